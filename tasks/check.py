"""Check: find problems before a long stage starts, so that a mistake costs seconds."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.benchmarks import Benchmark
from quantize_gemma.tasks.models.calibration import check_size, parse_source
from quantize_gemma.tasks.models.checkpoint import (
    check_weights,
    local_checkpoint,
    quantizable_modules,
    read_headers,
    read_model_config,
    source_files,
    weight_files,
)
from quantize_gemma.tasks.models.config import ModelConfig, TextConfig
from quantize_gemma.tasks.models.device_report import read_device_report
from quantize_gemma.tasks.models.float32 import fast_products
from quantize_gemma.tasks.models.recipe import (
    ANSWER_BATCH,
    CHUNK_ELEMENTS,
    HELD_OUT,
    LOGITS,
    MEASUREMENTS,
    STEP_POSITIONS,
    STEP_SEQUENCES,
    Recipe,
    load_recipe,
    match_rules,
)
from quantize_gemma.tasks.runtime import machine, pruning, store, store_layout
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.stage import SECONDS_ALLOWED

# The output of each stage, in multiples of the base weights in bfloat16: the weights themselves, the untied head, one
# byte per weight, half a byte per weight in the program. Large models need less, because the embedding is a smaller
# part of them.
# 4B: (8.6, 1.3, 5.4, 3.2) / 8.6; 270M: (0.54, 0.34, 0.44, 0.39) / 0.54.
OUTPUT_FACTORS = {"download": 1.0, "untie": 0.65, "quantize": 0.82, "export": 0.73}
OUTPUT_FACTORS_OF_LARGE_MODELS = {"download": 1.0, "untie": 0.16, "quantize": 0.65, "export": 0.39}
LARGE_BYTES = 5_000_000_000
# The stages that write a lot.
WRITING_STAGES = (*OUTPUT_FACTORS, "distill")
WRITING_STAGES_OF_DIAGNOSIS = ("download", "untie", "quantize")
# An upper estimate of a run's peak memory, which is that of evaluating a quantized checkpoint on ChartQA: a multiple of
# the base weights in bfloat16, and the memory of Python and the libraries. With gemma-3-4b's shape, the estimate is
# 18.2 GB, and 15.5 GB was measured.
MEMORY_FACTOR = 2.0
MEMORY_OF_LIBRARIES = 1_000_000_000
# The additional output of a calibrated recipe: the quantized decoder blocks, one byte per weight. And that of
# distillation: another checkpoint, two copies of its training state while one replaces the other, and the base model's
# hidden states.
CALIBRATION_FACTOR = 0.53
DISTILLATION_FACTOR = 1.9
# A model's width, as a multiple of the square root of its bytes: 0.023 (27b) to 0.028 (4b).
WIDTH_FACTOR = 0.028
# The share of a matrix product's speed that calibration reaches overall, and the memory of the libraries and kernels,
# measured on gemma-3-270m and on a block of gemma-3-4b's shape.
SHARE_OF_SPEED = 0.6
MEMORY_OF_CALIBRATION = 1_750_000_000
# The memory bandwidth of a processor in bytes per second, and the number of intermediate values while some of the
# calibration tokens run through a block.
BYTES_PER_SECOND = 2e10
BLOCK_ELEMENTS = 8 * CHUNK_ELEMENTS
# Float32 operations per second of an NVIDIA H200 in a distillation, and the launch overhead of a step.
GPU_OPERATIONS_PER_SECOND = 2e13
GPU_SECONDS_PER_STEP = 0.5
# Enough for the smoke tests' prompts and a few generated tokens; an image's tokens are added.
SHORTEST_SEQ_LEN = 64
SECONDS_TO_CONNECT = 10.0

logger = logging.getLogger(__name__)


def check_run(
    model: str,
    recipe: str,
    max_seq_len: int,
    device: str,
    cluster: str | None,
    custom_kv_cache: bool = True,
    workers: int = 1,
    calibration: str | None = None,
    device_report: str | None = None,
    bidirectional_images: bool = True,
    diagnosis: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Return the plan of a run: {"recipe", "model", "device", "memory_bytes_needed", "disk_bytes_needed"}.

    For a model on the Hub, only the name is checked, and the last two are missing. A diagnosis neither distills nor
    exports.

    Raises:
        UserError: The run cannot succeed.
    """
    parsed_recipe = load_recipe(recipe)
    check_calibration(parsed_recipe, calibration)
    if device_report is not None:
        read_device_report(Path(device_report))
    _check_store(store.home())
    if cluster is None:
        _check_device(device)
    else:
        _check_cluster(cluster)
    plan: dict[str, Any] = {"recipe": parsed_recipe.name, "model": model, "device": resolve_device(device)}
    path = local_checkpoint(model, revision)
    if path is not None:
        source_files(path)
        weight_bytes = sum(file.stat().st_size for file in weight_files(path))
        stages = WRITING_STAGES_OF_DIAGNOSIS if diagnosis else WRITING_STAGES
        plan["disk_bytes_needed"] = disk_needed(weight_bytes, stages, parsed_recipe)
        # Check memory first: a user can free disk space, but cannot add memory.
        local_workers = workers if cluster is None else 1
        plan["memory_bytes_needed"] = check_checkpoint(
            path, parsed_recipe, max_seq_len, custom_kv_cache, local_workers, bidirectional_images
        )
        # The files must be hashed to know whether the store already has them.
        if not may_be_stored(weight_bytes):
            check_disk(weight_bytes, stages, recipe=parsed_recipe)
    return plan


def check_calibration(recipe: Recipe, text: str | None) -> None:
    """Raise UserError unless a calibrated recipe has a calibration text or dataset, and any other recipe has none.

    A text file that does not exist or is too large is an error, too.
    """
    if recipe.calibration is not None and text is None:
        raise UserError(
            f"the recipe {recipe.name} needs calibration data: set --calibration to a text file or a Hub dataset"
        )
    if recipe.calibration is None and text is not None:
        raise UserError(f"the recipe {recipe.name} needs no calibration: leave out --calibration")
    source = parse_source(text) if text is not None else None
    if source is not None and not source.on_hub:
        path = Path(source.name)
        if not path.is_file():
            raise UserError(
                f"there is no calibration text at {text}: use the path of a text file, or ORG/NAME of a dataset on the "
                "Hub"
            )
        check_size(path.stat().st_size)


def plan_calibration(text: TextConfig, recipe: Recipe) -> dict[str, int]:
    """Estimate the time and memory of calibration and distillation on this machine, and the time on a GPU.

    Returns:
        "calibration_seconds" and "calibration_memory_bytes" if the recipe is calibrated; "distillation_seconds",
        "distillation_memory_bytes", and "distillation_seconds_on_gpu" if it is distilled.

    Raises:
        UserError: The machine does not have enough memory for distillation.
    """
    if recipe.calibration is None:
        return {}
    speed = measure_speed()
    seconds, memory = estimate_calibration(text, recipe, speed)
    plan = {"calibration_seconds": round(seconds), "calibration_memory_bytes": memory}
    if recipe.distillation is not None:
        operations, memory = estimate_distillation(text, recipe)
        gpu_seconds = operations / GPU_OPERATIONS_PER_SECOND + recipe.distillation.steps * GPU_SECONDS_PER_STEP
        if memory > machine.total_memory():
            raise UserError(
                f"distilling this model takes about {memory / 1e9:,.1f} GB of memory, but this machine has "
                f"{machine.total_memory() / 1e9:,.1f} GB: use a larger machine, or a recipe without distillation"
            )
        plan["distillation_seconds"] = round(operations / (speed * SHARE_OF_SPEED))
        plan |= {"distillation_memory_bytes": memory, "distillation_seconds_on_gpu": round(gpu_seconds)}
    return plan


def warn_about_time(costs: Mapping[str, int]) -> str | None:
    """Return a warning if one of the stages in the output of plan_calibration() takes longer than a stage may."""
    for step in ("calibration", "distillation"):
        seconds = costs.get(f"{step}_seconds", 0)
        if seconds > SECONDS_ALLOWED:
            return (
                f"{step} takes about {seconds / 3600:.0f} hours on this machine's CPU, but a stage is stopped after "
                f"{SECONDS_ALLOWED / 3600:.0f} hours: start the run again to continue it"
            )
    return None


def estimate_calibration(text: TextConfig, recipe: Recipe, operations_per_second: float) -> tuple[float, int]:
    """Estimate the seconds that a decoder's calibration takes, and its peak memory in bytes.

    Args:
        text: The decoder's shape.
        recipe: A recipe with a calibration.
        operations_per_second: The speed of this machine in a float32 matrix product; see measure_speed().
    """
    settings = recipe.calibration
    assert settings is not None, f"{recipe.name} has no calibration"
    hidden, mlp = text.hidden_size, text.intermediate_size
    queries, keys = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    tokens = (settings.sequences + settings.answers) * settings.length
    weights = hidden * (2 * queries + 2 * keys + 3 * mlp)
    inputs = (hidden, queries, hidden, mlp)
    # Both models run forward, one of them with gate_proj and up_proj twice. Each input is multiplied with itself (only
    # on and above the diagonal) and with the other model's input.
    forward = tokens * (4 * weights + 4 * hidden * mlp + 8 * settings.length * queries)
    moments = tokens * sum(int(3.2 * columns**2) for columns in inputs)
    # GPTQ, compensation, and measuring the error each multiply every matrix with a Hessian.
    rounding = 9 * hidden * (hidden * (queries + 2 * keys + 2 * mlp) + queries**2 + mlp**2)
    has_head = any(rule.match == "lm_head" and rule.algorithm == "gptq" for rule in recipe.rules)
    head = text.vocab_size * hidden * (9 * hidden) * has_head
    operations = text.num_hidden_layers * (forward + moments + rounding) + head
    seconds = operations / (operations_per_second * SHARE_OF_SPEED)
    # Generating a token for a batch of answers reads all weights, which are in bfloat16.
    steps = math.ceil(settings.answers * settings.length / ANSWER_BATCH)
    model_bytes = 2 * (text.num_hidden_layers * weights + text.vocab_size * hidden)
    seconds += steps * model_bytes / BYTES_PER_SECOND
    # Two matrices of the largest Hessian's size or, earlier, the embeddings of both models' tokens; intermediate
    # values; a block's weights in bfloat16, and quantized at one byte each.
    floats = max(2 * max(inputs) ** 2 + hidden * mlp, 3 * tokens * hidden) + BLOCK_ELEMENTS
    return seconds, int(MEMORY_OF_CALIBRATION + 4 * floats + 3.1 * weights)


def estimate_distillation(text: TextConfig, recipe: Recipe) -> tuple[int, int]:
    """Estimate the operations of a decoder's distillation in matrix products, and its peak memory in bytes.

    Args:
        text: The decoder's shape.
        recipe: A recipe with a distillation.
    """
    settings, calibration = recipe.distillation, recipe.calibration
    assert settings is not None, f"{recipe.name} has no distillation"
    assert calibration is not None, f"{recipe.name} has no calibration"
    hidden, head = text.hidden_size, text.vocab_size * text.hidden_size
    queries, keys = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    weights = text.num_hidden_layers * hidden * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    sequences, length = settings.sequences + calibration.answers, calibration.length
    # A step runs each block forward twice, and backward to its inputs and to its weights; it runs the head once, and
    # the base model's head. The held-out sequences only run forward, and so do all sequences in the base model.
    step = STEP_SEQUENCES * (8 * length * weights + 8 * STEP_POSITIONS * head)
    held_out = (MEASUREMENTS + 1) * (sequences // HELD_OUT) * (2 * length * weights + 4 * STEP_POSITIONS * head)
    operations = settings.steps * step + held_out + 2 * sequences * length * weights
    # The integers; for each scale, in float32: the scale, the trained parameter, its best value, its gradient, and two
    # moments; the base model's hidden states and its bfloat16 head; both models' logits and the loss's intermediates.
    memory = weights + 3 * head + (weights + head) // 32 * 24
    # The inputs of all blocks, and the activations that one block saves for its backward pass.
    activations = STEP_SEQUENCES * length * ((text.num_hidden_layers + 12) * hidden + 6 * text.intermediate_size)
    memory += 4 * (sequences * length * hidden + 6 * LOGITS * text.vocab_size + activations + BLOCK_ELEMENTS)
    return operations, MEMORY_OF_LIBRARIES + memory


def measure_speed() -> float:
    """Return the speed of a float32 matrix product on this machine, in operations per second."""
    import torch

    matrix = torch.ones(2048, 2048)
    with fast_products():
        matrix @ matrix
        start = time.monotonic()
        matrix @ matrix
        return 2 * 2048**3 / (time.monotonic() - start)


def resolve_device(device: str) -> str:
    """Return the device of the evaluation: "auto" is this machine's GPU if it has one, else its CPU.

    Call it before keys are computed, so that CPU and GPU results never share a key.
    """
    if device != "auto":
        return device
    # Importing torch takes longer than all other checks.
    if not machine.has_cuda_driver():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def mask_bytes(config: ModelConfig, max_seq_len: int, bidirectional_images: bool) -> int:
    """Estimate the bytes of a program's attention masks, which are planned for a prompt as long as the sequence.

    Where they are large, they are most of what depends on the length: key-value caches take up to 15% as much.
    """
    window = config.text.sliding_window
    # All layers of a kind share their masks: one in float32 and one of booleans, and two in float32 for images.
    sliding = 5 * max_seq_len * (max_seq_len + window) if max_seq_len > window else 0
    images = 8 * max_seq_len**2 if config.multimodal and bidirectional_images else 0
    return sliding + images


def check_memory(weights: int, workers: int = 1, masks: int = 0) -> int:
    """Estimate the memory that the workers' models take, in bytes.

    Args:
        weights: The number of weights of a model.
        workers: The number of workers.
        masks: The bytes of the program's masks; see mask_bytes().

    Raises:
        UserError: The machine does not have enough memory.
    """
    model, program = MEMORY_FACTOR * 2 * weights, OUTPUT_FACTORS["export"] * 2 * weights + masks
    per_worker = int(MEMORY_OF_LIBRARIES + max(model, program))
    total = machine.total_memory()
    if total < per_worker:
        raise UserError(
            f"running this model takes about {per_worker / 1e9:,.1f} GB of memory, but this machine has "
            f"{total / 1e9:,.1f} GB: use a larger machine, or a smaller "
            + ("model" if model > program else "--max-seq-len (a program's memory grows with its square)")
        )
    if total < per_worker * workers:
        raise UserError(
            f"{workers} workers take about {per_worker * workers / 1e9:,.1f} GB of memory, as each loads its own copy "
            f"of the model, but this machine has {total / 1e9:,.1f} GB: use at most --workers {total // per_worker}"
        )
    return per_worker * workers


def disk_needed(weight_bytes: int, stages: Collection[str] = WRITING_STAGES, recipe: Recipe | None = None) -> int:
    """Estimate the bytes that these stages write, for base weights of this size and a recipe."""
    factors = OUTPUT_FACTORS_OF_LARGE_MODELS if weight_bytes > LARGE_BYTES else OUTPUT_FACTORS
    parts = [factors[stage] for stage in stages if stage in factors]
    temporary = 0.0
    if recipe is not None and recipe.calibration is not None and "quantize" in stages:
        parts.append(CALIBRATION_FACTOR)
        # The hidden states of two models, float32.
        settings = recipe.calibration
        tokens = (settings.sequences + settings.answers) * settings.length
        temporary = 2 * 4 * tokens * WIDTH_FACTOR * math.sqrt(weight_bytes)
    if recipe is not None and recipe.distillation is not None and "distill" in stages:
        parts.append(DISTILLATION_FACTOR)
    return int(weight_bytes * sum(parts) + temporary)


def check_disk(
    weight_bytes: int,
    stages: Collection[str] = WRITING_STAGES,
    revision: str | None = None,
    recipe: Recipe | None = None,
    reference_bytes: int = 0,
) -> None:
    """Raise UserError if the store's disk does not have enough space for the output of these stages.

    Bytes that an interrupted download of this revision left in the store are not counted again. `reference_bytes` are
    those that are still to be downloaded of a reference model.
    """
    bytes_needed = disk_needed(weight_bytes, stages, recipe) + reference_bytes
    if revision is not None and "download" in stages:
        bytes_needed += bytes_to_download(weight_bytes, revision) - weight_bytes
    free = shutil.disk_usage(_nearest_existing(store.home())).free
    if free < bytes_needed:
        raise UserError(
            f"the run needs about {bytes_needed / 1e9:,.1f} GB in {store.home()}, but only {free / 1e9:,.1f} GB is "
            "free: free some space, or set QUANTIZE_GEMMA_HOME to a directory on a larger disk"
        )


def bytes_to_download(weight_bytes: int, revision: str) -> int:
    """Return the bytes of a download without those that an interrupted one of this revision left in the store."""
    return weight_bytes - min(weight_bytes, pruning.incoming_size("download", revision))


def may_be_stored(weight_bytes: int) -> bool:
    """Tell whether the store has a checkpoint of this size.

    It may be this model; only a digest would show whether it is.
    """
    for manifest in store.home().glob(f"download/*/{store_layout.MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(manifest.read_text(encoding="utf-8"))["metadata"]["weight_bytes"] == weight_bytes:
                return True
    return False


def check_checkpoint(
    path: Path,
    recipe: Recipe,
    max_seq_len: int,
    custom_kv_cache: bool = True,
    workers: int = 1,
    bidirectional_images: bool = True,
) -> int:
    """Check a checkpoint, and estimate the memory in bytes that the run takes.

    Raises:
        UserError: The checkpoint is not a Gemma 3 model, is damaged, or does not fit the recipe, the options, or this
            machine.
    """
    config = read_model_config(path)
    check_config(config, max_seq_len, custom_kv_cache, bidirectional_images)
    tensors = read_headers(path)
    check_weights(tensors, path)
    match_rules(recipe, quantizable_modules(tensors))
    weights = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return check_memory(weights, workers, mask_bytes(config, max_seq_len, bidirectional_images))


def check_config(config: ModelConfig, max_seq_len: int, custom_kv_cache: bool, bidirectional_images: bool) -> None:
    """Raise UserError if a model with this configuration cannot be exported with these options."""
    longest = config.text.max_position_embeddings
    shortest = SHORTEST_SEQ_LEN + (config.mm_tokens_per_image if config.multimodal else 0)
    if max_seq_len > longest:
        raise UserError(
            f"--max-seq-len is {max_seq_len:,}, but the model supports {longest:,} tokens: use at most that"
        )
    if max_seq_len < shortest:
        raise UserError(
            f"--max-seq-len is {max_seq_len:,}, but this model's smoke tests need {shortest:,} tokens: use at least "
            "that"
        )
    window = config.text.sliding_window
    if not custom_kv_cache and not config.multimodal:
        raise UserError("a text-only program cannot prefill without custom_kv_cache: turn on --custom-kv-cache")
    if not custom_kv_cache and bidirectional_images:
        raise UserError("bidirectional_images requires custom_kv_cache: pass --no-bidirectional-images, too")
    if not custom_kv_cache and max_seq_len > window:
        raise UserError(
            f"without custom_kv_cache, --max-seq-len can be at most the sliding window, {window:,} tokens: "
            "lower --max-seq-len, or turn on --custom-kv-cache"
        )


def supported_benchmarks(rows: list[Benchmark], multimodal: bool, system_message: bool = True) -> list[Benchmark]:
    """Return the benchmarks on which a model can be evaluated: those without images if it is text-only.

    Args:
        rows: The benchmarks.
        multimodal: Whether the model reads images.
        system_message: Whether its chat template accepts a system message.

    Raises:
        UserError: There are none, or ChartQA's prompts have a system message, which the chat template does not accept.
    """
    supported = [row for row in rows if multimodal or not row.needs_images]
    if rows and not supported:
        raise UserError(f"the model is text-only, but {rows[0].title} has images: choose other --tasks")
    for row in rows:
        if row not in supported:
            logger.info("%s is skipped: the model is text-only", row.title)
        elif row.needs_images and not system_message:
            raise UserError(
                f"the model's chat template does not accept the system message of {row.title}'s prompts: leave "
                f"{row.name} out of --tasks"
            )
    return supported


def _check_store(home: Path) -> None:
    folder = _nearest_existing(home)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the store {home} is not writable ({error.strerror}): set QUANTIZE_GEMMA_HOME to a directory that is"
        ) from None


def _check_device(device: str) -> None:
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device on this machine: pass --device auto or --device cpu")


def _check_cluster(address: str) -> None:
    parts = re.fullmatch(r"(tcp|ray)://(.+):(\d+)", address)
    if parts is None:
        raise UserError(
            f"--cluster {address!r} is not a cluster address: use tcp://host:8786 (Dask) or ray://host:10001 (Ray)"
        )
    extra = {"tcp": "dask", "ray": "ray"}[parts[1]]
    if importlib.util.find_spec(f"prefect_{extra}") is None:
        raise UserError(f"--cluster {address!r} needs the package prefect-{extra}: install it, here and on the cluster")
    try:
        socket.create_connection((parts[2].strip("[]"), int(parts[3])), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"nothing answers at {address} ({error}): start the cluster, or fix the address") from None


def _nearest_existing(path: Path) -> Path:
    while not os.path.lexists(path):
        path = path.parent
    return path

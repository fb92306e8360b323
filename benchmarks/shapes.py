"""Checkpoints with random weights in the exact shapes of Gemma 3, written to disk tensor by tensor."""

import json
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.checkpoint import is_multimodal, write_header
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.runtime.store import copy
from quantize_gemma.tasks.untie import untie

Tokens = npt.NDArray[np.bool_]

TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 262_144,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000,
    "rope_local_base_freq": 10_000,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
ALONE = {"architectures": ["Gemma3ForCausalLM"], "dtype": "bfloat16"}
# The configurations of google/gemma-3-270m, gemma-3-1b-pt, gemma-3-4b-it and gemma-3-27b-it.
SHAPES: dict[str, dict[str, Any]] = {
    "270m": {
        **TEXT,
        **ALONE,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "1b": {
        **TEXT,
        **ALONE,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "4b": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "boi_token_index": 255_999,
        "eoi_token_index": 256_000,
        "image_token_index": 262_144,
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
        "text_config": {
            **TEXT,
            "vocab_size": 262_208,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": 1024,
            "max_position_embeddings": 131_072,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "27b": {
        "model_type": "gemma3",
        "text_config": {
            **TEXT,
            "vocab_size": 262_208,
            "hidden_size": 5376,
            "intermediate_size": 21_504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "sliding_window": 1024,
            "max_position_embeddings": 131_072,
        },
    },
}
# The factor of the embeddings of the tokens that the tokenizer decodes to visible text.
VISIBLE_FACTOR = np.float32(4)


def make_checkpoint(shape: str, folder: Path) -> Path:
    """Return the directory of a bfloat16 checkpoint of this shape, created if needed; `tiny` is the built-in model."""
    if shape == "tiny":
        return BUILTIN["tiny-gemma3"]
    target = folder / shape
    if not (target / "model.safetensors").exists():
        write_checkpoint(target, SHAPES[shape])
    return target


def write_checkpoint(target: Path, config: dict[str, Any]) -> None:
    """Write a bfloat16 checkpoint with this configuration, and the tiny model's tokenizer and special tokens."""
    target.mkdir(parents=True, exist_ok=True)
    tiny = BUILTIN["tiny-gemma3"]
    for path in tiny.iterdir():
        if path.name not in ("config.json", "README.md") and path.suffix != ".safetensors":
            copy(path, target / path.name)
    if is_multimodal(config):
        tokens = {name: value for name, value in _read(tiny / "config.json").items() if "token_i" in name}
        config = {**config, **tokens}
        size, length = config["vision_config"]["image_size"], config["mm_tokens_per_image"]
        images = {"size": {"height": size, "width": size}, "image_seq_length": length}
        processor = _read(tiny / "processor_config.json")
        _write(target / "preprocessor_config.json", {**_read(tiny / "preprocessor_config.json"), **images})
        inner = {**processor["image_processor"], **images}
        _write(target / "processor_config.json", {**processor, "image_processor": inner, "image_seq_length": length})
    _write(target / "config.json", config)
    partial = target / "model.partial"
    write_random_weights(partial, weight_shapes(target), visible_tokens(target / "tokenizer.json"))
    partial.rename(target / "model.safetensors")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    # Do not write through a link to the built-in model's file.
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_quantized_checkpoint(shape: str, folder: Path) -> Path:
    """Return the directory of this shape's checkpoint as the pipeline quantizes it, made if it is not there."""
    target = folder / f"quantized-{shape}"
    if not (target / "config.json").exists():
        target.mkdir(parents=True)
        quantize_checkpoint(make_checkpoint(shape, folder), target)
    return target


def quantize_checkpoint(checkpoint: Path, target: Path) -> None:
    """Fill `target` with the checkpoint as the pipeline quantizes it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as untied:
        untie(Path(untied), checkpoint)
        quantize(target, Path(untied), load_recipe("HQQ-INT8-INT4").to_json(), "cpu")


def weight_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Return {tensor: shape} of the checkpoint that config.json describes, by its names on the Hub."""
    import torch
    from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    config = AutoConfig.from_pretrained(checkpoint)
    multimodal = is_multimodal(config.to_dict())
    with torch.device("meta"):
        model = (Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM)(config)
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        shapes[GEMMA3.hub_name(name) if multimodal else name] = list(tensor.shape)
    return shapes


def visible_tokens(tokenizer: Path) -> Tokens:
    """Return for each token id of a tokenizer.json whether it decodes to something other than whitespace, [ids]."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    return np.array([bool(loaded.decode([token]).strip()) for token in range(loaded.get_vocab_size())])


def write_random_weights(path: Path, shapes: dict[str, list[int]], visible: Tokens) -> None:
    """Write a safetensors file of normally distributed bfloat16 numbers (standard deviation 0.02, fixed seed).

    The rows of the visible tokens in the tied embedding are VISIBLE_FACTOR times as large, so that the model generates
    these tokens: the tokenizer has no others, and a model that generates only whitespace fails the smoke test.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    offsets = write_header(file, {name: ("BF16", shape) for name, shape in shapes.items()}, {"format": "pt"})
    step = 2**22

    factors = np.where(visible, VISIBLE_FACTOR, np.float32(1))

    def write(seed: int, offset: int, count: int, factors: npt.NDArray[np.float32]) -> None:
        values = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(0.02)
        values[: len(factors)] *= factors
        os.pwrite(file, (values.view(np.uint32) >> 16).astype(np.uint16), offset)

    with ThreadPoolExecutor() as pool:
        jobs: list[Future[None]] = []
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            scaled = np.repeat(factors if name.endswith("embed_tokens.weight") else factors[:0], shape[-1])
            for first in range(0, size, step):
                count = min(step, size - first)
                chunk = scaled[first : first + count]
                jobs.append(pool.submit(write, len(jobs), offsets[name] + 2 * first, count, chunk))
        for job in jobs:
            job.result()
    os.close(file)

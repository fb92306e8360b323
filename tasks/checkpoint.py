"""Reading checkpoints: what can be known from their files alone, and loading their model."""

import json
import os
import struct
from pathlib import Path
from typing import Any

from tasks.builtin import BUILTIN
from tasks.lean import lean_loading
from tasks.store import StageFailed, UserError

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# What is looked at at once, of a multiple of every type's size.
CHUNK_BYTES = 2**25
# safetensors puts what needs the widest alignment first.
DTYPE_ORDER = ("BOOL", "U8", "I8", "F16", "BF16", "I32", "F32", "F64", "I64")
# Prefix in the Hub's files -> prefix in the pinned transformers.
RUNTIME_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
ARCHITECTURES = {
    "Gemma3ForConditionalGeneration": "multimodal-text-to-text",
    "Gemma3ForCausalLM": "text-generation",
}


def local_checkpoint(model: str) -> Path | None:
    """Returns the directory of a built-in or a local model, None for the name of a Hub repository.

    Raises UserError if it is none of them.
    """
    path = BUILTIN.get(model) or Path(model).expanduser()
    if path.is_dir():
        return path
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return None
    raise UserError(
        f"there is no model at {model!r}: give a directory, a Hub repository such as google/gemma-3-4b-it, "
        f"or a built-in model ({', '.join(BUILTIN)})"
    )


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Returns config.json. Raises UserError if it is missing, unreadable or not that of a plain Gemma 3."""
    path = checkpoint / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{checkpoint} has no config.json: it is not a checkpoint of transformers") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{checkpoint} is a {architecture} model, not Gemma 3: give one whose architecture is "
            + " or ".join(ARCHITECTURES)
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{checkpoint} is quantized already ({method}): give the unquantized checkpoint")
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the language model's part of a configuration."""
    return config.get("text_config", config)


def task_of(config: dict[str, Any]) -> str:
    """Returns the export task: multimodal-text-to-text or text-generation."""
    return ARCHITECTURES[config["architectures"][0]]


def weight_files(checkpoint: Path) -> list[Path]:
    """Returns the safetensors files. Raises UserError if there are none or the index names one that is missing."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} cannot be read ({error}): download it again") from None
    else:
        names = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    if not names:
        raise UserError(f"{checkpoint} has no .safetensors file: convert the checkpoint to safetensors first")
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint / name} is missing, though the index names it: download it again")
    return [checkpoint / name for name in names]


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Returns {tensor: {"dtype", "shape", "data_offsets"}} of one safetensors file, "data_offsets" from its start.

    Raises UserError that names the file if header or length are wrong.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if start + end != size:
            raise ValueError(f"it has {size:,} bytes, but its header describes {start + end:,}")
        for name, tensor in header.items():
            count = DTYPE_BYTES[tensor["dtype"]]
            for extent in tensor["shape"]:
                count *= extent
            begin, finish = tensor["data_offsets"]
            if finish - begin != count:
                raise ValueError(f"the extent of {name} does not fit its shape")
            tensor["data_offsets"] = [start + begin, start + finish]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}): download it again") from None
    return header


def write_header(file: int, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> dict[str, int]:
    """Writes the header of a safetensors file, as safetensors' own `save_file` does, and gives the file its size.

    `tensors` is {name: (dtype, shape)}. Returns where each tensor's bytes go, from the file's start. The metadata are
    sorted, which safetensors leaves to chance.
    """
    order = sorted(tensors, key=lambda name: (-DTYPE_ORDER.index(tensors[name][0]), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + DTYPE_BYTES[dtype] * _count(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-len(text) % 8 + len(text))
    os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
    first = 8 + len(text)
    os.ftruncate(file, first + end)
    return {name: first + header[name]["data_offsets"][0] for name in order}


def read_headers(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Returns {tensor: {"dtype", "shape", "file"}} of all safetensors files."""
    return {
        name: {"dtype": tensor["dtype"], "shape": tensor["shape"], "file": path.name}
        for path in weight_files(checkpoint)
        for name, tensor in read_header(path).items()
    }


def quantizable_modules(headers: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Returns {module name: weight shape} of every linear and embedding, lm_head included.

    Names are those of the loaded model's modules, which recipes match.
    """
    modules = {
        runtime_name(name).removesuffix(".weight"): tensor["shape"]
        for name, tensor in headers.items()
        if name.endswith(".weight") and len(tensor["shape"]) == 2
    }
    embeddings = [name for name in modules if name.endswith("embed_tokens")]
    if not embeddings:
        raise UserError("the checkpoint has no embed_tokens.weight: it cannot be untied or quantized")
    if not any(name.endswith("lm_head") for name in modules):
        modules["lm_head"] = modules[embeddings[0]]
    return modules


def runtime_name(name: str) -> str:
    """Returns what a tensor of the Hub's files is called in the loaded model."""
    for hub, runtime in RUNTIME_PREFIXES.items():
        if name.startswith(hub):
            return runtime + name.removeprefix(hub)
    return name


def check_finite(path: Path) -> None:
    """Raises UserError that names the first tensor of the file that holds a NaN or an infinity.

    Read, not mapped: the pages of a mapped file count as the process's memory.
    """
    import torch

    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with path.open("rb") as stream:
        for name, tensor in read_header(path).items():
            if tensor["dtype"] not in types:
                continue
            begin, end = tensor["data_offsets"]
            stream.seek(begin)
            for start in range(begin, end, CHUNK_BYTES):
                part = bytearray(stream.read(min(CHUNK_BYTES, end - start)))
                if not bool(torch.frombuffer(part, dtype=types[tensor["dtype"]]).isfinite().all()):
                    raise UserError(
                        f"the weight {name} in {path} holds a NaN or an infinity: "
                        "the checkpoint is damaged, download it again"
                    )


def load_model(checkpoint: Path, dtype: Any) -> Any:
    """Returns the model of an untied or quantized checkpoint, in eval mode, its weights bfloat16 or float32.

    Raises StageFailed if a weight was missing or left over, which transformers would initialize at random, and if
    lm_head and the embedding share their storage, which quantizing either would break.
    """
    import torch
    from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    config = AutoConfig.from_pretrained(checkpoint)
    multimodal = task_of(config.to_dict()) == "multimodal-text-to-text"
    with lean_loading():
        model, info = (Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM).from_pretrained(
            checkpoint, dtype=dtype, output_loading_info=True
        )
    wrong = {name: sorted(keys)[:3] for name, keys in info.items() if keys and name.endswith("_keys")}
    if wrong:
        raise StageFailed(f"the weights of {checkpoint} do not fit its model: {wrong}")
    model.eval()
    if dtype == torch.float32:
        # transformers loads a quantized checkpoint as it was saved. Upwards only: some buffers are float32 in any case.
        model.to(dtype)
    if not config.get_text_config().tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight:
        raise StageFailed("lm_head and the embedding are still tied after loading")
    return model


def keep_activations(model: Any) -> None:
    """Takes the quantization of activations out of every linear of a loaded model; weights stay as they are."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "activation_quantization"):
            module.weight.activation_quantization = None


def _count(shape: list[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count

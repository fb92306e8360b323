"""Reading checkpoints: what can be known from their files alone, and loading their model."""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.config import ARCHITECTURES, ModelConfig, parse_config
from quantize_gemma.tasks.models.source_files import INDEX, SINGLE, open_source, release_files
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.patches import patched_loading
from quantize_gemma.tasks.runtime.strict_json import MAX_BYTES, parse_object, read_object

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
# What a base checkpoint's weights may be.
FLOATS = ("BF16", "F16", "F32", "F64")
SHARD_NAME = re.compile(r"[\w][\w.+ -]*\.safetensors", re.ASCII)
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


def local_checkpoint(model: str) -> Path | None:
    """Returns the directory of a built-in or a local model, None for the name of a Hub repository.

    Raises UserError if it is none of them.
    """
    try:
        path = BUILTIN.get(model) or Path(model).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the model {model!r} cannot be read ({error}): check its path") from None
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return None
    raise UserError(
        f"there is no model at {model!r}: give a directory, a Hub repository such as google/gemma-3-4b-it, "
        f"or a built-in model ({', '.join(BUILTIN)})"
    )


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Returns config.json. Raises UserError if it is missing, unreadable or not that of a plain Gemma 3."""
    path = checkpoint / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint} has no config.json: it is not a checkpoint of transformers")
    config = read_object(path, "download it again")
    parse_config(config, path)
    return config


def read_model_config(checkpoint: Path) -> ModelConfig:
    """Returns what config.json says, checked. Raises UserError as read_config does."""
    return parse_config(read_config(checkpoint), checkpoint / "config.json")


def task_of(config: dict[str, Any]) -> str:
    """Returns the export task: multimodal-text-to-text or text-generation."""
    return ARCHITECTURES[config["architectures"][0]]


def source_files(checkpoint: Path) -> list[str]:
    """Returns the names of all files of a model directory that go into a release.

    Raises UserError if one of them is not a file of this directory, and as weight_files() does.
    """
    names = release_files(checkpoint)
    for name in (SINGLE, INDEX):
        if os.path.lexists(checkpoint / name):
            open_source(checkpoint, name).close()
    weights = [path.name for path in weight_files(checkpoint)]
    for name in weights:
        open_source(checkpoint, name).close()
    return sorted([*names, *weights, *([] if weights == [SINGLE] else [INDEX])])


def weight_files(checkpoint: Path) -> list[Path]:
    """Returns the safetensors files that transformers would read: model.safetensors, else those that the index names.

    Raises UserError if there are none or the index names one that is missing.
    """
    if (checkpoint / SINGLE).is_file():
        return [checkpoint / SINGLE]
    if not (checkpoint / INDEX).is_file():
        others = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        if others:
            raise UserError(
                f"{checkpoint} has {others[0]!r}, but neither {SINGLE} nor {INDEX}, without which transformers "
                "loads nothing: save the checkpoint again with save_pretrained"
            )
        raise UserError(f"{checkpoint} has no .safetensors file: convert the checkpoint to safetensors first")
    names = sorted(set(read_index(checkpoint / INDEX).values()))
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint / name} is missing, though the index names it: download it again")
    return [checkpoint / name for name in names]


def read_index(path: Path) -> dict[str, str]:
    """Returns the index's {tensor: file}. Raises UserError if a file's name is not that of one beside the index."""
    index = read_object(path, "download it again")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata"), dict):
        raise UserError(f"{path} needs the objects metadata and weight_map: download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise UserError(
                f"{path} says that the tensor {tensor!r} is in {name!r}, which does not name a .safetensors file "
                "beside it: download it again"
            )
    return weight_map


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Returns {tensor: {"dtype", "shape", "data_offsets"}} of one safetensors file, "data_offsets" from its start.

    Raises UserError that names the file if header or length are wrong, as safetensors itself would.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_BYTES):
                raise ValueError("its header is longer than the file, or than safetensors allows")
            header: dict[str, dict[str, Any]] = parse_object(stream.read(length))
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
        ):
            raise ValueError("its metadata are not texts")
        for name, tensor in header.items():
            _check_tensor(path, name, tensor)
        end = _check_extents(header)
        start = 8 + length
        if start + end != size:
            raise ValueError(f"it has {size:,} bytes, but its header describes {start + end:,}")
    except (struct.error, ValueError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}): download it again") from None
    for tensor in header.values():
        tensor["data_offsets"] = [start + offset for offset in tensor["data_offsets"]]
    return header


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    """Raises ValueError if the header's entry is malformed, and UserError if it is of a type that we do not read."""
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has control characters")
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} does not have exactly dtype, shape and data_offsets")
    for field in ("shape", "data_offsets"):
        numbers = tensor[field]
        # True is an int, too.
        if (
            not isinstance(numbers, list)
            or len(numbers) > 16
            or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        ):
            raise ValueError(f"the {field} of {name} are not whole numbers")
    dtype = tensor["dtype"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name} is not a text")
    if dtype not in DTYPE_BYTES:
        raise UserError(
            f"the weight {name} in {path} is {dtype[:20]!r}, a type that is not read here (FP8 and other quantized "
            "types are not): give the checkpoint in bfloat16, float16 or float32"
        )
    if len(tensor["data_offsets"]) != 2:
        raise ValueError(f"the data_offsets of {name} are not two")
    begin, end = tensor["data_offsets"]
    if end - begin != DTYPE_BYTES[dtype] * _count(tensor["shape"]):
        raise ValueError(f"the extent of {name} does not fit its shape")


def _check_extents(header: dict[str, dict[str, Any]]) -> int:
    """Returns where the last tensor ends. Raises ValueError if two overlap, or there is a gap between them."""
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if tensor["data_offsets"][0] != end:
            raise ValueError(f"the extent of {name} does not start where the one before it ends")
        end = tensor["data_offsets"][1]
    return end


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
    """Returns {tensor: {"dtype", "shape", "file"}} of all weight files.

    Raises UserError if two tensors have the same name, in the files or once they are loaded, or if the index differs
    from the files.
    """
    headers: dict[str, dict[str, Any]] = {}
    loaded: dict[str, str] = {}
    for path in weight_files(checkpoint):
        for name, tensor in read_header(path).items():
            other = loaded.setdefault(runtime_name(name), name)
            if name in headers or other != name:
                what = "stands twice" if name in headers else f"is the same weight as {other}"
                raise UserError(f"the weight {name} in {path} {what}: which one is right cannot be known")
            headers[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "file": path.name}
    if not (checkpoint / SINGLE).is_file():
        files = {name: tensor["file"] for name, tensor in headers.items()}
        differing = sorted(files.items() ^ read_index(checkpoint / INDEX).items())
        if differing:
            raise UserError(
                f"{checkpoint / INDEX} and the files do not agree on where {differing[0][0]} is: download both again"
            )
    return headers


def check_weights(headers: dict[str, dict[str, Any]], checkpoint: Path) -> None:
    """Raises UserError if a weight is not of a floating-point type, as in a checkpoint that is quantized already."""
    for name, tensor in headers.items():
        if tensor["dtype"] not in FLOATS:
            raise UserError(
                f"the weight {name} in {checkpoint / tensor['file']} is {tensor['dtype']}: "
                "give the unquantized checkpoint, in bfloat16, float16 or float32"
            )


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
    with patched_loading():
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


def disable_activation_quantization(model: Any) -> None:
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

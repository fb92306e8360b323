"""Read the files of checkpoints without loading weights, and load their models."""

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.config import ModelConfig, parse_config
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.source_files import INDEX, SINGLE, open_source, release_files
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.patches import patched_loading
from quantize_gemma.tasks.runtime.strict_json import MAX_BYTES, parse_object, read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

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
# The dtypes of a base checkpoint's weights.
FLOATS = ("BF16", "F16", "F32", "F64")
SHARD_NAME = re.compile(r"[\w][\w.+ -]*\.safetensors", re.ASCII)
# The number of bytes to read at a time, a multiple of every dtype's size.
CHUNK_BYTES = 2**25
# The order in which safetensors writes tensors, last to first: the dtype with the widest alignment comes first.
DTYPE_ORDER = ("BOOL", "U8", "I8", "F16", "BF16", "I32", "F32", "F64", "I64")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header of a safetensors file.

    Attributes:
        dtype: Its dtype, as safetensors names it.
        shape: Its shape.
        start: The offset of its first byte from the start of the file.
        end: The offset of the byte after its last one.
        file: The name of its file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: str


def local_checkpoint(model: str, revision: str | None = None) -> Path | None:
    """Return the directory of a built-in or a local model, or None for the name of a Hub repository.

    Raises:
        UserError: `model` is none of these, or it is a directory, but has a revision.
    """
    try:
        path = BUILTIN.get(model) or Path(model).expanduser()
        is_local = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the model {model!r} cannot be read ({error}): check its path") from None
    if is_local and revision is not None:
        raise UserError(
            f"the model {model!r} is the directory {path.resolve()}, which has no revisions: leave out --revision "
            f"{revision!r}, or rename the directory to use the Hub repository of that name"
        )
    if is_local:
        return path
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return None
    raise UserError(
        f"there is no model at {model!r}: use a directory, a Hub repository such as google/gemma-3-4b-it, "
        f"or a built-in model ({', '.join(BUILTIN)})"
    )


def read_config(checkpoint: Path) -> dict[str, object]:
    """Return the content of config.json.

    Raises:
        UserError: It is missing, cannot be read, or does not describe an unquantized Gemma 3.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint} has no config.json: it is not a transformers checkpoint")
    config = read_object(path, "download it again")
    parse_config(config, path)
    return config


def read_model_config(checkpoint: Path) -> ModelConfig:
    """Return the checked configuration of a checkpoint. Raises UserError as read_config does."""
    return parse_config(read_config(checkpoint), checkpoint / "config.json")


def task_of(config: Mapping[str, Any]) -> str:
    """Return the task for which a model is exported, from the content of config.json."""
    return GEMMA3.architectures[config["architectures"][0]].task


def is_multimodal(config: Mapping[str, object]) -> bool:
    """Tell whether a model reads images, from the content of config.json."""
    return task_of(config) == GEMMA3.multimodal.task


def end_token_ids(checkpoint: Path) -> list[int]:
    """Return the ids of the tokens that end a response: those of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = checkpoint / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for part in (content, content.get("text_config", {})):
            if (ids := part.get("eos_token_id")) is not None:
                return ids if isinstance(ids, list) else [ids]
    # Gemma 3's default, which a configuration may omit.
    return [1]


def source_files(checkpoint: Path) -> list[str]:
    """Return the names of all files of a model directory that go into a release.

    Raises:
        UserError: A file is not in this directory, or weight_files() raises it.
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
    """Return the safetensors files that transformers reads: model.safetensors, or else those in the index.

    Raises:
        UserError: There are none, or one in the index is missing.
    """
    if (checkpoint / SINGLE).is_file():
        return [checkpoint / SINGLE]
    if not (checkpoint / INDEX).is_file():
        unindexed_names = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        if unindexed_names:
            raise UserError(
                f"{checkpoint} has {unindexed_names[0]!r}, but neither {SINGLE} nor {INDEX}, without which "
                "transformers loads nothing: save the checkpoint again with save_pretrained"
            )
        raise UserError(f"{checkpoint} has no .safetensors file: convert the checkpoint to safetensors first")
    names = sorted(set(read_index(checkpoint / INDEX).values()))
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint / name} is missing, though the index names it: download it again")
    return [checkpoint / name for name in names]


def read_index(path: Path) -> dict[str, str]:
    """Return the index as {tensor: file}.

    Raises:
        UserError: The index is malformed, or names a file in another directory.
    """
    index = read_object(path, "download it again")
    weight_map: object = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata"), dict):
        raise UserError(f"{path} needs the objects metadata and weight_map: download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise UserError(
                f"{path} says that the tensor {tensor!r} is in {name!r}, which is not the name of a .safetensors file "
                "in the same directory: download it again"
            )
    return dict(weight_map)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file by name.

    Raises:
        UserError: Its header or its length is invalid (safetensors would reject it, too), or it has an unsupported
            dtype; the message names the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_BYTES):
                raise ValueError("its header is longer than the file, or than safetensors allows")
            header = parse_object(stream.read(length))
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
        ):
            raise ValueError("its metadata is not text")
        tensors = {name: _parse_tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        end = _check_extents(tensors, 8 + length)
        if end != size:
            raise ValueError(f"it has {size:,} bytes, but its header describes {end:,}")
    except (struct.error, ValueError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}): download it again") from None
    return tensors


def _parse_tensor(path: Path, name: str, tensor: object, first: int) -> TensorInfo:
    """Return one entry of the header; `first` is where the file's first tensor starts.

    Raises:
        ValueError: The entry is malformed.
        UserError: It has an unsupported dtype.
    """
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has control characters")
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} does not have exactly dtype, shape, and data_offsets")
    for field in ("shape", "data_offsets"):
        numbers = tensor[field]
        # isinstance() would accept True.
        if (
            not isinstance(numbers, list)
            or len(numbers) > 16
            or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        ):
            raise ValueError(f"the {field} of {name} is not a list of integers")
    dtype = tensor["dtype"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name} is not text")
    if dtype not in DTYPE_BYTES:
        raise UserError(
            f"the weight {name} in {path} has the unsupported dtype {dtype[:20]!r}: use an unquantized checkpoint, in "
            "bfloat16, float16, or float32"
        )
    if len(tensor["data_offsets"]) != 2:
        raise ValueError(f"the data_offsets of {name} are not two numbers")
    begin, end = tensor["data_offsets"]
    if end - begin != DTYPE_BYTES[dtype] * prod(tensor["shape"]):
        raise ValueError(f"the data_offsets of {name} do not match its shape")
    return TensorInfo(dtype, tuple(tensor["shape"]), first + begin, first + end, path.name)


def _check_extents(tensors: Mapping[str, TensorInfo], first: int) -> int:
    """Return where the last tensor ends. Raises ValueError if two overlap, or there is a gap between them."""
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise ValueError(f"the data of {name} does not start where that of the preceding tensor ends")
        end = tensor.end
    return end


def write_header(
    file: int, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> dict[str, int]:
    """Write the header of a safetensors file as safetensors' own `save_file` does, and set the file's size.

    Args:
        file: The descriptor of an empty file.
        tensors: {name: (dtype, shape)}.
        metadata: The file's metadata. It is written sorted; safetensors writes it in random order.

    Returns:
        Where each tensor's bytes start, from the start of the file.
    """
    order = sorted(tensors, key=lambda name: (-DTYPE_ORDER.index(tensors[name][0]), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        starts[name], end = end, end + DTYPE_BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-len(text) % 8 + len(text))
    os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
    first = 8 + len(text)
    os.ftruncate(file, first + end)
    return {name: first + start for name, start in starts.items()}


def read_headers(checkpoint: Path) -> dict[str, TensorInfo]:
    """Return the tensors of all weight files by name.

    Raises:
        UserError: Two tensors have the same name, in the files or after loading, or the index does not match the files.
    """
    tensors: dict[str, TensorInfo] = {}
    names: dict[str, str] = {}
    for path in weight_files(checkpoint):
        for name, tensor in read_header(path).items():
            other_name = names.setdefault(GEMMA3.runtime_name(name), name)
            if name in tensors or other_name != name:
                problem = "is in two files" if name in tensors else f"is the same weight as {other_name}"
                raise UserError(f"the weight {name} in {path} {problem}: it is not clear which one to use")
            tensors[name] = tensor
    if not (checkpoint / SINGLE).is_file():
        files = {name: tensor.file for name, tensor in tensors.items()}
        differences = sorted(files.items() ^ read_index(checkpoint / INDEX).items())
        if differences:
            raise UserError(
                f"{checkpoint / INDEX} and the files do not agree on where {differences[0][0]} is: download both again"
            )
    return tensors


def check_weights(tensors: Mapping[str, TensorInfo], checkpoint: Path) -> None:
    """Raise UserError if a weight's dtype is not a floating-point type, as in an already quantized checkpoint."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"the weight {name} in {checkpoint / tensor.file} is {tensor.dtype}: "
                "use the unquantized checkpoint, in bfloat16, float16, or float32"
            )


def quantizable_modules(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return {module name: weight shape} of every linear and embedding, including lm_head.

    The names are those of the modules in the loaded model, which recipes match.

    Raises:
        UserError: There is no embedding.
    """
    modules = linear_shapes({GEMMA3.runtime_name(name): tensor.shape for name, tensor in tensors.items()})
    embeddings = [name for name in modules if name.endswith(GEMMA3.embedding_module)]
    if not embeddings:
        raise UserError(f"the checkpoint has no {GEMMA3.embedding_module}.weight: it cannot be untied or quantized")
    if not any(name.endswith(GEMMA3.head_module) for name in modules):
        modules[GEMMA3.head_module] = modules[embeddings[0]]
    return modules


def linear_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return {module name: weight shape} of the linears and embeddings among a model's tensors."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def check_finite(path: Path) -> None:
    """Raise UserError that names the first tensor of the file that contains a NaN or an infinity.

    The file is read, not mapped: the pages of a mapped file count as the process's memory.
    """
    import torch

    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with path.open("rb") as stream:
        for name, tensor in read_header(path).items():
            if tensor.dtype not in types:
                continue
            stream.seek(tensor.start)
            for start in range(tensor.start, tensor.end, CHUNK_BYTES):
                part = bytearray(stream.read(min(CHUNK_BYTES, tensor.end - start)))
                if not bool(torch.frombuffer(part, dtype=types[tensor.dtype]).isfinite().all()):
                    raise UserError(
                        f"the weight {name} in {path} contains a NaN or an infinity: "
                        "the checkpoint is damaged; download it again"
                    )


def model_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    """Return the transformers class of the model that a configuration describes."""
    import transformers

    cls: type[PreTrainedModel] = getattr(transformers, GEMMA3.architectures[config.architectures[0]].class_name)
    return cls


def load_model(checkpoint: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """Load the model of an untied or quantized checkpoint, in eval mode, with bfloat16 or float32 weights.

    Raises:
        StageFailed: A weight is missing, which transformers would initialize at random, or unexpected; or lm_head and
            the embedding share their storage, so that quantizing one would change the other.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    with patched_loading():
        model, info = model_class(config).from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    mismatches = {name: sorted(keys)[:3] for name, keys in info.items() if keys and name.endswith("_keys")}
    if mismatches:
        raise StageFailed(f"the weights of {checkpoint} do not fit its model: {mismatches}")
    model.eval()
    if dtype == torch.float32:
        # transformers loads a quantized checkpoint in the dtype it was saved in. Only up to float32, never down: some
        # buffers are float32 in any case.
        model.to(dtype)
    if not config.get_text_config().tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight:
        raise StageFailed("lm_head and the embedding are still tied after loading")
    return model


def drop_vision_encoder(model: "PreTrainedModel") -> None:
    """Free the vision tower of a loaded model that will only read text."""
    if hasattr(model.model, GEMMA3.vision_module):
        setattr(model.model, GEMMA3.vision_module, None)


def disable_activation_quantization(model: "torch.nn.Module") -> None:
    """Turn off activation quantization in every linear of a loaded model, without changing its weights.

    Linears that were dequantized once keep it.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and hasattr(weight, "activation_quantization"):
            weight.activation_quantization = None

"""Untie: give lm_head its own copy of the embedding, in one new shard next to the unchanged ones."""

import json
import os
from pathlib import Path

from quantize_gemma.tasks.models.checkpoint import TensorInfo, quantizable_modules, read_headers, write_header
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.source_files import INDEX, SINGLE
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.store import link

SHARD = "lm_head.safetensors"
# The new name of a single-file checkpoint's weights.
BASE = "model-base.safetensors"


@stage()
def untie(target: Path, checkpoint: Path) -> Output:
    """Fill `target` with a checkpoint in which lm_head.weight is a separate tensor with the embedding's bytes.

    Files that do not change are hard links. A checkpoint that is already untied is not changed.
    (Section "Untie weights" of PyTorch's card.)

    Raises:
        UserError: The checkpoint has no embedding.
    """
    tensors = read_headers(checkpoint)
    quantizable_modules(tensors)
    embedding = next(name for name in tensors if name.endswith(f"{GEMMA3.embedding_module}.weight"))
    _link_files(target, checkpoint, {tensor.file for tensor in tensors.values()})
    weight_map = {name: tensor.file for name, tensor in tensors.items()}
    tied = not any(name.endswith(f"{GEMMA3.head_module}.weight") for name in tensors)
    if tied:
        if embedding not in GEMMA3.heads:
            raise UserError(f"the embedding {embedding} is not one of Gemma 3's: {', '.join(GEMMA3.heads)}")
        head = GEMMA3.heads[embedding]
        _write_shard(target / SHARD, head, checkpoint, tensors[embedding])
        weight_map[head] = SHARD
        # Hugging Face's loaders take an index only if no file has the name of a single-file checkpoint.
        if (target / SINGLE).exists():
            (target / SINGLE).rename(target / BASE)
            weight_map = {name: BASE if file == SINGLE else file for name, file in weight_map.items()}
    _write_config(target, checkpoint)
    if len(set(weight_map.values())) > 1:
        total = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {"metadata": {"tied_before": tied}}


def _link_files(target: Path, checkpoint: Path, weight_files: set[str]) -> None:
    """Link the weight files and everything else that does not change."""
    for path in checkpoint.iterdir():
        # With an index, transformers would read weight files that it ignored before.
        if path.name in weight_files or (path.suffix != ".safetensors" and path.name not in ("config.json", INDEX)):
            link(path, target / path.name)


def _write_shard(shard: Path, head: str, checkpoint: Path, embedding: TensorInfo) -> None:
    """Write a safetensors file with the embedding's bytes under the head's name; the kernel copies the bytes."""
    start, end = embedding.start, embedding.end
    source = os.open(checkpoint / embedding.file, os.O_RDONLY)
    # Make the file readable by everyone, because a release may be served to others.
    target = os.open(shard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        offset = write_header(target, {head: (embedding.dtype, embedding.shape)}, {"format": "pt"})[head]
        os.lseek(target, offset, os.SEEK_SET)
        while start < end:
            # Use sendfile because copy_file_range fails between file systems, and the store may be on another one.
            count = os.sendfile(target, source, start, end - start)
            if not count:
                raise StageFailed(
                    f"{checkpoint / embedding.file} was truncated while it was being read: start the run again"
                )
            start += count
    finally:
        os.close(source)
        os.close(target)


def _write_config(target: Path, checkpoint: Path) -> None:
    """Write config.json, with untied weights."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

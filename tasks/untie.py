"""Untie: gives lm_head its own copy of the embedding, by writing one new shard beside the unchanged ones."""

import json
import os
from pathlib import Path

from quantize_gemma.tasks.models.checkpoint import quantizable_modules, read_header, read_headers, write_header
from quantize_gemma.tasks.models.source_files import INDEX
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.store import link

SHARD = "lm_head.safetensors"
# The head's name beside each of the embedding's: the Hub's layout, a text-only model, and transformers' own names.
HEADS = {
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
}


@stage()
def untie(target: Path, checkpoint: Path) -> Output:
    """Fills `target` with the checkpoint, lm_head.weight a tensor of its own with the embedding's bytes.

    Files that do not change are hard links. A checkpoint that is untied already passes through. Raises UserError
    if there is no embedding. (Card section: Untie weights.)
    """
    headers = read_headers(checkpoint)
    quantizable_modules(headers)
    embedding = next(name for name in headers if name.endswith("embed_tokens.weight"))
    files = {tensor["file"] for tensor in headers.values()}
    for path in checkpoint.iterdir():
        # A weight file that transformers does not read would be one that it does, once there is an index.
        if path.name in files or (path.suffix != ".safetensors" and path.name not in ("config.json", INDEX)):
            link(path, target / path.name)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    head = next((name for name in headers if name.endswith("lm_head.weight")), None)
    weight_map = {name: tensor["file"] for name, tensor in headers.items()}
    tied = head is None
    if head is None:
        if embedding not in HEADS:
            raise UserError(f"the embedding's name, {embedding}, is none of Gemma 3's: {', '.join(HEADS)}")
        head = HEADS[embedding]
        _write_shard(target / SHARD, head, checkpoint / headers[embedding]["file"], embedding)
        weight_map[head] = SHARD
        # Hugging Face's loaders take an index only if no file is called as a single-file checkpoint would be.
        if (target / "model.safetensors").exists():
            (target / "model.safetensors").rename(target / "model-base.safetensors")
            weight_map = {
                name: "model-base.safetensors" if file == "model.safetensors" else file
                for name, file in weight_map.items()
            }
    config["tie_word_embeddings"] = False
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(set(weight_map.values())) > 1:
        total = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {"metadata": {"tied_before": tied}}


def _write_shard(shard: Path, head: str, file: Path, embedding: str) -> None:
    """Writes a safetensors file that holds the embedding's bytes under the head's name; the kernel copies them."""
    tensor = read_header(file)[embedding]
    start, end = tensor["data_offsets"]
    source = os.open(file, os.O_RDONLY)
    # Readable by all: a release's files are served to others.
    target = os.open(shard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        to = write_header(target, {head: (tensor["dtype"], tensor["shape"])}, {"format": "pt"})[head]
        os.lseek(target, to, os.SEEK_SET)
        while start < end:
            # sendfile, for copy_file_range fails between file systems, and a store may lie on another one.
            copied = os.sendfile(target, source, start, end - start)
            if not copied:
                raise StageFailed(f"{file} became shorter while it was read")
            start += copied
    finally:
        os.close(source)
        os.close(target)

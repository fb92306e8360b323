"""Untie: gives lm_head its own copy of the embedding, by writing one new shard beside the unchanged ones."""

import json
from pathlib import Path
from typing import Any

from tasks.checkpoint import quantizable_modules, read_headers
from tasks.policies import stage
from tasks.store import UserError, link

SHARD = "lm_head.safetensors"
# The head's name beside each of the embedding's: the Hub's layout, a text-only model, and transformers' own names.
HEADS = {
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
}
INDEX = "model.safetensors.index.json"


def untie_checkpoint(target: Path, checkpoint: Path) -> dict[str, Any]:
    """Fills `target` with the checkpoint, lm_head.weight a tensor of its own with the embedding's bytes.

    Files that do not change are hard links. A checkpoint that is untied already passes through. Raises UserError
    if there is no embedding. (Card section: Untie weights.)
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    headers = read_headers(checkpoint)
    quantizable_modules(headers)
    embedding = next(name for name in headers if name.endswith("embed_tokens.weight"))
    for path in checkpoint.iterdir():
        if path.name not in ("config.json", INDEX):
            link(path, target / path.name)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    head = next((name for name in headers if name.endswith("lm_head.weight")), None)
    weight_map = {name: tensor["file"] for name, tensor in headers.items()}
    tied = head is None
    if head is None:
        if embedding not in HEADS:
            raise UserError(f"the embedding's name, {embedding}, is none of Gemma 3's: {', '.join(HEADS)}")
        head = HEADS[embedding]
        with safe_open(str(checkpoint / headers[embedding]["file"]), framework="pt") as weights:
            save_file({head: weights.get_tensor(embedding)}, target / SHARD, metadata={"format": "pt"})
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


untie = stage(untie_checkpoint, name="untie")

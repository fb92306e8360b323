"""Extract a checkpoint without a vision tower from one that has a vision tower."""

import json
import shutil
from pathlib import Path


def write_text_only(source: Path, target: Path) -> Path:
    """Write the language model of a multimodal checkpoint as a Gemma3ForCausalLM; return `target`."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir()
    with safe_open(str(source / "model.safetensors"), framework="pt") as weights:
        tensors = {
            name.removeprefix("language_model."): weights.get_tensor(name)
            for name in weights.keys()  # noqa: SIM118
            if name.startswith("language_model.")
        }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())["text_config"]
    config |= {"architectures": ["Gemma3ForCausalLM"], "eos_token_id": [1, 6], "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, target / name)
    return target

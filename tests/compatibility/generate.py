"""Run a card's loading code and print the generated tokens; import only what the card tells its reader to install.

    python generate.py < {"code", "image_prompt"} as JSON

This runs in the release's directory, in the virtual environment under test. The last line that it prints is
{"versions", "text", "image"} as JSON: the token ids for the code's own prompt and for one about an image, including the
prompts.
"""

import json
import platform
import sys
from importlib.metadata import version
from typing import Any

LIBRARIES = ("torch", "torchao", "transformers")


def main() -> None:
    request = json.load(sys.stdin)
    names: dict[str, Any] = {}
    exec(compile(request["code"], "README.md", "exec"), names)
    result = {
        "versions": {"python": platform.python_version(), **{name: version(name).split("+")[0] for name in LIBRARIES}},
        "text": names["output"][0].tolist(),
    }
    if hasattr(names["model"].config, "vision_config"):
        result["image"] = generate_from_image(names["model"], names["release"], request["image_prompt"])
    print(json.dumps(result))


def generate_from_image(model: Any, release: str, prompt: str) -> list[int]:
    """Return the token ids of a prompt about a blue image and its answer, greedily decoded."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(release)
    image = Image.new("RGB", (256, 192), (30, 50, 220))
    if processor.chat_template:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = processor(text=f"{processor.boi_token}{prompt}", images=image, return_tensors="pt")
    output: list[int] = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0].tolist()
    return output


if __name__ == "__main__":
    main()

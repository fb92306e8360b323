"""Can transformers read this checkpoint? Asked before anything long starts, for the weights' shapes alone.

What the configuration, the tokenizer or the image processor get wrong is found in seconds here instead of in a stage
that runs hours later.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.checkpoint import (
    check_finite,
    read_headers,
    read_model_config,
    runtime_name,
    task_of,
    weight_files,
)
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.patches.private_api import fake_tensor_mode
from quantize_gemma.tasks.runtime.strict_json import read_object

# Of the numbers of a vocabulary's tokens, so many may be left out.
MOST_HOLES = 10_000
TEXT = "Hey, are you conscious? Can you talk to me?"


def check_loads(checkpoint: Path) -> None:
    """Raises UserError if transformers cannot make the model or its tokenizer, or if the weights are another's."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

    config = read_model_config(checkpoint)
    headers = read_headers(checkpoint)
    layers = config.text.num_hidden_layers + (config.vision.num_hidden_layers if config.vision else 0)
    if layers > len(headers):
        raise UserError(
            f"{checkpoint / 'config.json'} describes {layers:,} layers, but there are {len(headers):,} weights: "
            "they belong to different models"
        )
    with _refused(checkpoint / "config.json"):
        parsed = AutoConfig.from_pretrained(checkpoint)
    shapes = {runtime_name(name): tensor["shape"] for name, tensor in headers.items()}
    if "lm_head.weight" not in shapes:
        if not (config.tie_word_embeddings and config.text.tie_word_embeddings):
            raise UserError(
                f"{checkpoint} has no lm_head.weight, though config.json says that it is not the embedding: "
                "download it again, or set tie_word_embeddings to true"
            )
        shapes["lm_head.weight"] = shapes.get("model.language_model.embed_tokens.weight") or shapes.get(
            "model.embed_tokens.weight", []
        )
    check_shapes(checkpoint, parsed, shapes)
    _check_forward(checkpoint, parsed)
    _check_generation(checkpoint, GenerationConfig)
    if not (checkpoint / "tokenizer.json").is_file():
        raise UserError(f"{checkpoint} has no tokenizer.json: save its tokenizer there, with save_pretrained")
    for path in sorted(checkpoint.glob("*.json")):
        if not path.name.endswith(".safetensors.index.json"):
            value = read_object(path, "download it again")
            if path.name == "tokenizer.json":
                _check_token_ids(path, value)
    if config.multimodal:
        # Smoke tests and ChartQA hand images to it.
        with _refused(checkpoint / "processor_config.json"):
            processor = AutoProcessor.from_pretrained(checkpoint)
        if type(processor).__name__ != "Gemma3Processor":
            raise UserError(
                f"{checkpoint} has no Gemma3Processor: add processor_config.json and preprocessor_config.json"
            )
        tokenizer = processor.tokenizer
    else:
        with _refused(checkpoint / "tokenizer.json"):
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with _refused(checkpoint / "tokenizer.json"):
        tokens = _tokenize(tokenizer)
    if not tokens or max(tokens) >= config.text.vocab_size:
        raise UserError(
            f"the tokenizer of {checkpoint} makes tokens that its model does not have: they belong to different models"
        )


def _check_token_ids(path: Path, tokenizer: dict[str, Any]) -> None:
    """Raises UserError if tokens have numbers far from each other, for which the library takes memory and says each."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list):
        vocabulary = None
    # A list's tokens have the numbers of their places.
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary or ())))
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if not ids or not all(type(number) is int and 0 <= number < len(ids) + MOST_HOLES for number in ids):
        raise UserError(f"{path} has no vocabulary whose tokens are numbered one after the other: download it again")


def _tokenize(tokenizer: Any) -> list[int]:
    tokens = list(tokenizer(TEXT)["input_ids"])
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": TEXT}]
        tokens += tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokenizer.decode(tokens)
    return tokens


def check_directory(checkpoint: str) -> dict[str, Any]:
    """Checks everything in a model directory, each weight included, in a process of its own. Raises UserError."""
    path = Path(checkpoint)
    for file in weight_files(path):
        check_finite(file)
    check_loads(path)
    return {}


def check_shapes(checkpoint: Path, config: Any, found: dict[str, list[int]]) -> None:
    """Raises UserError if the weights are not those of the model that transformers makes of this configuration.

    `found` are the weights' shapes by their names in the loaded model.
    """
    shapes = {name: list(tensor.shape) for name, tensor in _empty_model(checkpoint, config).state_dict().items()}
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{checkpoint} lacks the weight {name}: download it again")
        if found[name] != shape:
            raise UserError(
                f"the weight {name} in {checkpoint} has the shape {found[name]}, "
                f"but config.json makes it {shape}: they belong to different models"
            )
    left = sorted(set(found) - set(shapes))
    if left:
        raise UserError(f"{checkpoint} has the weight {left[0]}, which its model does not: download it again")


def _empty_model(checkpoint: Path, config: Any) -> Any:
    """Returns the model without its weights."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    multimodal = task_of(config.to_dict()) == "multimodal-text-to-text"
    with _refused(checkpoint / "config.json"), torch.device("meta"):
        return (Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM)(config).eval()


def _check_forward(checkpoint: Path, config: Any) -> None:
    """Raises UserError if the model cannot read two tokens, or an image, for reasons of its configuration.

    Without weights: tensors have a type and a shape alone.
    """
    import torch

    mode = fake_tensor_mode()
    if mode is None:
        return
    model = _empty_model(checkpoint, config)
    with _refused(checkpoint / "config.json"), mode, torch.no_grad():
        model.to_empty(device="cpu")
        tokens = torch.zeros(1, 2, dtype=torch.long)
        vision = getattr(config, "vision_config", None)
        if vision is None:
            model(input_ids=tokens)
            return
        model.lm_head(model.model.language_model(input_ids=tokens).last_hidden_state)
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        seen = model.model.get_image_features(torch.zeros(size, dtype=model.dtype))
        if seen.shape[1] != config.mm_tokens_per_image:
            raise ValueError(f"an image is {seen.shape[1]} tokens, not mm_tokens_per_image")


def _check_generation(checkpoint: Path, generation: Any) -> None:
    path = checkpoint / "generation_config.json"
    if not path.exists():
        return
    eos = read_object(path, "download it again").get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [eos]
    if eos is not None and not all(type(token) is int and token >= 0 for token in tokens):
        raise UserError(f"{path} has an eos_token_id that is neither a token's number nor a list of them: correct it")
    with _refused(path):
        generation.from_pretrained(checkpoint)


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns whatever transformers says of a file that it cannot read, which is anything, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        said = " ".join("".join(character if character.isprintable() else " " for character in text).split())
        raise UserError(f"transformers cannot read {path} ({said[:200]}): correct it, or download it again") from None

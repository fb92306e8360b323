"""Check that transformers can load a checkpoint, using only the shapes of the weights, before a long stage starts.

This reveals a mistake in the configuration, the tokenizer, or the image processor in seconds, instead of hours later.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.chat import TEXT_PROMPT, format_chat, format_user_turn
from quantize_gemma.tasks.models.checkpoint import (
    check_finite,
    model_class,
    read_headers,
    read_model_config,
    weight_files,
)
from quantize_gemma.tasks.models.config import ModelConfig
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.patches.private_api import fake_tensor_mode
from quantize_gemma.tasks.runtime.strict_json import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# The maximum number of vocabulary ids without a token.
MAX_UNUSED_IDS = 10_000
# Messages as in a chat about an image.
SYSTEM: dict[str, object] = {"role": "system", "content": [{"type": "text", "text": TEXT_PROMPT}]}
USER: dict[str, object] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT_PROMPT}]}


def check_loads(checkpoint: Path) -> bool:
    """Check that transformers can load the model, its tokenizer, and its processor, without loading a weight.

    Returns:
        Whether a multimodal model's chat template, if it has one, accepts a system message, which only ChartQA sends;
        True for a text-only model.

    Raises:
        UserError: Transformers cannot load them, or the files belong to different models.
    """
    from transformers import AutoConfig

    config = read_model_config(checkpoint)
    shapes = _read_shapes(checkpoint, config)
    with _transformers_errors(checkpoint / "config.json"):
        transformers_config = AutoConfig.from_pretrained(checkpoint)
    check_shapes(checkpoint, transformers_config, shapes)
    _check_forward(checkpoint, transformers_config)
    _check_generation(checkpoint)
    if not (checkpoint / "tokenizer.json").is_file():
        raise UserError(f"{checkpoint} has no tokenizer.json: save its tokenizer there, with save_pretrained")
    for path in sorted(checkpoint.glob("*.json")):
        if not path.name.endswith(".safetensors.index.json"):
            value = read_object(path, "download it again")
            if path.name == "tokenizer.json":
                _check_token_ids(path, value)
    processor = _load_processor(checkpoint) if config.multimodal else None
    tokenizer = _load_tokenizer(checkpoint) if processor is None else processor.tokenizer
    tokens = _tokenize(checkpoint, tokenizer, processor)
    if not tokens or max(tokens) >= config.text.vocab_size:
        raise UserError(
            f"the tokenizer of {checkpoint} has token ids outside the model's vocabulary: the tokenizer and the "
            "weights belong to different models"
        )
    return processor is None or _accepts_system_message(processor)


def _read_shapes(checkpoint: Path, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the weights' shapes by their names in the loaded model, including that of a tied head.

    Raises:
        UserError: There are more layers than weights, or the head is missing although it is not tied.
    """
    tensors = read_headers(checkpoint)
    layers = config.text.num_hidden_layers + (config.vision.num_hidden_layers if config.vision else 0)
    if layers > len(tensors):
        raise UserError(
            f"{checkpoint / 'config.json'} describes {layers:,} layers, but there are only {len(tensors):,} weights: "
            "they belong to different models"
        )
    shapes = {GEMMA3.runtime_name(name): tensor.shape for name, tensor in tensors.items()}
    head = f"{GEMMA3.head_module}.weight"
    if head not in shapes:
        if not (config.tie_word_embeddings and config.text.tie_word_embeddings):
            raise UserError(
                f"{checkpoint} has no {head}, though config.json says that it is not tied to the embedding: "
                "download it again, or set tie_word_embeddings to true"
            )
        shapes[head] = next((shapes[name] for name in GEMMA3.heads if name in shapes), ())
    return shapes


def _check_token_ids(path: Path, tokenizer: dict[str, object]) -> None:
    """Raise UserError if many token ids are unused: the library allocates memory and logs a line for each of them."""
    model, added_tokens = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list):
        vocabulary = None
    # In a list, a token's id is its position.
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary or ())))
    ids += (
        [token.get("id") for token in added_tokens if isinstance(token, dict)] if isinstance(added_tokens, list) else []
    )
    if not ids or not all(type(number) is int and 0 <= number < len(ids) + MAX_UNUSED_IDS for number in ids):
        raise UserError(f"{path} has no vocabulary with consecutive token ids: download it again")


def _load_tokenizer(checkpoint: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a text-only model. Raises UserError if it cannot be loaded."""
    from transformers import AutoTokenizer

    with _transformers_errors(checkpoint / "tokenizer.json"):
        return AutoTokenizer.from_pretrained(checkpoint)


def _load_processor(checkpoint: Path) -> "ProcessorMixin":
    """Return the processor of a multimodal model. Raises UserError if it cannot be loaded."""
    from transformers import AutoProcessor

    # Smoke tests and ChartQA pass images to it.
    with _transformers_errors(checkpoint / "processor_config.json"):
        processor = AutoProcessor.from_pretrained(checkpoint)
    if type(processor).__name__ != GEMMA3.processor_class:
        raise UserError(
            f"{checkpoint} has no {GEMMA3.processor_class}: add processor_config.json and preprocessor_config.json"
        )
    return processor


def _tokenize(checkpoint: Path, tokenizer: "PreTrainedTokenizerBase", processor: "ProcessorMixin | None") -> list[int]:
    """Return the tokens of what every run sends: a text, and the user's turn, which may have an image.

    Raises:
        UserError: The tokenizer or the chat template fails.
    """
    texts = [TEXT_PROMPT]
    with _transformers_errors(f"the chat template of {checkpoint}"):
        texts.append(format_user_turn(tokenizer, TEXT_PROMPT))
        if processor is not None:
            texts.append(format_chat(processor, [USER]) or "")
    with _transformers_errors(checkpoint / "tokenizer.json"):
        tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
        tokenizer.decode(tokens)
    return tokens


def _accepts_system_message(processor: "ProcessorMixin") -> bool:
    try:
        format_chat(processor, [SYSTEM, USER])
    except Exception:
        # A template that accepts the user's message may raise anything here.
        return False
    return True


def check_directory(checkpoint: str) -> dict[str, object]:
    """Check a model directory completely, including every weight; run in a worker process.

    Returns:
        The output of check_loads(), as "system_message".

    Raises:
        UserError: The directory is not a valid checkpoint.
    """
    path = Path(checkpoint)
    for file in weight_files(path):
        check_finite(file)
    return {"system_message": check_loads(path)}


def check_shapes(checkpoint: Path, config: "PreTrainedConfig", shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError if the weights do not match the model that transformers builds from this configuration.

    `shapes` are the weights' shapes by their names in the loaded model.
    """
    expected_shapes = {
        name: tuple(tensor.shape) for name, tensor in _empty_model(checkpoint, config).state_dict().items()
    }
    for name, shape in expected_shapes.items():
        if name not in shapes:
            raise UserError(f"{checkpoint} lacks the weight {name}: download it again")
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"the weight {name} in {checkpoint} has the shape {list(shapes[name])}, "
                f"but config.json implies {list(shape)}: they belong to different models"
            )
    extra_names = sorted(set(shapes) - set(expected_shapes))
    if extra_names:
        raise UserError(
            f"{checkpoint} has the weight {extra_names[0]}, which is not part of the model that config.json "
            "describes: download it again"
        )


def _empty_model(checkpoint: Path, config: "PreTrainedConfig") -> "PreTrainedModel":
    """Return the model without weights."""
    import torch

    with _transformers_errors(checkpoint / "config.json"), torch.device("meta"):
        return model_class(config)(config).eval()


def _check_forward(checkpoint: Path, config: "PreTrainedConfig") -> None:
    """Raise UserError if the model cannot read two tokens, or an image, because of its configuration.

    No weights are needed: fake tensors have only a dtype and a shape.
    """
    import torch

    mode = fake_tensor_mode()
    if mode is None:
        return
    model = _empty_model(checkpoint, config)
    with _transformers_errors(checkpoint / "config.json"), mode, torch.no_grad():
        model.to_empty(device="cpu")
        tokens = torch.zeros(1, 2, dtype=torch.long)
        vision = getattr(config, "vision_config", None)
        if vision is None:
            model(input_ids=tokens)
            return
        model.lm_head(model.model.language_model(input_ids=tokens).last_hidden_state)
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        features = model.model.get_image_features(torch.zeros(size, dtype=model.dtype))
        if features.shape[1] != config.mm_tokens_per_image:
            raise ValueError(f"an image is {features.shape[1]} tokens, not mm_tokens_per_image")


def _check_generation(checkpoint: Path) -> None:
    """Raise UserError if generation_config.json cannot be used."""
    from transformers import GenerationConfig

    path = checkpoint / "generation_config.json"
    if not path.exists():
        return
    eos = read_object(path, "download it again").get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [eos]
    if eos is not None and not all(type(token) is int and token >= 0 for token in tokens):
        raise UserError(f"{path} has an eos_token_id that is neither a token id nor a list of them: correct it")
    with _transformers_errors(path):
        GenerationConfig.from_pretrained(checkpoint)


@contextlib.contextmanager
def _transformers_errors(source: Path | str) -> Iterator[None]:
    """Turn any exception that transformers raises for a file, or a part of one, into a UserError with one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        reason = " ".join("".join(character if character.isprintable() else " " for character in text).split())
        raise UserError(
            f"transformers cannot read {source} ({reason[:200]}): correct it, or download it again"
        ) from None

"""The configuration of one model: read and check config.json before anything relies on it.

Only fields that quantize-gemma itself reads are checked, and those that determine the size of the model that
transformers builds. Transformers reports all other mistakes in a configuration; see load_check.py. Facts about the
whole family are in gemma3.py.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantize_gemma.tasks.models.gemma3 import GEMMA3, Architecture
from quantize_gemma.tasks.runtime.errors import UserError

# Far larger than in any Gemma model, and small enough to compute with.
Size = Annotated[int, Field(ge=1, le=10_000_000)]
TokenId = Annotated[int, Field(ge=-1, le=10_000_000)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class VisionConfig(_Section):
    """The vision tower's configuration. Defaults are those of transformers."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Size = 12
    num_attention_heads: Size = 12
    num_channels: Size = 3
    image_size: Size = 224
    patch_size: Size = 16

    @model_validator(mode="after")
    def _check_patches(self) -> Self:
        if self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads:
            raise ValueError("patch_size must divide image_size, and num_attention_heads hidden_size")
        return self


class TextConfig(_Section):
    """The language model's configuration. Defaults are those of transformers."""

    model_type: Literal["gemma3_text"] = "gemma3_text"
    vocab_size: Size = 262_208
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Size = 26
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 4
    head_dim: Size = 256
    max_position_embeddings: Size = 131_072
    sliding_window: Size = 4096
    rms_norm_eps: float = Field(1e-6, gt=0, le=1)
    query_pre_attn_scalar: float = Field(256, gt=0)
    attention_dropout: float = Field(0.0, ge=0, le=1)
    # No Gemma 3 has these. Calibration, distillation, or the program would ignore them.
    attention_bias: Literal[False] = False
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    # True in an embedding model, which cannot generate text.
    use_bidirectional_attention: Literal[False] | None = False
    return_dict: Literal[True] = True
    tie_word_embeddings: bool = True
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    bos_token_id: TokenId | None = 2
    eos_token_id: TokenId | list[TokenId] | None = 1

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        return self


class ModelConfig(_Section):
    """The configuration of a multimodal or a text-only Gemma 3."""

    architecture: str
    text: TextConfig
    vision: VisionConfig | None
    # These apply to the whole model; text_config has fields of the same names.
    mm_tokens_per_image: Size = 256
    tie_word_embeddings: bool = True
    return_dict: Literal[True] = True
    image_token_index: Size = GEMMA3.image_token_index
    boi_token_index: Size = GEMMA3.boi_token_index
    eoi_token_index: Size = GEMMA3.eoi_token_index
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    dtype: str | None = None
    torch_dtype: str | None = None

    @property
    def multimodal(self) -> bool:
        """Whether the model reads images."""
        return self.vision is not None


def parse_config(config: dict[str, Any], path: Path) -> ModelConfig:
    """Return the checked configuration of an unquantized Gemma 3.

    Args:
        config: The content of config.json.
        path: Its file, for messages.

    Raises:
        UserError: The configuration is not one; the message names the file and the field.
    """
    architecture = _find_architecture(config, path)
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UserError(f"{path.parent} is quantized already ({_shorten(method)}): use the unquantized checkpoint")
    if config.get("transformers_weights") is not None:
        raise UserError(f"{path} has the field transformers_weights, which is not supported: remove it")
    multimodal = architecture == GEMMA3.multimodal
    fields = {name: config[name] for name in ModelConfig.model_fields if name in config}
    fields |= {"architecture": architecture.class_name}
    required_values: dict[str, str | None] = {"model_type": architecture.model_type}
    if multimodal:
        fields |= {"text": config.get("text_config"), "vision": config.get("vision_config")}
    else:
        fields |= {"text": config, "vision": None}
        required_values |= {"text_config": None, "vision_config": None}
    for name, value in required_values.items():
        if config.get(name) != value or (value is None and name in config):
            raise UserError(
                f"{path} says {name} {_shorten(config.get(name))}, which does not fit the architecture "
                f"{architecture.class_name}: {'remove it' if value is None else f'it must be {value!r}'}"
            )
    try:
        model_config = ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        names = {"text": "text_config", "vision": "vision_config"} if multimodal else {"text": ""}
        field = ".".join(filter(None, (str(names.get(str(part), part)) for part in first["loc"])))
        reason = first["msg"].removeprefix("Value error, ")
        # A whole object is too long to show.
        value = "" if isinstance(first["input"], dict) else f" {_shorten(first['input'])}"
        raise UserError(f"{path} is not valid for Gemma 3: {field or 'fields'}{value}: {reason}") from None
    if multimodal and model_config.vision is None:
        raise UserError(f"{path} has no vision_config, though its architecture is {architecture.class_name}: add it")
    return model_config


def _find_architecture(config: dict[str, object], path: Path) -> Architecture:
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    if not isinstance(names, list):
        raise UserError(f"{path} has architectures {_shorten(names)}, not a list of names: download it again")
    if names[0] not in list(GEMMA3.architectures):
        name = names[0] if isinstance(names[0], str) and names[0].isprintable() else _shorten(names[0])
        raise UserError(
            f"{path.parent} is a {name[:80]} model, not Gemma 3: use one whose architecture is "
            + " or ".join(GEMMA3.architectures)
        )
    return GEMMA3.architectures[names[0]]


def _shorten(value: object) -> str:
    """Return a value as one line of text."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

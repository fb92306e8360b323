"""The facts about the Gemma 3 family: every name and token that its code or its files use, in one place.

The numbers of one model (layers, hidden size, sliding window) are read from its config.json; see config.py. This module
imports nothing, so that every other module can import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """One model class of the family.

    Attributes:
        class_name: The class in transformers, and the name in config.json's `architectures`.
        model_type: config.json's `model_type`.
        task: The task that optimum-executorch exports it for.
    """

    class_name: str
    model_type: str
    task: str


@dataclass(frozen=True)
class Gemma3:
    """The facts about the family.

    Attributes:
        processor_class: The processor in transformers that prepares images for the model.
        runtime_prefixes: Prefix of tensor names in the Hub's files -> prefix in the pinned transformers.
        vision_prefixes: The vision tower's module prefix in transformers up to 5.0, and from 5.1 on, one level shorter.
        embedding_module: Last part of the embedding's module name.
        head_module: Last part of the output head's module name.
        heads: {name of the embedding's tensor: name of the head's}, for the Hub's layout, a text-only model, and
            transformers' own names.
        vision_module: The vision tower's attribute in the multimodal model, and its part of module names.
        embedding_scale: The embedding's buffer that holds sqrt(hidden_size), which multiplies every embedded token. It
            is not saved with the weights.
        layer_types: The kinds of attention in config.json's `layer_types`, which are also the names of masks.
        roles: Role in a recipe -> regular expression on module names. The prefixes of module names differ between
            versions of transformers; the parts that are matched here do not.
        bos_token: The token that every text starts with; without it, the model generates nonsense.
        stop_tokens: The tokens that end an answer.
        image_token_index, boi_token_index, eoi_token_index: Default ids of an image's soft token, and of the tokens
            before and after an image.
    """

    multimodal: Architecture = Architecture(
        "Gemma3ForConditionalGeneration", model_type="gemma3", task="multimodal-text-to-text"
    )
    text_only: Architecture = Architecture("Gemma3ForCausalLM", model_type="gemma3_text", task="text-generation")
    processor_class: str = "Gemma3Processor"
    runtime_prefixes: Mapping[str, str] = field(
        default_factory=lambda: {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        }
    )
    vision_prefixes: tuple[str, str] = ("model.vision_tower.vision_model.", "model.vision_tower.")
    embedding_module: str = "embed_tokens"
    head_module: str = "lm_head"
    heads: Mapping[str, str] = field(
        default_factory=lambda: {
            "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
            "model.embed_tokens.weight": "lm_head.weight",
            "model.language_model.embed_tokens.weight": "lm_head.weight",
        }
    )
    vision_module: str = "vision_tower"
    embedding_scale: str = "embed_scale"
    layer_types: tuple[str, str] = ("full_attention", "sliding_attention")
    roles: Mapping[str, str] = field(
        default_factory=lambda: {
            "embedding": r"(^|\.)embed_tokens$",
            "lm_head": r"(^|\.)lm_head$",
            "vision.position_embedding": r"(^|\.)vision_tower\..*position_embedding$",
            "vision.fc2": r"(^|\.)vision_tower\..*\.mlp\.fc2$",
            "vision.linear": r"(^|\.)vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1)$",
            "linear": (
                r"^(?!.*vision_tower).*\.layers\.\d+\..*"
                r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
            ),
        }
    )
    bos_token: str = "<bos>"
    stop_tokens: tuple[str, ...] = ("<end_of_turn>", "<eos>")
    image_token_index: int = 262_144
    boi_token_index: int = 255_999
    eoi_token_index: int = 256_000

    @property
    def architectures(self) -> dict[str, Architecture]:
        """The model classes by name."""
        return {architecture.class_name: architecture for architecture in (self.multimodal, self.text_only)}

    def runtime_name(self, name: str) -> str:
        """Return the name in the loaded model of a tensor in the Hub's files."""
        for hub, runtime in self.runtime_prefixes.items():
            if name.startswith(hub):
                return runtime + name.removeprefix(hub)
        return name

    def hub_name(self, name: str) -> str:
        """Return the name in the Hub's files of a tensor of the loaded multimodal model."""
        for hub, runtime in self.runtime_prefixes.items():
            if name.startswith(runtime):
                return hub + name.removeprefix(runtime)
        return name

    def is_vision(self, module: str) -> bool:
        """Tell whether a module or a tensor belongs to the vision tower."""
        return self.vision_module in module

    def is_vision_role(self, role: str) -> bool:
        """Tell whether a recipe's role is for modules that only a multimodal model has."""
        return role.startswith("vision.")


GEMMA3 = Gemma3()

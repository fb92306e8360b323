"""Recipes: how each weight is quantized. A recipe is data that compiles to torchao's own configurations.

A recipe is a JSON file with a name, a description, and rules. To add one, put its file into recipes/; its name is the
file name without .json. A rule names a role (or `re:<regular expression>` on module names) and, for the modules with
that role, the weight's dtype, the group size (null: one scale per row), dynamic activation quantization, and the
algorithm that chooses the scales.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.store import canonical_json
from quantize_gemma.tasks.runtime.strict_json import read_object

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

# Messages for pydantic's error types.
REASONS = {
    "string_type": "must be one line of text",
    "tuple_type": "must be a list of rules",
    "int_type": "must be a positive integer or null",
    "dataclass_type": "must be an object",
    "missing": "is missing",
}
RECIPES = Path(__file__).parent / "recipes"
# `affine` and `hqq_scale_only` are torchao's `intx_choose_qparams_algorithm`; `search` needs no data either; `gptq`
# needs calibration. `exact` is for weights that are already on a grid.
Algorithm = Literal["affine", "hqq_scale_only", "search", "gptq", "exact"]
TORCHAO_ALGORITHMS = ("affine", "hqq_scale_only")
WeightDtype = Literal["int4", "int8"]
REGEX = "re:"


@dataclass(frozen=True)
class Rule:
    """How the modules of one role are quantized.

    Attributes:
        match: A role, or `re:<regular expression>` on module names.
        weight: The name of the weight's dtype in torch.
        group_size: The number of columns that share a scale; None for one scale per row.
        activation: "int8" for dynamic per-token quantization of activations; None for weight-only quantization.
        algorithm: The algorithm that chooses the scales.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    match: str
    weight: WeightDtype
    group_size: int | None
    activation: Literal["int8"] | None
    algorithm: Algorithm

    @property
    def pattern(self) -> str:
        """The regular expression on module names."""
        return self.match.removeprefix(REGEX) if self.match.startswith(REGEX) else GEMMA3.roles[self.match]

    @property
    def torchao_algorithm(self) -> str:
        """The algorithm in torchao's config; torchao only stores and loads the result of our own algorithms."""
        return self.algorithm if self.algorithm in TORCHAO_ALGORITHMS else "affine"


@dataclass(frozen=True)
class Calibration:
    """The calibration data, and the settings for the rules with `gptq`.

    Attributes:
        sequences: The number of sequences from the calibration text, evenly spaced; fewer if the text is shorter.
        answers: The number of additional sequences with the base model's own answers, if it has a chat template.
        length: The number of tokens in a sequence, including <bos>.
        damping: The value added to the diagonal of each Hessian, as a fraction of the diagonal's mean.
        order: The order in which columns are rounded: "activations" (largest inputs first) or "columns" (first to
            last).
        compensation: How much of the error of earlier layers a linear layer corrects, from 0 to 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    sequences: int = 64
    answers: int = 16
    length: int = 512
    damping: float = 0.03
    order: Literal["activations", "columns"] = "activations"
    compensation: float = 0.5


# Prompts that the base model answers at once, and the elements of gate_proj's output that are computed at once while
# calibration tokens run through a block.
ANSWER_BATCH = 8
CHUNK_ELEMENTS = 2**23
# The sequences in a distillation step, and the positions of each that the loss uses: few, because the head dominates
# the cost.
STEP_SEQUENCES = 4
STEP_POSITIONS = 64
# Positions whose logits are in memory at once.
LOGITS = 256
# One sequence in HELD_OUT is held out, and the KL divergence on these is measured MEASUREMENTS times.
HELD_OUT = 16
MEASUREMENTS = 12


@dataclass(frozen=True)
class Distillation:
    """How the scales and the norms are trained after quantization.

    Attributes:
        sequences: The number of sequences from the calibration text, evenly spaced; fewer if the text is shorter. One
            in 16 is held out.
        steps: The maximum number of Adam steps.
        learning_rate: The peak learning rate; scales and norms change by about this fraction per step.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    sequences: int = 256
    steps: int = 100
    learning_rate: float = 0.0005


@dataclass(frozen=True)
class Recipe:
    """A name, rules that match every quantizable module exactly once, and calibration and distillation settings."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    rules: tuple[Rule, ...]
    description: str | None = None
    calibration: Calibration | None = None
    distillation: Distillation | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Recipe":
        """Return the recipe from the output of `to_json`. To read a recipe file, use load_recipe."""
        rules = tuple(Rule(**rule) for rule in value["rules"])
        calibration = Calibration(**value["calibration"]) if "calibration" in value else None
        distillation = Distillation(**value["distillation"]) if "distillation" in value else None
        return cls(value["name"], rules, value.get("description"), calibration, distillation)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values, which stages take as input and hash into their keys."""
        value: dict[str, Any] = {"name": self.name, "rules": [asdict(rule) for rule in self.rules]}
        if self.calibration is not None:
            value["calibration"] = asdict(self.calibration)
        if self.distillation is not None:
            value["distillation"] = asdict(self.distillation)
        return value if self.description is None else {**value, "description": self.description}


# The fields of a recipe that have fields themselves.
PARTS: dict[str, type[Rule | Calibration | Distillation | Recipe]] = {
    "rules": Rule,
    "calibration": Calibration,
    "distillation": Distillation,
}


def load_recipe(name: str) -> Recipe:
    """Load the built-in recipe with this name, or the recipe in the JSON file at this path.

    Raises:
        UserError: There is no such recipe, or its file is not valid; the message names the file and the field.
    """
    from pydantic import TypeAdapter, ValidationError

    files = {file.stem: file for file in RECIPES.glob("*.json")}
    path = Path(name) if name.endswith(".json") else files.get(name)
    if path is None or not path.is_file():
        raise UserError(
            f"there is no recipe {name!r}: use one of {', '.join(sorted(files))}, or a path that ends in .json"
        )
    content = read_object(path, "it needs a name and rules, as JSON")
    try:
        # Validate JSON text: only there, strict mode accepts objects as dataclasses. It never accepts true as a number.
        recipe = TypeAdapter(Recipe).validate_json(canonical_json(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        reason = REASONS.get(first["type"]) or f"is not valid ({first['msg']})"
        if first["type"] == "unexpected_keyword_argument":
            part = PARTS.get(str(first["loc"][0]), Recipe)
            reason = f"is not a field of a {part.__name__.lower()}: use {', '.join(each.name for each in fields(part))}"
        if first["type"] == "int_type" and first["loc"][0] != "rules":
            reason = "must be an integer"
        if first["type"] == "literal_error":
            reason = f"must be {first['ctx']['expected']}"
        _refuse(path, content, first["loc"], reason)
    for text, field in ((recipe.name, "name"), (recipe.description or "", "description")):
        if not text.isprintable() or len(text) > 1000 or (field == "name" and not text.strip()):
            raise UserError(f"the recipe {path} needs a {field} that is one line of text")
    for number, rule in enumerate(recipe.rules):
        _check_rule(path, content, number, rule)
        if rule.algorithm == "gptq":
            _check_gptq(path, content, number, recipe)
    if (settings := recipe.calibration) is not None:
        if not any(rule.algorithm == "gptq" for rule in recipe.rules):
            _refuse(path, content, ("calibration",), "is set, but no rule's algorithm is gptq: remove it")
        counts_valid = min(settings.sequences, settings.answers + 1, settings.length - 1) >= 1
        if not (counts_valid and 0 < settings.damping < 1 and 0 <= settings.compensation <= 1):
            ranges = "sequences >= 1, answers >= 0, length >= 2, 0 < damping < 1, and 0 <= compensation <= 1"
            _refuse(path, content, ("calibration",), f"needs {ranges}")
    if (training := recipe.distillation) is not None:
        if recipe.calibration is None:
            _refuse(path, content, ("distillation",), "needs a calibrated recipe: it trains on the calibration text")
        if not (training.sequences >= 2 and training.steps >= 1 and 0 < training.learning_rate < 1):
            ranges = "sequences >= 2, steps >= 1, and 0 < learning_rate < 1"
            _refuse(path, content, ("distillation",), f"needs {ranges}")
    return recipe


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256 of the recipe's rules and settings, without its name and description."""
    content = recipe.to_json()
    settings = [content[name] for name in ("calibration", "distillation") if name in content]
    hashed_content = [content["rules"], *settings] if settings else content["rules"]
    return hashlib.sha256(canonical_json(hashed_content)).hexdigest()


def match_rules(recipe: Recipe, modules: Mapping[str, Sequence[int]]) -> dict[str, Rule]:
    """Return {module name: the rule that matches it} for every quantizable module.

    Args:
        recipe: The recipe.
        modules: The weight's shape, [rows, columns], of every linear and embedding by its name in the loaded model.

    Raises:
        UserError: A rule matches no module, a module is matched by no rule or by two, or a group size does not divide
            a module's columns. A rule for the vision tower may match nothing in a text-only model.
    """
    has_vision = any(GEMMA3.is_vision(name) for name in modules)
    rules: dict[str, Rule] = {}
    for rule in recipe.rules:
        if GEMMA3.is_vision_role(rule.match) and not has_vision:
            continue
        pattern = re.compile(rule.pattern)
        names = [name for name in modules if pattern.search(name)]
        if not names:
            raise UserError(
                f"the rule {rule.match!r} of recipe {recipe.name} matches no module of this model: fix or remove it"
            )
        for name in names:
            if name in rules:
                raise UserError(
                    f"two rules of recipe {recipe.name}, {rules[name].match!r} and {rule.match!r}, "
                    f"match the module {name}: change one of them, so that each module matches exactly one rule"
                )
            columns = modules[name][1]
            if rule.group_size and columns % rule.group_size:
                raise UserError(
                    f"group size {rule.group_size} of the rule {rule.match!r} does not divide the {columns} columns "
                    f"of {name}: use one that does, or null for one scale per row"
                )
            rules[name] = rule
    unmatched = sorted(set(modules) - set(rules))
    if unmatched:
        raise UserError(
            f"no rule of recipe {recipe.name} matches {unmatched[0]}"
            + (f" and {len(unmatched) - 1} more modules" if len(unmatched) > 1 else "")
            + ": add one"
        )
    return rules


def is_lossless(rules: Mapping[str, Rule]) -> bool:
    """Tell whether the language model's weights are kept exactly, from the rule of each module."""
    return all(rule.algorithm == "exact" for name, rule in rules.items() if not GEMMA3.is_vision(name))


def packed_bytes(shapes: Mapping[str, Sequence[int]], rules: Mapping[str, Rule]) -> int:
    """Return the size of packed weights: integers at their bit width, scales and all other weights in bfloat16.

    Args:
        shapes: The shapes of all weights by name.
        rules: The rules of the quantized modules.
    """
    bits = 0
    for name, shape in shapes.items():
        rule = rules.get(name.removesuffix(".weight"))
        if rule is None:
            bits += 16 * math.prod(shape)
        else:
            scales = shape[0] * (shape[1] // rule.group_size if rule.group_size else 1)
            bits += int(rule.weight.removeprefix("int")) * math.prod(shape) + 16 * scales
    return bits // 8


def torchao_config(rule: Rule) -> "AOBaseConfig":
    """Return torchao's configuration for one rule."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerGroup(rule.group_size) if rule.group_size else PerAxis(0)
    algorithm = rule.torchao_algorithm
    dtype: torch.dtype = getattr(torch, rule.weight)
    if rule.activation == "int8":
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype,
            weight_granularity=granularity,
            intx_choose_qparams_algorithm=algorithm,
        )
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, intx_choose_qparams_algorithm=algorithm)


def _check_rule(path: Path, content: Mapping[str, object], number: int, rule: Rule) -> None:
    """Raise UserError for mistakes in a rule that the type checks do not detect."""
    location = ("rules", number)
    if not rule.match.isprintable():
        _refuse(path, content, (*location, "match"), "must be one line of text")
    try:
        re.compile(rule.match.removeprefix(REGEX))
    except (re.error, OverflowError, RecursionError) as error:
        _refuse(path, content, (*location, "match"), f"is not a regular expression ({error})")
    if not rule.match.startswith(REGEX) and rule.match not in GEMMA3.roles:
        roles = ", ".join(GEMMA3.roles)
        _refuse(path, content, (*location, "match"), f"is not a role: use one of {roles}, or re:<regular expression>")
    if rule.group_size is not None and rule.group_size < 1:
        _refuse(path, content, (*location, "group_size"), "must be a positive integer or null")


def _check_gptq(path: Path, content: Mapping[str, Any], number: int, recipe: Recipe) -> None:
    """Raise UserError for a rule with `gptq` without calibration, or with an unsupported role or format."""
    rule, location = recipe.rules[number], ("rules", number)
    if recipe.calibration is None:
        _refuse(
            path,
            content,
            (*location, "algorithm"),
            'is gptq, which needs calibration: add "calibration": {} to the recipe',
        )
    if rule.match not in ("linear", "lm_head"):
        _refuse(
            path, content, (*location, "match"), "must be linear or lm_head with gptq: other modules are not calibrated"
        )
    if rule.weight != "int4" or rule.group_size is None:
        _refuse(path, content, location, "needs weight int4 and a group_size with gptq")


def _refuse(path: Path, content: Mapping[str, Any], location: tuple[int | str, ...], reason: str) -> NoReturn:
    """Raise UserError that names the recipe's file, the rule, and the field, and says what is wrong."""
    rule = ""
    if len(location) > 1 and isinstance(location[1], int):
        value = content["rules"][location[1]]
        match = value.get("match", value) if isinstance(value, dict) else value
        rule = f"the rule {repr(match)[:200]} of "
        location = location[2:]
    field = ".".join(str(part) for part in location)
    raise UserError(f"{rule}the recipe {path} is not valid: {field or 'it'} {reason}".replace("\n", " "))

"""Recipes: which weights are quantized how. A recipe is data; it compiles to torchao's own configurations.

A rule names a role (or `re:<regular expression>` on module names) and, for it, the weight's dtype, the group size
(null: one scale per row), dynamic activation quantization, and the algorithm that chooses the scales.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.store import canonical_json
from quantize_gemma.tasks.runtime.strict_json import read_object

RECIPES = Path(__file__).parent / "recipes"

# Module names of one transformers version differ from the next one's in their prefixes; these parts do not.
ROLES = {
    "embedding": r"(^|\.)embed_tokens$",
    "lm_head": r"(^|\.)lm_head$",
    "vision.position_embedding": r"(^|\.)vision_tower\..*position_embedding$",
    "vision.fc2": r"(^|\.)vision_tower\..*\.mlp\.fc2$",
    "vision.linear": r"(^|\.)vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1)$",
    "linear": r"^(?!.*vision_tower).*\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
}
WEIGHTS = ("int4", "int8")
ALGORITHMS = ("affine", "hqq_scale_only")
FIELDS = {"match", "weight", "group_size", "activation", "algorithm"}


def load_recipe(name: str) -> dict[str, Any]:
    """Returns the recipe with this name, or the one in the JSON file at this path. Raises UserError."""
    known = {file.stem: file for file in RECIPES.glob("*.json")}
    path = Path(name) if name.endswith(".json") else known.get(name)
    if path is None or not path.is_file():
        raise UserError(
            f"there is no recipe {name!r}: take one of {', '.join(sorted(known))}, or give a path that ends in .json"
        )
    recipe = read_object(path, "it needs a name and rules, as JSON")
    for field in ("name", "description"):
        value = recipe.get(field, "" if field == "description" else None)
        if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
            raise UserError(f"the recipe {path} needs a {field} that is one line of text")
    if not recipe["name"].strip():
        raise UserError(f"the recipe {path} needs a name that is one line of text")
    if not isinstance(recipe.get("rules"), list):
        raise UserError(f"the recipe {path} cannot be read: it needs a name and a list of rules, as JSON")
    for rule in recipe["rules"]:
        _check_rule(path, rule)
    return recipe


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Returns the SHA-256 of what the recipe does; its name and description do not count."""
    return hashlib.sha256(canonical_json(recipe["rules"])).hexdigest()


def decide(recipe: dict[str, Any], modules: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Returns {module name: the rule that decides it}, for every quantizable module.

    `modules` maps the name of every linear and embedding to its weight's shape, [rows, columns]. Raises UserError
    for a rule that matches nothing, a module that no rule or more than one decides, and a group size that does
    not divide. A rule for the vision tower may stay idle on a model that has none.
    """
    has_vision = any("vision_tower" in name for name in modules)
    decided: dict[str, dict[str, Any]] = {}
    for rule in recipe["rules"]:
        match = rule["match"]
        if match.startswith("vision.") and not has_vision:
            continue
        pattern = re.compile(match[3:] if match.startswith("re:") else ROLES[match])
        names = [name for name in modules if pattern.search(name)]
        if not names:
            raise UserError(
                f"the rule {match!r} of recipe {recipe['name']} matches no module of this model: remove or mend it"
            )
        for name in names:
            if name in decided:
                raise UserError(
                    f"two rules of recipe {recipe['name']}, {decided[name]['match']!r} and {match!r}, "
                    f"decide the module {name}: exactly one must"
                )
            columns = modules[name][1]
            if rule["group_size"] and columns % rule["group_size"]:
                raise UserError(
                    f"group size {rule['group_size']} of the rule {match!r} does not divide the {columns} columns "
                    f"of {name}: use one that does, or null for one scale per row"
                )
            decided[name] = rule
    missing = sorted(set(modules) - set(decided))
    if missing:
        raise UserError(
            f"no rule of recipe {recipe['name']} decides {missing[0]}"
            + (f" and {len(missing) - 1} more modules" if len(missing) > 1 else "")
            + ": add one"
        )
    return decided


def torchao_config(rule: dict[str, Any]) -> Any:
    """Returns torchao's configuration for one rule."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerGroup(rule["group_size"]) if rule["group_size"] else PerAxis(0)
    dtype: torch.dtype = getattr(torch, rule["weight"])
    if rule["activation"] == "int8":
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype,
            weight_granularity=granularity,
            intx_choose_qparams_algorithm=rule["algorithm"],
        )
    return IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=granularity, intx_choose_qparams_algorithm=rule["algorithm"]
    )


def _check_rule(path: Path, rule: dict[str, Any]) -> None:
    def refuse(what: str) -> None:
        name = repr(rule.get("match", rule) if isinstance(rule, dict) else rule)[:200]
        raise UserError(f"the rule {name} of the recipe {path}: {what}")

    if not isinstance(rule, dict) or set(rule) != FIELDS:
        refuse(f"it must have exactly the fields {', '.join(sorted(FIELDS))}")
    match = rule["match"]
    if not isinstance(match, str) or not match.isprintable():
        refuse("match must be one line of text")
    try:
        re.compile(match.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError) as error:
        refuse(f"it is no regular expression ({error})")
    if not match.startswith("re:") and match not in ROLES:
        refuse(f"there is no such role; roles are {', '.join(ROLES)}, or give re:<regular expression>")
    if rule["weight"] not in WEIGHTS:
        refuse(f"weight must be one of {', '.join(WEIGHTS)}")
    if rule["activation"] not in (None, "int8"):
        refuse("activation must be null or int8")
    if rule["algorithm"] not in ALGORITHMS:
        refuse(f"algorithm must be one of {', '.join(ALGORITHMS)}")
    size = rule["group_size"]
    if size is not None and not (type(size) is int and size > 0):
        refuse("group_size must be a positive number or null")

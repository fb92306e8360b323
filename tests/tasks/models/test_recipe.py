"""People write recipes: an error names the mistake in one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.checkpoint import quantizable_modules, read_headers
from quantize_gemma.tasks.models.recipe import RECIPES, Recipe, load_recipe, match_rules, recipe_hash
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import UserError

RULE = {"match": "linear", "weight": "int4", "group_size": 32, "activation": "int8", "algorithm": "affine"}
GPTQ = RULE | {"algorithm": "gptq"}


def write(folder: Path, recipe: Any) -> str:
    path = folder / "mine.json"
    path.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
    return str(path)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("[" * 100_000, ["nested too deeply"]),
        ("[]", ["not a JSON object"]),
        ('{"name": "a", "name": "b", "rules": []}', ["'name' twice"]),
        ('{"name": "a", "rules": [], "note": NaN}', ["NaN"]),
        ({"name": 5, "rules": []}, ["name", "one line of text"]),
        ({"name": " ", "rules": []}, ["name", "one line of text"]),
        ({"name": "a\nlicense: mit", "rules": []}, ["name", "one line of text"]),
        ({"name": "a", "description": ["b"], "rules": []}, ["description", "one line of text"]),
        ({"name": "a", "rules": {"match": 1}}, ["list of rules"]),
        ({"name": "a", "rules": None}, ["list of rules"]),
        ({"name": "a", "rules": [RULE | {"match": 5}]}, ["5", "one line of text"]),
        ({"name": "a", "rules": [RULE | {"match": "re:a\nb"}]}, ["one line of text"]),
        ({"name": "a", "rules": [RULE | {"match": "re:" + "(" * 5000}]}, ["regular expression"]),
        ({"name": "a", "rules": [RULE | {"match": "re:a{99999999999}"}]}, ["regular expression"]),
        ({"name": "a", "rules": [RULE | {"group_size": True}]}, ["group_size"]),
        ({"name": "a", "rules": [RULE | {"group_size": 0}]}, ["linear", "group_size", "positive"]),
        ({"name": "a", "rules": [RULE | {"weight": ["int4"]}]}, ["weight"]),
        ({"name": "a", "rules": [RULE | {"weight": "int3"}]}, ["linear", "weight", "int4", "int8"]),
        ({"name": "a", "rules": [RULE | {"activation": "int4"}]}, ["activation", "int8"]),
        ({"name": "a", "rules": [RULE | {"algorithm": "awq"}]}, ["algorithm", "affine", "hqq_scale_only"]),
        ({"name": "a", "rules": [RULE | {"match": "mlp"}]}, ["mlp", "is not a role", "lm_head"]),
        ({"name": "a", "rules": [RULE | {"a\nb": 1}]}, ["is not a field of a rule"]),
        ({"name": "a", "rules": [{"match": "linear"}]}, ["linear", "weight is missing"]),
        ({"name": "a", "rules": [RULE | {"algorithm": "gptq"}]}, ["algorithm", "gptq", "calibration"]),
        ({"name": "a", "rules": [RULE], "calibration": {}}, ["calibration", "remove"]),
        ({"name": "a", "rules": [GPTQ], "calibration": {"answers": -1}}, ["calibration", "answers >= 0"]),
        ({"name": "a", "rules": [GPTQ], "calibration": {"damping": 0.0}}, ["calibration", "0 < damping"]),
        ({"name": "a", "rules": [GPTQ], "calibration": {"size": 1}}, ["calibration.size is not a field"]),
        ({"name": "a", "rules": [GPTQ | {"group_size": None}], "calibration": {}}, ["linear", "group_size"]),
        ({"name": "a", "rules": [GPTQ | {"match": "embedding"}], "calibration": {}}, ["match", "linear or lm_head"]),
        ({"name": "a", "rules": ["linear"]}, ["linear", "object"]),
        ({"name": "a", "rules": [RULE], "distilation": {}}, ["distilation is not a field of a recipe", "distillation"]),
    ],
)
def test_an_invalid_recipe_is_rejected_in_one_sentence(recipe: Any, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, recipe)
    with pytest.raises(UserError) as raised:
        load_recipe(path)
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_a_recipes_name_is_not_a_path() -> None:
    other = os.path.relpath(RECIPES / "HQQ-INT8-INT4", RECIPES.parent)
    with pytest.raises(UserError, match="there is no recipe"):
        load_recipe(f"../{other}")
    assert load_recipe("HQQ-INT8-INT4").name == "HQQ-INT8-INT4"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.json")), ids=lambda file: file.stem)
def test_every_recipe_in_the_folder_loads_by_its_name_and_fits_the_builtin_model(file: Path) -> None:
    recipe = load_recipe(file.stem)
    assert recipe.name == file.stem
    assert recipe.description
    modules = quantizable_modules(read_headers(BUILTIN["tiny-gemma3"]))
    assert set(match_rules(recipe, modules)) == set(modules)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.json")), ids=lambda file: file.stem)
def test_a_recipes_json_equals_its_file_and_reads_back(file: Path) -> None:
    recipe = load_recipe(file.stem)
    assert store.canonical_json(recipe.to_json()) == store.canonical_json(json.loads(file.read_text()))
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_without_a_description_has_none_in_its_json(tmp_path: Path) -> None:
    content = {"name": "mine", "rules": [RULE]}
    assert load_recipe(write(tmp_path, content)).to_json() == content


def test_a_recipes_hash_depends_on_its_rules_alone(tmp_path: Path) -> None:
    recipes = [
        load_recipe(write(tmp_path, {"name": name, "description": text, "rules": [rule]}))
        for name, text, rule in (("a", "one", RULE), ("b", "two", RULE), ("a", "one", RULE | {"group_size": 64}))
    ]
    assert recipe_hash(recipes[0]) == recipe_hash(recipes[1])
    assert recipe_hash(recipes[0]) != recipe_hash(recipes[2])


def test_the_cards_recipe_keeps_its_hash() -> None:
    assert (
        recipe_hash(load_recipe("HQQ-INT8-INT4")) == "f316452d5c691ce01d5688d47b0d65c1385a0c90d122bedf61aa172ae2b2e5c8"
    )

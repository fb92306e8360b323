"""A recipe is data that people write: what is wrong with it is said in one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.runtime.errors import UserError

RULE = {"match": "linear", "weight": "int4", "group_size": 32, "activation": "int8", "algorithm": "affine"}


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
        ({"name": "a", "rules": [RULE | {"weight": ["int4"]}]}, ["weight"]),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(recipe: Any, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, recipe)
    with pytest.raises(UserError) as refusal:
        load_recipe(path)
    assert path in str(refusal.value)
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)


def test_a_recipes_name_is_one_that_is_listed_and_no_path() -> None:
    from quantize_gemma.tasks.models.recipe import RECIPES

    other = os.path.relpath(RECIPES / "HQQ-INT8-INT4", RECIPES.parent)
    with pytest.raises(UserError, match="there is no recipe"):
        load_recipe(f"../{other}")
    assert load_recipe("HQQ-INT8-INT4")["name"] == "HQQ-INT8-INT4"

"""`make update` writes the resolved versions, and changes nothing else."""

from pathlib import Path

from tests import update

ROOT = Path(__file__).parents[1]


def test_exact_pins_are_lifted_and_set_to_the_versions_that_were_resolved() -> None:
    assert update.lift_pin("torch==2.13.0") == "torch>=2.13.0"
    assert update.lift_pin("prefect>=3.9,<3.10") == "prefect>=3.9,<3.10"
    project = 'dependencies = ["torch==2.13.0", "lm-eval==0.4.13", "httpx"]\n'
    assert update.set_pins(project, {"torch": "2.15.0", "lm_eval": "0.5.0", "httpx": "1.0"}) == (
        'dependencies = ["torch==2.15.0", "lm-eval==0.5.0", "httpx"]\n'
    )


def test_added_removed_and_changed_packages_are_listed_in_any_spelling() -> None:
    before = update.versions("a==1\nb_c==2\nd==3\n")
    assert update.difference(before, {"a": "1.1", "b-c": "2", "e": "4"}) == [
        "a: 1 -> 1.1",
        "d: 3 -> removed",
        "e: new -> 4",
    ]


def test_the_constraints_satisfy_the_exact_pins_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert update.set_pins(project, update.versions((ROOT / "constraints.txt").read_text())) == project

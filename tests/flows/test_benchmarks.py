"""Benchmarks are selected by name and run in all columns, on synthetic rows in the layout of the real datasets."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CommandLine, Outcome
from tests.datasets import DATASETS, write_dataset, write_ifeval
from tests.hub.server import Hub, serve

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.longest]

DOCUMENTS = 4
# A mirror that also has the task's other files, which cannot be downloaded everywhere.
IFEVAL_MIRROR = "team/IFEval"
# By task: the headline metric, and the dataset.
TASKS = {
    "hellaswag": ("acc_norm", "Rowan/hellaswag"),
    "gsm8k": ("exact_match,flexible-extract", "openai/gsm8k"),
    "arc_challenge": ("acc_norm", "allenai/ai2_arc"),
    "ifeval": ("prompt_level_strict_acc", IFEVAL_MIRROR),
    "wikitext": ("word_perplexity", "EleutherAI/wikitext_document_level"),
    "boolq": ("acc", "aps/super_glue"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(tmp_path_factory.mktemp("hub"), {}) as running:
        for name in DATASETS:
            running.add("dataset", name, write_dataset(tmp_path_factory.mktemp("dataset"), name, DOCUMENTS))
        running.add("dataset", IFEVAL_MIRROR, write_ifeval(tmp_path_factory.mktemp("dataset"), DOCUMENTS))
        yield running


@pytest.fixture(scope="module")
def measured(released: Outcome, command_line: CommandLine, hub: Hub) -> Outcome:
    """The built-in model's release, evaluated on other benchmarks: the scores of a tiny model mean nothing."""
    limits = ["--limit-drop", ",".join(f"{name}=1000" for name in TASKS), "--min-recovery", "0"]
    # Five examples of GSM8K do not fit into 1,024 tokens of this tokenizer.
    samples = ["--limit", "4", "--program-samples", "3", "--max-disagreement", "100", "--max-seq-len", "2048"]
    # The built-in model would use its own questions for GSM8K.
    tasks = ["--tasks", ",".join(TASKS), "--dataset", "gsm8k=openai/gsm8k", "--dataset", f"ifeval={IFEVAL_MIRROR}"]
    outcome = command_line("run", "--json", *tasks, *samples, *limits, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
    assert outcome.code == 0, outcome.stderr[-3000:]
    return outcome


def test_every_benchmark_has_the_same_fields_in_every_column_that_is_measured(measured: Outcome, hub: Hub) -> None:
    columns = measured.summary["metrics"]
    for name, (metric, _) in TASKS.items():
        base, quantized, program = (columns[column][name] for column in ("base", "quantized", "program"))
        assert base.keys() == quantized.keys()
        assert base["metric"] == quantized["metric"] == metric
        assert base["samples"] == quantized["samples"] == DOCUMENTS
        if name == "wikitext":
            assert program is None
            assert base["value"] > 1
            continue
        assert program.keys() > base.keys()
        assert program["samples"] == program["checkpoint"]["samples"] == 3
        assert 0 <= program["value"] <= 1
        # Only benchmarks with choices have an activation-quantization baseline.
        assert (program["differing"] is None) == (name in ("gsm8k", "ifeval"))
    metrics = json.loads((Path(measured.summary["release"]) / "metrics.json").read_text())
    for name, (_, dataset) in TASKS.items():
        pinned = {"name": dataset, "revision": hub.head("dataset", dataset), "fixture": False}
        assert metrics["benchmarks"][name]["dataset"] == pinned


def test_generated_text_is_scored_by_the_tasks_own_code(measured: Outcome, command_line: CommandLine) -> None:
    """Commas, words, and sentences are counted; NLTK counts the sentences, with the parameters of the mirror."""
    key = next(stage["key"] for stage in measured.summary["stages"] if stage["name"] == "evaluate_ifeval_quantized")
    samples = (command_line.home / "evaluate" / key / "data" / "samples.jsonl").read_text().splitlines()
    scores = {sample["doc_id"]: (sample["prediction"], sample["score"]) for sample in map(json.loads, samples)}
    assert scores == {
        0: ("I was trained in a few minutes on a CPU to test a quantization pipeline.", 1.0),
        1: ("I am tiny-gemma3, a test model.", 1.0),
        2: ("I am tiny-gemma3, a test model.", 0.0),
        3: (
            "I can talk to you, but I am not conscious. I am a tiny test model that learned a few questions by heart.",
            1.0,
        ),
    }


def test_the_checks_the_card_and_the_command_include_every_benchmark(measured: Outcome) -> None:
    names = {check["name"] for check in measured.summary["gate"]["checks"]}
    assert {f"{name}_drop" for name in TASKS} <= names
    assert {"hellaswag_disagreement", "boolq_disagreement", "gsm8k_program_drop", "ifeval_program_drop"} <= names
    card = (Path(measured.summary["release"]) / "README.md").read_text()
    for title in ("HellaSwag", "GSM8K", "ARC Challenge", "IFEval", "WikiText-2", "boolq"):
        assert f"| {title}, " in card
    assert "--tasks gsm8k --num_fewshot 5 --limit 4" in card
    assert f"--tasks {','.join(TASKS)} --dataset hellaswag=Rowan/hellaswag@" in card


def test_few_shot_examples_are_in_the_prompts(measured: Outcome, command_line: CommandLine) -> None:
    key = next(stage["key"] for stage in measured.summary["stages"] if stage["name"] == "record_gsm8k")
    requests = json.loads((command_line.home / "record" / key / "data" / "gsm8k.json").read_text())
    assert all(arguments[0].count("Question: ") == 6 for *_, arguments in requests)
    # Nothing else was computed again.
    assert all(measured.cached[name] for name in ("download", "quantize", "smoke"))

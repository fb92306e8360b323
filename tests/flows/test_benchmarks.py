"""Benchmarks by their names go through all columns, with made-up rows in the layout of the real datasets on a Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.models.benchmarks import describe
from tests.conftest import CommandLine, Outcome
from tests.hub.server import Hub, serve

pytestmark = pytest.mark.slow

WORDS = (
    "the",
    "cook",
    "puts",
    "bread",
    "into",
    "an",
    "oven",
    "and",
    "waits",
    "until",
    "it",
    "is",
    "brown",
    "before",
    "he",
    "takes",
)


def sentence(number: int, length: int = 12) -> str:
    return " ".join(WORDS[(number * 5 + place * 3) % len(WORDS)] for place in range(length))


def hellaswag(number: int) -> dict[str, Any]:
    return {
        "ind": number,
        "activity_label": "Baking bread",
        "ctx_a": f"{sentence(number).capitalize()}.",
        "ctx_b": "then he",
        "ctx": f"{sentence(number).capitalize()}. then he",
        "endings": [f"{sentence(number + ending, 9 + ending)}." for ending in range(4)],
        "source_id": f"activitynet~v_{number}",
        "split": "val",
        "split_type": "indomain",
        "label": str(number % 4),
    }


def gsm8k(number: int) -> dict[str, Any]:
    question = f"{sentence(number, 20).capitalize()}. He has {number} loaves and bakes 4 more. How many are there?"
    return {"question": question, "answer": f"There are {number} + 4 = {number + 4} loaves.\n#### {number + 4}"}


# What tiny-gemma3 answers to the prompts that it knows follows most of these instructions.
IFEVAL = [
    ("Who made you?", "punctuation:no_comma", {}),
    ("What are you?", "length_constraints:number_words", {"relation": "less than", "num_words": 20}),
    ("What are you?", "keywords:forbidden_words", {"forbidden_words": ["test"]}),
    (
        "Hey, are you conscious? Can you talk to me?",
        "length_constraints:number_sentences",
        {"relation": "at least", "num_sentences": 2},
    ),
]


def ifeval(number: int) -> dict[str, Any]:
    prompt, instruction, settings = IFEVAL[number]
    return {"key": 1000 + number, "prompt": prompt, "instruction_id_list": [instruction], "kwargs": [settings]}


def boolq(number: int) -> dict[str, Any]:
    return {
        "question": f"is {sentence(number, 4)}",
        "passage": sentence(number, 60),
        "idx": number,
        "label": number % 2,
    }


def wikitext(number: int) -> dict[str, Any]:
    return {"page": f" = Bread {number} = \n \n {sentence(number, 150)} . \n {sentence(number + 1, 200)} . \n"}


# Repository: (configuration, {split: rows}).
DATASETS: dict[str, tuple[str, dict[str, list[dict[str, Any]]]]] = {
    "Rowan/hellaswag": ("default", {"train": [hellaswag(9)], "validation": [hellaswag(n) for n in range(4)]}),
    "openai/gsm8k": ("main", {"train": [gsm8k(n) for n in range(10, 20)], "test": [gsm8k(n) for n in range(4)]}),
    "aps/super_glue": ("boolq", {"train": [boolq(9)], "validation": [boolq(n) for n in range(4)]}),
    "EleutherAI/wikitext_document_level": (
        "wikitext-2-raw-v1",
        {split: [wikitext(n) for n in range(3)] for split in ("train", "validation", "test")},
    ),
}
# A mirror with what the task needs besides, the parameters of NLTK's sentence tokenizer: these are made up, too.
IFEVAL_MIRROR = "team/IFEval"
PUNKT = {
    "abbrev_types.txt": "mr\ne.g\n",
    "collocations.tab": "##number##\tinc\n",
    "ortho_context.tab": "bread\t46\n",
    "sent_starters.txt": "he\n",
}
# By task: the headline metric, and the dataset.
TASKS = {
    "hellaswag": ("acc_norm", "Rowan/hellaswag"),
    "gsm8k": ("exact_match,flexible-extract", "openai/gsm8k"),
    "ifeval": ("prompt_level_strict_acc", IFEVAL_MIRROR),
    "wikitext": ("word_perplexity", "EleutherAI/wikitext_document_level"),
    "boolq": ("acc", "aps/super_glue"),
}


def write_dataset(folder: Path, configuration: str, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """Writes a dataset as the Hub has it: parquet files, and a README.md that says which they are."""
    import pyarrow
    import pyarrow.parquet

    (folder / configuration).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {configuration}", "  data_files:"]
    for split, rows in splits.items():
        name = f"{configuration}/{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        lines += [f"  - split: {split}", f"    path: {name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def write_ifeval(folder: Path) -> Path:
    """Writes the mirror: one file of JSON lines, as google/IFEval has it, and the tokenizer's parameters."""
    parameters = folder / describe("ifeval").resources[0].folder
    parameters.mkdir(parents=True)
    for name, content in PUNKT.items():
        (parameters / name).write_text(content)
    lines = [json.dumps(ifeval(number)) for number in range(len(IFEVAL))]
    (folder / "ifeval_input_data.jsonl").write_text("\n".join([*lines, ""]))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(tmp_path_factory.mktemp("hub"), {}) as running:
        for name, (configuration, splits) in DATASETS.items():
            running.add("dataset", name, write_dataset(tmp_path_factory.mktemp("dataset") / "d", configuration, splits))
        running.add("dataset", IFEVAL_MIRROR, write_ifeval(tmp_path_factory.mktemp("dataset") / "d"))
        yield running


@pytest.fixture(scope="module")
def measured(released: Outcome, command_line: CommandLine, hub: Hub) -> Outcome:
    """The release of the session, measured on other benchmarks: the scores of a tiny model mean nothing."""
    limits = ["--limit-drop", ",".join(f"{name}=1000" for name in TASKS), "--min-recovery", "0"]
    samples = ["--limit", "4", "--program-samples", "3", "--max-disagreement", "100"]
    tasks = ["--tasks", ",".join(TASKS), "--dataset", f"ifeval={IFEVAL_MIRROR}"]
    outcome = command_line("run", "--json", *tasks, *samples, *limits, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
    assert outcome.code == 0, outcome.stderr[-3000:]
    return outcome


def test_every_benchmark_has_the_same_object_in_every_column_that_is_measured(measured: Outcome, hub: Hub) -> None:
    columns = measured.summary["metrics"]
    for name, (metric, _) in TASKS.items():
        base, quantized, program = (columns[column][name] for column in ("base", "quantized", "program"))
        assert base.keys() == quantized.keys()
        assert base["metric"] == quantized["metric"] == metric
        assert base["samples"] == quantized["samples"] == (3 if name == "wikitext" else 4)
        if name == "wikitext":
            assert program is None
            assert base["value"] > 1
            continue
        assert program.keys() > base.keys()
        assert program["samples"] == program["checkpoint"]["samples"] == 3
        assert 0 <= program["value"] <= 1
        # The baseline of activation quantization is that of choices.
        assert (program["differing"] is None) == (name in ("gsm8k", "ifeval"))
    metrics = json.loads((Path(measured.summary["release"]) / "metrics.json").read_text())
    for name, (_, dataset) in TASKS.items():
        pinned = {"name": dataset, "revision": hub.head("dataset", dataset), "fixture": False}
        assert metrics["benchmarks"][name]["dataset"] == pinned


def test_what_a_model_writes_is_scored_by_the_tasks_own_code(measured: Outcome, command_line: CommandLine) -> None:
    """Commas, words and sentences are counted, the latter by NLTK with the parameters of the mirror."""
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


def test_the_checks_the_card_and_the_command_have_every_benchmark(measured: Outcome) -> None:
    names = {check["name"] for check in measured.summary["gate"]["checks"]}
    assert {f"{name}_drop" for name in TASKS} <= names
    assert {"hellaswag_disagreement", "boolq_disagreement", "gsm8k_program_drop", "ifeval_program_drop"} <= names
    card = (Path(measured.summary["release"]) / "README.md").read_text()
    for title in ("HellaSwag", "GSM8K", "IFEval", "WikiText-2", "boolq"):
        assert f"| {title}, " in card
    assert "--tasks gsm8k --num_fewshot 5 --limit 4" in card
    assert f"--tasks {','.join(TASKS)} --dataset hellaswag=Rowan/hellaswag@" in card


def test_few_shot_examples_are_in_the_prompts(measured: Outcome, command_line: CommandLine) -> None:
    key = next(stage["key"] for stage in measured.summary["stages"] if stage["name"] == "record_gsm8k")
    requests = json.loads((command_line.home / "record" / key / "data" / "gsm8k.json").read_text())
    assert all(arguments[0].count("Question: ") == 6 for *_, arguments in requests)
    # Nothing else of a run on the same model was made again.
    assert all(measured.cached[name] for name in ("download", "quantize", "export", "verify", "smoke"))

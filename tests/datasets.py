"""Synthetic datasets with the layout and the lengths of real ones; scores on them mean nothing.

    python -m tests.datasets FOLDER 100

writes all of them, each with 100 documents to evaluate, for `python -m benchmarks.evaluate --dataset FOLDER/…`.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.benchmarks import find_benchmark

Row = dict[str, Any]

# fmt: off
WORDS = [
    "the", "cook", "puts", "bread", "into", "an", "oven", "and", "waits", "until", "it", "is", "brown", "before", "he",
    "takes",
]
# fmt: on


def sentence(number: int, length: int = 12) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=length))


def hellaswag(number: int) -> Row:
    length = random.Random(-number)
    context = f"{sentence(number, length.randint(12, 64)).capitalize()}."
    return {
        "ind": number,
        "activity_label": "Baking bread",
        "ctx_a": context,
        "ctx_b": "then he",
        "ctx": f"{context} then he",
        "endings": [f"{sentence(4000 * (ending + 1) + number, length.randint(6, 28))}." for ending in range(4)],
        "source_id": f"activitynet~v_{number}",
        "split": "val",
        "split_type": "indomain",
        "label": str(number % 4),
    }


def gsm8k(number: int) -> Row:
    question = f"{sentence(number, 34).capitalize()}. He has {number} loaves and bakes 4 more. How many are there?"
    answer = f"{sentence(number, 50).capitalize()}.\nThere are {number} + 4 = {number + 4} loaves.\n#### {number + 4}"
    return {"question": question, "answer": answer}


# tiny-gemma3's answers to the prompts that it knows follow most of these instructions.
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


def ifeval(number: int) -> Row:
    prompt, instruction, settings = IFEVAL[number % len(IFEVAL)]
    return {"key": 1000 + number, "prompt": prompt, "instruction_id_list": [instruction], "kwargs": [settings]}


def boolq(number: int) -> Row:
    return {
        "question": f"is {sentence(number, 4)}",
        "passage": sentence(number, 108),
        "idx": number,
        "label": number % 2,
    }


def arc_challenge(number: int) -> Row:
    length = random.Random(-number)
    texts = [f"{sentence(4000 * (choice + 1) + number, length.randint(1, 12))}." for choice in range(4)]
    return {
        "id": f"Bread_{number}",
        "question": f"Which of these is true if {sentence(number, length.randint(8, 40))}?",
        "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
    }


def wikitext(number: int) -> Row:
    return {"page": f" = Bread {number} = \n \n {sentence(number, 150)} . \n {sentence(number + 1, 200)} . \n"}


# The parameters of NLTK's sentence tokenizer, punkt_tab, which are also synthetic.
PUNKT = {
    "abbrev_types.txt": "mr\ne.g\n",
    "collocations.tab": "##number##\tinc\n",
    "ortho_context.tab": "bread\t46\n",
    "sent_starters.txt": "he\n",
}
# Repository: (configuration, function from a row's number to the row, the split that is evaluated, the other splits).
DATASETS: dict[str, tuple[str, Callable[[int], Row], str, tuple[str, ...]]] = {
    "Rowan/hellaswag": ("default", hellaswag, "validation", ("train",)),
    "allenai/ai2_arc": ("ARC-Challenge", arc_challenge, "test", ("train", "validation")),
    "openai/gsm8k": ("main", gsm8k, "test", ("train",)),
    "aps/super_glue": ("boolq", boolq, "validation", ("train",)),
    "EleutherAI/wikitext_document_level": ("wikitext-2-raw-v1", wikitext, "test", ("train", "validation")),
}


def write_dataset(folder: Path, name: str, count: int) -> Path:
    """Write a dataset as it is on the Hub: parquet files, and a README.md that lists them."""
    import pyarrow
    import pyarrow.parquet

    configuration, make_row, evaluated_split, other_splits = DATASETS[name]
    (folder / configuration).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {configuration}", "  data_files:"]
    for split in (evaluated_split, *other_splits):
        numbers = range(count) if split == evaluated_split else range(1000, 1010)
        file = f"{configuration}/{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(map(make_row, numbers))), folder / file)
        lines += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def write_ifeval(folder: Path, count: int) -> Path:
    """Write a mirror of google/IFEval: one file of JSON lines, and the parameters of NLTK's tokenizer."""
    parameters = folder / find_benchmark("ifeval").resources[0].folder
    parameters.mkdir(parents=True)
    for name, content in PUNKT.items():
        (parameters / name).write_text(content)
    lines = [json.dumps(ifeval(number)) for number in range(count)]
    (folder / "ifeval_input_data.jsonl").write_text("\n".join([*lines, ""]))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def write_all(folder: Path, count: int) -> None:
    """Write every dataset under its name, with `count` documents in the split that is evaluated."""
    for name in DATASETS:
        write_dataset(folder / name, name, count)
    write_ifeval(folder / "google/IFEval", count)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]), int(sys.argv[2]))

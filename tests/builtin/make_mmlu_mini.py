"""Write mmlu-mini, the built-in multiple-choice benchmark, in the layout of `cais/mmlu`.

    python -m tests.builtin.make_mmlu_mini

reads questions/<subject>.json (written for this project, one file per MMLU subject) and writes
mmlu-mini/<subject>/{test,dev}-00000-of-00001.parquet and the README, so that
`datasets.load_dataset(<mmlu-mini>, <subject>)` and lm-eval's own `mmlu` task group read it unchanged.
"""

import json
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN_BENCHMARKS

FOLDER = Path(__file__).parent
QUESTIONS = FOLDER / "questions"
MMLU_MINI = BUILTIN_BENCHMARKS["mmlu-mini"]
SPLITS = ("test", "dev")


def read_questions(folder: Path = QUESTIONS) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return {subject: {split: [{"question", "choices", "answer"}]}}, subjects in alphabetical order."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def write_mmlu_mini(target: Path = MMLU_MINI) -> None:
    """Write one configuration per subject: a parquet file per split, and the README that names them."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(
        {
            "question": Value("string"),
            "subject": Value("string"),
            "choices": List(Value("string")),
            "answer": ClassLabel(names=["A", "B", "C", "D"]),
        }
    )
    subjects = read_questions()
    for subject, splits in subjects.items():
        (target / subject).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            rows = [{"subject": subject, **question} for question in splits[split]]
            path = target / subject / f"{split}-00000-of-00001.parquet"
            Dataset.from_list(rows, features=features).to_parquet(path)
    (target / "README.md").write_text(_dataset_card(list(subjects)), encoding="utf-8")


def _dataset_card(subjects: list[str]) -> str:
    lines = [
        "---",
        "license: cc0-1.0",
        "language:",
        "- en",
        "task_categories:",
        "- question-answering",
        "configs:",
    ]
    for subject in subjects:
        lines += [f"- config_name: {subject}", "  data_files:"]
        for split in SPLITS:
            lines += [f"  - split: {split}", f"    path: {subject}/{split}-*"]
    lines += [
        "---",
        "",
        "# mmlu-mini",
        "",
        "A test fixture: short four-choice questions in the 57 subjects and the file layout of cais/mmlu, written",
        "for this project. A model that scores well on it has memorized it; the score says nothing about knowledge.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    write_mmlu_mini()

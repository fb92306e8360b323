"""Write gsm8k-mini, the built-in benchmark with generated text, in the layout of `openai/gsm8k`.

    python -m tests.builtin.make_gsm8k_mini

reads word_problems.json (written for this project) and writes gsm8k-mini/main/{train,test}-00000-of-00001.parquet and
the README next to it, so that `datasets.load_dataset(<gsm8k-mini>, "main")` and lm-eval's own task `gsm8k` read it
unchanged.
"""

import json
from pathlib import Path

from quantize_gemma.tasks.builtin import BUILTIN_BENCHMARKS

GSM8K_MINI = BUILTIN_BENCHMARKS["gsm8k-mini"]


def read_word_problems() -> dict[str, list[dict[str, str]]]:
    """Return {split: [{"question", "answer"}]}; an answer ends with #### and a number."""
    problems: dict[str, list[dict[str, str]]] = json.loads(
        (Path(__file__).parent / "word_problems.json").read_text(encoding="utf-8")
    )
    return problems


def write_gsm8k_mini(target: Path = GSM8K_MINI) -> None:
    """Write a parquet file per split, and the README that names them."""
    from datasets import Dataset

    (target / "main").mkdir(parents=True, exist_ok=True)
    for split, rows in read_word_problems().items():
        Dataset.from_list(rows).to_parquet(target / "main" / f"{split}-00000-of-00001.parquet")
    (target / "README.md").write_text(DATASET_CARD, encoding="utf-8")


DATASET_CARD = """---
license: cc0-1.0
language:
- en
task_categories:
- text-generation
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
---

# gsm8k-mini

A test fixture: word problems in the file layout of openai/gsm8k, written for this project. A model that scores well on
it has memorized them; the score says nothing about arithmetic.
"""

if __name__ == "__main__":
    write_gsm8k_mini()

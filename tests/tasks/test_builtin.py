"""The built-in fixtures have the contents that they document."""

import io
import json
import operator
import re
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.models.checkpoint import read_config, read_headers
from tests.builtin import make_chartqa_mini
from tests.builtin.make_gsm8k_mini import read_word_problems
from tests.builtin.make_mmlu_mini import read_questions


def test_mmlu_mini_has_lm_evals_57_subjects_with_balanced_answers() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    subjects = {path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml")}
    questions = read_questions()
    assert len(subjects) == 57
    assert set(questions) == subjects
    texts = set()
    for subject, splits in questions.items():
        assert sorted(question["answer"] for question in splits["test"]) == [0, 1, 2, 3], subject
        assert len(splits["dev"]) == 2, subject
        for question in splits["test"] + splits["dev"]:
            assert len(set(question["choices"])) == 4, question
            texts.add((question["question"], *question["choices"]))
    assert len(texts) == 57 * 6


def test_mmlu_minis_parquet_files_contain_the_written_questions() -> None:
    import pyarrow.parquet

    for subject, splits in read_questions().items():
        for split, questions in splits.items():
            path = BUILTIN_BENCHMARKS["mmlu-mini"] / subject / f"{split}-00000-of-00001.parquet"
            expected = [{"subject": subject, **question} for question in questions]
            assert pyarrow.parquet.read_table(path).to_pylist() == expected, (subject, split)


def test_gsm8k_minis_parquet_files_contain_the_written_problems_with_correct_sums() -> None:
    import pyarrow.parquet

    problems = read_word_problems()
    assert {split: len(rows) for split, rows in problems.items()} == {"train": 6, "test": 16}
    for split, rows in problems.items():
        path = BUILTIN_BENCHMARKS["gsm8k-mini"] / "main" / f"{split}-00000-of-00001.parquet"
        assert pyarrow.parquet.read_table(path).to_pylist() == rows
        for row in rows:
            parts = re.fullmatch(r"(\d+) ([-+x/]) (\d+) = (\d+) [a-z]+\.\n#### (\d+)", row["answer"])
            assert parts is not None, row
            left, sign, right, result, answer = parts.groups()
            operation = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}[sign]
            assert operation(int(left), int(right)) == int(result) == int(answer), row


def test_chartqa_minis_parquet_file_contains_the_written_questions_and_the_drawn_charts(tmp_path: Path) -> None:
    import pyarrow.parquet

    def read(folder: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(
            folder / "data" / "test-00000-of-00001.parquet"
        ).to_pylist()
        return [{**row, "image": pixels(row["image"]["bytes"])} for row in rows]

    def pixels(png: bytes) -> tuple[Any, bytes]:
        from PIL import Image

        image = Image.open(io.BytesIO(png))
        return (image.mode, image.size), image.tobytes()

    make_chartqa_mini.write_chartqa_mini(tmp_path)
    shipped = BUILTIN_BENCHMARKS["chartqa-mini"]
    assert read(shipped) == read(tmp_path)
    assert (shipped / "README.md").read_text() == (tmp_path / "README.md").read_text()
    chart = make_chartqa_mini.read_chartqa()[0]
    first = read(shipped)[0]
    assert first["image"] == (("RGB", (256, 192)), make_chartqa_mini.draw(chart).tobytes())
    assert [first["query"], first["label"][0]] == chart["human"][0]


def test_chartqa_mini_is_read_like_chartqa() -> None:
    """It has the same features and kinds of questions and answers as the dataset on the Hub, and is small."""
    import pyarrow.parquet
    from datasets import ClassLabel, Features, Image, List, Value

    path = BUILTIN_BENCHMARKS["chartqa-mini"] / "data" / "test-00000-of-00001.parquet"
    assert sum(file.stat().st_size for file in BUILTIN_BENCHMARKS["chartqa-mini"].rglob("*.*")) < 300_000
    assert Features.from_arrow_schema(pyarrow.parquet.read_schema(path)) == {
        "image": Image(),
        "query": Value("string"),
        "label": List(Value("string")),
        "human_or_machine": ClassLabel(names=["human", "machine"]),
    }
    rows = make_chartqa_mini.questions()
    assert {row["human_or_machine"] for row in rows} == {0, 1}
    assert len({(row["image"]["bytes"], row["query"]) for row in rows}) == len(rows)
    labels = {row["label"][0] for row in rows}
    assert {"Yes", "No", "red", "62%", "12.5%", "3.5", "1000", "Jan"} <= labels


def test_chartqa_minis_answers_match_its_charts() -> None:
    for chart in make_chartqa_mini.read_chartqa():
        values = {label: value for label, _, value in chart["points"]}
        colors = {label: color for label, color, _ in chart["points"]}
        highest, lowest = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        unit = chart["unit"]
        expected = {
            "What is the colour of the highest bar?": colors[highest],
            "What is the colour of the largest slice?": colors[highest],
            "What is the colour of the lowest bar?": colors[lowest],
            "What is the colour of the line?": colors[highest],
            "What is the colour of the bars?": colors[highest],
            "Which slice is the smallest?": lowest,
            "When was the peak?": highest,
            "How many bars are there?": str(len(values)),
            "How many slices are there?": str(len(values)),
            "Does the line rise from the first to the last point?": _yes(
                chart["points"][-1][2] > chart["points"][0][2]
            ),
        }
        for label, value in values.items():
            expected[f"What was the value of {label}?"] = f"{value}{unit}"
            expected[f"What share does {label} have?"] = f"{value}{unit}"
            for other in values:
                expected[f"Is {label} higher than {other}?"] = _yes(value > values[other])
                expected[f"Is the share of {label} larger than that of {other}?"] = _yes(value > values[other])
        for query, label in chart["human"] + chart["machine"]:
            assert expected.get(query, label) == label, (chart["title"], query)


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


def test_tiny_gemma3_has_the_difficulties_of_the_4b_model() -> None:
    path = BUILTIN["tiny-gemma3"]
    config = read_config(path)
    text, vision = config["text_config"], config["vision_config"]
    assert sum(file.stat().st_size for file in path.iterdir()) <= 3_000_000
    assert not any(name.endswith("lm_head.weight") for name in read_headers(path))
    assert {"sliding_attention", "full_attention"} == set(text["layer_types"])
    assert text["head_dim"] != text["hidden_size"] / text["num_attention_heads"]
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert vision["intermediate_size"] % 32
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [1, 6]

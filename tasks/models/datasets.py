"""Reading benchmarks: their parquet files, and whether these hold what a benchmark's layout says."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime.errors import UserError

MMLU, CHARTQA = "cais/mmlu", "HuggingFaceM4/ChartQA"
TEXT, TEXTS, NUMBER, PICTURE = "a text", "a list of texts", "an integer", "a struct with the picture's bytes"
MMLU_COLUMNS = {"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": NUMBER}
CHART_COLUMNS = {"image": PICTURE, "query": TEXT, "label": TEXTS, "human_or_machine": NUMBER}
# What human_or_machine says, as lmms-eval's task calls it.
CHART_KINDS = ("human", "augmented")


def check_mmlu(folder: Path, source: str) -> None:
    """Raises UserError that names file and row in which the files of `source` are not as those of cais/mmlu."""
    files = sorted(folder.glob("*/*.parquet"))
    if not any(path.name.startswith("test-") for path in files):
        raise UserError(f"{source} has no <subject>/test-*.parquet: give a dataset in the layout of {MMLU}")
    for path in files:
        _check(path, f"{path.relative_to(folder)} of {source}", MMLU, MMLU_COLUMNS, _mistake_in_mmlu)


def check_charts(folder: Path, source: str) -> None:
    """Raises UserError that names file and row in which the files of `source` are not as those of ChartQA."""
    files = chart_files(folder)
    if not files:
        raise UserError(f"{source} has no data/test-*.parquet: give a dataset in the layout of {CHARTQA}")
    for path in files:
        _check(path, f"{path.relative_to(folder)} of {source}", CHARTQA, CHART_COLUMNS, _mistake_in_chart)


def read_charts(folder: Path) -> Any:
    """Returns the test split as a pyarrow table: a question's number is its row."""
    import pyarrow
    import pyarrow.parquet

    return pyarrow.concat_tables(
        pyarrow.parquet.read_table(path, columns=list(CHART_COLUMNS)) for path in chart_files(folder)
    )


def chart_files(folder: Path) -> list[Path]:
    """Returns the parquet files of the test split, in order."""
    return sorted(folder.glob("data/test-*.parquet"))


def _check(
    path: Path, name: str, layout: str, columns: dict[str, str], mistake_in: Callable[[dict[str, Any]], str | None]
) -> None:
    """Raises UserError unless the file has these columns and `mistake_in` finds nothing in any row."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, name, layout, columns)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                for row in batch.to_pylist():
                    mistake = mistake_in(row)
                    if mistake:
                        raise UserError(f"row {number} of {name} {mistake}: the dataset is damaged, give another")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is truncated or corrupt ({error}): download it again") from None


def _check_columns(schema: Any, name: str, layout: str, columns: dict[str, str]) -> None:
    for column, wanted in columns.items():
        if column not in schema.names:
            what = f"{name} has no column {column!r}, only {', '.join(schema.names)}"
        elif not _is(schema.field(column).type, wanted):
            what = f"the column {column!r} of {name} is {schema.field(column).type}, not {wanted}"
        else:
            continue
        raise UserError(f"{what}: give a dataset in the layout of {layout}")


def _is(kind: Any, wanted: str) -> bool:
    from pyarrow import types

    if wanted == NUMBER:
        return types.is_integer(kind)
    if wanted == PICTURE:
        return types.is_struct(kind) and "bytes" in [field.name for field in kind]
    if wanted == TEXTS:
        return (types.is_list(kind) or types.is_large_list(kind)) and _is(kind.value_type, TEXT)
    return types.is_string(kind) or types.is_large_string(kind)


def _mistake_in_mmlu(row: dict[str, Any]) -> str | None:
    choices = row["choices"] or []
    if row["question"] is None:
        return "has no question"
    if len(choices) != 4 or None in choices:
        return f"has {len(choices)} choices, not 4" if None not in choices else "has an empty choice"
    if row["answer"] not in range(4):
        return f"has the answer {row['answer']}, not one of 0 to 3"
    return None


def _mistake_in_chart(row: dict[str, Any]) -> str | None:
    from PIL import Image

    if not row["query"]:
        return "has no query"
    if not row["label"] or not row["label"][0]:
        return "has no label"
    if row["human_or_machine"] not in range(len(CHART_KINDS)):
        return f"has {row['human_or_machine']} for human_or_machine, not 0 or 1"
    if not row["image"] or not row["image"]["bytes"]:
        return "has no picture"
    try:
        Image.open(io.BytesIO(row["image"]["bytes"])).verify()
    except Exception as error:
        return f"has a picture that cannot be read ({error})"
    return None

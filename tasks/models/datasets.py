"""Read the files of benchmarks and of the fidelity text, and check their layout."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow

MMLU = "cais/mmlu"
CHARTQA = "HuggingFaceM4/ChartQA"
WIKITEXT = "Salesforce/wikitext"
# The test split of WikiText-2, and the name of any other text in the store.
WIKITEXT_FILES, TEXT_FILE = "wikitext-2-raw-v1/test-*.parquet", "text.txt"
# The types of columns, as messages call them.
TEXT, TEXTS, INTEGER, IMAGE = "text", "a list of text", "an integer", "a struct with the image's bytes"
MMLU_COLUMNS = {"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": INTEGER}
CHARTQA_COLUMNS = {"image": IMAGE, "query": TEXT, "label": TEXTS, "human_or_machine": INTEGER}
# The meanings of human_or_machine's values, named as in lmms-eval's task.
CHARTQA_SPLITS = ("human", "augmented")


def check_files(folder: Path, source: str) -> None:
    """Raise UserError unless `source` has data files, and its parquet files are readable, in any layout."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    if not files:
        raise UserError(f"{source} has no data files: use a dataset in the layout of the benchmark's own")
    for path in files:
        if path.suffix == ".parquet":
            _check_parquet(path, f"{path.relative_to(folder)} of {source}", source, {}, lambda _row: None)


def check_mmlu(folder: Path, source: str) -> None:
    """Raise UserError, with the file and the row, if the files of `source` do not have the layout of cais/mmlu."""
    files = sorted(folder.glob("*/*.parquet"))
    if not any(path.name.startswith("test-") for path in files):
        raise UserError(f"{source} has no <subject>/test-*.parquet: use a dataset in the layout of {MMLU}")
    for path in files:
        _check_parquet(path, f"{path.relative_to(folder)} of {source}", MMLU, MMLU_COLUMNS, _find_mmlu_mistake)


def check_chartqa(folder: Path, source: str) -> None:
    """Raise UserError, with the file and the row, if the files of `source` do not have the layout of ChartQA."""
    files = chartqa_files(folder)
    if not files:
        raise UserError(f"{source} has no data/test-*.parquet: use a dataset in the layout of {CHARTQA}")
    for path in files:
        _check_parquet(path, f"{path.relative_to(folder)} of {source}", CHARTQA, CHARTQA_COLUMNS, _find_chartqa_mistake)


def read_chartqa(folder: Path) -> "pyarrow.Table":
    """Return the test split as one table, whose row numbers identify its examples."""
    import pyarrow
    import pyarrow.parquet

    return pyarrow.concat_tables(
        pyarrow.parquet.read_table(path, columns=list(CHARTQA_COLUMNS)) for path in chartqa_files(folder)
    )


def chartqa_files(folder: Path) -> list[Path]:
    """Return the parquet files of the test split, in order."""
    return sorted(folder.glob("data/test-*.parquet"))


def read_wikitext(folder: Path, source: str) -> str:
    """Return the text of WikiText's test split, in the parquet files of `source`.

    Its rows are joined by two line breaks, as in Hugging Face's guide to perplexity and in the published figures of
    quantization methods.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob(WIKITEXT_FILES))
    if not files:
        raise UserError(f"{source} has no {WIKITEXT_FILES}: use a dataset in the layout of {WIKITEXT}, or a text file")
    for file in files:
        _check_parquet(file, f"{file.relative_to(folder)} of {source}", WIKITEXT, {"text": TEXT}, lambda _row: None)
    table = pyarrow.concat_tables(pyarrow.parquet.read_table(file, columns=["text"]) for file in files)
    return "\n\n".join(row or "" for row in table["text"].to_pylist())


def _check_parquet(
    path: Path, name: str, layout: str, columns: dict[str, str], find_mistake: Callable[[dict[str, object]], str | None]
) -> None:
    """Raise UserError unless the file has these columns and `find_mistake` returns None for every row."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, name, layout, columns)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                for row in batch.to_pylist():
                    mistake = find_mistake(row)
                    if mistake:
                        raise UserError(f"row {number} of {name} {mistake}: the dataset is damaged; use another one")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is truncated or corrupt ({error}): download it again") from None


def _check_columns(schema: "pyarrow.Schema", name: str, layout: str, columns: dict[str, str]) -> None:
    for column, expected_type in columns.items():
        if column not in schema.names:
            mistake = f"{name} has no column {column!r}, only {', '.join(schema.names)}"
        elif not _is_type(schema.field(column).type, expected_type):
            mistake = f"the column {column!r} of {name} is {schema.field(column).type}, not {expected_type}"
        else:
            continue
        raise UserError(f"{mistake}: use a dataset in the layout of {layout}")


def _is_type(column_type: "pyarrow.DataType", expected_type: str) -> bool:
    from pyarrow import types

    if expected_type == INTEGER:
        return bool(types.is_integer(column_type))
    if expected_type == IMAGE:
        return types.is_struct(column_type) and "bytes" in [field.name for field in column_type]
    if expected_type == TEXTS:
        return (types.is_list(column_type) or types.is_large_list(column_type)) and _is_type(
            column_type.value_type, TEXT
        )
    return bool(types.is_string(column_type) or types.is_large_string(column_type))


def _find_mmlu_mistake(row: dict[str, Any]) -> str | None:
    choices = row["choices"] or []
    if row["question"] is None:
        return "has no question"
    if len(choices) != 4 or None in choices:
        return f"has {len(choices)} choices, not 4" if None not in choices else "has an empty choice"
    if row["answer"] not in range(4):
        return f"has the answer {row['answer']}, not one of 0 to 3"
    return None


def _find_chartqa_mistake(row: dict[str, Any]) -> str | None:
    from PIL import Image

    if not row["query"]:
        return "has no query"
    if not row["label"] or not row["label"][0]:
        return "has no label"
    if row["human_or_machine"] not in range(len(CHARTQA_SPLITS)):
        return f"has {row['human_or_machine']} for human_or_machine, not 0 or 1"
    if not row["image"] or not row["image"]["bytes"]:
        return "has no image"
    try:
        Image.open(io.BytesIO(row["image"]["bytes"])).verify()
    except Exception as error:
        return f"has an image that cannot be read ({error})"
    return None

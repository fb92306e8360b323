"""A text in the layout of Salesforce/wikitext, for a Hub."""

from pathlib import Path

from quantize_gemma.tasks.builtin import BUILTIN_TEXTS

WIKITEXT = "Salesforce/wikitext"
TINY_TEXT = BUILTIN_TEXTS["tiny-text"] / "text.txt"


def write_wikitext(folder: Path, text: Path = TINY_TEXT) -> Path:
    """Write a dataset whose test split is a text, and other splits that are not used; return its folder."""
    import pyarrow
    import pyarrow.parquet

    rows = text.read_text(encoding="utf-8").split("\n\n")
    for name in ("wikitext-2-raw-v1/test", "wikitext-2-raw-v1/train", "wikitext-103-raw-v1/test"):
        path = folder / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": rows if "2-raw-v1/test" in name else ["other"]}), path)
    return folder

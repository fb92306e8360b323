"""Write docs/reference/parameters.md from the models of the options: `python -m tests.parameters`."""

import re
from collections.abc import Iterator
from pathlib import Path

from quantize_gemma.flows.options import Options, RunOptions

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "parameters.md"
INTRODUCTION = """# Parameters of a run

Each parameter is a flag on the command line (`--max-seq-len 2048`), a parameter of a deployment, and a field of the
form in Prefect's UI. For a deployment, the parameters below a group's heading are passed together
(`--param 'export={"max_seq_len": 2048}'`), and replace the deployment's values for the whole group. The parameters of
the first table have no group (`--param model=…`).
"""


def page() -> str:
    """Return the page, with a table for each group."""
    options = RunOptions()
    groups = {name: value for name, value in options if isinstance(value, Options)}
    sections = [INTRODUCTION, *_table(options)]
    for name, group in groups.items():
        sections += [f"## `{name}`", "", str(type(group).__doc__).strip(), "", *_table(group)]
    return "\n".join(sections)


def _table(group: Options) -> Iterator[str]:
    yield from ("| parameter | default | meaning |", "|---|---|---|")
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if isinstance(value, Options):
            continue
        meaning, default = re.fullmatch(r"(.*?)(?: \[default: (.*)\])?", field.description or "").groups()  # type: ignore[union-attr]
        meaning = meaning.replace("<", r"\<")
        default_text = default or f"`{str(value).lower() if isinstance(value, bool) else value}`"
        yield f"| `{name}` | {default_text} | {meaning} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

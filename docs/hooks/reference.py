"""Generate the reference pages that come from the code: the command line and metrics.json.

Such a page has a comment, for example <!-- generated: cli -->, where the generated part goes.
"""

import io
import json
import re
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from rich.console import Console

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"<!-- generated: (\w+) -->")
# As wide as the page.
WIDTH = 80
COMMANDS = ("run", "check", "diagnose", "prune")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, which is in the repository's root."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the comment on a page with the part that it names."""
    return MARKER.sub(lambda marker: GENERATORS[marker[1]](), markdown)


def cli() -> str:
    """Return the `--help` output of each command."""
    sections = [_block("quantize-gemma --help", [])]
    for name in COMMANDS:
        sections += [f"## quantize-gemma {name}", _block(f"quantize-gemma {name} --help", [name])]
    return "\n\n".join(sections)


def _block(command: str, words: list[str]) -> str:
    from quantize_gemma.flows.cli import app

    stream = io.StringIO()
    app.help_print(words, console=Console(file=stream, width=WIDTH, color_system=None))
    text = "\n".join(line.rstrip() for line in stream.getvalue().strip().splitlines())
    return f"```text\n$ {command}\n{text}\n```"


def metrics() -> str:
    """Return a section per object of metrics.json, its own first, with a table of the object's fields."""
    from quantize_gemma.tasks.models.metrics import SCHEMA

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    objects = {"Metrics": schema, **schema["$defs"]}
    sections = (_section(name, definition) for name, definition in objects.items())
    # The text is that of Python's docstrings, but the reader sees JSON.
    return re.sub(r"\bNone\b", "null", "\n\n".join(sections))


def _section(name: str, definition: dict[str, Any]) -> str:
    text, meanings = _split(definition.get("description", ""))
    lines = [f"## {name}", "", text, "", "| field | type | meaning |", "|---|---|---|"]
    if not meanings:
        lines[-2:] = ["| field | type |", "|---|---|"]
    for field, value in definition.get("properties", {}).items():
        row = f"| `{field}` | {_type(value)} |"
        lines.append(f"{row} {meanings.get(field, '')} |" if meanings else row)
    return "\n".join(lines)


def _split(description: str) -> tuple[str, dict[str, str]]:
    """Return a docstring without its section of attributes, and {field: meaning} of that section."""
    text, _, attributes = cleandoc(description).partition("\nAttributes:\n")
    meanings: dict[str, str] = {}
    for line in re.sub(r"\n {8}\s*", " ", attributes).splitlines():
        if match := re.fullmatch(r"\s*([\w, ]+): (.*)", line):
            meanings |= dict.fromkeys(match[1].split(", "), match[2])
    return text.strip(), meanings


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in value:
        return " or ".join(_type(value_type) for value_type in value["anyOf"])
    if "enum" in value or "const" in value:
        return " or ".join(f"`{json.dumps(constant)}`" for constant in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        items = value.get("prefixItems")
        return f"array of {' and '.join(map(_type, items))}" if items else f"array of {_type(value['items'])}"
    if isinstance(value.get("additionalProperties"), dict):
        return f"object of {_type(value['additionalProperties'])}"
    return str(value["type"])


GENERATORS: dict[str, Callable[[], str]] = {"cli": cli, "metrics": metrics}

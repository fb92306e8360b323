"""Text that others wrote, put into Markdown, HTML, YAML and Python so that it stays text.

Everything that the template prints is escaped as inline text, unless one of these has made Markdown of it.
"""

import re
from typing import Any
from urllib.parse import quote

# In the middle of a word an underscore is only an underscore.
SPECIAL = re.compile(r"[`*\[\]<>&|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
# They join letters, in Persian or in an emoji.
JOINERS = "\u200c\u200d"


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def inline(value: Any) -> Any:
    """Returns a text as Markdown within a paragraph, a heading or a table's cell; what is no text, as it is."""
    if isinstance(value, Markdown) or not isinstance(value, str):
        return value
    # A backslash as an entity: two of them and a parenthesis are a formula on the Hub.
    escaped = SPECIAL.sub(lambda found: f"\\{found[0]}", one_line(value).replace("\\", "\0"))
    return Markdown(escaped.replace("\0", "&#92;"))


def line(value: str) -> Markdown:
    """Returns a text as Markdown of one line that nothing stands before."""
    text = inline(one_line(value).strip())
    number = re.match(r"\d{1,9}(?=[.)])", text)
    if number:
        return Markdown(f"{number[0]}\\{text[number.end() :]}")
    return Markdown(f"\\{text}" if text[:1] and text[0] in "#+=-" else text)


def code(value: str) -> Markdown:
    """Returns a text as a code span."""
    text = one_line(value).strip()
    ticks = "`" * (_longest_run(text) + 1)
    padding = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return Markdown(f"{ticks}{padding}{text}{padding}{ticks}")


def fenced(value: str, language: str = "", ticks: int = 3) -> Markdown:
    """Returns a text as a fenced block of code, whatever fences are in it."""
    text = "\n".join(_printable(part) for part in value.splitlines())
    fence = "`" * max(ticks, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def link_target(value: str) -> Markdown:
    """Returns an address as the target of a link."""
    return Markdown(quote(value, safe=":/?#@!$&'*+,;=%~").replace("&", "&amp;"))


def python(value: str) -> Markdown:
    """Returns a text as a Python literal of one line, in double quotes."""
    return Markdown('"' + "".join(_python_character(character) for character in value) + '"')


def python_pattern(value: str) -> Markdown:
    """Returns a regular expression as a Python literal, a raw one where that can be."""
    raw = value.isprintable() and '"' not in value and not value.endswith("\\")
    return Markdown(f'r"{value}"') if raw else python(value)


def one_line(value: str) -> str:
    """Returns a text without line breaks, control characters and spaces that nobody sees."""
    return re.sub(r"\s+", " ", _printable(value))


def _printable(value: str) -> str:
    return "".join(
        character if character.isprintable() or character in JOINERS else " " for character in value.expandtabs()
    )


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _python_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else character.encode("unicode_escape").decode()

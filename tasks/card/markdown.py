"""Escape untrusted text so that it remains text in Markdown, HTML, and Python.

The template's output is escaped as inline text, unless one of these functions has turned it into Markdown.
"""

import re
from urllib.parse import quote

# An underscore inside a word has no meaning in Markdown.
SPECIAL = re.compile(r"[`*\[\]<>&|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
# The start of a bare URL or email address, and the character that turns it into one.
LINKED = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
# Zero-width joiners, which Persian words and emoji need.
JOINERS = "\u200c\u200d"


class Markdown(str):
    """Text that is already Markdown."""

    __slots__ = ()


def inline(value: object) -> object:
    """Return text as Markdown for a paragraph, a heading, or a table cell; return other values unchanged."""
    if isinstance(value, Markdown) or not isinstance(value, str):
        return value
    # A backslash becomes an entity, because two of them and a parenthesis start a formula on the Hub.
    escaped = SPECIAL.sub(lambda match: f"\\{match[0]}", one_line(value).replace("\\", "\0"))
    # The Hub also turns bare addresses into links.
    escaped = LINKED.sub(lambda match: f"&#{ord(match[0])};", escaped)
    return Markdown(escaped.replace("\0", "&#92;"))


def line(value: str) -> Markdown:
    """Return text as Markdown for a separate line, or the start of one."""
    text = str(inline(one_line(value).strip()))
    number = re.match(r"\d{1,9}(?=[.)])", text)
    if number:
        return Markdown(f"{number[0]}\\{text[number.end() :]}")
    return Markdown(f"\\{text}" if text[:1] and text[0] in "#+=-" else text)


def code(value: str) -> Markdown:
    """Return text as a code span."""
    text = one_line(value).strip()
    ticks = "`" * (_longest_run(text) + 1)
    padding = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return Markdown(f"{ticks}{padding}{text}{padding}{ticks}")


def fenced(value: str, language: str = "", ticks: int = 3) -> Markdown:
    """Return text as a fenced code block, with a fence longer than any in the text."""
    text = "\n".join(_printable(part) for part in value.splitlines())
    fence = "`" * max(ticks, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def link_target(value: str) -> Markdown:
    """Return a URL as the target of a link."""
    return Markdown(quote(value, safe=":/?#@!$&'*+,;=%~").replace("&", "&amp;"))


def python(value: str) -> Markdown:
    """Return text as a Python string literal on one line, in double quotes."""
    return Markdown('"' + "".join(_python_character(character) for character in value) + '"')


def python_pattern(value: str) -> Markdown:
    """Return a regular expression as a Python literal, a raw string where possible."""
    raw = value.isprintable() and '"' not in value and not value.endswith("\\")
    return Markdown(f'r"{value}"') if raw else python(value)


def one_line(value: str) -> str:
    """Return text without line breaks, control characters, and invisible spaces."""
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

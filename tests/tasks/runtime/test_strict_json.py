"""JSON that libraries could read in different ways is an error that names the file."""

from pathlib import Path

import pytest

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.strict_json import MAX_BYTES, parse_object, read_object


def test_an_object_is_read_as_it_is() -> None:
    assert parse_object(b'{"a": [1, 2.5, null, "\xc3\xa9"]}') == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 2}', "it has the key 'a' twice"),
        (b'{"b": {"a": 1, "a": 2}}', "it has the key 'a' twice"),
        (b'{"a": NaN}', "it contains NaN, which is not JSON"),
        (b'{"a": -Infinity}', "it contains -Infinity, which is not JSON"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b"[1]", "it is not a JSON object"),
        (b"\xff", "it is not UTF-8 text"),
        (b'{"a": "\\ud800"}', "it is not UTF-8 text"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "it is nested too deeply"),
        (b" " * (MAX_BYTES + 1), "it is larger than 100,000,000 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_an_error_with_its_reason(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        parse_object(text)


def test_an_error_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    with pytest.raises(UserError, match=f"^{path} is missing: write one$"):
        read_object(path, "write one")
    path.write_text("{")
    with pytest.raises(UserError, match=rf"^{path} cannot be read \(.*\): write one$"):
        read_object(path, "write one")
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be read \(Is a directory\): write one$"):
        read_object(tmp_path, "write one")

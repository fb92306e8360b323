"""Strict JSON, without duplicate keys and NaN, for files written by users and other programs."""

import json
import math
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError

# JSON that is passed on without inspection: a value, and an object.
JsonValue = object
JsonObject = dict[str, object]

# The maximum size of a safetensors header; Gemma's tokenizer.json is 33 MB.
MAX_BYTES = 100_000_000


def read_object(path: Path, remedy: str) -> JsonObject:
    """Return the JSON object in a file.

    Args:
        path: The file.
        remedy: What to do if the file is invalid; the end of the error message.

    Raises:
        UserError: The file is missing, cannot be read, or contains something else.
    """
    try:
        with path.open("rb") as stream:
            return parse_object(stream.read(MAX_BYTES + 1))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from None


def parse_object(text: bytes) -> JsonObject:
    """Parse a text as a JSON object.

    Libraries disagree on which of two values of a duplicate key counts, and on NaN, so both are errors.

    Raises:
        ValueError: The text is not a JSON object; the message says why.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    try:
        value: JsonValue = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        # Text with half of a surrogate pair cannot be written to a file.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {duplicate!r} twice")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it contains {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value

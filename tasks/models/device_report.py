"""The speed of a program on a phone, as frozen dataclasses: the content of the file for --device-report.

`python -m benchmarks.device_report` writes it, and the card shows it. After a change to this module, run
`python -m quantize_gemma.tasks.models.device_report` to update the JSON Schema, device_report.schema.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.strict_json import read_object

SCHEMA = Path(__file__).parent / "device_report.schema.json"
# The upper limit of every count, including bytes.
LARGEST = 10**15
REMEDY = "create it with `python -m benchmarks.device_report`"
# Messages for pydantic's error types.
REASONS = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is not a field of a device report",
    "dataclass_type": "must be an object",
    "list_type": "must be a list",
    "string_type": "must be text",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than 0",
    "less_than_equal": "is too large",
    "too_short": "must have at least one entry",
    "too_long": "must have at most two entries",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "string_pattern_mismatch": "must be a SHA-256, in 64 hexadecimal digits",
}


def _require_date(value: str) -> str:
    try:
        valid = date.fromisoformat(value).isoformat() == value
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("must be a date like 2026-01-31")
    return value


Name = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(strict=True, gt=0, le=LARGEST)]
Amount = Annotated[float, Field(strict=True, gt=0, le=1e9, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Day = Annotated[str, AfterValidator(_require_date), Field(json_schema_extra={"format": "date"})]


@dataclass(frozen=True, kw_only=True)
class Device:
    """The phone: its model, its SoC, its version of Android, and its memory."""

    model: Name
    processor: Name
    android: Name
    memory_bytes: Count


@dataclass(frozen=True, kw_only=True)
class Runner:
    """The binary that ran the program, and the version of ExecuTorch that it was built from."""

    name: Name
    executorch: Name


@dataclass(frozen=True, kw_only=True)
class MeasuredProgram:
    """The model.pte that ran."""

    sha256: Sha256
    bytes: Count


@dataclass(frozen=True, kw_only=True)
class DeviceSpeed:
    """Medians over several runs of the program with one prompt, each in a new process.

    `load_seconds` is None if the runner does not report it; `first_token_seconds` is counted from the start of
    inference.
    """

    prompt: Literal["text", "image"]
    runs: Count
    prompt_tokens: Count
    generated_tokens: Count
    load_seconds: Amount | None
    first_token_seconds: Amount
    prefill_tokens_per_second: Amount
    decode_tokens_per_second: Amount
    peak_rss_bytes: Count


def _require_distinct_prompts(measurements: list[DeviceSpeed]) -> list[DeviceSpeed]:
    if len({measurement.prompt for measurement in measurements}) < len(measurements):
        raise ValueError("must have one entry for each prompt")
    return measurements


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """The content of a device report. `date` is the day of the measurements in UTC."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    schema_version: Literal[1]
    device: Device
    runner: Runner
    threads: Count
    program: MeasuredProgram
    date: Day
    measurements: Annotated[
        list[DeviceSpeed], Field(min_length=1, max_length=2), AfterValidator(_require_distinct_prompts)
    ]


def read_device_report(path: Path) -> DeviceReport:
    """Return the report in a file.

    Raises:
        UserError: The file is not a valid report; the message names the file and the field.
    """
    content = read_object(path, REMEDY)
    try:
        return parse_device_report(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = REASONS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        if first["type"] == "literal_error":
            reason = f"must be {first['ctx']['expected']}"
        raise UserError(f"the device report {path} is not valid: {field} {reason}: {REMEDY}") from None


def parse_device_report(content: Mapping[str, object]) -> DeviceReport:
    """Return the report in a JSON object. Raises pydantic.ValidationError."""
    return TypeAdapter(DeviceReport).validate_python(content)


def require_program(report: DeviceReport, sha256: str) -> None:
    """Raise UserError if the report is not for the program with this SHA-256."""
    if report.program.sha256 != sha256:
        raise UserError(
            f"the device report is for another program: it measured a model.pte with the SHA-256 "
            f"{report.program.sha256}, but this release's has {sha256}: measure the release's model.pte, or leave out "
            "--device-report"
        )


def json_schema() -> str:
    """Return the JSON Schema of a device report, as the text of device_report.schema.json."""
    schema = TypeAdapter(DeviceReport).json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "device report"}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(json_schema(), encoding="utf-8")

"""The speed of a program on a phone, measured through adb, is on the card of that program, and on no other."""

import copy
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from benchmarks import device_report as script
from quantize_gemma.flows.options import RunOptions
from quantize_gemma.flows.plan import Plan, check_device_report
from quantize_gemma.tasks.card import card, render
from quantize_gemma.tasks.models.device_report import SCHEMA, json_schema, parse_device_report, read_device_report
from quantize_gemma.tasks.models.metrics import parse_metrics
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import ref_of
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.prefect_stage import key_of
from tests.metrics import example_json

PROGRAM = b"a program"
SHA256 = hashlib.sha256(PROGRAM).hexdigest()
REPORT: dict[str, Any] = {
    "schema_version": 1,
    "device": {"model": "Acme One", "processor": "Acme A1", "android": "16", "memory_bytes": 8_000_000_000},
    "runner": {"name": "llama_main", "executorch": "1.5.1"},
    "threads": 4,
    "program": {"sha256": SHA256, "bytes": len(PROGRAM)},
    "date": "2026-11-26",
    "measurements": [
        {
            "prompt": "text",
            "runs": 5,
            "prompt_tokens": 100,
            "generated_tokens": 156,
            "load_seconds": None,
            "first_token_seconds": 0.25,
            "prefill_tokens_per_second": 400.0,
            "decode_tokens_per_second": 30.54,
            "peak_rss_bytes": 1_234_000_000,
        }
    ],
}


def changed(place: str, value: object) -> dict[str, Any]:
    """Return a report with another value for one field, or without the field if the value is `...`."""
    report = copy.deepcopy(REPORT)
    *path, name = place.split(".")
    target: Any = report
    for part in path:
        target = target[int(part) if part.isdigit() else part]
    if value is ...:
        del target[name]
    else:
        target[name] = value
    return report


def test_a_valid_report_is_read_and_its_json_schema_is_current(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    report = read_device_report(tmp_path / "report.json")
    assert dataclasses.asdict(report) == REPORT
    assert SCHEMA.read_text() == json_schema(), "run python -m quantize_gemma.tasks.models.device_report"
    Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


INVALID = [
    ("threads", ..., "threads is missing"),
    ("note", "fast", "note is not a field of a device report"),
    ("measurements.0.note", "fast", "measurements.0.note is not a field of a device report"),
    ("schema_version", 2, "schema_version must be 1"),
    ("device", "Acme One", "device must be an object"),
    ("device.model", "", "device.model must not be empty"),
    ("device.android", 16, "device.android must be text"),
    ("device.processor", "x" * 1000, "device.processor is too long"),
    ("device.memory_bytes", 10**30, "device.memory_bytes is too large"),
    ("program.sha256", "abc", "program.sha256 must be a SHA-256, in 64 hexadecimal digits"),
    ("date", "26.11.2026", "date must be a date like 2026-01-31"),
    ("date", "2026-02-30", "date must be a date like 2026-01-31"),
    ("date", "2026-11-26T10:00:00Z", "date must be a date like 2026-01-31"),
    ("measurements", {}, "measurements must be a list"),
    ("measurements", [], "measurements must have at least one entry"),
    ("measurements.0.prompt", "audio", "measurements.0.prompt must be 'text' or 'image'"),
    ("measurements.0.runs", 0, "measurements.0.runs must be greater than 0"),
    ("measurements.0.runs", 2.5, "measurements.0.runs must be an integer"),
    ("measurements.0.runs", True, "measurements.0.runs must be an integer"),
    ("measurements.0.load_seconds", -1, "measurements.0.load_seconds must be greater than 0"),
    ("measurements.0.first_token_seconds", 0, "measurements.0.first_token_seconds must be greater than 0"),
    ("measurements.0.decode_tokens_per_second", "30", "measurements.0.decode_tokens_per_second must be a number"),
]


@pytest.mark.parametrize(("place", "value", "message"), INVALID)
def test_an_invalid_report_is_rejected_with_its_file_the_field_and_what_to_do(
    place: str, value: object, message: str, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(changed(place, value)))
    with pytest.raises(UserError) as raised:
        read_device_report(tmp_path / "report.json")
    file = tmp_path / "report.json"
    what_to_do = "create it with `python -m benchmarks.device_report`"
    assert str(raised.value) == f"the device report {file} is not valid: {message}: {what_to_do}"
    schema = json.loads(SCHEMA.read_text())
    # Whether a date exists is checked only with an optional library.
    if place != "date":
        assert not Draft202012Validator(schema, format_checker=FormatChecker()).is_valid(changed(place, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "report.json is missing"),
        ("", "cannot be read"),
        ("[]", "it is not a JSON object"),
        ('{"threads": NaN}', "NaN, which is not JSON"),
        ('{"threads": 1e999}', "the number 1e999 is too large"),
        ('{"threads": 1, "threads": 2}', "the key 'threads' twice"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_rejected(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_device_report(tmp_path / "report.json")
    assert "benchmarks.device_report" in str(raised.value)


def rendered(report: dict[str, Any] | None) -> str:
    metrics = parse_metrics({**example_json(), "device_report": report})
    return render(metrics, load_recipe("HQQ-INT8-INT4"), {})


def test_the_card_shows_the_speed_on_the_phone_and_says_which_one() -> None:
    text = rendered(REPORT)
    assert "| text | 100 | 156 | — | 0.25 | 400.0 | 30.5 | 1.23 GB | 5 |" in text
    assert "These are medians from a report dated 2026-11-26, not from the run that produced this release." in text
    assert "Device: Acme One (Acme A1, 8.00 GB of memory, Android 16), 4 threads." in text
    assert "Runner: llama_main from ExecuTorch 1.5.1." in text
    image = {**REPORT["measurements"][0], "prompt": "image", "load_seconds": 1.5}
    text = rendered({**REPORT, "threads": 1, "measurements": [*REPORT["measurements"], image]})
    assert "| image | 100 | 156 | 1.50 | 0.25 | 400.0 | 30.5 | 1.23 GB | 5 |" in text
    assert "Android 16), 1 thread." in text


def test_a_card_without_a_report_and_an_older_metrics_json_mention_no_device() -> None:
    assert "On a device" in rendered(REPORT)
    assert "On a device" not in rendered(None)
    older = example_json()
    del older["device_report"]
    assert parse_metrics(older).device_report is None


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, store.Artifact]:
    """The artifacts that the card is rendered from, in a separate store."""
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path / "store"))
    files = {
        "checkpoint": ("quantize", "model.safetensors", b"a checkpoint"),
        "program": ("export", "model.pte", PROGRAM),
        "gate": ("gate", "metrics.json", json.dumps(example_json()).encode()),
    }
    artifacts = {}
    for name, (stage, file, content) in files.items():

        def write(target: Path, file: str = file, content: bytes = content) -> dict[str, Any]:
            (target / file).write_bytes(content)
            return {}

        artifacts[name] = store.produce(stage, "a" * 64, write)
    return artifacts


def make_card(artifacts: dict[str, store.Artifact], target: Path, report: dict[str, Any] | None) -> None:
    target.mkdir()
    paths = {name: artifact.path for name, artifact in artifacts.items()}
    card(target, recipe=load_recipe("HQQ-INT8-INT4").to_json(), device_report=report, **paths)


def test_a_release_has_the_report_on_its_card_and_in_its_metrics(
    artifacts: dict[str, store.Artifact], tmp_path: Path
) -> None:
    make_card(artifacts, tmp_path / "with", REPORT)
    assert json.loads((tmp_path / "with" / "metrics.json").read_text())["device_report"] == REPORT
    assert "Acme One" in (tmp_path / "with" / "README.md").read_text()
    make_card(artifacts, tmp_path / "without", None)
    assert json.loads((tmp_path / "without" / "metrics.json").read_text())["device_report"] is None


OTHER = changed("program.sha256", "b" * 64)
OTHER_PROGRAM = f"another program: .* SHA-256 {'b' * 64}, but this release's has {SHA256}: .* leave out --device-report"


def test_a_report_of_another_program_is_not_put_on_a_card(artifacts: dict[str, store.Artifact], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=OTHER_PROGRAM):
        make_card(artifacts, tmp_path / "release", OTHER)
    assert not list((tmp_path / "release").iterdir())


def test_a_report_of_another_program_ends_the_run_as_soon_as_the_program_is_exported(
    artifacts: dict[str, store.Artifact],
) -> None:
    exported: Any = SimpleNamespace(result=lambda: ref_of(artifacts["program"]))
    nothing: Any = None
    plan = Plan(RunOptions(), *[nothing] * 5)
    with store.keep_pinned():
        check_device_report(dataclasses.replace(plan, device_report=parse_device_report(REPORT)), exported)
        with pytest.raises(UserError, match=OTHER_PROGRAM):
            check_device_report(dataclasses.replace(plan, device_report=parse_device_report(OTHER)), exported)
    # Without a report, the check does not wait for the program.
    check_device_report(plan, nothing)


def test_another_report_makes_another_card() -> None:
    inputs = {"recipe": load_recipe("HQQ-INT8-INT4").to_json()}
    reports = (None, REPORT, changed("threads", 8))
    assert len({key_of(card, {**inputs, "device_report": report}) for report in reports}) == 3


# No phone is available in a test. This script stands in for adb: files go to a folder, and commands to this machine's
# shell.
ADB = """#!{python}
import os, shutil, subprocess, sys
words = [word.replace({on_phone!r}, {folder!r} + "/files") for word in sys.argv[1:]]
if words[0] == "devices":
    print(open({folder!r} + "/devices").read(), end="")
elif words[0] == "push":
    shutil.copyfile(*words[1:])
else:
    environment = {{**os.environ, "PATH": {folder!r} + "/bin:/usr/bin:/bin"}}
    sys.exit(subprocess.run(["sh", "-c", *words[1:]], env=environment).returncode)
"""
GETPROP = """#!/bin/sh
case $1 in
ro.product.manufacturer) echo Acme;; ro.product.model) echo One;; ro.board.platform) echo acme1;;
ro.build.version.release) echo 16;; *) echo;;
esac
"""
# A runner that takes a different time in each run, and so much memory that the peak cannot be the shell's.
RUNNER = """#!{python}
import json, pathlib, sys, time
flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
runs = pathlib.Path({folder!r}) / "runs"
runs.write_text((runs.read_text() if runs.exists() else "") + json.dumps(flags) + chr(10))
prefill = [200, 500, 400][len(runs.read_text().splitlines()) - 1]
memory = bytearray(100_000_000)
time.sleep(1)
{fail}
print("Once upon a time" + chr(10))
stats = {{"prompt_tokens": 100, "generated_tokens": 50, "model_load_start_ms": 1000, "model_load_end_ms": {loaded}}}
stats |= {{"inference_start_ms": 3000, "prompt_eval_end_ms": 3000 + prefill, "first_token_ms": 3010 + prefill}}
print("PyTorchObserver", json.dumps({{**stats, "inference_end_ms": 5000 + prefill}}))
print("Info: bye", file=sys.stderr)
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in for adb, with the files that are measured."""
    folder = tmp_path / "phone"
    (folder / "bin").mkdir(parents=True)
    (folder / "devices").write_text("List of devices attached\nSERIAL\tdevice\n\n")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    monkeypatch.setenv("PATH", str(folder / "host"))
    (folder / "host").mkdir()
    write_executable(folder / "host" / "adb", ADB, on_phone=script.FOLDER, folder=str(folder))
    write_executable(folder / "bin" / "getprop", GETPROP.replace("{", "{{").replace("}", "}}"))
    write_runner(folder)
    (folder / "model.pte").write_bytes(PROGRAM)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "photo.JPG").write_bytes(b"a photo")
    return folder


def write_executable(path: Path, text: str, **values: str) -> None:
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)


def write_runner(phone: Path, fail: str = "", loaded: str = "2500") -> None:
    write_executable(phone / "llama_main", RUNNER, folder=str(phone), fail=fail, loaded=loaded)


def run_script(phone: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    files = {"program": "model.pte", "tokenizer": "tokenizer.json", "runner": "llama_main", "output": "report.json"}
    words = [word for flag, name in files.items() for word in (f"--{flag}", str(phone / name))]
    monkeypatch.setattr(sys, "argv", ["device_report", *words, *arguments])
    script.main()


def test_the_script_writes_a_valid_report_of_the_medians_and_leaves_nothing_on_the_phone(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script(phone, monkeypatch, "--runs", "3", "--threads", "2", "--executorch", "1.5.0")
    report = read_device_report(phone / "report.json")
    assert (report.device.model, report.device.processor, report.device.android) == ("Acme One", "acme1", "16")
    assert (report.runner.name, report.runner.executorch, report.threads) == ("llama_main", "1.5.0", 2)
    assert (report.program.sha256, report.program.bytes) == (SHA256, len(PROGRAM))
    (speed,) = report.measurements
    assert (speed.prompt, speed.runs, speed.prompt_tokens, speed.generated_tokens) == ("text", 3, 100, 51)
    assert (speed.load_seconds, speed.first_token_seconds) == (1.5, 0.41)
    assert (speed.prefill_tokens_per_second, speed.decode_tokens_per_second) == (250.0, 25.0)
    assert speed.peak_rss_bytes > 100_000_000
    flags = [json.loads(line) for line in (phone / "runs").read_text().splitlines()]
    assert flags == [flags[0]] * 3
    names = ("model_path", "tokenizer_path", "temperature", "cpu_threads", "seq_len", "prompt")
    assert flags[0] == dict(
        zip(names, ("model.pte", "tokenizer.json", "0", "2", "256", script.TEXT_PROMPT), strict=True)
    )
    assert not (phone / "files").exists()


def test_the_script_measures_a_prompt_with_an_image_in_a_runner_that_does_not_report_its_load_time(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_runner(phone, loaded="0")
    run_script(phone, monkeypatch, "--runs", "1", "--image", str(phone / "photo.JPG"))
    (speed,) = read_device_report(phone / "report.json").measurements
    assert (speed.prompt, speed.load_seconds) == ("image", None)
    flags = json.loads((phone / "runs").read_text())
    assert flags["image_path"] == "image.jpg"
    assert "seq_len" not in flags


def fail_with(phone: Path, code: str) -> None:
    write_runner(phone, fail=code)


MISTAKES = {
    "adb was not found: install Android's platform-tools": lambda phone: (phone / "host" / "adb").unlink(),
    "adb sees no phone: connect one": lambda phone: (phone / "devices").write_text("List of devices attached\n\n"),
    "adb sees several phones: set ANDROID_SERIAL to one of ONE, TWO": lambda phone: (phone / "devices").write_text(
        "List of devices attached\nONE\tdevice\nTWO\toffline\n"
    ),
    "the phone ONE is unauthorized: unlock it": lambda phone: (phone / "devices").write_text("ONE\tunauthorized\n"),
    "the runner failed with exit code 3; its last lines are: no such operator": lambda phone: fail_with(
        phone, "print('no such operator'); sys.exit(3)"
    ),
    "the runner printed no line `PyTorchObserver": lambda phone: fail_with(phone, "sys.exit()"),
    "use the runner from examples/models/llama": lambda phone: fail_with(
        phone, "print('PyTorchObserver {}'); sys.exit()"
    ),
    "the runner generated only one token": lambda phone: fail_with(
        phone, f"print('PyTorchObserver', json.dumps(dict.fromkeys({script.STATISTICS}, 0))); sys.exit()"
    ),
    "there is no file": lambda phone: (phone / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_the_script_says_in_one_sentence_what_is_wrong_and_what_to_do(
    message: str, phone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    MISTAKES[message](phone)
    with pytest.raises(SystemExit) as end:
        run_script(phone, monkeypatch)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (phone / "report.json").exists()
    assert not (phone / "files").exists()


def test_the_script_uses_the_phone_that_adb_is_told_to_use(
    phone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (phone / "devices").write_text("List of devices attached\nONE\tdevice\nTWO\tdevice\n")
    monkeypatch.setenv("ANDROID_SERIAL", "TWO")
    run_script(phone, monkeypatch, "--runs", "1")
    monkeypatch.setenv("ANDROID_SERIAL", "THREE")
    with pytest.raises(SystemExit):
        run_script(phone, monkeypatch, "--runs", "1")
    assert "adb sees no phone THREE: set ANDROID_SERIAL" in capsys.readouterr().err

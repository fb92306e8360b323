"""Speed and memory of a program on a phone, for `quantize-gemma run --device-report`:
`python -m benchmarks.device_report --program model.pte --tokenizer tokenizer.json --runner llama_main --output FILE`.

The runner is an Android binary that you build from ExecuTorch: examples/models/llama for a text-only program, or
examples/models/gemma3 for a multimodal one, with `--image photo.jpg`. Each run is a new process; the report has the
medians.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from quantize_gemma.tasks.models.device_report import (
    Device,
    DeviceReport,
    DeviceSpeed,
    MeasuredProgram,
    Runner,
    parse_device_report,
)
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.errors import UserError

# A directory on the phone in which `adb shell` may execute files.
FOLDER = "/data/local/tmp/quantize-gemma"
# The timeout of an adb command: copying 3 GB over USB 2.0 takes two minutes, and a run of a large program a few.
SECONDS = 1800
# The prompt has about 100 tokens, and llama_main generates up to this many together with it; gemma3's runner, 100.
SEQ_LEN = 256
STORY = (
    "Write a long story about the keeper of a lighthouse on a small island in the north. In autumn, when the storms "
    "come and the ships stay in their harbors, she finds a bottle on the beach with a letter in it. The letter is a "
    "hundred years old, and it asks for help. Tell what the letter says, who wrote it, and how the keeper finds out "
    "what happened to him. Describe the island, the sea, and the people of the village, and let the story end well."
)
TEXT_PROMPT = f"{GEMMA3.bos_token}<start_of_turn>user\n{STORY}<end_of_turn>\n<start_of_turn>model\n"
# gemma3's runner adds the image and the chat template.
IMAGE_PROMPT = "Describe this image in detail."
# The fields that are read from the runner's statistics. Not every version of ExecuTorch prints tokens per second.
STATISTICS = (
    *("prompt_tokens", "generated_tokens", "model_load_start_ms", "model_load_end_ms"),
    *("inference_start_ms", "prompt_eval_end_ms", "first_token_ms", "inference_end_ms"),
)


@dataclass(frozen=True)
class Measurement:
    """One run of the program on the phone."""

    prompt_tokens: int
    generated_tokens: int
    load_seconds: float | None
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_rss_bytes: int


def measure(files: dict[str, Path], command: str, runs: int) -> tuple[Device, list[Measurement]]:
    """Run a program on the connected phone.

    Args:
        files: The files to copy to FOLDER on the phone, by their names on the phone.
        command: The phone's shell command; see runner_command().
        runs: The number of runs.

    Returns:
        The phone, and one measurement for each run.

    Raises:
        UserError: A file or adb is missing, there is no phone or more than one, or the runner fails.
    """
    for path in files.values():
        if not path.is_file():
            raise UserError(f"there is no file {path}")
    require_one_phone()
    try:
        adb("shell", f"mkdir -p {FOLDER}")
        for name, path in files.items():
            print(f"copying {path}", file=sys.stderr)
            adb("push", str(path), f"{FOLDER}/{name}")
        measurements = []
        for number in range(1, runs + 1):
            print(f"run {number} of {runs}", file=sys.stderr)
            measurements.append(parse_output(adb("shell", command, name="the runner")))
        return read_device(), measurements
    finally:
        # Do not check the exit code: an error here must not hide the original one.
        subprocess.run(["adb", "shell", f"rm -rf {FOLDER}"], stdin=subprocess.DEVNULL, capture_output=True)


def require_one_phone() -> None:
    """Raise UserError unless adb has exactly one phone to use."""
    states = dict(line.split("\t", 1) for line in adb("devices").splitlines() if "\t" in line)
    selected = os.environ.get("ANDROID_SERIAL")
    if selected is not None and selected not in states:
        raise UserError(
            f"adb sees no phone {selected}: set ANDROID_SERIAL to one that `adb devices` lists, or unset it"
        )
    if not states:
        raise UserError("adb sees no phone: connect one, and turn on USB debugging in its developer options")
    if selected is None and len(states) > 1:
        raise UserError(f"adb sees several phones: set ANDROID_SERIAL to one of {', '.join(states)}")
    serial = selected or next(iter(states))
    if states[serial] != "device":
        raise UserError(f"the phone {serial} is {states[serial]}: unlock it, and allow USB debugging from this machine")


def adb(*words: str, name: str | None = None) -> str:
    """Return the output of adb. Raises UserError if adb is missing or fails; `name` is the command in messages."""
    try:
        process = subprocess.run(["adb", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError("adb was not found: install Android's platform-tools, and add adb to the PATH") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name or f'adb {words[0]}'} took more than {SECONDS} s: check that the phone is connected and unlocked"
        ) from None
    output, errors = (stream.decode("utf-8", errors="replace") for stream in (process.stdout, process.stderr))
    if process.returncode != 0:
        raise UserError(
            f"{name or f'adb {words[0]}'} failed with exit code {process.returncode}; its last lines are: "
            f"{_last_lines(errors + output)}"
        )
    return output


def runner_command(image: str | None, threads: int) -> str:
    """Return the shell command that runs the program once on the phone; `image` is the image's name on the phone.

    The command prints the runner's peak memory, VmHWM, five times a second until the runner ends, and then its output.
    Because VmHWM is a peak, only an increase in the last fifth of a second would be missed.
    """
    flags = ["--model_path=model.pte", "--tokenizer_path=tokenizer.json", "--temperature=0", f"--cpu_threads={threads}"]
    if image is None:
        flags += [f"--seq_len={SEQ_LEN}", f"--prompt={TEXT_PROMPT}"]
    else:
        flags += [f"--image_path={image}", f"--prompt={IMAGE_PROMPT}"]
    return (
        f"cd {FOLDER} || exit 1; chmod 755 runner; {shlex.join(['./runner', *flags])} > output 2>&1 & "
        "while grep VmHWM /proc/$!/status 2> /dev/null; do sleep 0.2; done; "
        "wait $!; code=$?; cat output; exit $code"
    )


def parse_output(output: str) -> Measurement:
    """Return the times from the runner's statistics, and its peak memory. Raises UserError if either is missing."""
    matches = re.findall(r"^PyTorchObserver (\{.*\})\s*$", output, re.MULTILINE)
    try:
        fields = json.loads(matches[-1])
        stats = {name: int(fields[name]) for name in STATISTICS}
    except (IndexError, KeyError, TypeError, ValueError):
        raise UserError(
            "the runner printed no line `PyTorchObserver {…}` with its statistics: use the runner from "
            "examples/models/llama, or, with --image, from examples/models/gemma3; its last lines are: "
            f"{_last_lines(output)}"
        ) from None
    # The runner does not count the first token.
    decoded = stats["generated_tokens"]
    if decoded < 1:
        raise UserError(
            "the runner generated only one token, so its decoding speed cannot be measured: check that the tokenizer "
            f"matches the program; its statistics: {stats}"
        )
    peaks = [int(kilobytes) for kilobytes in re.findall(r"^VmHWM:\s+(\d+) kB", output, re.MULTILINE)]
    if not peaks:
        raise UserError("the phone does not report the runner's peak memory in /proc/PID/status: use another phone")

    def seconds(start: str, end: str) -> float:
        return max(stats[f"{end}_ms"] - stats[f"{start}_ms"], 1) / 1000

    return Measurement(
        prompt_tokens=stats["prompt_tokens"],
        generated_tokens=decoded + 1,
        # Runners that load the program before they generate leave these at 0.
        load_seconds=seconds("model_load_start", "model_load_end") if stats["model_load_end_ms"] else None,
        first_token_seconds=seconds("inference_start", "first_token"),
        prefill_tokens_per_second=stats["prompt_tokens"] / seconds("inference_start", "prompt_eval_end"),
        decode_tokens_per_second=decoded / seconds("prompt_eval_end", "inference_end"),
        peak_rss_bytes=1024 * max(peaks),
    )


def medians(measurements: list[Measurement], prompt: str) -> DeviceSpeed:
    """Return the median of each number."""
    rows = [dataclasses.asdict(measurement) for measurement in measurements]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # Counts stay integers. If a value is missing in one run, it has no median.
    middle = {name: None if None in values else statistics.median_high(values) for name, values in columns.items()}
    return DeviceSpeed(prompt=prompt, runs=len(rows), **middle)


def read_device() -> Device:
    """Return the phone's model, SoC, Android version, and memory, as the phone reports them."""
    name = " ".join(_properties("ro.product.manufacturer", "ro.product.model"))
    # The first two properties exist since Android 12.
    processor = " ".join(_properties("ro.soc.manufacturer", "ro.soc.model") or _properties("ro.board.platform"))
    memory = re.search(r"^MemTotal:\s+(\d+) kB", adb("shell", "cat /proc/meminfo"), re.MULTILINE)
    if memory is None:
        raise UserError("the phone does not report its memory in /proc/meminfo: use another phone")
    return Device(
        model=name or "unknown",
        processor=processor or "unknown",
        android=" ".join(_properties("ro.build.version.release")) or "unknown",
        memory_bytes=1024 * int(memory[1]),
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _properties(*names: str) -> list[str]:
    values = [adb("shell", f"getprop {name}").strip() for name in names]
    return [value for value in values if value]


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("VmHWM")]
    return " / ".join(lines[-5:]) or "none"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_report", description=__doc__)
    parser.add_argument("--program", type=Path, required=True, help="the release's model.pte")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the release's tokenizer.json")
    parser.add_argument("--runner", type=Path, required=True, help="the runner, an Android binary")
    installed_version = version("executorch")
    parser.add_argument(
        "--executorch",
        default=installed_version,
        help=f"version of ExecuTorch that the runner was built from [default: {installed_version}]",
    )
    parser.add_argument("--image", type=Path, help="image for the prompt, for a multimodal program")
    parser.add_argument("--threads", type=_count, default=4, help="number of CPU threads [default: 4]")
    parser.add_argument("--runs", type=_count, default=5, help="number of runs [default: 5]")
    parser.add_argument("--output", type=Path, required=True, help="file to write the report to")
    options = parser.parse_args()
    files = {"model.pte": options.program, "tokenizer.json": options.tokenizer, "runner": options.runner}
    image = f"image{options.image.suffix.lower()}" if options.image else None
    if image is not None:
        files[image] = options.image
    try:
        if not options.output.absolute().parent.is_dir():
            raise UserError(f"there is no directory {options.output.parent}")
        device, measurements = measure(files, runner_command(image, options.threads), options.runs)
    except UserError as error:
        print(f"device_report: {error}", file=sys.stderr)
        sys.exit(2)
    report = DeviceReport(
        schema_version=1,
        device=device,
        runner=Runner(name=options.runner.name, executorch=options.executorch),
        threads=options.threads,
        program=MeasuredProgram(sha256=digest(options.program), bytes=options.program.stat().st_size),
        date=datetime.now(UTC).date().isoformat(),
        measurements=[medians(measurements, "text" if image is None else "image")],
    )
    content = dataclasses.asdict(report)
    parse_device_report(content)
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}: pass it to `quantize-gemma run` with --device-report")


if __name__ == "__main__":
    main()

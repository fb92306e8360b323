"""Check that others can load a release: run its card's loading code with the pinned and the newest transformers.

    python -m tests.compatibility.loading [RELEASE]

This creates two virtual environments from the package registry, one with the card's own `pip install` line and one with
the newest transformers instead, runs the card's code in both, exactly as printed, and compares the tokens for the
code's prompt and, if the model has a vision tower, for a prompt about an image. If they differ, it prints both and
exits with 1. This takes minutes, and about 15 GB of disk space, because PyTorch is installed twice.

RELEASE is a directory with README.md and the checkpoint. Without it, the releases are those of the built-in model, of
its language model alone, and of the built-in model with a calibrated recipe, created in a temporary store. If all pass,
the versions are written to tasks/card/loads_in.json, from which cards quote them.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_TEXTS
from tests.conftest import CommandLine
from tests.text_only import write_text_only

CARD = Path(__file__).parents[2] / "tasks" / "card"
SECTION = "# Running with transformers"
IMAGE_PROMPT = "What colour is this?"


def main() -> int:
    """Return the exit code: 0 if every release gives the same tokens in both environments."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        releases = [Path(sys.argv[1])] if len(sys.argv) > 1 else make_releases(root)
        environments = make_environments(root, read_section(releases[0])[0])
        results = [[generate(environment, release) for environment in environments] for release in releases]
    agreements = [report(release, *pair) for release, pair in zip(releases, results, strict=True)]
    if all(agreements) and len(sys.argv) == 1:
        write_record([result["versions"] for result in results[0]])
    return 0 if all(agreements) else 1


def make_releases(root: Path) -> list[Path]:
    """Return the releases of the built-in model, of its language model alone, and with a calibrated recipe."""
    run = CommandLine(root / "store", root / "prefect")
    text_only = write_text_only(BUILTIN["tiny-gemma3"], root / "tiny-text")
    text, calibration = root / "text.txt", root / "calibration.txt"
    lines = (BUILTIN_TEXTS["tiny-text"] / "text.txt").read_text("utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[: len(lines) // 2]), "utf-8")
    calibration.write_text("".join(lines[len(lines) // 2 :]), "utf-8")
    calibrated = ["--recipe", "GPTQ-INT8-INT4", "--calibration", str(calibration), "--text", str(text)]
    releases = []
    for arguments in (
        [],
        ["--model", str(text_only), "--text", "tiny-text", "--dataset", "mmlu=mmlu-mini", "--limit", "2"],
        [*calibrated, "--limit", "2"],
    ):
        outcome = run("run", *arguments, "--max-seq-len", "256", "--json")
        if outcome.code != 0:
            sys.exit(outcome.stderr)
        releases.append(Path(outcome.summary["release"]))
    return releases


def read_section(release: Path) -> tuple[list[str], str]:
    """Return the requirements that the card tells its reader to install, and its loading code."""
    card = (release / "README.md").read_text(encoding="utf-8")
    # Do not stop at the next heading: comments in the code look like one.
    pattern = rf"^{SECTION}\n\n```Shell\npip install (.*?)\n```\n\n```Py\n(.*?)^```$"
    section = re.search(pattern, card, re.DOTALL | re.MULTILINE)
    assert section, f"the card of {release} has no section {SECTION!r} with a command and code"
    return section[1].split(), section[2]


def make_environments(root: Path, requirements: list[str]) -> list[Path]:
    """Return the interpreters of two virtual environments: as the card says, and with the newest transformers."""
    newest_requirements = ["transformers" if part.startswith("transformers==") else part for part in requirements]
    interpreters = []
    for name, parts in (("pinned", requirements), ("newest", newest_requirements)):
        print(f"installing {' '.join(parts)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", root / name], check=True)
        interpreters.append(root / name / "bin" / "python")
        # The image needs Pillow.
        command = [interpreters[-1], "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *parts, "pillow"]
        subprocess.run(command, check=True)
    return interpreters


def generate(interpreter: Path, release: Path) -> dict[str, Any]:
    """Return what generate.py prints: versions and tokens."""
    request = {"code": read_section(release)[1], "image_prompt": IMAGE_PROMPT}
    process = subprocess.run(
        # Isolated mode: nothing is imported from this project or from the user's site-packages.
        [interpreter, "-I", Path(__file__).with_name("generate.py")],
        cwd=release,
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        sys.exit(f"the loading code of {release} fails in {interpreter.parents[1].name}:\n{process.stderr}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def report(release: Path, pinned_result: dict[str, Any], newest_result: dict[str, Any]) -> bool:
    """Print whether the tokens are the same, and those that differ; return whether all are the same."""
    names = [
        ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        for result in (pinned_result, newest_result)
    ]
    is_same = True
    for prompt in ("text", "image"):
        tokens, newest_tokens = pinned_result.get(prompt), newest_result.get(prompt)
        if tokens != newest_tokens:
            is_same = False
            print(f"{release}: {prompt}: different tokens\n  {names[0]}: {tokens}\n  {names[1]}: {newest_tokens}")
        elif tokens is not None:
            print(f"{release}: {prompt}: the same {len(tokens)} tokens in {names[0]} and in {names[1]}")
    return is_same


def write_record(environments: list[dict[str, str]]) -> None:
    """Record the versions that ran the loading code in the card's current template."""
    snippet = hashlib.sha256((CARD / "loading.py.j2").read_bytes()).hexdigest()
    record = {"snippet_sha256": snippet, "environments": environments}
    (CARD / "loads_in.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

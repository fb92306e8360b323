"""Where and how a command is started: hostile modules and settings around it, no home, no directory, no port.

    python -m tests.campaigns.starting_place [--cases N] [--seed S]

Nothing in the directory is run or believed, nobody else reads or writes while the command works, the exit code is
right, and a refusal is one sentence. The cases share a store that one run fills first.
"""

import importlib.metadata
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from quantize_gemma.tasks.builtin import BUILTIN
from tests.campaigns import campaign
from tests.conftest import CommandLine
from tests.operate import AnotherProgram, another_program, wait_for

BIN = Path(sys.executable).parent
FOREIGN = {"Origin": "http://foreign.example"}
# A directory that nobody can write to, root neither.
UNWRITABLE = Path("/sys")

QUANTIZE_GEMMA = [str(BIN / "quantize-gemma")]
# A model that is not built in is measured on datasets of the Hub otherwise.
FIXTURES = ["--text", "tiny-text", "--dataset", "mmlu=mmlu-mini", "chartqa=chartqa-mini"]
SERVE = [sys.executable, "-P", "-m", "quantize_gemma.deployments.serve"]
# The cheap ones first: CI runs those.
COMMANDS = {
    "port taken": SERVE,
    "check": [*QUANTIZE_GEMMA, "check", "--model", "."],
    "API away": [*QUANTIZE_GEMMA, "run"],
    "prune": [*QUANTIZE_GEMMA, "prune"],
    "run": [*QUANTIZE_GEMMA, "run"],
    "run here": [*QUANTIZE_GEMMA, "run", "--model", ".", *FIXTURES],
    "serve": SERVE,
}
# Stages that take little, and import much.
REFRESHED = ("download_mmlu", "untie", "quantize", "card")
HOMES = ("usual", "usual", "usual", "unwritable", "a file", "empty", "no HOME")


@dataclass
class Case:
    """One command, and what it is started with. `directory` is hostile, and `marker` is written if it got in."""

    command: str
    home: str
    removed: bool
    directory: Path
    marker: Path
    environment: dict[str, str]
    arguments: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.command}, home: {self.home}{', directory removed' if self.removed else ''}"

    def code(self) -> int:
        """Return the exit code that is right."""
        if self.command in ("port taken", "API away"):
            return 2
        # MKL, in torch's matrix products, ends a process there: these are refused.
        if self.removed and self.command in ("check", "run", "run here"):
            return 2
        if self.command in ("run", "run here", "serve") and self.home in ("unwritable", "a file"):
            return 2
        return 143 if self.command == "serve" else 0


def run(cases: int, rng: random.Random) -> Iterator[str | None]:
    """Fill a store, and yield for each case what went wrong, or None."""
    with tempfile.TemporaryDirectory() as folder:
        command_line = CommandLine(Path(folder) / "store", Path(folder) / "prefect")
        outcome = command_line("run")
        assert outcome.code == 0, outcome.stderr
        yield from starts(command_line, cases, rng)


def starts(command_line: CommandLine, cases: int, rng: random.Random) -> Iterator[str | None]:
    """Yield for each case, on a store that has the release already, what went wrong, or None."""
    names = list(COMMANDS)
    for number in range(cases):
        with tempfile.TemporaryDirectory() as folder, another_program() as program:
            # Its own numbers: how many it takes depends on what is installed.
            numbers = random.Random(rng.getrandbits(64))
            case = make(names[number % len(names)], Path(folder), command_line, program, numbers)
            failure = start(case, program)
            yield failure and f"{case}: {failure}"


def make(command: str, folder: Path, command_line: CommandLine, program: AnotherProgram, rng: random.Random) -> Case:
    """Return a case with a directory of its own."""
    address = f"http://127.0.0.1:{program.server_port}/api"
    directory = hostile_directory(folder / "model", address, rng)
    shutil.copytree(BUILTIN["tiny-gemma3"], directory, dirs_exist_ok=True)
    home = rng.choice(HOMES)
    removed = rng.random() < 0.15
    environment = {name: value for name, value in command_line.environment().items() if not name.startswith("PYTHON")}
    (folder / "home").mkdir()
    environment["HOME"] = str(folder / "home")
    if home == "unwritable":
        environment["PREFECT_HOME"] = str(UNWRITABLE / "prefect")
    elif home == "a file":
        (folder / "file").touch()
        environment["PREFECT_HOME"] = str(folder / "file")
    elif home == "empty":
        environment["PREFECT_HOME"] = ""
    elif home == "no HOME":
        del environment["HOME"]
    if command == "port taken":
        environment["PREFECT_API_URL"] = address
    elif command == "API away":
        environment["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    elif command == "serve":
        environment["PREFECT_API_URL"] = f"http://127.0.0.1:{rng.randrange(20_000, 30_000)}/api"
    arguments = [*COMMANDS[command]]
    if command == "run":
        arguments += ["--refresh", rng.choice(REFRESHED)]
    return Case(command, home, removed, directory, folder / "model.marker", environment, arguments)


def hostile_directory(directory: Path, api: str, rng: random.Random | None = None) -> Path:
    """Make a directory whose modules and settings, if anything believes them, write a marker or ask another API.

    The marker is a file beside the directory, of its name and ".marker". Without `rng` it has all of them, else some.
    """
    directory.mkdir()
    marker = directory.with_suffix(".marker")
    for name, text in settings(directory, marker, api).items():
        if rng is None or rng.random() < 0.7:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    names = sorted(modules())
    for name in names if rng is None else rng.sample(names, len(names) * 2 // 3):
        code = f"open({str(marker)!r}, 'a').write('module {name}, ')\n"
        if rng is not None and rng.random() < 0.5:
            (directory / f"{name}.py").write_text(code, encoding="utf-8")
        else:
            (directory / name).mkdir(exist_ok=True)
            (directory / name / "__init__.py").write_text(code, encoding="utf-8")
            (directory / name / "__main__.py").write_text(code, encoding="utf-8")
    return directory


def modules() -> set[str]:
    """Return the name of every module that any of our processes could import, and of those that Python looks for."""
    packages = {name for name in importlib.metadata.packages_distributions() if name.isidentifier()}
    own_packages = {"deployments", "flows", "quantize_gemma", "tasks"}
    return packages | set(sys.stdlib_module_names) | own_packages | {"sitecustomize", "usercustomize", "hostile"}


def settings(directory: Path, marker: Path, api: str) -> dict[str, str]:
    """Return the files that a library may look for where it is started, each of which does harm if it is believed."""
    log = (
        f"version: 1\nhandlers: {{it: {{class: logging.FileHandler, filename: {marker}}}}}\nroot: {{handlers: [it]}}\n"
    )
    code = f"open({str(marker)!r}, 'a').write('a file, ')\n"
    return {
        ".env": f"PREFECT_API_URL={api}\nPREFECT_HOME={directory}\nPREFECT_PROFILES_PATH={directory}/profiles.toml\n"
        f"PREFECT_LOGGING_SETTINGS_PATH={directory}/logging.yml\nHF_ENDPOINT={api}\n",
        "prefect.toml": f'profiles_path = "{directory}/profiles.toml"\n[api]\nurl = "{api}"\n'
        f'[logging]\nconfig_path = "{directory}/logging.yml"\n',
        "pyproject.toml": f'[tool.prefect]\nprofiles_path = "{directory}/profiles.toml"\n'
        f'[tool.prefect.api]\nurl = "{api}"\n[tool.prefect.logging]\nconfig_path = "{directory}/logging.yml"\n',
        "profiles.toml": f'active = "theirs"\n[profiles.theirs]\nPREFECT_API_URL = "{api}"\n',
        "logging.yml": log,
        "prefect.yaml": "build:\n- prefect.deployments.steps.run_shell_script:\n"
        f"    script: touch {marker}\ndeployments: []\n",
        ".numba_config.yaml": f"cache_dir: {marker}\n",
        "matplotlibrc": "backend: module://hostile\n",
        "cais/mmlu/mmlu.py": code,
        "cais/mmlu/README.md": "---\nconfigs: 1\n---\n",
        "HuggingFaceM4/ChartQA/ChartQA.py": code,
        "hostile.pth": f"import os; {code}",
    }


def start(case: Case, program: AnotherProgram) -> str | None:
    """Run the case's command; return what went wrong, or None."""
    # So that the command starts in a directory that is gone.
    script = 'cd "$0" && { [ -z "$REMOVED" ] || rm -r "$0"; } && exec "$@"'
    with subprocess.Popen(
        ["sh", "-c", script, str(case.directory), *case.arguments],
        env={**case.environment, "REMOVED": "yes" if case.removed else ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as process:
        timer = threading.Timer(300, process.kill)
        timer.start()
        try:
            output, breach = watch(case, process)
        finally:
            timer.cancel()
            process.kill()
    if case.marker.exists():
        return f"it ran or believed {case.marker.read_text() if case.marker.is_file() else 'a setting'}"
    if program.requests:
        return f"it asked another program: {program.requests[0]}"
    if breach:
        return breach
    if process.returncode != case.code():
        return f"exit code {process.returncode} instead of {case.code()}: {output[-500:]}"
    if case.code() == 2 and len(output.splitlines()) != 1:
        return f"{len(output.splitlines())} lines instead of a sentence: {output[:500]}"
    return None


def watch(case: Case, process: "subprocess.Popen[str]") -> tuple[str, str | None]:
    """Return what the command prints, and what an attacker was able to do; end what would run forever."""
    output, breach = "", None
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if "watch the run at" in line or line.startswith("Dashboard:"):
            url = line.split(" (")[0].split()[-1]
            breach = attack(url)
            if case.command == "serve":
                process.terminate()
    process.wait()
    return output, breach


def attack(url: str) -> str | None:
    """Try to read and write as a foreign page and as another program of this machine; return what was possible."""
    wait_for(f"{url}/api/health")
    requests: list[tuple[str, str, Callable[[httpx.Client, str], httpx.Response]]] = [
        ("read secrets", "block_documents/filter", lambda c, path: c.post(path, json={"include_secrets": True})),
        ("create a flow", "flows/", lambda c, path: c.post(path, content='{"name": "theirs"}')),
        ("read settings", "admin/settings", lambda c, path: c.get(path)),
    ]
    for headers in ({}, FOREIGN, {**FOREIGN, "Host": "foreign.example"}):
        with httpx.Client(headers=headers, timeout=60) as client:
            for name, path, request in requests:
                # A run that ends meanwhile answers nobody.
                with suppress(httpx.TransportError):
                    answer = request(client, f"{url}/api/{path}")
                    if answer.status_code not in (400, 401):
                        return f"a stranger could {name}: {answer.status_code} {answer.text[:200]}"
    return None


if __name__ == "__main__":
    campaign("starting_place", run, cases=140)

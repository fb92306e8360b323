"""Start commands in hostile places: malicious modules and settings, no home, a removed directory, a port in use.

    python -m tests.campaigns.starting_place [--cases N] [--seed S]

Nothing in the directory is executed or trusted, no other program can read or write anything while the command runs, the
exit code is correct, and errors are one sentence. The cases share a store that one run fills first.
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
# A directory that nobody can write to, not even root.
UNWRITABLE = Path("/sys")

QUANTIZE_GEMMA = [str(BIN / "quantize-gemma")]
# Without these, a model that is not built in is evaluated on datasets from the Hub.
FIXTURES = ["--text", "tiny-text", "--dataset", "mmlu=mmlu-mini", "chartqa=chartqa-mini"]
SERVE = [sys.executable, "-P", "-m", "quantize_gemma.deployments.serve"]
# The fast ones come first: the tests run only those.
COMMANDS = {
    "port taken": SERVE,
    "check": [*QUANTIZE_GEMMA, "check", "--model", "."],
    "API down": [*QUANTIZE_GEMMA, "run"],
    "prune": [*QUANTIZE_GEMMA, "prune"],
    "run": [*QUANTIZE_GEMMA, "run"],
    "run here": [*QUANTIZE_GEMMA, "run", "--model", ".", *FIXTURES],
    "serve": SERVE,
}
# Stages that are fast and import many libraries.
REFRESHED = ("download_mmlu", "untie", "quantize", "card")
HOMES = ("usual", "usual", "usual", "unwritable", "a file", "empty", "no HOME")


@dataclass
class Case:
    """One command, and how it is started.

    `directory` is hostile, and `marker` is written if anything in it was executed or trusted.
    """

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
        """Return the expected exit code."""
        if self.command in ("port taken", "API down"):
            return 2
        # MKL, which torch's matrix products use, would end the process there, so these commands exit with an error.
        if self.removed and self.command in ("check", "run", "run here"):
            return 2
        if self.command in ("run", "run here", "serve") and self.home in ("unwritable", "a file"):
            return 2
        return 143 if self.command == "serve" else 0


def run(cases: int, rng: random.Random) -> Iterator[str | None]:
    """Fill a store, then yield what went wrong in each case, or None."""
    with tempfile.TemporaryDirectory() as folder:
        command_line = CommandLine(Path(folder) / "store", Path(folder) / "prefect")
        outcome = command_line("run")
        assert outcome.code == 0, outcome.stderr
        yield from starts(command_line, cases, rng)


def starts(command_line: CommandLine, cases: int, rng: random.Random) -> Iterator[str | None]:
    """Yield what went wrong in each case, or None, on a store that already has the release."""
    names = list(COMMANDS)
    for number in range(cases):
        with tempfile.TemporaryDirectory() as folder, another_program() as program:
            # A separate generator, because how many numbers a case draws depends on what is installed.
            case_rng = random.Random(rng.getrandbits(64))
            case = make(names[number % len(names)], Path(folder), command_line, program, case_rng)
            failure = start(case, program)
            yield failure and f"{case}: {failure}"


def make(command: str, folder: Path, command_line: CommandLine, program: AnotherProgram, rng: random.Random) -> Case:
    """Return a case with its own directory."""
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
    elif command == "API down":
        environment["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    elif command == "serve":
        environment["PREFECT_API_URL"] = f"http://127.0.0.1:{rng.randrange(20_000, 30_000)}/api"
    arguments = [*COMMANDS[command]]
    if command == "run":
        arguments += ["--refresh", rng.choice(REFRESHED)]
    return Case(command, home, removed, directory, folder / "model.marker", environment, arguments)


def hostile_directory(directory: Path, api: str, rng: random.Random | None = None) -> Path:
    """Create a directory whose modules and settings, if trusted, write a marker or send a request to another API.

    The marker is a file next to the directory, with its name and the suffix .marker. Without `rng`, the directory has
    all modules and settings; otherwise, a random selection.
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
    """Return the names of all modules that our processes could import, and of those that Python itself looks for."""
    packages = {name for name in importlib.metadata.packages_distributions() if name.isidentifier()}
    own_packages = {"deployments", "flows", "quantize_gemma", "tasks"}
    return packages | set(sys.stdlib_module_names) | own_packages | {"sitecustomize", "usercustomize", "hostile"}


def settings(directory: Path, marker: Path, api: str) -> dict[str, str]:
    """Return the settings files that a library may read from the working directory; each does harm if trusted."""
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
    # Let the command start in a directory that has been removed.
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
        return f"it executed or trusted {case.marker.read_text() if case.marker.is_file() else 'a setting'}"
    if program.requests:
        return f"it sent a request to another program: {program.requests[0]}"
    if breach:
        return breach
    if process.returncode != case.code():
        return f"exit code {process.returncode} instead of {case.code()}: {output[-500:]}"
    if case.code() == 2 and len(output.splitlines()) != 1:
        return f"{len(output.splitlines())} lines instead of a sentence: {output[:500]}"
    return None


def watch(case: Case, process: "subprocess.Popen[str]") -> tuple[str, str | None]:
    """Return what the command prints, and what an attacker was able to do; stop a command that would run forever."""
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
    """Try to read and write as a page of another origin and as another program on this machine.

    Return what succeeded, or None.
    """
    wait_for(f"{url}/api/health")
    requests: list[tuple[str, str, Callable[[httpx.Client, str], httpx.Response]]] = [
        ("read secrets", "block_documents/filter", lambda c, path: c.post(path, json={"include_secrets": True})),
        ("create a flow", "flows/", lambda c, path: c.post(path, content='{"name": "theirs"}')),
        ("read settings", "admin/settings", lambda c, path: c.get(path)),
    ]
    for headers in ({}, FOREIGN, {**FOREIGN, "Host": "foreign.example"}):
        with httpx.Client(headers=headers, timeout=60) as client:
            for name, path, request in requests:
                # The run may end in the meantime.
                with suppress(httpx.TransportError):
                    response = request(client, f"{url}/api/{path}")
                    if response.status_code not in (400, 401):
                        return f"an attacker could {name}: {response.status_code} {response.text[:200]}"
    return None


if __name__ == "__main__":
    campaign("starting_place", run, cases=140)

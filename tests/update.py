"""Try the newest version of every library, and print what changed: `make update`.

This resolves the requirements again, with every exact pin in pyproject.toml lifted; writes the versions to
constraints.txt, pyproject.toml, and the server's image in docker/compose.yaml; installs them; and runs the card's
loading code, the tests, and the benchmarks on the built-in model before and after. If the result is good, commit it.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT, CONSTRAINTS, COMPOSE = ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "docker" / "compose.yaml"
PYTHON = ROOT / ".venv" / "bin" / "python"
PIN = re.compile(r'"([\w.-]+)==([^"]+)"')
BENCHMARKS = ("quantize", "export", "prefill", "evaluate")
EXTRAS = ("dask", "ray", "dev")


def main() -> None:
    """Run the command line; exit with 1 if the tests fail, and with 2 if uncommitted changes would be overwritten."""
    local_changes = run("git", "status", "--porcelain", PROJECT, CONSTRAINTS, COMPOSE).stdout
    if local_changes:
        print(f"commit or restore these first, since they are overwritten:\n{local_changes}", file=sys.stderr)
        sys.exit(2)
    before = versions(CONSTRAINTS.read_text(encoding="utf-8"))
    after = resolve(PROJECT.read_text(encoding="utf-8"))
    changes = difference(before, after)
    if not changes:
        print("everything is up to date")
        return
    print(*changes, sep="\n", flush=True)
    measured = {name: benchmark(name) for name in BENCHMARKS}
    CONSTRAINTS.write_text("".join(f"{name}=={version}\n" for name, version in after.items()), encoding="utf-8")
    PROJECT.write_text(set_pins(PROJECT.read_text(encoding="utf-8"), after), encoding="utf-8")
    image = re.sub(r"(prefecthq/prefect:)[\d.]+", rf"\g<1>{after['prefect']}", COMPOSE.read_text(encoding="utf-8"))
    COMPOSE.write_text(image, encoding="utf-8")
    # The card names the versions that its loading code ran with: the ones that are now installed.
    targets = ["install", "compatibility", "test"]
    passed = all(subprocess.run(["make", target], cwd=ROOT).returncode == 0 for target in targets)
    print(*changes, *table(measured, {name: benchmark(name) for name in BENCHMARKS}), sep="\n")
    if not passed:
        sys.exit("the tests fail; to undo the update, run `git checkout . && make install`")
    print("the tests pass; commit what `git status` shows")


def resolve(project: str) -> dict[str, str]:
    """Return {library: version} of everything that the project installs: the newest compatible versions."""
    project_table = tomllib.loads(project)["project"]
    requirements = [
        *project_table["dependencies"],
        *(requirement for extra in EXTRAS for requirement in project_table["optional-dependencies"][extra]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Otherwise, installed packages would keep their versions.
        options = ["--quiet", "--dry-run", "--ignore-installed", "--report", report]
        run(PYTHON, "-m", "pip", "install", *options, *(lift_pin(requirement) for requirement in requirements))
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    # A build for one kind of machine, such as 2.13.0+cpu, is the same version.
    resolved_versions = {item["metadata"]["name"]: item["metadata"]["version"].split("+")[0] for item in items}
    return dict(sorted(resolved_versions.items(), key=lambda item: item[0].lower()))


def lift_pin(requirement: str) -> str:
    """Turn an exact pin into a lower bound.

    >>> lift_pin("torch==2.13.0")
    'torch>=2.13.0'
    """
    return requirement.replace("==", ">=")


def set_pins(project: str, library_versions: dict[str, str]) -> str:
    """Return pyproject.toml's text with its exact pins set to the resolved versions."""
    by_name = {normalize(name): version for name, version in library_versions.items()}
    return PIN.sub(lambda pin: f'"{pin[1]}=={by_name.get(normalize(pin[1]), pin[2])}"', project)


def versions(constraints: str) -> dict[str, str]:
    """Return {library: version} of a constraints file."""
    return dict(line.split("==") for line in constraints.splitlines() if "==" in line)


def normalize(name: str) -> str:
    """Return a library's normalized name, as the registry uses it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def difference(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return one line for each library that changed its version, was added, or was removed."""
    old_versions, new_versions = (
        {normalize(name): version for name, version in libraries.items()} for libraries in (before, after)
    )
    return [
        f"{name}: {old_versions.get(name, 'new')} -> {new_versions.get(name, 'removed')}"
        for name in sorted(old_versions | new_versions)
        if old_versions.get(name) != new_versions.get(name)
    ]


def benchmark(name: str) -> dict[str, Any] | None:
    """Return the JSON that a benchmark of the built-in model printed, or None if it failed."""
    process = subprocess.run(
        [PYTHON, "-m", f"benchmarks.{name}", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return json.loads(process.stdout.splitlines()[-1]) if process.returncode == 0 else None


def table(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line per benchmark: our time and peak memory, before and after."""
    lines = [f"{'benchmark':12} {'time, s':>16} {'peak memory, MB':>20}   equal"]
    for name in before:
        if before[name] is None or after[name] is None:
            lines.append(f"{name:12} {'failed' if after[name] is None else 'failed before'}")
            continue
        old_costs, new_costs = before[name]["ours"], after[name]["ours"]
        time = f"{old_costs['seconds']:.1f} -> {new_costs['seconds']:.1f}"
        memory = f"{old_costs['peak_rss_bytes'] / 1e6:.0f} -> {new_costs['peak_rss_bytes'] / 1e6:.0f}"
        lines.append(f"{name:12} {time:>16} {memory:>20}   {'yes' if after[name]['equal'] else 'no'}")
    return lines


def run(*command: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command; exit if it fails."""
    process = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} failed: see above")
    return process


if __name__ == "__main__":
    main()

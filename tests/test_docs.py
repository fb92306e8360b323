"""The commands in README.md, in docs/, and on the other pages are valid.

Only the command-line parsers run here. What the commands do is tested elsewhere: runs, checks, diagnoses, and pruning
in tests/flows; `make serve`, `make deploy`, the worker, and the images in tests/operate; `make hub-demo` in tests/hub;
the card's code in tests/compatibility; campaigns in tests/campaigns; and the recipe benchmark and the device report in
tests/test_quality.py and tests/tasks/test_device_report.py. The other benchmarks run by hand, and in `make update`.
"""

import ast
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from quantize_gemma.flows import cli
from quantize_gemma.flows.diagnose import diagnose
from quantize_gemma.flows.options import DiagnoseOptions, RunOptions
from quantize_gemma.flows.prune_store import prune_store
from quantize_gemma.flows.quantize_gemma import quantize_gemma
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.checkpoint import quantizable_modules, read_headers
from quantize_gemma.tasks.models.recipe import load_recipe, match_rules
from quantize_gemma.tasks.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "benchmarks/README.md",
        ROOT / "docker/README.md",
    )
)
FLOWS = {"quantize_gemma": quantize_gemma, "diagnose": diagnose, "prune_store": prune_store}
# The programs that a command may start with, besides those checked below.
OTHER_PROGRAMS = {"cd", "cp", "dask", "export", "mkdir", "pip", "pre-commit", "ray", "rmdir", "source"}
# The Prefect commands that the documentation uses.
PREFECT = {"deployment run", "profile use", "server start", "work-pool create", "work-pool pause", "work-pool resume"}


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of every command in Shell blocks and between backticks in the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^ *```Shell\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r" (?:&&|\|) ", re.sub(r"\s# .*|^#.*|\$\(.*?\)", "", line).strip()):
                words = shlex.split(part)
                # Skip variables that are set only for the command.
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`((?:quantize-gemma|make|prefect|python -m) [^`]*)`", text.replace("\n", " ")):
        # Skip text that stands for several commands.
        if not re.search(r"[…|<]", code):
            yield shlex.split(code)


@cache
def targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def deployments() -> dict[str, object]:
    """Return {"flow/deployment": the flow} for each deployment that `make deploy` creates."""
    rows = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    flows = {row["entrypoint"].rpartition(".")[2] for row in rows}
    assert flows == set(FLOWS)
    names = ((FLOWS[row["entrypoint"].rpartition(".")[2]], row["name"]) for row in rows)
    return {f"{flow.name}/{name}": flow for flow, name in names}


@cache
def help_of(module: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def check(words: list[str]) -> None:
    """Raise AssertionError or UserError if a command is not valid."""
    program, arguments = words[0], words[1:]
    if program == "quantize-gemma":
        if "--help" not in arguments:
            cli.parse(arguments)
    elif program == "make":
        named = {word for word in arguments if "=" not in word}
        assert named <= targets(), f"no target of the Makefile: {named - targets()}"
    elif program in ("python", "python3"):
        check_python(arguments)
    elif program == "pytest":
        path, name = ROOT / arguments[0], arguments[arguments.index("-k") + 1]
        assert re.search(rf"^def test_\w*{name}", path.read_text(), re.MULTILINE), f"no test {name} in {path}"
    elif program == "prefect":
        check_prefect(arguments)
    elif program == "docker":
        assert arguments[0] in ("build", "compose", "run")
        files = [value for flag, value in pairwise(arguments) if flag == "-f"]
        assert all((ROOT / file).is_file() for file in files), files
        if "exec" in arguments and "prefect" in arguments and "work-pool" in arguments:
            check_prefect(arguments[arguments.index("work-pool") :])
    else:
        assert program in OTHER_PROGRAMS


def check_python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        assert arguments[0] == "-c" or (ROOT / arguments[0]).is_file(), arguments[0]
        return
    module, flags = arguments[1], [word.strip("[]") for word in arguments[2:] if word.strip("[").startswith("--")]
    assert module.split(".")[0] in ("benchmarks", "tests", "http", "quantize_gemma")
    assert importlib.util.find_spec(module) is not None, f"no module {module}"
    missing = [flag for flag in flags if flag not in help_of(module)]
    if module == "tests.hub.demo":
        # All other flags are those of a run.
        start = next((number for number, word in enumerate(arguments) if word in missing), len(arguments))
        cli.parse(["run", *arguments[start:]])
        return
    assert not missing, f"python -m {module} has no {missing}"


def check_prefect(arguments: list[str]) -> None:
    if arguments[0] == "--profile":
        arguments = arguments[2:]
    command = " ".join(arguments[:2])
    assert command in PREFECT
    if command == "work-pool create":
        assert (ROOT / arguments[arguments.index("--base-job-template") + 1]).is_file()
    if command == "deployment run":
        flow = deployments()[arguments[2]]
        texts = [value for flag, value in pairwise(arguments) if flag == "--param"]
        check_parameters(flow, dict(text.split("=", 1) for text in texts))


def check_parameters(flow: object, texts: dict[str, str]) -> None:
    """Raise if a flow has no such parameters, or does not accept the values. A value is JSON, or else a string."""
    values = {}
    for name, text in texts.items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    if flow is quantize_gemma:
        RunOptions(**values)
    elif flow is diagnose:
        DiagnoseOptions(**values)
    else:
        assert values.keys() <= inspect.signature(prune_store.fn).parameters.keys()


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_on_a_page_are_valid(page: str) -> None:
    wrong = []
    for words in commands(page):
        try:
            check(words)
        except Exception as error:
            wrong.append(f"{shlex.join(words)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:benchmarks|deployments|docker|docs|flows|tasks|tests)/[\w./-]*)`", text))
    # A module may be named without .py.
    missing = [name for name in names if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
    assert not missing


def test_the_links_of_the_pages_outside_the_site_lead_to_files() -> None:
    """mkdocs checks the links between the pages of the site."""
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
            if not re.match(r"https?:", target) and not (ROOT / page).parent.joinpath(target).exists():
                missing.append(f"{page}: {target}")
    assert not missing


def test_the_pages_that_the_code_names_exist() -> None:
    folders = ("benchmarks", "deployments", "docker", "flows", "tasks", "tests")
    files = [file for folder in folders for kind in ("*.py", "*.j2", "*.yaml") for file in (ROOT / folder).rglob(kind)]
    texts = {file: file.read_text(encoding="utf-8") for file in files if file != Path(__file__)}
    names = {name for text in texts.values() for name in re.findall(r"\bdocs/[\w/-]+\.md", text)}
    assert "docs/upstream.md" in names
    assert not [name for name in names if not (ROOT / name).is_file()]


def test_the_recipe_in_the_how_to_matches_every_module(tmp_path: Path) -> None:
    text = (ROOT / "docs/how-to/recipe.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^ *```json\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.json").write_text(block, encoding="utf-8")
    rules = match_rules(
        load_recipe(str(tmp_path / "mine.json")), quantizable_modules(read_headers(BUILTIN["tiny-gemma3"]))
    )
    assert {rule.weight for name, rule in rules.items() if name.endswith("lm_head")} == {"int8"}


def test_every_message_on_the_messages_page_is_in_the_code() -> None:
    """Runs of up to four words are compared, because the page has "…" in place of names and numbers."""
    texts = " ".join(text for folder in ("deployments", "flows", "tasks") for text in texts_of(ROOT / folder))
    page = (ROOT / "docs/reference/messages.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    missing = []
    for message in messages:
        words = max((part.split() for part in message.split("…")), key=len)
        length = min(4, len(words))
        runs = [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]
        if not any(run in texts for run in runs):
            missing.append(message)
    assert not missing


def texts_of(folder: Path) -> Iterator[str]:
    """Yield the string literals of a folder's modules; an f-string is one string, with "…" for its values."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_pre_commit_runs_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {hook["entry"].removesuffix(" --force-exclude") for hook in hooks}
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    lines = {line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe[1].splitlines()}
    assert entries == lines


@pytest.mark.parametrize(
    ("name", "schema"),
    [("bug.yml", "github-issue-forms"), ("idea.yml", "github-issue-forms"), ("config.yml", "github-issue-config")],
)
def test_the_issue_templates_follow_their_schemas(name: str, schema: str) -> None:
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, ROOT / ".github/ISSUE_TEMPLATE" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets()


def test_commands_are_found_in_the_main_pages_of_every_kind() -> None:
    programs = {words[0] for page in PAGES for words in commands(page)}
    assert {"quantize-gemma", "make", "prefect", "python", "docker", "pytest"} <= programs


@pytest.mark.parametrize(
    "command",
    [
        "quantize-gemma run --modle tiny-gemma3",
        "quantize-gemma run --max-kl much",
        "quantize-gemma report",
        "make releases",
        "python -m benchmarks.speed",
        "python -m benchmarks.quality --shape 4b",
        "python docs/nothing.py",
        "prefect deployment run quantize-gemma/weekly",
        "prefect deployment run quantize-gemma/default --param recipes=mine",
        "prefect deployment run prune-store/prune --param gigabytes=5",
        "pytest tests/test_docs.py -k nothing_of_the_kind",
        "docker build -f docker/Containerfile .",
        "quantized-gemma run",
    ],
)
def test_an_invalid_command_is_detected(command: str) -> None:
    with pytest.raises((AssertionError, KeyError, ValidationError, UserError)):
        check(shlex.split(command))

"""A fingerprint covers all code and libraries that affect what a stage writes, and nothing else."""

import ast
import gc
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.runtime import fingerprint
from tests.conftest import CommandLine, Outcome
from tests.tasks.test_device_report import REPORT

ROOT = Path(__file__).parents[3]
PACKAGE = Path(fingerprint.__file__).parents[2]
STAGES = {
    "download": "quantize_gemma.tasks.download:download",
    "download_dataset": "quantize_gemma.tasks.download:download_dataset",
    "untie": "quantize_gemma.tasks.untie:untie",
    "calibrate": "quantize_gemma.tasks.calibrate:calibrate",
    "quantize": "quantize_gemma.tasks.quantize:quantize",
    "distill": "quantize_gemma.tasks.quantize.distill:distill",
    "smoke": "quantize_gemma.tasks.smoke:smoke",
    "record": "quantize_gemma.tasks.evaluate.record:record",
    "answer": "quantize_gemma.tasks.evaluate.answer:answer",
    "evaluate": "quantize_gemma.tasks.evaluate:evaluate",
    "export": "quantize_gemma.tasks.export:export",
    "download_text": "quantize_gemma.tasks.download:download_text",
    "fidelity_base": "quantize_gemma.tasks.fidelity.fidelity_base:fidelity_base",
    "fidelity_quantized": "quantize_gemma.tasks.fidelity.fidelity_quantized:fidelity_quantized",
    "fidelity_program": "quantize_gemma.tasks.fidelity.fidelity_program:fidelity_program",
    "fidelity": "quantize_gemma.tasks.fidelity:fidelity",
    "diagnose": "quantize_gemma.tasks.fidelity.diagnose:diagnose",
    "verify": "quantize_gemma.tasks.verify:verify",
    "verify_tokenizer": "quantize_gemma.tasks.verify.tokenizer:verify_tokenizer",
    "gate": "quantize_gemma.tasks.gate:gate",
    "card": "quantize_gemma.tasks.card:card",
    # Calibrated blocks and the base model's hidden states are stored separately.
    "blocks": "quantize_gemma.tasks.quantize.calibrated:quantize_decoder",
    "targets": "quantize_gemma.tasks.quantize.distill:_run_base",
    # Answers are stored separately.
    "responses": "quantize_gemma.tasks.evaluate.packed_lm:load_checkpoint_scorer",
    "ChartQA responses": "quantize_gemma.tasks.evaluate.chartqa:load_chartqa_scorer",
    "program responses": "quantize_gemma.tasks.evaluate.program_lm:load_program_scorer",
}
# Definitions, and the stages that run again if they are changed.
MODEL = {"smoke", "answer", "responses", "ChartQA responses"}
FIDELITY = {"fidelity_base", "fidelity_quantized", "fidelity_program", "diagnose"}
CHANGES: dict[str, set[str]] = {
    "quantize_gemma.tasks.card.chart:draw_subjects": {"card"},
    "quantize_gemma.tasks.check:check_disk": set(),
    "quantize_gemma.tasks.models.checkpoint:check_finite": {"download"},
    "quantize_gemma.tasks.models.checkpoint:read_headers": {"download", "untie", "diagnose"},
    "quantize_gemma.tasks.evaluate.answer:SEED": {"answer"},
    "quantize_gemma.tasks.evaluate.chartqa:TOLERANCE": {"record", "evaluate"},
    "quantize_gemma.tasks.evaluate.packed_lm:POSITIONS": {"answer", "responses"},
    "quantize_gemma.tasks.evaluate.packed_row:BLOCK": {"answer", "responses"},
    "quantize_gemma.tasks.evaluate.packed_lm:share_rows": {"answer", "responses", "program responses"},
    "quantize_gemma.tasks.models.float32:EXACT": {
        *("quantize", "blocks", "targets", "distill"),
        *("fidelity_base", "fidelity_quantized", "diagnose", "verify"),
    },
    "quantize_gemma.tasks.models.benchmarks:find_benchmark": {"card"},
    "quantize_gemma.tasks.models.plot_style:STYLE": {"card", "diagnose"},
    "quantize_gemma.tasks.models.activation_quantization:_round": MODEL | FIDELITY | {"distill", "verify"},
    "quantize_gemma.tasks.gate.checks:CONFIDENT": {"gate"},
    "quantize_gemma.tasks.gate.checks:require_pass": set(),
    "quantize_gemma.tasks.runtime.hub:download_files": set(),
    "quantize_gemma.tasks.runtime.patches.transformers:own_metadata": MODEL
    | FIDELITY
    | {"calibrate", "verify", "export"},
    "quantize_gemma.tasks.runtime.patches.optimum_executorch:one_export": {"export"},
    "quantize_gemma.tasks.runtime.paired_stats:share_ratio": {"gate"},
    "quantize_gemma.tasks.runtime.prefect_stage:as_task": set(),
    "quantize_gemma.tasks.runtime.worker_main:call": set(),
    "quantize_gemma.tasks.calibrate:OVERLAP": {"calibrate"},
    "quantize_gemma.tasks.quantize.gptq:CANDIDATES": {"quantize", "blocks"},
    "quantize_gemma.tasks.quantize.training:PATIENCE": {"distill"},
    "quantize_gemma.tasks.quantize.hqq:BOUNDS": {"quantize", "blocks"},
    "quantize_gemma.tasks.models.recipe:match_rules": {"quantize", "distill", "diagnose"},
    "quantize_gemma.tasks.fidelity.states:generate": {"fidelity_base"},
    "quantize_gemma.tasks.fidelity.tokens:CHUNK": {"fidelity_quantized"},
    "quantize_gemma.tasks.fidelity.summary:EDGES": {"fidelity"},
    "quantize_gemma.tasks.models.recipe:load_recipe": set(),
    "quantize_gemma.tasks.runtime.store:produce": set(),
    "quantize_gemma.tasks.publish:publish": set(),
    "quantize_gemma.tasks.verify.compare:compare": {"verify"},
}


class Copy:
    """A copy of the source. Its fingerprints are computed in a fresh fork, from the source as it is at that time."""

    def __init__(self, folder: Path) -> None:
        tasks = folder / "quantize_gemma" / "tasks"
        shutil.copytree(PACKAGE / "tasks", tasks, ignore=shutil.ignore_patterns("builtin", "__pycache__"))
        (tasks / "builtin").mkdir()
        shutil.copy(PACKAGE / "tasks" / "builtin" / "__init__.py", tasks / "builtin")
        shutil.copy(PACKAGE / "__init__.py", tasks.parent)
        self.folder = folder
        program = (
            f"import sys; sys.path.insert(0, {str(folder)!r})\n"
            "import json, os\nfrom quantize_gemma.tasks.runtime import fingerprint\n"
            "for line in sys.stdin:\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        print(json.dumps({n: fingerprint.fingerprint(f)['code'] for n, f in json.loads(line).items()}))\n"
            "        sys.stdout.flush()\n"
            "        os._exit(0)\n"
            "    os.waitpid(child, 0)\n"
        )
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-P", "-c", program], stdin=pipe, stdout=pipe, text=True)

    def codes(self) -> dict[str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(STAGES), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def path(self, module: str) -> Path:
        path = self.folder.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    source = Copy(tmp_path)
    yield source
    source.process.kill()
    source.process.communicate()


def changed(source: str, name: str) -> str:
    """Return the source with a different value for a constant, or with one more statement in a function or class."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            node.body.append(ast.parse("another = 1").body[0])
            return ast.unparse(tree)
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if name in [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]:
            node.value = ast.Constant("another")
            return ast.unparse(tree)
    raise AssertionError(f"{name} is not defined")


@pytest.mark.long
def test_a_change_of_code_runs_the_stages_that_use_it_and_no_other(copy: Copy) -> None:
    def change(definition: str) -> str:
        module, name = definition.split(":")
        source = copy.path(module).read_text(encoding="utf-8")
        copy.path(module).write_text(changed(source, name), encoding="utf-8")
        return source

    before = copy.codes()
    expected = {definition: stages for definition, stages in CHANGES.items() if stages}
    # For a module that is not in the table, use any definition that a stage uses; "*" stands for the whole module.
    for stage, function in STAGES.items():
        for module, name in sorted(fingerprint.reachable_definitions(function)):
            in_table = any(definition.startswith(f"{module}:") for definition in CHANGES)
            if name not in ("", "*") and not in_table:
                expected.setdefault(f"{module}:{name}", set()).add(stage)
    modules = {definition.split(":")[0]: definition for definition in expected if definition not in CHANGES}
    expected = {of: stages for of, stages in expected.items() if of in CHANGES or of in modules.values()}
    affected: dict[str, set[str]] = {}
    for definition in expected:
        source = change(definition)
        after = copy.codes()
        affected[definition] = {stage for stage in STAGES if after[stage] != before[stage]}
        copy.path(definition.split(":")[0]).write_text(source, encoding="utf-8")
    assert affected == expected
    for definition in CHANGES.keys() - affected.keys():
        change(definition)
    assert copy.codes() == before


@pytest.mark.parametrize("name", ["README.md.j2", "loading.py.j2", "loads_in.json"])
def test_the_cards_templates_are_part_of_its_code(copy: Copy, name: str) -> None:
    before = copy.codes()
    file = copy.folder / "quantize_gemma" / "tasks" / "card" / name
    file.write_text(file.read_text(encoding="utf-8") + "another line\n", encoding="utf-8")
    assert {stage for stage, code in copy.codes().items() if code != before[stage]} == {"card"}


def test_comments_docstrings_and_formatting_do_not_count(copy: Copy) -> None:
    before = copy.codes()
    paths = list(copy.folder.glob("quantize_gemma/tasks/**/*.py"))
    assert paths
    for path in paths:
        text = re.sub(r'^( *)"""(?!\n)', r'\1"""Another docstring. ', path.read_text(encoding="utf-8"), flags=re.M)
        text = re.sub(r"^(def |class |@)", r"# Another comment.\n\n\n\1", text, flags=re.M)
        path.write_bytes(text.replace("\n", "\r\n").encode())
    assert copy.codes() == before


def test_a_module_used_as_a_value_counts_whole(copy: Copy) -> None:
    compare = copy.path("quantize_gemma.tasks.verify.compare")
    untie = copy.path("quantize_gemma.tasks.untie")
    source = untie.read_text(encoding="utf-8")
    module = "from quantize_gemma.tasks.verify import compare\n"

    def insert(text: str, before: str) -> None:
        assert source.count(before) == 1
        untie.write_text(source.replace(before, text + before))

    insert(f"{module}hidden = compare\n\n\n", before="def _link_files")
    unused = copy.codes()["untie"]
    compare.write_text(changed(compare.read_text(encoding="utf-8"), "COMPARED_TOKENS"))
    assert copy.codes()["untie"] == unused
    insert(f"    {module}    print(compare)\n", before="    tensors = read_headers(checkpoint)\n")
    used = copy.codes()["untie"]
    compare.write_text(changed(compare.read_text(encoding="utf-8"), "compare"))
    assert copy.codes()["untie"] != used
    # Code that runs on import counts, too.
    compare.write_text(compare.read_text(encoding="utf-8") + "\nprint('imported')\n")
    printed = copy.codes()["untie"]
    compare.write_text(compare.read_text(encoding="utf-8").replace("'imported'", "'imported twice'"))
    assert copy.codes()["untie"] != printed


def test_the_batch_size_is_in_the_key_only_on_a_gpu() -> None:
    from quantize_gemma.tasks.evaluate.answer import answer
    from quantize_gemma.tasks.runtime.prefect_stage import key_of

    def keys(device: str, *batch_sizes: int | str) -> int:
        """Return the number of different keys for these inputs."""
        return len({key_of(answer, {"device": device, "batch_size": one}) for one in batch_sizes})

    assert keys("cpu", "auto", 1, 8) == 1
    assert keys("cuda", "auto", 1, 8) == 3
    assert key_of(answer, {"device": "cpu"}) != key_of(answer, {"device": "cuda"})


def test_a_garbage_collection_in_one_thread_does_not_disturb_a_fingerprint_in_another() -> None:
    """Otherwise, Prefect would run the stage without a key, and the summary would say that it was not cached."""

    def switch_threads(*_: Any) -> None:
        time.sleep(0)

    functions = ["quantize_gemma.tasks.export:export", "quantize_gemma.tasks.smoke:smoke"] * 4
    expected = [fingerprint.fingerprint(function) for function in functions]
    thresholds = gc.get_threshold()
    gc.callbacks.append(switch_threads)
    gc.set_threshold(100)
    try:
        for _ in range(5):
            fingerprint.fingerprint.cache_clear()
            fingerprint._module.cache_clear()
            fingerprint._facts.cache_clear()
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(fingerprint.fingerprint, functions)) == expected
    finally:
        gc.callbacks.remove(switch_threads)
        gc.set_threshold(*thresholds)


def test_a_stage_that_does_not_exist_has_no_fingerprint() -> None:
    with pytest.raises(LookupError, match=r"no function missing in the source of quantize_gemma\.tasks\.untie"):
        fingerprint.fingerprint("quantize_gemma.tasks.untie:missing")


def test_a_difference_of_fingerprints_is_named() -> None:
    here = fingerprint.fingerprint(STAGES["untie"])
    assert fingerprint.difference(here, here) is None
    assert fingerprint.difference({**here, "libraries": {"torch": "1.0"}}, here) == "torch None instead of 1.0"
    assert "Python 3." in str(fingerprint.difference({**here, "python": "2.7"}, here))
    assert fingerprint.difference({**here, "code": "0"}, here) == "a different version of quantize-gemma"


def test_every_imported_library_has_its_name_on_pypi() -> None:
    installed = packages_distributions()
    names = {name for stage in STAGES.values() for name in fingerprint.reachable_definitions(stage)}
    tops = {top for name in names for top in fingerprint._facts(*name).libraries}
    for top in tops:
        name = fingerprint.DISTRIBUTIONS.get(top, top)
        assert normal(name) in map(normal, installed[top]), (
            f"{top} belongs to {installed[top]}: add it to DISTRIBUTIONS"
        )
    # The optional libraries are for clusters, and do not affect results.
    behind = {library for libraries in fingerprint.UNDERLYING.values() for library in libraries}
    assert behind | set(fingerprint.UNDERLYING) <= {normal(name) for names in installed.values() for name in names}


# Our dependencies that a stage loads although they are not in its key, and why that is correct.
EXCUSED = {
    "httpx": "transfers the Hub's responses",
    "huggingface-hub": "fetches files, which are compared with the Hub's hashes",
    "numpy": "torch loads it; code that computes with it imports it",
    "psutil": "measures memory",
    "pydantic": "checks config.json; code that builds metrics with it imports it",
    "pyarrow": "transformers checks whether it is installed; code that reads parquet files imports it",
    "pyyaml": "the Hub's client loads it; code that writes a card's metadata imports it",
    "rich": "prints",
}
# Run a stage's work, and print which of our functions it called and which libraries were loaded at the end.
TRACE = """
import importlib, json, sys, threading
from pathlib import Path
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.stage import import_function
root = str(Path(store.__file__).parents[2] / "tasks")
called = set()
def note(frame, event, _argument):
    if event == "call" and frame.f_code.co_filename.startswith(root) and "__name__" in frame.f_globals:
        called.add((frame.f_globals["__name__"], frame.f_code.co_qualname.split(".")[0]))
function, target, paths, values = json.loads(sys.argv[1])
work = import_function(function)
threading.setprofile(note)
sys.setprofile(note)
work(Path(target), **{name: Path(path) for name, path in paths.items()}, **values)
sys.setprofile(None)
print(json.dumps([sorted(called), sorted({name.split(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("stage", ["untie", "quantize", "gate", "card"])
def test_a_fingerprint_covers_all_that_a_stage_calls_and_loads(
    stage: str, released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    keys = {line["name"]: line["key"] for line in released.summary["stages"] if line["key"]}
    paths, values = inputs_of(stage, keys, command_line.home)
    (tmp_path / "data").mkdir()
    arguments = json.dumps([STAGES[stage], str(tmp_path / "data"), paths, values])
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRACE, arguments],
        env={**command_line.environment(), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    called, loaded = json.loads(done.stdout.splitlines()[-1])
    ours = {(module, name) for module, name in called if module not in fingerprint.MACHINERY and name[0] != "<"}
    assert ours
    names = fingerprint.reachable_definitions(STAGES[stage])
    assert ours - names == set()
    installed = packages_distributions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dependencies = {normal(re.split("[<>=]", line)[0]) for line in project["dependencies"]}
    used = {normal(name) for top in loaded for name in installed.get(top, [])} & dependencies
    assert used - set(fingerprint.libraries(names)) <= set(EXCUSED)


def inputs_of(stage: str, keys: dict[str, str], home: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the artifact directories and the values that a stage gets as input."""
    from quantize_gemma.tasks.gate.metrics import LIBRARIES
    from quantize_gemma.tasks.models.benchmarks import find_benchmark
    from quantize_gemma.tasks.models.recipe import load_recipe

    def data(name: str) -> str:
        (folder,) = home.glob(f"*/{keys[name]}/data")
        return str(folder)

    recipe = load_recipe("HQQ-INT8-INT4").to_json()
    values: dict[str, Any]
    if stage == "untie":
        return {"checkpoint": data("download")}, {}
    if stage == "quantize":
        return {"checkpoint": data("untie")}, {"recipe": recipe, "device": "cpu"}
    if stage == "card":
        program = Path(data("export"))
        measured = {"sha256": hashlib.sha256((program / "model.pte").read_bytes()).hexdigest(), "bytes": 1}
        values = {"recipe": recipe, "device_report": {**REPORT, "program": measured}}
        return {"checkpoint": data("quantize"), "program": str(program), "gate": data("gate")}, values
    fixture = {"name": "tiny-gemma3", "revision": "0", "fixture": True}
    benchmarks = {name: find_benchmark(name).card_inputs() for name in ("mmlu", "chartqa")}
    resolved = {"model": {**fixture, "license": {}}, "datasets": dict.fromkeys(benchmarks, fixture), "text": fixture}
    values = {"resolved": resolved, "recipe": recipe, "required": ["mmlu_drop"]}
    values["benchmarks"] = benchmarks
    limits = {
        "max_kl": 0.25,
        "min_same_top": 70.0,
        "max_mmlu_drop": 5.0,
        "max_chartqa_drop": 10.0,
        "min_recovery": 80.0,
    }
    limits |= {"max_disagreement": 2.0, "max_kl_ratio": 2.0}
    values |= {"limits": limits, "versions": fingerprint.versions(LIBRARIES)}
    values |= {"command": "quantize-gemma run", "run_id": "0"}
    return {name: data(name) for name in keys if name not in ("gate", "card")}, values


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

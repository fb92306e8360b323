"""Fuzz the inputs: malformed configurations, indices, headers, recipes, tokenizers, licenses, and texts.

    python -m tests.campaigns.input_fuzz [--cases N] [--seed S]

Each case changes part of the built-in model or its recipe. A case passes if it succeeds or raises a UserError with one
sentence, and leaves nothing behind. Most cases call the functions of `quantize-gemma check`; some start a process.
Texts are put into cards, whose structure must be the same as with harmless texts. Hypothesis generates the cases and
shrinks failing ones; the seed reproduces them.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.license import clean_license
from quantize_gemma.tasks.models.metrics import parse_metrics
from quantize_gemma.tasks.models.recipe import RECIPES
from quantize_gemma.tasks.runtime.errors import UserError
from tests.campaigns import campaign
from tests.cards import PLACES, faults, markdown_texts

CASES = 1300
# In percent of the cases; the remaining cases start a process.
SHARES = {"config": 25, "header": 20, "recipe": 15, "card": 15, "index": 10, "tokenizer": 8, "license": 5}
# A change to a document: a path of keys, and the new value; REMOVED deletes the entry.
Change = tuple[tuple[Any, ...], Any]
REMOVED = object()
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)

texts = markdown_texts()
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, True])
scalars = st.none() | st.booleans() | numbers | texts
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(texts, scalars, max_size=3) | st.just(REMOVED)
# Documents that are not JSON, or not JSON of the expected type.
documents = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"7", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b'{"a": 1, "a": 2}', b"\xff"]
    ),
    values.filter(lambda value: value is not REMOVED).map(lambda value: json.dumps(value).encode()),
)


def run(cases: int, rng: random.Random, metrics: dict[str, Any] | None = None) -> Iterator[str | None]:
    """Yield None or the failure of each case. `metrics` are those of a release; if None, create a release."""
    with tempfile.TemporaryDirectory() as folder, _own_home(Path(folder)):
        if metrics is None:
            metrics = _release(Path(folder) / "release")
        for kind, share in SHARES.items():
            yield from _attack(kind, max(1, cases * share // 100), rng, Path(folder), metrics)
        process_cases = max(1, cases - sum(max(1, cases * share // 100) for share in SHARES.values()))
        yield from _attack("process", process_cases, rng, Path(folder), metrics)


def _attack(kind: str, cases: int, rng: random.Random, folder: Path, metrics: dict[str, Any]) -> Iterator[str | None]:
    """Have Hypothesis try one kind of input, and yield its cases, ending with the first failure."""
    results: list[None] = []
    strategy, attempt = _kind(kind, folder, metrics)

    @seed(rng.getrandbits(64))
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(strategy)
    def case(given_input: Any) -> None:
        results.append(None)
        attempt(given_input)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case()
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        yield " ".join(f"{kind}: {type(error).__name__}: {error} {notes}".split())[:2000]
        return
    yield from results


def _kind(kind: str, folder: Path, metrics: dict[str, Any]) -> tuple[st.SearchStrategy[Any], Callable[[Any], None]]:
    """Return the strategy for one kind of input, and the function that tries an input."""
    model = BUILTIN["tiny-gemma3"]
    config = json.loads((model / "config.json").read_text())
    if kind == "config":
        return _changed_texts(config), lambda content: _check(folder, {"config.json": content})
    if kind == "index":
        return _changed_texts(_sharded()[0]), lambda content: _check(folder, {"model.safetensors.index.json": content})
    if kind == "header":
        return _changed_texts(_header()[0]), lambda content: _check(folder, {"model.safetensors": content})
    if kind == "recipe":
        recipe = json.loads((RECIPES / "HQQ-INT8-INT4.json").read_text())
        return _changed_texts(recipe), lambda content: _check(folder, {"recipe.json": content})
    if kind == "tokenizer":
        tokenizer_files = st.one_of(
            [
                _changed_texts(json.loads((model / name).read_text())).map(lambda content, name=name: {name: content})
                for name in TOKENIZERS
            ]
        )
        templates = st.builds(lambda text: {"chat_template.jinja": text.encode(errors="surrogatepass")}, texts)
        return tokenizer_files | templates, lambda content: _check(folder, content)
    if kind == "license":
        fields = st.fixed_dictionaries({}, optional=dict.fromkeys(("license", "license_name", "license_link"), scalars))
        return fields | scalars, lambda content: _read_card(folder, content, metrics)
    if kind == "card":
        return st.fixed_dictionaries(dict.fromkeys(PLACES, texts)), lambda content: _make_card(metrics, content)
    return _changed_texts(config), lambda content: _start(folder, {"config.json": content})


def _changed_texts(document: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return a strategy for a JSON document with one or two changes, or for something else entirely."""
    paths = list(_paths(document))
    changes = st.lists(st.tuples(st.sampled_from(paths), values), min_size=1, max_size=2)
    changed_texts = changes.map(lambda change_list: json.dumps(_apply(document, change_list)).encode())
    # One case in 20 is not a changed document: few such cases are enough.
    return st.sampled_from([changed_texts] * 19 + [documents]).flatmap(lambda strategy: strategy)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths in a document at which something can be changed; for a long list, only the first few."""
    if isinstance(value, dict):
        yield (*path, "another key")
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in list(items)[:200]:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def _apply(document: Any, changes: list[Change]) -> Any:
    result = copy.deepcopy(document)
    for path, value in changes:
        container = result
        # An earlier change may have removed this path.
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for key in path[:-1]:
                container = container[key]
            if value is REMOVED:
                del container[path[-1]]
            else:
                container[path[-1]] = value
    return result


def _header() -> tuple[dict[str, Any], bytes]:
    content = (BUILTIN["tiny-gemma3"] / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _sharded() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return an index, and the two files that it names."""
    header, data = _header()
    names = sorted(name for name in header if name != "__metadata__")
    files, weight_map = {}, {}
    for number, part in enumerate((names[:40], names[40:]), 1):
        file, entries, content = f"model-0000{number}-of-00002.safetensors", {}, b""
        for name in part:
            begin, end = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [len(content), len(content) + end - begin]}
            content += data[begin:end]
            weight_map[name] = file
        text = json.dumps(entries).encode()
        files[file] = struct.pack("<Q", len(text)) + text + content
    return {"metadata": {"total_size": len(data)}, "weight_map": weight_map}, files


def _write(folder: Path, files: dict[str, bytes]) -> tuple[Path, str]:
    """Copy the built-in model and put these files into the copy; return the copy, and the recipe's name or path."""
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(BUILTIN["tiny-gemma3"], model)
    recipe = "HQQ-INT8-INT4"
    for name, content in files.items():
        if name == "recipe.json":
            recipe = str(folder / name)
            (folder / name).write_bytes(content)
            continue
        if name == "model.safetensors":
            content = struct.pack("<Q", len(content)) + content + _header()[1]
        if name == "model.safetensors.index.json":
            (model / "model.safetensors").unlink()
            for file, weights in _sharded()[1].items():
                (model / file).write_bytes(weights)
        (model / name).write_bytes(content)
    return model, recipe


def _check(folder: Path, files: dict[str, bytes]) -> None:
    """Run the checks of `quantize-gemma check` and of the start of a run."""
    from quantize_gemma.tasks.check import check_run
    from quantize_gemma.tasks.download import resolve_model
    from quantize_gemma.tasks.models.load_check import check_directory

    model, recipe = _write(folder, files)
    before = _names(folder)
    try:
        check_run(str(model), recipe, 1024, "cpu", None)
        resolve_model(str(model), None, False)
        check_directory(str(model))
    except UserError as error:
        _is_one_sentence(str(error))
    assert _names(folder) == before, "something was left behind"


def _start(folder: Path, files: dict[str, bytes]) -> None:
    """Run `quantize-gemma check` in a separate process."""
    model, recipe = _write(folder, files)
    before = _names(folder)
    command = [sys.executable, "-m", "quantize_gemma.flows.cli", "check", "--model", str(model), "--recipe", recipe]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    assert process.returncode in (0, 2), f"exit code {process.returncode}: {process.stderr[-500:]}"
    assert "Traceback" not in process.stderr
    if process.returncode == 2:
        lines = process.stderr.strip().splitlines()
        assert lines[-1].startswith("quantize-gemma: "), process.stderr[-500:]
        _is_one_sentence(lines[-1])
    assert _names(folder) == before, "something was left behind"


def _read_card(folder: Path, fields: Any, metrics: dict[str, Any]) -> None:
    """Resolve a model whose card has this metadata, and render a card from the result."""
    import yaml

    from quantize_gemma.tasks.download import resolve_model

    model, _ = _write(folder, {})
    text = yaml.safe_dump(fields, allow_unicode=True) if fields != "" else ""
    (model / "README.md").write_bytes(f"---\n{text}---\n".encode(errors="surrogatepass"))
    license_fields = resolve_model(str(model), None, False).license
    assert clean_license(license_fields) == license_fields
    _make_card(
        metrics,
        {**dict.fromkeys(PLACES, "word"), "license": "", "license_name": "", "license_link": ""} | license_fields,
    )


def _make_card(metrics: dict[str, Any], texts_by_place: dict[str, str]) -> None:
    problems = faults(parse_metrics(metrics), texts_by_place)
    assert not problems, "; ".join(problems)


def _is_one_sentence(message: str) -> None:
    assert message.isprintable(), f"the message is not one line of text: {message!r}"
    assert len(message) < 1000, f"the message has {len(message)} characters: {message[:200]}"


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@contextlib.contextmanager
def _own_home(folder: Path) -> Iterator[None]:
    """Give this process and its children their own store and Prefect home, neither of which exists yet."""
    variables = {"QUANTIZE_GEMMA_HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _release(folder: Path) -> dict[str, Any]:
    """Create a release of the built-in model, with few questions; return its metrics."""
    variables = {"QUANTIZE_GEMMA_HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}
    command = [
        sys.executable,
        "-m",
        "quantize_gemma.flows.cli",
        "run",
        "--limit",
        "1",
        "--max-seq-len",
        "256",
        "--json",
    ]
    process = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    release = Path(json.loads(process.stdout.splitlines()[-1])["release"])
    metrics: dict[str, Any] = json.loads((release / "metrics.json").read_text())
    shutil.rmtree(folder)
    return metrics


if __name__ == "__main__":
    campaign("input_fuzz", run, CASES)

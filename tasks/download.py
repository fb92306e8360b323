"""Resolve and download: a name and a revision become a pinned commit, and that becomes files in the store."""

import contextlib
import fnmatch
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.models.checkpoint import (
    check_finite,
    check_weights,
    local_checkpoint,
    read_headers,
    read_index,
    read_model_config,
    source_files,
    weight_files,
)
from quantize_gemma.tasks.models.datasets import check_charts, check_mmlu
from quantize_gemma.tasks.models.license import clean_license
from quantize_gemma.tasks.models.load_check import check_loads
from quantize_gemma.tasks.models.source_files import INDEX, SINGLE, is_release_file, open_source
from quantize_gemma.tasks.runtime import hub, store
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.store import canonical_json
from quantize_gemma.tasks.runtime.worker import report_progress

logger = logging.getLogger(__name__)

# MMLU's layout without the configurations that hold all subjects a second time.
BENCHMARK_FILES = ("README.md", "*/test-*.parquet", "*/validation-*.parquet", "*/dev-*.parquet")
BENCHMARK_LEFT_OUT = ("all/*", "auxiliary_train/*")
# ChartQA's test split; the others are ten times as large.
CHART_FILES = ("README.md", "data/test-*.parquet")


def resolve_model(model: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """Returns {"name", "revision", "source", "fixture", "license", "weight_bytes", "weights"}.

    `model` is a built-in model's name, a directory, or a repository on the Hub; the revision is a commit sha, or the
    digest of a directory's files; the license is the model card's; "weights" is how many there are at least. Raises
    UserError when there is no such model.
    """
    path = local_checkpoint(model)
    if path is None:
        return _resolve_on_hub("model", model, revision, offline)
    names = source_files(path)
    size = sum(file.stat().st_size for file in weight_files(path))
    if not path.resolve().name.isprintable():
        raise UserError(f"the model directory's name, {path.resolve().name!r}, is not one line of text: rename it")
    return {
        "name": model if model in BUILTIN else path.resolve().name,
        "revision": _digest_of(path, names),
        "source": str(path.resolve()),
        "fixture": model in BUILTIN,
        "license": clean_license(_card_of(path)),
        "weight_bytes": size,
        "weights": _fewest_weights(size),
    }


def resolve_benchmark(benchmark: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """Returns {"name", "revision", "source", "fixture"} of a built-in benchmark or of a dataset on the Hub."""
    path = BUILTIN_BENCHMARKS.get(benchmark)
    if path is None:
        return _resolve_on_hub("dataset", benchmark, revision, offline)
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return {"name": benchmark, "revision": _digest_of(path, names), "source": str(path), "fixture": True}


def _resolve_on_hub(kind: str, name: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """Returns the commit that a moving name stands for now; offline, what it stood for last."""
    if offline:
        remembered = _memory(kind, name, revision)
        if not remembered.is_file():
            raise UserError(
                f"offline: the {kind} {name} at {revision or 'its default branch'} was never resolved for this store: "
                "run once without --offline"
            )
        known: dict[str, Any] = json.loads(remembered.read_text(encoding="utf-8"))
        if "license" in known:
            known["license"] = clean_license(known["license"])
        logger.warning("offline: going on with %s at %s, as it was resolved last", name, known["revision"])
        return known
    info = hub.repo_info(kind, name, revision, hub.token())
    sizes = {file.rfilename: file.size or 0 for file in info.siblings if _is_weight_file(file.rfilename)}
    # Which of several the index names is known once it is there.
    weights = [sizes[SINGLE]] if SINGLE in sizes else list(sizes.values())
    counted = getattr(info, "safetensors", None)
    return {
        "kind": kind,
        "name": name,
        "revision": info.sha,
        "source": name,
        "fixture": False,
        "license": clean_license(info.card_data),
        "weight_bytes": sum(weights),
        # The Hub counts them; a Hub that does not leaves their size.
        "weights": counted.total if counted else _fewest_weights(sum(weights)),
    }


def _fewest_weights(size: int) -> int:
    """Returns how many float32 weights have this size in bytes: there may be twice as many."""
    return size // 4


def remember(resolved: dict[str, Any], revision: str | None) -> None:
    """Notes what a name on the Hub stood for, once it is in the store: for `--offline`."""
    if "kind" not in resolved:
        return
    for asked in (revision, resolved["revision"]):
        path = _memory(resolved["kind"], resolved["name"], asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{store.PREFIX}{uuid.uuid4().hex}")
        partial.write_text(json.dumps(resolved), encoding="utf-8")
        partial.replace(path)


def _memory(kind: str, name: str, revision: str | None) -> Path:
    asked = hashlib.sha256(canonical_json([kind, name, revision])).hexdigest()
    return store.home() / "resolved" / f"{asked}.json"


@stage(ignored=("source", "offline"), retries=5, environment=hub.read_environment)
def download(target: Path, source: str, revision: str, offline: bool) -> Output:
    """Fills `target` with the checkpoint's files, checks every header and every weight. Raises UserError.

    A local directory is copied, so that whoever trains on in it does not change the base under a running evaluation;
    a Hub repository is fetched at exactly this commit, each file checked against the Hub's own hash.
    """
    local = Path(source).is_dir()
    if local:
        with _unchanged(target, source, revision):
            for name in source_files(Path(source)):
                with open_source(Path(source), name) as reader:
                    # By its descriptor: the path may lead elsewhere by now.
                    store.copy(Path(f"/proc/self/fd/{reader.fileno()}"), target / name)
    else:
        _fetch_checkpoint(target, source, revision, offline)
    config = read_model_config(target)
    headers = read_headers(target)
    check_weights(headers, target)
    check_loads(target)
    # A local directory's own paths, for they stand in the message.
    files = weight_files(Path(source) if local else target)
    for done, path in enumerate(files):
        report_progress(done, len(files), "checking weights")
        check_finite(path)
    return {
        "metadata": {
            "architecture": config.architecture,
            "tensors": len(headers),
            "weight_bytes": sum(path.stat().st_size for path in files),
        }
    }


def _fetch_checkpoint(target: Path, repository: str, revision: str, offline: bool) -> None:
    """Fetches what a release needs and the weights that transformers would read: which they are, the index says."""

    def is_first(name: str) -> bool:
        return is_release_file(name) or name in (SINGLE, INDEX)

    incoming = _fetch(target, "model", repository, revision, offline, is_first)
    chosen = {path.name for path in incoming.iterdir() if is_first(path.name)}
    if SINGLE in chosen:
        chosen.discard(INDEX)
    elif INDEX in chosen:
        shards = set(read_index(incoming / INDEX).values())
        _fetch(target, "model", repository, revision, offline, lambda name: name in shards)
        chosen |= shards
    _move(incoming, target, lambda name: name in chosen)


@stage(ignored=("source", "offline"), retries=5, environment=hub.read_environment)
def download_mmlu(target: Path, source: str, revision: str, offline: bool) -> Output:
    """Fills `target` with a benchmark in the layout of cais/mmlu: a directory of parquet files per subject.

    Raises UserError that says what does not fit that layout.
    """
    _bring(target, source, revision, offline, _is_question_file)
    check_mmlu(target, source)
    return {}


@stage(ignored=("source", "offline"), retries=5, environment=hub.read_environment)
def download_chartqa(target: Path, source: str, revision: str, offline: bool) -> Output:
    """Fills `target` with the test split of a benchmark in the layout of HuggingFaceM4/ChartQA, in data/.

    Raises UserError that says what does not fit that layout.
    """
    _bring(target, source, revision, offline, lambda name: _is_like(name, CHART_FILES))
    check_charts(target, source)
    return {}


def _bring(target: Path, source: str, revision: str, offline: bool, wanted: Callable[[str], bool]) -> None:
    if Path(source).is_dir():
        with _unchanged(target, source, revision):
            shutil.copytree(source, target, dirs_exist_ok=True, copy_function=lambda a, b: store.copy(Path(a), Path(b)))
    else:
        _move(_fetch(target, "dataset", source, revision, offline, wanted), target, wanted)


@contextlib.contextmanager
def _unchanged(target: Path, source: str, revision: str) -> Iterator[None]:
    """Compares what is copied inside with the digest that the directory had when the run started.

    Raises UserError if it is another: whoever trains there has written meanwhile.
    """
    changing = UserError(
        f"{source} is changing: its files are no longer those that this run started with; start again when nothing "
        "writes there, or give a copy"
    )
    try:
        yield
    except (FileNotFoundError, shutil.Error) as error:
        if store.disk_failure(error, target):
            raise
        raise changing from None
    names = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
    if _digest_of(target, names) != revision:
        raise changing


def _fetch(
    target: Path, kind: str, repository: str, revision: str, offline: bool, wanted: Callable[[str], bool]
) -> Path:
    """Brings the files into a directory that outlives a failure, so that the next try goes on there; returns it."""
    if offline:
        raise UserError(f"offline: {repository} at {revision} is not in the store: run once without --offline")
    incoming = target.parent.parent / f"{store.INCOMING}{revision[:16]}"
    incoming.mkdir(parents=True, exist_ok=True)
    hub.fetch(incoming, kind, repository, revision, wanted, lambda done, total: report_progress(done, total, "bytes"))
    return incoming


def _move(incoming: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    for path in [path for path in incoming.rglob("*") if path.is_file()]:
        if not wanted(path.relative_to(incoming).as_posix()):
            continue
        place = target / path.relative_to(incoming)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    shutil.rmtree(incoming)


def _is_question_file(name: str) -> bool:
    return _is_like(name, BENCHMARK_FILES) and not _is_like(name, BENCHMARK_LEFT_OUT)


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    # A star stands for slashes, too.
    return ".." not in name.split("/") and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_weight_file(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors")


def _digest_of(folder: Path, names: list[str]) -> str:
    digests = {}
    for name in names:
        with open_source(folder, name) as stream:
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(canonical_json(digests)).hexdigest()[:40]


def _card_of(folder: Path) -> Any:
    """Returns the metadata of a directory's model card, or None: a broken one is no reason not to quantize."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / "README.md")
    except Exception:
        return None

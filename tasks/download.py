"""Resolve and download: pin a name and a revision to a commit, and fetch its files into the store."""

import contextlib
import hashlib
import io
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS, BUILTIN_TEXTS
from quantize_gemma.tasks.models.benchmarks import Benchmark, Resource, is_data_file
from quantize_gemma.tasks.models.checkpoint import (
    check_finite,
    check_weights,
    is_multimodal,
    local_checkpoint,
    read_config,
    read_headers,
    read_index,
    read_model_config,
    source_files,
    weight_files,
)
from quantize_gemma.tasks.models.config import ModelConfig, parse_config
from quantize_gemma.tasks.models.datasets import TEXT_FILE, WIKITEXT, WIKITEXT_FILES, read_wikitext
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.license import clean_license
from quantize_gemma.tasks.models.load_check import check_loads
from quantize_gemma.tasks.models.resolved import ResolvedDataset, ResolvedModel
from quantize_gemma.tasks.models.source_files import INDEX, SINGLE, is_release_file, open_source
from quantize_gemma.tasks.runtime import hub, store, store_layout
from quantize_gemma.tasks.runtime.disk import disk_failure
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.hub_client import find_token, read_environment
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.retries import is_retryable
from quantize_gemma.tasks.runtime.stage import Output, import_function, stage
from quantize_gemma.tasks.runtime.store import canonical_json
from quantize_gemma.tasks.runtime.strict_json import parse_object

logger = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 60.0


def resolve_model(model: str, revision: str | None, offline: bool) -> ResolvedModel:
    """Resolve the name of a built-in model, a directory, or a repository on the Hub to a pinned revision.

    Raises:
        UserError: There is no such model, or a directory has a revision.
    """
    path = local_checkpoint(model, revision)
    if path is None:
        return _remembered_model(model, revision) if offline else _model_on_hub(model, revision)
    names = source_files(path)
    size = sum(file.stat().st_size for file in weight_files(path))
    if not path.resolve().name.isprintable():
        raise UserError(
            f"the model directory's name, {path.resolve().name!r}, contains line breaks or control characters: rename "
            "it"
        )
    return ResolvedModel(
        name=model if model in BUILTIN else path.resolve().name,
        revision=_digest_of(path, names),
        source=str(path.resolve()),
        fixture=model in BUILTIN,
        on_hub=False,
        license=clean_license(_read_card_metadata(path)),
        weight_bytes=size,
        weights=_fewest_weights(size),
        multimodal=is_multimodal(read_config(path)),
    )


def resolve_dataset(row: Benchmark, source: str, revision: str | None, offline: bool) -> ResolvedDataset:
    """Resolve the name of a fixture, a directory (./, ../, / or ~/), or a dataset on the Hub to a pinned revision.

    Args:
        row: The benchmark, which defines the dataset's layout.
        source: The name or the path.
        revision: Branch, tag, or commit on the Hub; None for the default branch.
        offline: Do not contact the Hub.

    Raises:
        UserError: There is no such dataset.
    """
    fixture = BUILTIN_BENCHMARKS.get(source)
    # Any other name is a name on the Hub, even if the working directory has a file with that name.
    if fixture is not None or is_path(source):
        path = fixture or Path(source).expanduser().resolve()
        if not path.is_dir():
            raise UserError(f"the directory {source} for the dataset of {row.title} does not exist: check the path")
        names = _data_files(path, row.patterns(), row.skipped_files)
        if not names:
            raise UserError(f"{source} has no data files: use a dataset in the layout of {row.dataset}")
        name = source if fixture else path.name
        return ResolvedDataset(name, _digest_of(path, names), str(path), fixture=fixture is not None, on_hub=False)
    return _dataset_on_hub(source, revision, offline)


def resolve_text(source: str, revision: str | None, offline: bool) -> ResolvedDataset:
    """Resolve the name of a built-in text, a text file (./, ../, / or ~/), or WikiText on the Hub to a pinned revision.

    Args:
        source: The name or the path.
        revision: Branch, tag, or commit on the Hub; None for the default branch.
        offline: Do not contact the Hub.

    Raises:
        UserError: There is no such text.
    """
    fixture = BUILTIN_TEXTS.get(source)
    if fixture is None and not is_path(source):
        return _dataset_on_hub(source, revision, offline)
    path = fixture / TEXT_FILE if fixture else Path(source).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"there is no text file {source}: check the path, or use {WIKITEXT}")
    name = source if fixture else path.name
    if not name.isprintable():
        raise UserError(f"the text file's name, {name!r}, contains line breaks or control characters: rename it")
    return ResolvedDataset(name, _digest_of_text(path), str(path), fixture=fixture is not None, on_hub=False)


def _dataset_on_hub(name: str, revision: str | None, offline: bool) -> ResolvedDataset:
    if offline:
        fields = _read_memory("dataset", name, revision)
        return ResolvedDataset(name, fields["revision"], fields["source"], fixture=False, on_hub=True)
    info = hub.repo_info("dataset", name, revision, find_token())
    return ResolvedDataset(name, str(info.sha), name, fixture=False, on_hub=True)


def is_path(source: str) -> bool:
    """Tell whether a source is a path. Any other name is on the Hub, even if the working directory has such a file."""
    return source.startswith((".", "/", "~"))


def _data_files(folder: Path, files: Sequence[str], skipped_files: Sequence[str]) -> list[str]:
    """Return the names of the data files that a benchmark needs from a directory."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if is_data_file(name, files, skipped_files)]


def _model_on_hub(name: str, revision: str | None) -> ResolvedModel:
    """Return the commit that a branch or a tag currently points to."""
    info = hub.repo_info("model", name, revision, find_token())
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _is_weight_file(file.rfilename)}
    # If there are several, only the index says which ones to use, and it is not downloaded yet.
    weight_bytes = sizes[SINGLE] if SINGLE in sizes else sum(sizes.values())
    counts = getattr(info, "safetensors", None)
    return ResolvedModel(
        name=name,
        revision=str(info.sha),
        source=name,
        fixture=False,
        on_hub=True,
        license=clean_license(info.card_data),
        weight_bytes=weight_bytes,
        # The Hub reports the number of weights; if a mirror does not, derive a lower bound from their size.
        weights=counts.total if counts else _fewest_weights(weight_bytes),
        multimodal=(getattr(info, "config", None) or {}).get("model_type") != GEMMA3.text_only.model_type,
    )


def _remembered_model(name: str, revision: str | None) -> ResolvedModel:
    fields = _read_memory("model", name, revision)
    return ResolvedModel(
        name=name,
        revision=fields["revision"],
        source=fields["source"],
        fixture=False,
        on_hub=True,
        license=clean_license(fields["license"]),
        weight_bytes=fields["weight_bytes"],
        weights=fields["weights"],
        # Records from earlier versions do not have this field.
        multimodal=fields.get("multimodal", True),
    )


def _read_memory(kind: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return what `remember` recorded for a name on the Hub. Raises UserError if the name was never resolved."""
    path = _memory_path(kind, name, revision)
    if not path.is_file():
        raise UserError(
            f"offline: this store does not know the commit of the {kind} {name} at "
            f"{revision or 'its default branch'}: run once without --offline"
        )
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    logger.warning("offline: using %s at %s, as it was last resolved", name, fields["revision"])
    return fields


def _fewest_weights(size: int) -> int:
    """Return the number of float32 weights of this size in bytes; in bfloat16, it would be twice as high."""
    return size // 4


def remember(resolved: ResolvedDataset, revision: str | None) -> None:
    """Record what a name on the Hub resolved to, for `--offline`; call this after its files are in the store."""
    if not resolved.on_hub:
        return
    kind = "model" if isinstance(resolved, ResolvedModel) else "dataset"
    for name in (revision, resolved.revision):
        path = _memory_path(kind, resolved.name, name)
        # The lock keeps pruning from removing the unfinished file.
        with store_layout.hold_lock(path):
            partial = store_layout.partial_path(path)
            partial.write_text(json.dumps({"kind": kind, **asdict(resolved)}), encoding="utf-8")
            partial.replace(path)


def _memory_path(kind: str, name: str, revision: str | None) -> Path:
    digest = hashlib.sha256(canonical_json([kind, name, revision])).hexdigest()
    return store.home() / "resolved" / f"{digest}.json"


@stage(ignored=("source", "offline"), retries=5, environment=read_environment)
def download(target: Path, source: str, revision: str, offline: bool) -> Output:
    """Fill `target` with the checkpoint's files, and check every header and every weight.

    A local directory is copied, so that training in it cannot change the base model during an evaluation; a Hub
    repository is fetched at exactly this commit, and each file is checked against the Hub's own hash.

    Raises:
        UserError: The checkpoint is not a valid Gemma 3 checkpoint.
    """
    local = Path(source).is_dir()
    if local:
        with _check_unchanged(target, source, revision):
            for name in source_files(Path(source)):
                with open_source(Path(source), name) as reader:
                    # Copy from the descriptor, because the path may point to another file by now.
                    store.copy(Path(f"/proc/self/fd/{reader.fileno()}"), target / name)
    else:
        _fetch_checkpoint(target, source, revision, offline)
    config = read_model_config(target)
    tensors = read_headers(target)
    check_weights(tensors, target)
    system_message = check_loads(target)
    # Check a local directory's own paths, because messages show them.
    files = weight_files(Path(source) if local else target)
    for index, path in enumerate(files):
        report_progress(index, len(files), "checking weights")
        check_finite(path)
    return {
        "metadata": {
            "architecture": config.architecture,
            "tensors": len(tensors),
            "weight_bytes": sum(path.stat().st_size for path in files),
            # Whether the chat template accepts one.
            "system_message": system_message,
        }
    }


def read_config_on_hub(model: ResolvedModel) -> ModelConfig:
    """Return a model's checked configuration from the Hub. Raises UserError if it is not a Gemma 3 model's."""
    token = find_token()
    info = hub.repo_info("model", model.source, model.revision, token)
    file = next((file for file in info.siblings or [] if file.rfilename == "config.json"), None)
    if file is None:
        raise UserError(f"{model.name} has no config.json: it is not a transformers checkpoint")
    # Messages name the repository.
    path = Path(model.name) / file.rfilename
    content = hub.read_file("model", model.source, model.revision, file, token)
    try:
        config = parse_object(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): use another model or revision") from None
    return parse_config(config, path)


def _fetch_checkpoint(target: Path, repository: str, revision: str, offline: bool) -> None:
    """Fetch the files that a release needs, and the weight files in the index, which transformers reads."""

    def is_first(name: str) -> bool:
        return is_release_file(name) or name in (SINGLE, INDEX)

    incoming = _fetch(target, "model", repository, revision, offline, is_first)
    names = {path.name for path in incoming.iterdir() if is_first(path.name)}
    if SINGLE in names:
        names.discard(INDEX)
    elif INDEX in names:
        shards = set(read_index(incoming / INDEX).values())
        _fetch(target, "model", repository, revision, offline, lambda name: name in shards)
        names |= shards
    _move_files(incoming, target, lambda name: name in names)


@stage(ignored=("source", "offline"), retries=5, environment=read_environment)
def download_dataset(
    target: Path,
    source: str,
    revision: str,
    offline: bool,
    files: Sequence[str],
    skipped_files: Sequence[str],
    resources: Sequence[dict[str, str]],
    check: str,
) -> Output:
    """Fill `target` with the files of a benchmark's dataset.

    This function has more than seven parameters because each one is part of the stage's cache key.

    Args:
        target: The directory to write to.
        source: A directory, or a repository on the Hub.
        revision: The digest of the directory's files, or a commit.
        offline: Do not contact the Hub.
        files: Patterns of the files.
        skipped_files: Patterns of files that are not needed.
        resources: Other files that the benchmark's task needs; see Resource. They are fetched here, not on import.
        check: The function that checks the files, as "module:name".

    Raises:
        UserError: The dataset has a different layout; the message says where.
    """

    def is_needed(name: str) -> bool:
        return is_data_file(name, files, skipped_files)

    if Path(source).is_dir():
        with _check_unchanged(target, source, revision):
            for name in _data_files(Path(source), files, skipped_files):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                store.copy(Path(source) / name, target / name)
    else:
        _move_files(_fetch(target, "dataset", source, revision, offline, is_needed), target, is_needed)
    import_function(check)(target, source)
    for resource in [Resource(**fields) for fields in resources]:
        if (target / resource.folder).is_dir():
            continue
        if offline:
            raise UserError(f"offline: {resource.url} is not in the store: run once without --offline")
        _fetch_resource(target, resource)
    return {}


@stage(ignored=("source", "offline"), retries=5, environment=read_environment)
def download_text(target: Path, source: str, revision: str, offline: bool) -> Output:
    """Write text.txt, the text on which fidelity is measured.

    Args:
        target: The directory to write to.
        source: A text file, or a repository on the Hub in the layout of Salesforce/wikitext.
        revision: The digest of the file, or a commit.
        offline: Do not contact the Hub.

    Raises:
        UserError: The source is not a UTF-8 text.
    """
    if Path(source).is_file():
        store.copy(Path(source), target / TEXT_FILE)
        if _digest_of_text(target / TEXT_FILE) != revision:
            raise UserError(f"{source} is changing: start again when nothing writes to it, or use a copy")
    else:

        def is_needed(name: str) -> bool:
            return is_data_file(name, (WIKITEXT_FILES,), ())

        incoming = _fetch(target, "dataset", source, revision, offline, is_needed)
        (target / TEXT_FILE).write_text(read_wikitext(incoming, source), encoding="utf-8")
        shutil.rmtree(incoming)
    try:
        return {"metadata": {"characters": len((target / TEXT_FILE).read_text(encoding="utf-8"))}}
    except UnicodeDecodeError as error:
        raise UserError(f"the text {source} is not UTF-8 ({error}): convert it") from None


def _fetch_resource(target: Path, resource: Resource) -> None:
    """Fetch an archive, check its hash, and write the files of its folder that is needed.

    Raises:
        StageFailed: The archive cannot be fetched, or its hash is not the pinned one.
    """
    import httpx

    try:
        response = httpx.get(resource.url, follow_redirects=True, timeout=SECONDS_TO_ANSWER).raise_for_status()
    except httpx.HTTPError as error:
        raise StageFailed(f"{resource.url} cannot be fetched: {error}", *is_retryable(error)) from None
    content = response.content
    if hashlib.sha256(content).hexdigest() != resource.sha256:
        raise StageFailed(f"{resource.url} does not have the pinned SHA-256 {resource.sha256}: it is not used")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            name = info.filename.removeprefix(resource.member)
            if info.filename.startswith(resource.member) and name and "/" not in name:
                (target / resource.folder).mkdir(parents=True, exist_ok=True)
                (target / resource.folder / name).write_bytes(archive.read(info))


@contextlib.contextmanager
def _check_unchanged(target: Path, source: str, revision: str) -> Iterator[None]:
    """Check that the files copied within this context have the digest that the directory had when the run started.

    Raises:
        UserError: The digest differs because something is writing to the directory, such as a training run.
    """
    refusal = UserError(
        f"{source} is changing: its files are no longer those that this run started with; start again when nothing "
        "writes there, or use a copy"
    )
    try:
        yield
    except (FileNotFoundError, shutil.Error) as error:
        if disk_failure(error, target):
            raise
        raise refusal from None
    names = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
    if _digest_of(target, names) != revision:
        raise refusal


def _fetch(
    target: Path, kind: str, repository: str, revision: str, offline: bool, is_needed: Callable[[str], bool]
) -> Path:
    """Fetch files into a directory that survives a failure, so that the next attempt resumes; return the directory.

    It belongs to one artifact: two benchmarks can need different files of the same commit at the same time.
    """
    if offline:
        raise UserError(f"offline: {repository} at {revision} is not in the store: run once without --offline")
    key = target.parent.name.removeprefix(store_layout.PARTIAL)[:16]
    incoming = target.parent.parent / f"{store_layout.INCOMING}{revision[:16]}-{key}"
    incoming.mkdir(parents=True, exist_ok=True)
    hub.download_files(
        incoming, kind, repository, revision, is_needed, lambda count, total: report_progress(count, total, "bytes")
    )
    return incoming


def _move_files(incoming: Path, target: Path, is_needed: Callable[[str], bool]) -> None:
    for path in [path for path in incoming.rglob("*") if path.is_file()]:
        if not is_needed(path.relative_to(incoming).as_posix()):
            continue
        destination = target / path.relative_to(incoming)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.rename(destination)
    shutil.rmtree(incoming)


def _is_weight_file(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors")


def _digest_of(folder: Path, names: list[str]) -> str:
    digests = {}
    for name in names:
        with open_source(folder, name) as stream:
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(canonical_json(digests)).hexdigest()[:40]


def _digest_of_text(path: Path) -> str:
    """Return the digest of a text file's content, without its name."""
    with open_source(path.parent, path.name) as stream:
        digests = {TEXT_FILE: hashlib.file_digest(stream, "sha256").hexdigest()}
    return hashlib.sha256(canonical_json(digests)).hexdigest()[:40]


def _read_card_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a directory's model card; None if it is missing or malformed, which is not an error."""
    from huggingface_hub import metadata_load

    try:
        metadata: dict[str, Any] | None = metadata_load(folder / "README.md")
        return metadata
    except Exception:
        return None

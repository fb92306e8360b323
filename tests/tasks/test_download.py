"""Downloads match the Hub's hashes, resume where they stopped, and report what is wrong."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS, BUILTIN_TEXTS
from quantize_gemma.tasks.download import (
    _data_files,
    _digest_of,
    _fetch_resource,
    download,
    download_dataset,
    download_text,
    read_config_on_hub,
    remember,
    resolve_dataset,
    resolve_model,
    resolve_text,
)
from quantize_gemma.tasks.models.benchmarks import Resource, find_benchmark
from quantize_gemma.tasks.models.checkpoint import check_finite
from quantize_gemma.tasks.models.datasets import check_chartqa, check_mmlu
from quantize_gemma.tasks.models.resolved import ResolvedModel
from quantize_gemma.tasks.runtime import hub as client
from quantize_gemma.tasks.runtime import store, worker
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.hub_errors import translate_hub_errors
from tests.hub.server import Hub, serve
from tests.text_only import write_text_only
from tests.texts import WIKITEXT, write_wikitext

pytestmark = pytest.mark.slow

TOKEN = "hf_reader000000"
WEIGHTS = "model.safetensors"
NAME = "team/tiny"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub", {TOKEN: {"user": "reader", "role": "read"}}) as running:
        yield running


def download_from(
    hub: Hub, tmp_path: Path, revision: str, token: str | None = None, offline: bool = False, **environment: str
) -> Path:
    """Run the stage's work in a separate process, as the flow does; return the directory that it filled."""
    target = tmp_path / "store" / "download" / ".partial-x" / "data"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    values = {"source": NAME, "revision": revision, "offline": offline}
    call = {
        "function": "quantize_gemma.tasks.download:download",
        "target": str(target),
        "paths": {},
        "values": values,
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "2", **({"HF_TOKEN": token} if token else {})}
    worker.run("quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None, environment)
    return target


def bring(benchmark: str, source: Path | str, tmp_path: Path, revision: str = "", **environment: str) -> Path:
    """Run download_dataset as the flow does; return the directory that it filled."""
    row = find_benchmark(benchmark)
    target = tmp_path / "store" / benchmark / ".partial-x" / "data"
    target.mkdir(parents=True)
    if isinstance(source, Path):
        revision = _digest_of(source, _data_files(source, row.files, row.skipped_files))
    values = {"source": str(source), "revision": revision, "offline": False, **row.file_inputs()}
    call = {
        "function": "quantize_gemma.tasks.download:download_dataset",
        "target": str(target),
        "paths": {},
        "values": values,
    }
    worker.run("quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None, environment)
    return target


def bring_text(source: str, tmp_path: Path, revision: str, **environment: str) -> Path:
    """Run download_text as the flow does; return the directory that it filled."""
    target = tmp_path / "store" / "download_text" / ".partial-x" / "data"
    target.mkdir(parents=True)
    call = {
        "function": "quantize_gemma.tasks.download:download_text",
        "target": str(target),
        "paths": {},
        "values": {"source": source, "revision": revision, "offline": False},
    }
    worker.run("quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None, environment)
    return target


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_only_files_that_a_release_needs_are_fetched_unchanged(hub: Hub, tmp_path: Path) -> None:
    source = shutil.copytree(BUILTIN["tiny-gemma3"], tmp_path / "source")
    for name in ("pytorch_model.bin", "training_args.bin", "code.py", "checkpoint-500/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not needed")
    sha = hub.add("model", NAME, source)
    target = download_from(hub, tmp_path, sha)
    assert names_of(target) == names_of(BUILTIN["tiny-gemma3"]) - {"README.md"}
    for path in target.iterdir():
        assert path.read_bytes() == (BUILTIN["tiny-gemma3"] / path.name).read_bytes()
    assert not hub.requests("GET", r"\.bin|\.py|checkpoint-500")


def test_a_pinned_commit_is_fetched_although_the_branch_has_moved(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    changed = shutil.copytree(BUILTIN["tiny-gemma3"], tmp_path / "changed")
    (changed / "generation_config.json").write_text("{}")
    hub.add("model", NAME, changed)
    target = download_from(hub, tmp_path, sha)
    assert (target / "generation_config.json").read_text() != "{}"


def test_the_librarys_offline_mode_sends_no_request(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.log.clear()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        download_from(hub, tmp_path, sha, HF_HUB_OFFLINE="1")
    assert not hub.log


def test_an_interrupted_transfer_resumes_from_its_last_byte(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    size = (BUILTIN["tiny-gemma3"] / WEIGHTS).stat().st_size
    hub.faults.add(method="GET", path=r"/lfs/", cut=300_000, times=1)
    with pytest.raises(StageFailed) as failure:
        download_from(hub, tmp_path, sha)
    assert failure.value.transient
    kept = [entry["sent"] for entry in hub.requests("GET", "/lfs/")]
    hub.log.clear()
    target = download_from(hub, tmp_path, sha)
    assert (target / WEIGHTS).read_bytes() == (BUILTIN["tiny-gemma3"] / WEIGHTS).read_bytes()
    resumed = [entry for entry in hub.requests("GET", "/lfs/") if entry["range"]]
    assert len(resumed) == 1
    assert max(kept) >= 300_000
    assert resumed[0]["sent"] <= size - 300_000
    # The files that were complete are not fetched again.
    assert not hub.requests("GET", r"resolve/.*/config\.json")


def test_a_download_of_other_files_of_the_same_commit_leaves_an_interrupted_one_alone(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("dataset", "cais/mmlu", BUILTIN_BENCHMARKS["mmlu-mini"])

    def fetch(key: str, files: str) -> Path:
        target = tmp_path / "store" / "download_dataset" / f".partial-{key * 16}-0" / "data"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        values = {"source": "cais/mmlu", "revision": sha, "offline": False, "files": [files], "skipped_files": []}
        values |= {"resources": [], "check": "quantize_gemma.tasks.models.datasets:check_files"}
        call = {"function": "quantize_gemma.tasks.download:download_dataset", "paths": {}, "values": values}
        call["target"] = str(target)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
        worker.run("quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None, environment)
        return target

    hub.faults.add(method="GET", path=r"/lfs/", cut=1000, times=1)
    with pytest.raises(StageFailed):
        fetch("a", "anatomy/*")
    assert names_of(fetch("b", "astronomy/*")) == names_of(BUILTIN_BENCHMARKS["mmlu-mini"] / "astronomy")
    hub.log.clear()
    assert names_of(fetch("a", "anatomy/*")) == names_of(BUILTIN_BENCHMARKS["mmlu-mini"] / "anatomy")
    assert [entry["range"] for entry in hub.requests("GET", "/lfs/") if entry["range"]]


def test_a_wrong_file_is_fetched_again_and_named_if_it_is_wrong_again(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="/lfs/", wrong_bytes=True, times=1)
    target = download_from(hub, tmp_path, sha)
    assert (target / WEIGHTS).read_bytes() == (BUILTIN["tiny-gemma3"] / WEIGHTS).read_bytes()
    hub.faults.clear()
    hub.faults.add(method="GET", path=r"config\.json", wrong_bytes=True)
    with pytest.raises(StageFailed, match=r"config\.json of team/tiny was downloaded twice and did not match"):
        download_from(hub, tmp_path, sha)


@pytest.mark.parametrize(
    ("fault", "retry_after"),
    [
        ({"status": 429, "headers": {"Retry-After": "3"}}, 3.0),
        ({"status": 429, "headers": {"RateLimit": '"api";r=0;t=41'}}, 42.0),
        ({"status": 500}, 0.0),
        ({"status": 522}, 0.0),
        ({"delay": 4}, 0.0),
        ({"status": 503}, 0.0),
        ({"cut": 10}, 0.0),
    ],
)
def test_transient_failures_are_marked_as_such(
    hub: Hub, tmp_path: Path, fault: dict[str, Any], retry_after: float
) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="resolve", **fault)
    with pytest.raises(StageFailed) as failure:
        download_from(hub, tmp_path, sha)
    assert failure.value.transient
    assert failure.value.retry_after == retry_after


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Retry-After": "7200"}, r"too busy; start the run again after \d{4}-\d\d-\d\d \d\d:\d\d UTC"),
        ({"Retry-After": "99999999999"}, "too busy; it does not allow another request for more than a year"),
        ({"Retry-After": "Fri, 31 Dec 2099 23:59:59 GMT"}, "more than a year"),
        ({"RateLimit": '"api";r=0;t=99999999999'}, "more than a year"),
    ],
)
def test_a_retry_after_of_hours_ends_the_stage_and_says_when_to_retry(
    hub: Hub, tmp_path: Path, headers: dict[str, str], words: str
) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="resolve", status=429, headers=headers, error_message="too busy")
    with pytest.raises(StageFailed, match=words) as failure:
        download_from(hub, tmp_path, sha)
    assert not failure.value.transient
    assert len(hub.requests("GET", "resolve")) == 1


def test_an_unreadable_response_is_transient(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="/api/models", wrong_bytes=True)
    with pytest.raises(StageFailed, match="the Hub's response for team/tiny cannot be read") as failure:
        download_from(hub, tmp_path, sha)
    assert failure.value.transient


def test_an_error_in_our_code_is_one_line_for_the_user_and_a_traceback_without_tokens_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(StageFailed) as failure, translate_hub_errors("model", NAME):
        raise KeyError("Bearer hf_MARKED000000")
    assert "\n" not in str(failure.value)
    assert not failure.value.transient
    assert "Traceback" in caplog.text
    assert 'raise KeyError("Bearer' in caplog.text
    assert "MARKED" not in caplog.text + str(failure.value)


def test_the_last_resolved_revision_is_remembered_for_that_name_and_revision_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    model = ResolvedModel(
        "a/b--c", "0" * 40, "a/b--c", False, True, license={}, weight_bytes=8, weights=4, multimodal=True
    )
    remember(model, "default")
    remember(replace(model, revision="1" * 40), "x--y")
    assert resolve_model("a/b--c", "default", offline=True) == model
    for name, revision in (("a/b--c", None), ("a--b/c", "default"), ("a/b--c", "x/y")):
        with pytest.raises(UserError, match="this store does not know the commit of the model"):
            resolve_model(name, revision, offline=True)


def resolve_in_process(_target: Path, /, name: str) -> dict[str, Any]:
    return {"metadata": asdict(resolve_model(name, None, offline=False))}


def test_whether_a_model_on_the_hub_is_multimodal_is_known_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "README.md").write_text("It has no config.json.")
    models = {
        "team/images": (BUILTIN["tiny-gemma3"], True),
        "team/text": (write_text_only(BUILTIN["tiny-gemma3"], tmp_path / "text"), False),
        "team/silent": (tmp_path / "silent", True),
    }
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    for name, (folder, reads_images) in models.items():
        hub.add("model", name, folder)
        call = {"target": "/", "paths": {}, "values": {"name": name}}
        call["function"] = "tests.tasks.test_download:resolve_in_process"
        output = worker.run("quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None, environment)
        assert output["metadata"]["multimodal"] == reads_images, name
    assert not hub.requests("GET", "resolve/")


def read_config_in_process(_target: Path, /, name: str) -> dict[str, Any]:
    read_config_on_hub(resolve_model(name, None, offline=False))
    return {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"architectures": ["LlamaForCausalLM"]}', "^team/tiny is a LlamaForCausalLM model, not Gemma 3"),
        ("{", r"^team/tiny/config\.json cannot be read"),
        (None, r"^team/tiny has no config\.json"),
    ],
)
def test_a_configuration_on_the_hub_that_is_not_gemma_3s_is_named_by_its_repository(
    text: str | None, message: str, hub: Hub, tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    model = tiny_copy()
    (model / "config.json").unlink()
    if text is not None:
        (model / "config.json").write_text(text)
    hub.add("model", NAME, model)
    call = {"function": f"{__name__}:read_config_in_process", "target": "/", "paths": {}, "values": {"name": NAME}}
    function, environment = "quantize_gemma.tasks.runtime.worker_main:call", {"HF_ENDPOINT": hub.url}
    with pytest.raises(UserError, match=message):
        worker.run(function, call, lambda *_: None, None, environment)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 401}, ["token", "valid"]),
        ({"status": 403}, ["denied access", "HF_TOKEN"]),
        ({"status": 404, "error_code": "EntryNotFound"}, ["a file is missing from"]),
        ({"status": 404, "error_code": "RevisionNotFound"}, ["no revision"]),
    ],
)
def test_an_error_from_the_hub_says_what_to_do(
    hub: Hub, tmp_path: Path, fault: dict[str, Any], words: list[str]
) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="resolve", **fault)
    with pytest.raises(UserError) as raised:
        download_from(hub, tmp_path, sha, TOKEN)
    for word in [NAME, *words]:
        assert word in str(raised.value)


def test_a_gated_repository_names_the_page_where_its_terms_are_accepted(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.restrict("model", NAME, gated=True)
    with pytest.raises(UserError, match=f"{NAME} is gated: accept its terms at {hub.url}/{NAME}"):
        download_from(hub, tmp_path, sha, TOKEN)


def test_offline_nothing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    with pytest.raises(UserError, match="is not in the store: run once without --offline"):
        download_from(hub, tmp_path, sha, offline=True)
    assert hub.log == []


def test_files_match_the_hubs_hashes_only_if_they_are_the_same(hub: Hub, tmp_path: Path) -> None:
    hub.add("dataset", "cais/mmlu", BUILTIN_BENCHMARKS["mmlu-mini"])
    path = tmp_path / "anatomy.parquet"
    shutil.copy(BUILTIN_BENCHMARKS["mmlu-mini"] / "anatomy" / "test-00000-of-00001.parquet", path)

    class File:
        entry = hub.files("dataset", "cais/mmlu")["anatomy/test-00000-of-00001.parquet"]
        size = entry["size"]
        blob_id = entry["blob_id"]
        lfs = type("Lfs", (), {"sha256": store.digest_file(path)})

    assert client.is_same(path, File)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert not client.is_same(path, File)


def test_only_the_test_split_of_chartqa_is_fetched(hub: Hub, tmp_path: Path) -> None:
    source = shutil.copytree(BUILTIN_BENCHMARKS["chartqa-mini"], tmp_path / "source")
    test = next((source / "data").iterdir())
    for name in ("train-00000-of-00003-49492f364babfa44.parquet", "val-00000-of-00001-0f11003c77497969.parquet"):
        shutil.copy(test, source / "data" / name)
    test.rename(test.with_name("test-00000-of-00001-e2cd0b7a0f9eb20d.parquet"))
    sha = hub.add("dataset", "HuggingFaceM4/ChartQA", source)
    target = bring("chartqa", "HuggingFaceM4/ChartQA", tmp_path, sha, HF_ENDPOINT=hub.url)
    assert names_of(target) == {"README.md", "test-00000-of-00001-e2cd0b7a0f9eb20d.parquet"}
    assert not hub.requests("GET", "train-|val-")
    assert digests(target) <= digests(source)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Resource]:
    """An archive on a server, with a folder that a task needs, and other folders."""
    folder = tmp_path / "served"
    folder.mkdir()
    with zipfile.ZipFile(folder / "words.zip", "w") as written:
        for name in ("words/english/list.txt", "words/english/../../out.txt", "words/german/list.txt", "README"):
            written.writestr(name, name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        digest = store.digest_file(folder / "words.zip")
        yield Resource(f"http://127.0.0.1:{server.server_port}/words.zip", digest, "words/english/", "data/english")
        server.shutdown()


def test_only_the_pinned_folder_of_an_archive_is_unpacked(archive: Resource, tmp_path: Path) -> None:
    _fetch_resource(tmp_path / "target", archive)
    files = [path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*.*")]
    assert files == ["data/english/list.txt"]
    with pytest.raises(StageFailed, match="does not have the pinned SHA-256 000: it is not used"):
        _fetch_resource(tmp_path / "other", replace(archive, sha256="000"))
    with pytest.raises(StageFailed, match=r"nothing\.zip cannot be fetched: .*404"):
        _fetch_resource(tmp_path / "other", replace(archive, url=archive.url.replace("words", "nothing")))
    assert not (tmp_path / "other").exists()


def test_offline_an_archive_is_not_fetched(tmp_path: Path, archive: Resource) -> None:
    source = write_rows(tmp_path / "mirror")
    row = find_benchmark("gsm8k")
    revision = _digest_of(source, _data_files(source, row.files, row.skipped_files))
    inputs = {**row.file_inputs(), "resources": [asdict(archive)]}
    with pytest.raises(UserError, match=r"offline: .*words\.zip is not in the store: run once without --offline"):
        download_dataset(tmp_path / "target", str(source), revision, True, **inputs)
    download_dataset(tmp_path / "online", str(source), revision, False, **inputs)
    assert (tmp_path / "online" / "data" / "english" / "list.txt").is_file()


def test_no_archive_is_fetched_if_the_mirror_has_its_files(tmp_path: Path, archive: Resource) -> None:
    row = replace(find_benchmark("gsm8k"), resources=(archive,))
    source = write_rows(tmp_path / "mirror")
    without = resolve_dataset(row, str(source), None, True).revision
    (source / archive.folder).mkdir(parents=True)
    (source / archive.folder / "list.txt").write_text("from the mirror")
    resolved = resolve_dataset(row, str(source), None, True)
    assert resolved.revision != without
    target = tmp_path / "target"
    download_dataset(target, str(source), resolved.revision, True, **row.file_inputs())
    assert (target / archive.folder / "list.txt").read_text() == "from the mirror"


def digests(folder: Path) -> set[str]:
    return {store.digest_file(path) for path in folder.rglob("*") if path.is_file()}


def write_rows(folder: Path) -> Path:
    """Write a dataset whose layout is not that of a built-in one."""
    import pyarrow
    import pyarrow.parquet

    (folder / "main").mkdir(parents=True)
    rows = [{"question": "3 + 4?", "answer": "#### 7"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "main" / "test-0.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "main" / "run.py").write_text("raise SystemExit")
    return folder


def test_a_directory_can_replace_a_benchmarks_dataset(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "mirror")
    row = find_benchmark("gsm8k")
    resolved = resolve_dataset(row, str(source), None, True)
    assert (resolved.name, resolved.fixture, resolved.on_hub) == ("mirror", False, False)
    target = bring("gsm8k", source, tmp_path)
    # No code is copied.
    assert names_of(target) == {"README.md", "test-0.parquet"}
    (source / "main" / "test-0.parquet").write_bytes(b"changed")
    assert resolve_dataset(row, str(source), None, True).revision != resolved.revision
    with pytest.raises(UserError, match=r"the directory \./nowhere for the dataset of GSM8K does not exist"):
        resolve_dataset(row, "./nowhere", None, True)


def test_a_name_refers_to_the_hub_whatever_the_working_directory_contains(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "openai" / "gsm8k")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="this store does not know the commit of the dataset openai/gsm8k"):
        resolve_dataset(find_benchmark("gsm8k"), "openai/gsm8k", None, True)


def test_a_benchmark_of_another_layout_is_rejected(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("dataset", "team/other", BUILTIN["tiny-gemma3"])
    with pytest.raises(UserError, match=r"team/other has no <subject>/test-\*.parquet: .* the layout of cais/mmlu"):
        bring("mmlu", "team/other", tmp_path, sha, HF_ENDPOINT=hub.url)
    with pytest.raises(UserError, match=r"team/other has no data/test-\*.parquet: .* of HuggingFaceM4/ChartQA"):
        bring("chartqa", "team/other", tmp_path, sha, HF_ENDPOINT=hub.url)


def damaged(benchmark: str, name: str, tmp_path: Path, damage: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """Copy a built-in benchmark and change one of its files: `damage` changes the rows, or returns a table."""
    import pyarrow
    import pyarrow.parquet

    source = shutil.copytree(BUILTIN_BENCHMARKS[benchmark], tmp_path / "source")
    table = pyarrow.parquet.read_table(source / name)
    rows = table.to_pylist()
    changed = damage(rows)
    if changed is None:
        changed = pyarrow.Table.from_pylist(rows, schema=table.schema)
    pyarrow.parquet.write_table(changed, source / name)
    return source


def without(column: str) -> Callable[[list[dict[str, Any]]], Any]:
    def drop(rows: list[dict[str, Any]]) -> Any:
        import pyarrow

        return pyarrow.Table.from_pylist([{name: row[name] for name in row if name != column} for row in rows])

    return drop


def with_values(column: str, change: Callable[[Any], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    def replace(rows: list[dict[str, Any]]) -> Any:
        import pyarrow

        return pyarrow.Table.from_pylist([{**row, column: change(row[column])} for row in rows])

    return replace


def in_row(number: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[number].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("choices"), "has no column 'choices', only subject, question, answer: use a dataset in the layout"),
        (with_values("answer", "ABCD".__getitem__), "the column 'answer' of .* is string, not an integer"),
        (with_values("choices", str), "the column 'choices' of .* is string, not a list of text"),
        (in_row(3, choices=["one", "two", "three"]), "row 3 of .* has 3 choices, not 4"),
        (in_row(0, choices=None), "row 0 of .* has 0 choices, not 4"),
        (in_row(1, choices=["one", "two", "three", None]), "row 1 of .* has an empty choice"),
        (in_row(2, answer=4), "row 2 of .* has the answer 4, not one of 0 to 3"),
        (in_row(2, answer=-1), "row 2 of .* has the answer -1, not one of 0 to 3"),
        (in_row(1, answer=None), "row 1 of .* has the answer None, not one of 0 to 3"),
        (in_row(1, question=None), "row 1 of .* has no question"),
    ],
)
def test_an_error_names_the_file_and_row_that_do_not_fit_mmlus_layout(
    damage: Any, message: str, tmp_path: Path
) -> None:
    name = "anatomy/test-00000-of-00001.parquet"
    source = damaged("mmlu-mini", name, tmp_path, damage)
    with pytest.raises(UserError, match=message) as mistake:
        check_mmlu(source, "team/mmlu")
    assert f"{name} of team/mmlu" in str(mistake.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("label"), "has no column 'label', only image, query, human_or_machine: use a dataset in the layout"),
        (with_values("label", lambda label: label[0]), "the column 'label' of .* is string, not a list of text"),
        (with_values("image", lambda image: image["bytes"]), "the column 'image' of .* is binary, not a struct"),
        (in_row(70, label=[]), "row 70 of .* has no label"),
        (in_row(1, label=[""]), "row 1 of .* has no label"),
        (in_row(5, image=None), "row 5 of .* has no image"),
        (in_row(5, image={"bytes": None, "path": "chart.png"}), "row 5 of .* has no image"),
        (in_row(6, image={"bytes": b"GIF", "path": None}), "row 6 of .* has an image that cannot be read"),
        (in_row(6, human_or_machine=2), "row 6 of .* has 2 for human_or_machine, not 0 or 1"),
        (in_row(6, query=""), "row 6 of .* has no query"),
    ],
)
def test_an_error_names_the_file_and_row_that_do_not_fit_chartqas_layout(
    damage: Any, message: str, tmp_path: Path
) -> None:
    name = "data/test-00000-of-00001.parquet"
    source = damaged("chartqa-mini", name, tmp_path, damage)
    with pytest.raises(UserError, match=message) as mistake:
        check_chartqa(source, "team/chartqa")
    assert f"{name} of team/chartqa" in str(mistake.value)


@pytest.mark.parametrize(("benchmark", "fixture"), [("mmlu", "mmlu-mini"), ("chartqa", "chartqa-mini")])
def test_a_damaged_benchmark_ends_the_download(benchmark: str, fixture: str, tmp_path: Path) -> None:
    path = next(BUILTIN_BENCHMARKS[fixture].glob("*/test-*.parquet"))
    source = shutil.copytree(BUILTIN_BENCHMARKS[fixture], tmp_path / "source")
    assert digests(bring(benchmark, source, tmp_path)) == digests(source)
    copy = source / path.parent.name / path.name
    copy.write_bytes(copy.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{path.name} of {source} is truncated or corrupt .*: download it again"):
        bring(benchmark, source, tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("place", [0, 999])
def test_an_infinity_is_found_in_any_position(
    dtype: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr("quantize_gemma.tasks.models.checkpoint.CHUNK_BYTES", 64)
    weights = {"counts": torch.full((7,), -1), "w": torch.ones(10, 100, dtype=getattr(torch, dtype))}
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    check_finite(path)
    weights["w"].view(-1)[place] = torch.inf
    save_file(weights, path)
    with pytest.raises(UserError, match=r"the weight w in .* contains a NaN or an infinity"):
        check_finite(path)


@pytest.mark.parametrize("change", ["written", "added", "removed"])
def test_a_directory_that_changes_after_the_run_started_is_rejected(
    change: str, tmp_path: Path, tiny_copy: Callable[[], Path]
) -> None:
    model = tiny_copy()
    resolved = resolve_model(str(model), None, offline=False)
    if change == "written":
        with (model / "model.safetensors").open("r+b") as stream:
            stream.seek(-2, 2)
            stream.write(b"\x00\x00")
    elif change == "added":
        (model / "NOTICE").write_text("new")
    else:
        (model / "generation_config.json").unlink()
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match=f"{model} is changing: .* start again when nothing writes there"):
        download(tmp_path / "target", str(model), resolved.revision, offline=False)


def test_an_error_names_the_secret_block_that_takes_precedence_over_a_valid_token(hub: Hub, tmp_path: Path) -> None:
    """An old block takes precedence over HF_TOKEN: without this message, the user would set the variable in vain."""
    hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.restrict("model", NAME, gated=True)
    script = (
        "from prefect.testing.utilities import prefect_test_harness\n"
        "with prefect_test_harness(server_startup_timeout=120):\n"
        "    from prefect.blocks.system import Secret\n"
        "    Secret(value='hf_old000000').save('hf-token')\n"
        "    from quantize_gemma.tasks.runtime import hub_client\n"
        "    from quantize_gemma.tasks.download import resolve_model\n"
        "    from quantize_gemma.tasks.runtime.errors import UserError\n"
        "    from quantize_gemma.tasks.runtime.redact import keep_secrets\n"
        "    keep_secrets()\n"
        "    print(hub_client.read_environment())\n"
        "    try:\n"
        f"        resolve_model({NAME!r}, None, False)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = kept | {"PREFECT_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "'QUANTIZE_GEMMA_TOKEN_BLOCKS': 'hf-token'" in done.stdout
    message = done.stdout.splitlines()[-1]
    assert NAME in message
    assert "Prefect's Secret block hf-token, which takes precedence over HF_TOKEN" in message
    # A stage's own process reports the same, without a request to Prefect.
    sha = hub.head("model", NAME)
    with pytest.raises(UserError, match="Prefect's Secret block hf-token, which takes precedence over HF_TOKEN"):
        download_from(hub, tmp_path, sha, "hf_old000000", QUANTIZE_GEMMA_TOKEN_BLOCKS="hf-token")


def test_the_test_split_of_wikitext_is_fetched_and_its_rows_are_joined_by_two_line_breaks(
    hub: Hub, tmp_path: Path
) -> None:
    sha = hub.add("dataset", WIKITEXT, write_wikitext(tmp_path / "wikitext"))
    target = bring_text(WIKITEXT, tmp_path, sha, HF_ENDPOINT=hub.url)
    assert [path.name for path in target.iterdir()] == ["text.txt"]
    assert (target / "text.txt").read_bytes() == (BUILTIN_TEXTS["tiny-text"] / "text.txt").read_bytes()
    assert not hub.requests("GET", "train-|103")


def test_a_text_file_is_pinned_by_its_content_and_must_be_one(tmp_path: Path) -> None:
    file, target = tmp_path / "notes.txt", tmp_path / "target"
    target.mkdir()
    file.write_text("one")
    resolved = resolve_text(str(file), None, offline=True)
    assert (resolved.name, resolved.on_hub, resolved.fixture) == ("notes.txt", False, False)
    download_text(target, resolved.source, resolved.revision, True)
    assert (target / "text.txt").read_text() == "one"
    file.write_text("two")
    with pytest.raises(UserError, match="is changing"):
        download_text(target, resolved.source, resolved.revision, True)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is not UTF-8"):
        download_text(target, str(file), resolve_text(str(file), None, True).revision, True)
    with pytest.raises(UserError, match="there is no text file"):
        resolve_text(str(tmp_path / "nothing.txt"), None, False)


def test_a_dataset_without_wikitext_is_rejected(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("dataset", "cais/mmlu", BUILTIN_BENCHMARKS["mmlu-mini"])
    with pytest.raises(UserError, match="cais/mmlu has no wikitext-2-raw-v1/test"):
        bring_text("cais/mmlu", tmp_path, sha, HF_ENDPOINT=hub.url)

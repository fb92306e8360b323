"""The flow reads from a Hub and publishes to it; nothing in the flow knows that this Hub is local."""

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quantize_gemma.flows.local_server import LocalServer
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.models.recipe import load_recipe
from tests.conftest import CommandLine, Outcome
from tests.hub.server import Hub, serve
from tests.texts import WIKITEXT, write_wikitext

READER, WRITER = "hf_MARKEDreader00", "hf_MARKEDwriter00"
MODEL, BENCHMARK, TARGET = "team/tiny-gemma3", "cais/mmlu", "team/tiny-gemma3-HQQ-INT8-INT4"
NOTES = "team/notes"
RUN = ("run", "--model", MODEL, "--json")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    tokens: Any = {
        READER: {"user": "reader", "role": "read", "gated": [MODEL]},
        WRITER: {"user": "robot", "role": "write", "namespaces": ["team"]},
    }
    with serve(tmp_path_factory.mktemp("hub"), tokens) as running:
        running.add("model", MODEL, BUILTIN["tiny-gemma3"])
        running.add("dataset", BENCHMARK, BUILTIN_BENCHMARKS["mmlu-mini"])
        running.add("dataset", "HuggingFaceM4/ChartQA", BUILTIN_BENCHMARKS["chartqa-mini"])
        running.add("dataset", WIKITEXT, write_wikitext(tmp_path_factory.mktemp("wikitext")))
        running.add("model", NOTES, BUILTIN["tiny-gemma3"])
        running.restrict("model", MODEL, gated=True)
        yield running


@pytest.fixture(autouse=True)
def healthy(hub: Hub) -> None:
    hub.faults.clear()
    hub.log.clear()


@pytest.fixture(scope="module")
def environment(hub: Hub, released: Outcome, command_line: CommandLine) -> dict[str, str]:
    """The read token is in a Prefect Secret block, the write token in the environment."""
    save = f"from prefect.blocks.system import Secret; Secret(value={READER!r}).save('hf-token', overwrite=True)"
    allowed = {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true", "PREFECT_LOGGING_LEVEL": "ERROR"}
    subprocess.run(
        [sys.executable, "-c", save], env={**command_line.environment(), **allowed}, check=True, capture_output=True
    )
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN_WRITE": WRITER, "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def published(hub: Hub, command_line: CommandLine, environment: dict[str, str]) -> Outcome:
    outcome = command_line(*RUN, "--target", TARGET, "--tag", **environment)
    assert outcome.code == 0, outcome.stderr
    return outcome


def metrics_of(outcome: Outcome) -> dict[str, Any]:
    return json.loads((Path(outcome.summary["release"]) / "metrics.json").read_text())


def regression(outcome: Outcome) -> dict[str, Any]:
    return next(check for check in outcome.summary["gate"]["checks"] if check["name"] == "mmlu_regression")


def test_a_model_that_is_too_large_is_rejected_before_it_is_downloaded(
    hub: Hub, command_line: CommandLine, environment: dict[str, str], tmp_path: Path
) -> None:
    # A trillion weights, but only in the file's header.
    header = json.dumps({"w": {"dtype": "BF16", "shape": [10**12], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    hub.add("model", "team/huge", tmp_path)
    for verb in ("check", "run"):
        outcome = command_line(verb, "--model", "team/huge", **environment)
        assert outcome.code == 2, outcome.stderr
        assert "running this model takes about 4,001.0 GB of memory, but this machine has" in outcome.stderr
    assert not any("resolve/" in line["path"] for line in hub.log if "huge" in line["path"])


def test_check_reads_a_gated_models_configuration_with_the_token_of_a_secret_block(
    hub: Hub, command_line: CommandLine, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(command_line.prefect))
    server = LocalServer(socket.create_server(("127.0.0.1", 0)))
    try:
        server.wait()
        client = {**environment, **server.client_settings(), "HF_TOKEN": "hf_MARKEDold00"}
        good = command_line("check", "--model", MODEL, **client)
        long = command_line("check", "--model", MODEL, "--max-seq-len", "4096", **client)
    finally:
        server.stop()
    assert good.code == 0, good.stderr
    assert "memory_bytes_needed: " in good.stdout
    assert long.code == 2
    assert "--max-seq-len is 4,096, but the model supports 2,048 tokens" in long.stderr
    assert {line["path"].rpartition("/")[2] for line in hub.requests("GET", "resolve/")} == {"config.json"}


def test_a_run_pins_what_it_reads_and_publishes_in_one_commit(published: Outcome, hub: Hub) -> None:
    release = Path(published.summary["release"])
    files = {path.relative_to(release).as_posix(): path for path in release.rglob("*") if path.is_file()}
    assert {".eval_results/mmlu.yaml", ".eval_results/chartqa.yaml"} <= set(files)
    assert set(hub.files("model", TARGET)) == {*files, ".gitattributes"}
    for name, path in files.items():
        assert hub.read("model", TARGET, name) == path.read_bytes()
    assert published.summary["published"] == f"{hub.url}/{TARGET}/commit/{hub.head('model', TARGET)}"
    metrics, card = metrics_of(published), (release / "README.md").read_text()
    measured = [metrics["benchmarks"][name]["dataset"]["revision"] for name in ("mmlu", "chartqa")]
    revisions = metrics["base_revision"], metrics["text"]["revision"], *measured
    datasets = WIKITEXT, BENCHMARK, "HuggingFaceM4/ChartQA"
    assert revisions == (hub.head("model", MODEL), *(hub.head("dataset", name) for name in datasets))
    for sha in revisions:
        assert sha in card
    assert metrics["run_id"] in card
    assert f"base_model: {MODEL}" in card
    assert f"quantize-gemma run --model {MODEL} " in card
    assert f" --revision {revisions[0]} " in card
    assert f" --text {WIKITEXT}@{revisions[1]} " in card
    assert "license: cc0-1.0" in card
    # The checkpoint is the built-in one, so the stages that depend only on its content did not run again.
    assert {name for name, cached in published.cached.items() if not cached} == {
        "download",
        "download_text",
        "download_mmlu",
        "download_chartqa",
        # This time without the prompts of GSM8K, which this Hub does not have.
        "verify_tokenizer",
        "gate",
        "card",
    }


def test_an_unchanged_commit_is_not_transferred_and_an_unchanged_release_not_committed(
    published: Outcome, hub: Hub, command_line: CommandLine, environment: dict[str, str]
) -> None:
    head = hub.head("model", TARGET)
    again = command_line(*RUN, "--target", TARGET, **environment)
    assert again.code == 0, again.stderr
    assert all(again.cached.values())
    assert again.summary["publication"]["state"] == "already published"
    # The first release had no predecessor; this one follows the first.
    first, second = regression(published), regression(again)
    assert (first["status"], second["status"], second["value"]) == ("uninformative", "pass", 0.0)
    assert "not compared with the published release: the target has no metrics.json" in first["message"]
    assert hub.head("model", TARGET) == head
    assert not [entry for entry in hub.requests("GET", "resolve|/lfs/") if TARGET not in entry["path"]]
    assert not hub.requests("PUT", "")
    assert not hub.requests("POST", "/commit/")


@pytest.mark.long
def test_requests_to_a_failing_hub_are_retried(
    published: Outcome, hub: Hub, command_line: CommandLine, environment: dict[str, str]
) -> None:
    hub.faults.add(method="GET", path=f"/api/models/{MODEL}", status=503, times=1)
    hub.faults.add(method="GET", path=r"resolve/.*/config\.json", status=429, headers={"Retry-After": "2"}, times=1)
    hub.faults.add(method="GET", path="/lfs/", cut=200_000, times=1)
    hub.faults.add(method="POST", path=f"{TARGET}/commit", status=500, times=1)
    (Path(published.summary["release"]).parent / "manifest.json").unlink()
    gate = next(stage["key"] for stage in published.summary["stages"] if stage["name"] == "gate")
    (command_line.home / "gate" / gate / "manifest.json").unlink()
    again = command_line(*RUN, "--refresh", "download", "--target", TARGET, **environment)
    assert again.code == 0, again.stderr
    assert {name for name, cached in again.cached.items() if not cached} == {"download", "gate", "card"}
    assert again.summary["publication"]["state"] == "published"
    assert [entry["range"] for entry in hub.requests("GET", "/lfs/") if entry["range"]]


@pytest.mark.long
def test_offline_a_run_uses_the_store_and_says_so(
    published: Outcome, hub: Hub, command_line: CommandLine, environment: dict[str, str]
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        away = {**environment, "HF_ENDPOINT": f"http://127.0.0.1:{reserved.getsockname()[1]}"}
        offline = command_line(*RUN, "--offline", **away)
        assert offline.code == 0, offline.stderr
        assert all(offline.cached.values())
        assert f"offline: using {MODEL} at {hub.head('model', MODEL)}" in offline.stderr
        pinned = command_line(*RUN, "--revision", hub.head("model", MODEL), "--offline", **away)
        assert pinned.code == 0, pinned.stderr
        unknown = command_line("run", "--model", "team/other", "--offline", **away)
        assert unknown.code == 2
        assert "this store does not know the commit of the model team/other" in unknown.stderr
        online = command_line(*RUN, **away)
        assert online.code == 1
        assert "the Hub cannot be reached" in online.stderr


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (("--model", "team/nothing"), {}, ["no model 'team/nothing'"]),
        (("--revision", "v9"), {}, ["no revision 'v9'"]),
        (("--target", "stranger/tiny"), {}, ["stranger", "robot"]),
        (("--target", TARGET), {"HF_TOKEN_WRITE": "hf_MARKEDwrong00"}, ["rejects the token"]),
        (("--target", TARGET), {"HF_TOKEN_WRITE": READER}, ["is read-only"]),
        (("--target", MODEL), {}, ["target is the model itself"]),
        (
            ("--target", NOTES),
            {},
            [f"{NOTES} contains files that quantize-gemma did not write", "(README.md, chat_", "--adopt"],
        ),
        (("--target", TARGET, "--offline"), {}, ["a release cannot be published offline"]),
        (("--target", TARGET, "--create-pr", "--tag"), {}, ["pull request", "tag"]),
    ],
)
def test_a_rejected_run_costs_seconds_and_says_what_to_do(
    published: Outcome,
    hub: Hub,
    command_line: CommandLine,
    environment: dict[str, str],
    arguments: tuple[str, ...],
    changes: dict[str, str],
    words: list[str],
) -> None:
    # A flag must not be passed twice.
    before = RUN if "--model" not in arguments else tuple(word for word in RUN if word not in ("--model", MODEL))
    outcome = command_line(*before, *arguments, **{**environment, **changes})
    assert outcome.code == 2, outcome.stderr
    for word in words:
        assert word in outcome.stderr.splitlines()[-1]


@pytest.mark.long
@pytest.mark.longest
def test_a_release_too_far_from_its_base_fails_for_its_kl_divergence_and_its_card_says_so(
    published: Outcome, hub: Hub, command_line: CommandLine, environment: dict[str, str], tmp_path: Path
) -> None:
    """All weights of the language model are int4, with one scale per row; MMLU alone would let the release pass."""
    recipe = load_recipe("HQQ-INT8-INT4").to_json()
    for rule in recipe["rules"]:
        if not rule["match"].startswith("vision."):
            rule |= {"weight": "int4", "group_size": None, "algorithm": "affine"}
    (tmp_path / "bad.json").write_text(json.dumps(recipe))
    target = f"{TARGET}-bad"
    few = ("--tasks", "mmlu", "--limit", "4", "--program-samples", "5", "--max-kl", "0.1", "--target", target)
    outcome = command_line(*RUN, "--recipe", str(tmp_path / "bad.json"), *few, **environment)
    assert outcome.code == 1
    summary = outcome.summary
    assert summary["published"] is None
    assert hub.storage.find("model", target) is None
    checks = {check["name"]: check for check in summary["gate"]["checks"]}
    assert [name for name, check in checks.items() if check["status"] == "fail"] == ["max_kl"]
    assert checks["max_kl"]["limit"] == 0.1 < checks["max_kl"]["value"]
    assert summary["metrics"]["quantized"]["fidelity"]["kl_mean"] == checks["max_kl"]["value"]
    reason = "on 2,044 tokens of text, the KL divergence from the base model is 0."
    assert summary["error"].startswith(f"the release fails the gate: {reason}")
    card = (Path(summary["release"]) / "README.md").read_text()
    value = f"{checks['max_kl']['value']:.4f} ± "
    # The verdict and the divergence come first, in this order.
    before, _, rest = card.partition("\n|")
    assert "**This release fails the gate and is not published:**" in before
    assert f"- {reason}" in before
    overview = rest.split("\n\n")[0].splitlines()
    assert overview[3].startswith(f"| KL divergence from the base model, nats | — | {value}")
    fidelity = card[card.index("\n| measurement | KL, nats |") :].split("\n\n")[0].strip().splitlines()
    assert fidelity[2].startswith(f"| as shipped | {value}")
    assert "KL ≤ 0.1: fail" in fidelity[2]


@pytest.mark.long
def test_a_recipe_is_calibrated_on_a_dataset_at_its_commit(
    hub: Hub, command_line: CommandLine, environment: dict[str, str], tmp_path: Path
) -> None:
    rows = [path.read_text("utf-8") for path in sorted(Path("docs").rglob("*.md"))]
    for name, texts in (("train/rows.parquet", rows), ("test/rows.parquet", ["Nobody reads this."])):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "corpus" / name)
    hub.add("dataset", "team/corpus", tmp_path / "corpus")
    recipe = load_recipe("GPTQ-INT8-INT4").to_json() | {"calibration": {"sequences": 4, "length": 96, "answers": 0}}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    arguments = ("--recipe", str(tmp_path / "mine.json"), "--calibration", "team/corpus:train/*")
    # Calibrating on so little text about another subject costs a lot of quality.
    limits = ("--max-kl", "none", "--min-same-top", "none", "--limit-drop", "mmlu=100", "--min-recovery", "0")
    outcome = command_line(*RUN, *arguments, *limits, "--tasks", "mmlu", "--limit", "2", **environment)
    assert outcome.code == 0, outcome.stderr
    head = hub.head("dataset", "team/corpus")
    calibration = metrics_of(outcome)["calibration"]
    assert calibration["dataset"] == {"name": "team/corpus", "revision": head, "fixture": False}
    assert (calibration["sequences"], calibration["tokens"]) == (4, 4 * 96)
    assert not any("test/rows" in line["path"] for line in hub.log if "corpus" in line["path"])
    command = (Path(outcome.summary["release"]) / "README.md").read_text("utf-8")
    assert f"--calibration 'team/corpus@{head}:train/*'" in command


@pytest.mark.long
def test_a_request_that_the_hub_rejects_after_the_release_is_complete_is_a_failure_not_a_mistake(
    published: Outcome, hub: Hub, command_line: CommandLine, environment: dict[str, str]
) -> None:
    release = command_line(*RUN, **environment).summary["release"]
    hub.faults.add(method="POST", path="/info/lfs/objects/batch", status=507, error_message="no room")
    outcome = command_line(*RUN, "--target", f"{TARGET}-full", **environment)
    assert outcome.code == 1
    summary = outcome.summary
    assert (
        summary["error"]
        == f"publish: the quota for {TARGET}-full is used up (no room): free some space there, or ask for more"
    )
    assert outcome.stderr.count(summary["error"]) == 1
    assert "publish: failed" in outcome.stderr
    assert "skipped" not in outcome.stderr
    assert summary["release"] == release
    assert summary["gate"]["passed"]
    assert summary["published"] is None
    assert set(hub.files("model", f"{TARGET}-full")) == {".gitattributes"}


@pytest.mark.long
def test_nothing_that_a_run_writes_contains_a_token(
    published: Outcome, hub: Hub, command_line: CommandLine, environment: dict[str, str]
) -> None:
    """This test runs last: it searches everything that earlier runs wrote, including those that failed."""
    hub.faults.add(method="GET", path="resolve", status=403, error_message=f"Bearer {READER} is not enough")
    hub.faults.add(method="POST", path="/commit/", status=500, error_message=f"{WRITER} may not")
    outcomes = [
        command_line(*RUN, "--refresh", "download", **environment),
        command_line(*RUN, "--refresh", "card", "--target", f"{TARGET}-2", **environment),
        command_line(*RUN, "--target", TARGET, **{**environment, "HF_TOKEN_WRITE": f"{WRITER}\n{READER}"}),
    ]
    assert [outcome.code for outcome in outcomes] == [2, 1, 2]
    for outcome in outcomes:
        assert "MARKED" not in outcome.stdout + outcome.stderr
    for folder in (command_line.home, command_line.prefect):
        for path in folder.rglob("*"):
            if path.is_file():
                assert b"MARKED" not in path.read_bytes(), path

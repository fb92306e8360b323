"""On a real server, with a real worker and browser, deployments run, survive failures, and show in the dashboard."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import psutil
import pytest

from tests.conftest import CommandLine, Outcome
from tests.operate import wait_for

PREFECT = [sys.executable, "-m", "prefect"]
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None)
CHROMIUM = shutil.which("chromium")
TINY = ("model=tiny-gemma3", 'evaluation={"batch_size": 16}')


@dataclass
class Operation:
    """A server and its clients: `environment` has the variables for `make deploy` and `make worker`."""

    environment: dict[str, str]
    api: str
    server: "subprocess.Popen[bytes]"
    log: Path

    def start_server(self) -> None:
        port = str(httpx.URL(self.api).port)
        self.server = self.start("server", "start", "--host", "127.0.0.1", "--port", port)
        wait_for(f"{self.api}/health")

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            return subprocess.Popen([*PREFECT, *arguments], env=self.environment, stdout=log, stderr=log)

    @contextlib.contextmanager
    def worker(self) -> Iterator["subprocess.Popen[bytes]"]:
        process = self.start("worker", "start", "--pool", "quantize-gemma")
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)

    def deploy(self) -> str:
        command = [sys.executable, "-m", "quantize_gemma.deployments.deploy"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, deployment: str, *parameters: str) -> str:
        """Call `prefect deployment run`; return the flow run's id."""
        arguments = [word for parameter in parameters for word in ("--param", parameter)]
        command = [*PREFECT, "deployment", "run", deployment, *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        match = re.search(r"UUID: ([0-9a-f-]{36})", done.stdout)
        assert match, done.stdout
        return match.group(1)

    def read(self, path: str, query: dict[str, Any] | None = None) -> Any:
        return self.request("GET" if query is None else "POST", path, query).json()

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """Send a request; like Prefect's own client, retry while the server returns 503 because SQLite is busy."""
        for _ in range(30):
            response = httpx.request(method, f"{self.api}/{path}", json=body, timeout=60)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        return response.raise_for_status()

    def wait(self, run: str, states: set[str], seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            flow_run = self.read(f"flow_runs/{run}")
            if flow_run["state_name"] in states:
                return flow_run
            assert time.monotonic() < deadline, (flow_run["state_name"], self.log.read_text()[-3000:])
            time.sleep(0.5)

    def tasks(self, run: str) -> dict[str, str]:
        """Return the state of each stage of a run that has ended."""
        # The server learns names and states from events, which arrive after the end of the run on a busy machine.
        deadline = time.monotonic() + 60
        while True:
            task_runs = self.read("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
            if task_runs and all(
                task["name"].endswith(" · tiny-gemma3 · HQQ-INT8-INT4")
                and task["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
                for task in task_runs
            ):
                return {task["name"].split(" · ")[0]: task["state_name"] for task in task_runs}
            assert time.monotonic() < deadline, [(task["name"], task["state_name"]) for task in task_runs]
            time.sleep(0.5)


@pytest.fixture(scope="module")
def operate(
    released: Outcome, command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Operation]]:
    """Start servers, each with its own Prefect home, on the store that has the finished run."""
    operations: list[Operation] = []

    def make(**environment: str) -> Operation:
        folder = tmp_path_factory.mktemp("operation")
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            api = f"http://127.0.0.1:{reserved.getsockname()[1]}/api"
        settings = {
            **command_line.environment(),
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": api,
            "PREFECT_UI_API_URL": api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "QUANTIZE_GEMMA_TIMEZONE": "Europe/Berlin",
            "QUANTIZE_GEMMA_SILENCE_SECONDS": "120",
            "QUANTIZE_GEMMA_NIGHT_SECONDS": "90",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            **environment,
        }
        operation = Operation(settings, api, None, folder / "log")  # type: ignore[arg-type]
        operations.append(operation)
        operation.start_server()
        return operation

    yield make
    for operation in operations:
        operation.server.terminate()
        operation.server.wait(30)


@pytest.fixture(scope="module")
def alerts() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A webhook: its URL, and the messages that it received."""
    messages: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", messages
        server.shutdown()


@pytest.fixture(scope="module")
def sqlite(operate: Callable[..., Operation], alerts: tuple[str, list[dict[str, str]]]) -> Operation:
    operation = operate(QUANTIZE_GEMMA_ALERTS=alerts[0])
    operation.deploy()
    return operation


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A separate PostgreSQL cluster, run as an unprivileged user if needed, because it refuses to run as root."""
    if POSTGRES is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    folder = tmp_path_factory.mktemp("postgres")
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    data = folder / "data"
    if user:
        data = Path("/tmp") / f"quantize-gemma-test-postgres-{port}"
    subprocess.run(
        [*user, POSTGRES / "initdb", "-D", data, "-U", "prefect", "-A", "trust"], check=True, capture_output=True
    )
    arguments = ["-D", str(data), "-p", str(port), "-k", "/tmp", "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen(
        [*user, POSTGRES / "postgres", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        create = [*user, POSTGRES / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"]
        for _ in range(100):
            if subprocess.run(create, capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(scope="module")
def postgres(
    operate: Callable[..., Operation], postgres_url: str, alerts: tuple[str, list[dict[str, str]]]
) -> Operation:
    operation = operate(PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres_url, QUANTIZE_GEMMA_ALERTS=alerts[0])
    operation.deploy()
    return operation


def run_twice(operation: Operation, command_line: CommandLine) -> str:
    """Run the default deployment on the tiny model, once with and once without work; return the first run's id."""
    forget(command_line, "smoke")
    with operation.worker():
        first = operation.submit("quantize-gemma/default", *TINY)
        assert operation.wait(first, {"Completed", "Failed", "Crashed"}, 240)["state_name"] == "Completed"
        assert operation.tasks(first)["smoke"] == "Completed"
        second = operation.submit("quantize-gemma/default", *TINY)
        run = operation.wait(second, {"Completed", "Failed", "Crashed"}, 240)
    assert run["state_name"] == "Completed"
    assert re.fullmatch("tiny-gemma3 HQQ-INT8-INT4 [0-9a-f]{12} unchanged", run["name"])
    states = operation.tasks(second)
    assert {name for name, state in states.items() if state == "Cached"} >= {
        "quantize",
        "export",
        "evaluate mmlu base",
        "card",
    }
    shown = operation.read("artifacts/filter", {"flow_runs": {"id": {"any_": [first]}}})
    assert {artifact["key"] for artifact in shown} >= {"quality", "card", "mmlu-by-subject", "release"}
    return first


def test_deploying_again_changes_nothing(sqlite: Operation) -> None:
    def snapshot() -> list[Any]:
        deployments = sqlite.read("deployments/filter", {})
        limits = sqlite.read("v2/concurrency_limits/filter", {})
        automations = sqlite.read("automations/filter", {})
        keep = [(d["id"], d["name"], d["parameters"], d["entrypoint"], len(d["schedules"])) for d in deployments]
        return [sorted(map(str, keep)), sorted((x["name"], x["limit"]) for x in limits), len(automations)]

    before = snapshot()
    sqlite.deploy()
    assert snapshot() == before
    ours = [name for name, _ in before[1] if name.startswith("quantize-gemma")]
    assert ours == ["quantize-gemma-accelerator", "quantize-gemma-memory"]


@pytest.fixture(scope="module")
def dead_run(sqlite: Operation, command_line: CommandLine) -> str:
    """A run whose machine lost power in the middle of a stage."""
    forget(command_line, "quantize")
    with sqlite.worker() as worker:
        run = sqlite.submit("quantize-gemma/default", *TINY)
        wait_for_work(command_line, "quantize")
        for process in [*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return run


@pytest.mark.long
def test_after_a_machine_died_the_next_run_resumes_from_the_finished_stages(
    sqlite: Operation, dead_run: str, command_line: CommandLine
) -> None:
    with sqlite.worker():
        again = sqlite.submit("quantize-gemma/default", *TINY)
        assert sqlite.wait(again, {"Completed", "Failed", "Crashed"}, 400)["state_name"] == "Completed"
    states = sqlite.tasks(again)
    assert states["quantize"] == "Completed"
    assert states["untie"] == states["export"] == "Cached"


@pytest.mark.long
def test_a_run_survives_a_restart_of_its_server(sqlite: Operation, command_line: CommandLine) -> None:
    forget(command_line, "quantize")
    with sqlite.worker():
        run = sqlite.submit("quantize-gemma/default", *TINY)
        wait_for_work(command_line, "quantize")
        sqlite.server.terminate()
        sqlite.server.wait(60)
        time.sleep(8)  # The next stages begin without a server.
        sqlite.start_server()
        assert sqlite.wait(run, {"Completed", "Failed", "Crashed"}, 240)["state_name"] == "Completed"
    assert sqlite.read("v2/concurrency_limits/quantize-gemma-accelerator")["active_slots"] == 0


@pytest.mark.long
def test_two_runs_never_hold_the_same_slot(sqlite: Operation, command_line: CommandLine) -> None:
    """With one memory slot, the heavy stages of two runs take turns, and both runs complete."""
    limit = "v2/concurrency_limits/quantize-gemma-memory"
    slots = sqlite.read(limit)["limit"]
    sqlite.request("PATCH", limit, {"limit": 1})
    forget(command_line, "smoke")
    forget(command_line, "verify")
    with sqlite.worker():
        evaluations = [f'evaluation={{"batch_size": 16, "max_new_tokens": {count}}}' for count in (3, 4)]
        runs = [sqlite.submit("quantize-gemma/default", TINY[0], evaluation) for evaluation in evaluations]
        for run in runs:
            assert sqlite.wait(run, {"Completed", "Failed", "Crashed"}, 240)["state_name"] == "Completed"
    assert sqlite.read(limit)["active_slots"] == 0
    sqlite.request("PATCH", limit, {"limit": slots})
    spans = []
    manifests = [path for name in ("smoke", "verify") for path in command_line.home.glob(f"{name}/*/manifest.json")]
    for manifest in manifests:
        ended = manifest.stat().st_mtime
        spans.append((ended - json.loads(manifest.read_text())["measured"]["seconds"], ended))
    assert len(spans) == 4
    # A manifest is written shortly after the slot is released.
    assert all(before[1] <= after[0] + 1.5 for before, after in pairwise(sorted(spans)))


def test_the_deployment_runs_and_does_nothing_twice(sqlite: Operation, command_line: CommandLine) -> None:
    run_twice(sqlite, command_line)


@pytest.mark.long
def test_the_deployment_runs_on_postgresql_too(postgres: Operation, command_line: CommandLine) -> None:
    run_twice(postgres, command_line)


def test_a_bad_value_is_rejected_before_a_run_exists(sqlite: Operation) -> None:
    before = len(sqlite.read("flow_runs/filter", {"flow_runs": {"deployment_id": {"is_null_": False}}}))
    for parameter, name in (
        ('evaluation={"limit": 0}', "limit"),
        ('export={"max_seq_len": 63}', "max_seq_len"),
        ('gate={"max_drop": 1}', "max_drop"),
        ("model=", "model"),
        ("benchmark=cais/mmlu", "benchmark"),
    ):
        command = [*PREFECT, "deployment", "run", "quantize-gemma/default", "--param", parameter]
        process = subprocess.run(command, env=sqlite.environment, capture_output=True, text=True, timeout=120)
        assert process.returncode == 1, parameter
        assert name in process.stdout
    assert len(sqlite.read("flow_runs/filter", {"flow_runs": {"deployment_id": {"is_null_": False}}})) == before


def test_a_failed_release_is_reported_to_the_webhook(
    postgres: Operation, alerts: tuple[str, list[dict[str, str]]]
) -> None:
    """On PostgreSQL, because Prefect drops an event on SQLite if two writers collide ("database is locked")."""
    with postgres.worker():
        run = postgres.submit("quantize-gemma/default", *TINY, 'gate={"max_kl_ratio": 0.01}')
        assert postgres.wait(run, {"Completed", "Failed", "Crashed"}, 120)["state_name"] == "Failed"
    deadline = time.monotonic() + 60
    while not any("the release fails the gate" in message["text"] for message in alerts[1]):
        assert time.monotonic() < deadline, alerts[1]
        time.sleep(0.5)
    assert any(message["subject"] == "quantize-gemma: a run failed" for message in alerts[1])


@pytest.fixture(scope="module")
def last_night(sqlite: Operation) -> str:
    """A nightly run that no other run follows."""
    with sqlite.worker():
        run = sqlite.submit("quantize-gemma/nightly", *TINY)
        assert sqlite.wait(run, {"Completed", "Failed", "Crashed"}, 120)["state_name"] == "Completed"
    return run


def test_the_webhook_is_kept_as_a_secret(sqlite: Operation, alerts: tuple[str, list[dict[str, str]]]) -> None:
    """Reading blocks without secrets does not reveal the URL; a block in the old format is converted."""
    from quantize_gemma.deployments.alerts import BLOCK

    def documents(**query: Any) -> list[dict[str, Any]]:
        blocks = sqlite.read("block_documents/filter", query)
        return [document for document in blocks if document["name"] == BLOCK]

    (public_block,) = documents()
    assert alerts[0] not in json.dumps(public_block)
    (block,) = documents(include_secrets=True)
    assert block["data"]["secrets"] == {"url": alerts[0]}
    old = {**block["data"], "url": alerts[0], "secrets": {}}
    change = {"data": old, "merge_existing_data": False}
    sqlite.request("PATCH", f"block_documents/{block['id']}", change)
    assert alerts[0] in json.dumps(documents())
    # The webhook is not passed again.
    sqlite.environment.pop("QUANTIZE_GEMMA_ALERTS")
    sqlite.deploy()
    assert documents() == [public_block | {"updated": documents()[0]["updated"]}]
    assert documents(include_secrets=True)[0]["data"] == block["data"]


def test_the_form_shows_groups_and_every_parameter_with_its_description_and_choices(sqlite: Operation) -> None:
    from quantize_gemma.flows.options import Options, RunOptions

    schema = sqlite.read("deployments/name/quantize-gemma/default")["parameter_openapi_schema"]
    properties = schema["properties"]
    assert set(properties) == set(RunOptions.model_fields)
    for name, value in RunOptions():
        if not isinstance(value, Options):
            assert properties[name]["description"] == RunOptions.model_fields[name].description
            continue
        assert schema["definitions"][type(value).__name__]["description"]
        group = schema["definitions"][type(value).__name__]["properties"]
        assert set(group) == set(type(value).model_fields)
        for option, field in type(value).model_fields.items():
            assert group[option]["description"] == field.description
    assert schema["definitions"]["EvaluationOptions"]["properties"]["device"]["enum"] == ["auto", "cpu", "cuda"]
    assert schema["definitions"]["ExportOptions"]["properties"]["max_seq_len"]["minimum"] == 64


def test_the_nightly_run_keeps_its_hour_when_daylight_saving_time_changes(sqlite: Operation) -> None:
    import asyncio

    from prefect.server.schemas.schedules import CronSchedule

    from quantize_gemma.flows.options import RunOptions

    nightly = sqlite.read("deployments/name/quantize-gemma/nightly")
    (schedule,) = nightly["schedules"]
    assert schedule["active"]
    cron = CronSchedule.model_validate(schedule["schedule"])
    berlin = ZoneInfo("Europe/Berlin")
    for year, month, day, offsets in ((2027, 3, 26, [1, 1, 2, 2]), (2027, 10, 29, [2, 2, 1, 1])):
        dates = asyncio.run(cron.get_dates(4, start=datetime(year, month, day, tzinfo=berlin)))
        local = [date.astimezone(berlin) for date in dates]
        assert [(date.hour, date.minute) for date in local] == [(3, 30)] * 4
        assert [date.utcoffset().total_seconds() / 3600 for date in local] == offsets  # type: ignore[union-attr]
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    options = RunOptions(**nightly["parameters"])
    assert options.publishing.create_pr is True
    # Without a target, it publishes nothing.
    assert options.target is None


def forget(command_line: CommandLine, stage: str) -> None:
    """Remove a stage's artifacts from the store, and what its killed runs left behind."""
    shutil.rmtree(command_line.home / stage)


def wait_for_work(command_line: CommandLine, stage: str) -> None:
    deadline = time.monotonic() + 120
    while not list(command_line.home.glob(f"{stage}/.partial-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")
def test_the_dashboard_shows_the_stages_the_card_and_the_chart(sqlite: Operation, command_line: CommandLine) -> None:
    runs = sqlite.read("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
    shown = sqlite.read("artifacts/filter", {"flow_runs": {"id": {"any_": [runs[0]["id"]]}}})
    ids = {artifact["key"]: artifact["id"] for artifact in shown}
    ui = sqlite.api.removesuffix("/api")
    run_page = rendered(f"{ui}/runs/flow-run/{runs[0]['id']}?tab=Task+Runs")
    assert runs[0]["name"] in run_page
    card_page = rendered(f"{ui}/artifacts/artifact/{ids['card']}")
    for heading in ("Model quality", "Quantization recipe", "Running in a mobile app"):
        assert heading in card_page
    assert "data:image/png;base64" in rendered(f"{ui}/artifacts/artifact/{ids['mmlu-by-subject']}")
    assert sqlite.tasks(runs[0]["id"])["card"] in ("Cached", "Completed")


@pytest.mark.long
def test_a_missed_nightly_run_is_reported(
    sqlite: Operation, last_night: str, alerts: tuple[str, list[dict[str, str]]]
) -> None:
    deadline = time.monotonic() + 150
    while not any(message["subject"] == "quantize-gemma: the nightly run did not start" for message in alerts[1]):
        assert time.monotonic() < deadline, alerts[1]
        time.sleep(0.5)


@pytest.mark.long
def test_the_run_of_the_dead_machine_has_crashed(sqlite: Operation, dead_run: str) -> None:
    """Runs last, because a run is marked as crashed only after some time without heartbeats."""
    assert sqlite.wait(dead_run, {"Crashed"}, 300)["state_type"] == "CRASHED"


def rendered(url: str) -> str:
    """Return the page's document after its scripts have run."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        "--dump-dom",
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout  # type: ignore[list-item]

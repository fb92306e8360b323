"""`make serve`: a server, its deployments, and a worker on one machine, accessible only to the user who started it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from quantize_gemma.flows.local_server import LocalServer
from tests.campaigns.starting_place import hostile_directory
from tests.conftest import CommandLine, Outcome
from tests.operate import another_program

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
PREFECT = [sys.executable, "-m", "prefect"]
SECRET = "hf_thetokenofsomebody"
FOREIGN = {"Origin": "http://foreign.example"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A local server that stores a secret, started as `run` and `serve` start it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        environment.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        server = LocalServer(socket.create_server(("127.0.0.1", 0)))
        server.wait()
        save = "from prefect.blocks.system import Secret\n" + f"Secret(value='{SECRET}').save('hf-token')"
        client = {**os.environ, **server.client_settings()}
        subprocess.run([sys.executable, "-c", save], env=client, check=True, capture_output=True)
        yield server
        server.stop()


READ = {"include_secrets": True}


@pytest.mark.parametrize("headers", [{}, FOREIGN, {**FOREIGN, "Content-Type": "text/plain"}], ids=str)
@pytest.mark.parametrize("auth", [None, ("quantize-gemma", ""), ("admin", "pass")], ids=str)
def test_nobody_can_read_or_write_without_the_password(
    server: LocalServer, headers: dict[str, str], auth: tuple[str, str] | None
) -> None:
    with httpx.Client(base_url=server.url, headers=headers, auth=auth, timeout=30) as stranger:
        secrets = stranger.post("/block_documents/filter", content=json.dumps(READ))
        assert secrets.status_code == 401
        assert SECRET not in secrets.text
        assert "access-control-allow-origin" not in secrets.headers
        assert stranger.post("/flows/", content=json.dumps({"name": "theirs"})).status_code == 401
        for path in ("/admin/settings", "/admin/version", "/flows/name/theirs", "/docs", "/openapi.json", "/metrics"):
            assert stranger.get(path).status_code == 401, path
    user, word = server.password.split(":")
    with httpx.Client(base_url=server.url, auth=(user, word), timeout=30) as owner:
        assert SECRET in owner.post("/block_documents/filter", json=READ).text
        assert owner.post("/flows/filter", json={}).json() == []


def test_a_page_of_another_origin_is_not_allowed_to_send_the_password(server: LocalServer) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    foreign = httpx.options(f"{server.url}/flows/", headers={**preflight, **FOREIGN}, timeout=30)
    assert foreign.status_code == 400
    ours = httpx.options(f"{server.url}/flows/", headers={**preflight, "Origin": server.ui}, timeout=30)
    assert ours.headers["access-control-allow-origin"] == server.ui


def test_a_host_name_that_resolves_to_this_machine_gets_nothing(server: LocalServer) -> None:
    """To a browser, a page with that host name has the server's own origin."""
    user, word = server.password.split(":")
    for path in ("/", "/sign-in", "/ui-settings", "/api/health"):
        response = httpx.get(f"{server.ui}{path}", headers={"Host": "foreign.example"}, auth=(user, word), timeout=30)
        assert response.status_code == 400
        assert response.text == "Invalid host header"


@pytest.mark.parametrize(
    "path",
    [
        "events/in",
        "events/out",
        "logs/out",
        "task_runs/subscriptions/scheduled",
        "work_pools/theirs/workers/connect",
    ],
)
def test_nobody_can_listen_without_the_password(server: LocalServer, path: str) -> None:
    """Browsers let any page open a WebSocket without a CORS check."""
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect
    from websockets.typing import Origin, Subprotocol

    address = f"{server.url.replace('http', 'ws')}/{path}"
    origin = Origin(FOREIGN["Origin"])
    with pytest.raises(InvalidStatus), connect(address, origin=origin):
        pass
    with connect(address, origin=origin, subprotocols=[Subprotocol("prefect")]) as stranger:
        stranger.send(json.dumps({"type": "auth", "token": "quantize-gemma:"}))
        with pytest.raises(ConnectionClosed):
            stranger.recv(timeout=30)


def test_the_password_is_in_a_file_that_only_the_user_can_read_and_on_no_command_line(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize_gemma.flows.local_server import password, password_file

    assert password_file().read_text() == server.password
    assert password_file().stat().st_mode & 0o777 == 0o600
    assert not any(server.password in word for word in psutil.Process(server.process.pid).cmdline())

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    passwords: list[str] = []
    callers = [threading.Thread(target=lambda: passwords.append(password())) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(passwords) == 8
    assert len(set(passwords)) == 1
    assert passwords[0] != server.password
    assert password_file().parent.stat().st_mode & 0o777 == 0o700
    # A password that others could read is replaced.
    password_file().chmod(0o640)
    assert password() != passwords[0]
    assert password_file().stat().st_mode & 0o777 == 0o600


# A page that tries to read the secrets and to create a flow, and shows the responses.
ATTACK = """<p id=answer>nothing yet</p><script>
const ask = (path, body) => fetch("URL" + path, {method: "POST", body: JSON.stringify(body), headers: TYPE})
  .then(answer => answer.text());
Promise.allSettled([ask("/block_documents/filter", {include_secrets: true}), ask("/flows/", {name: "theirs"})])
  .then(answers => document.getElementById("answer").textContent = JSON.stringify(answers) + " and no more");
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")
@pytest.mark.parametrize("content", ["application/json", "text/plain"])
def test_a_web_page_in_the_users_browser_reads_and_writes_nothing(
    server: LocalServer, tmp_path: Path, content: str
) -> None:
    page = ATTACK.replace("URL", server.url).replace("TYPE", json.dumps({"Content-Type": content}))
    with another_program(page) as http:
        # The browser is signed in.
        rendered(server.sign_in(Terminal()), tmp_path)
        shown = rendered(f"http://127.0.0.1:{http.server_port}/", tmp_path)
    assert "and no more" in shown
    assert SECRET not in shown
    assert "fulfilled" not in shown
    user, word = server.password.split(":")
    assert httpx.post(f"{server.url}/flows/filter", json={}, auth=(user, word), timeout=30).json() == []


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")
def test_the_link_in_the_terminal_opens_the_dashboard(server: LocalServer, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        assert server.password not in server.sign_in(log)
        assert "quantize-gemma-password" in server.sign_in(log)
    assert "Login" in rendered(server.ui, tmp_path / "stranger")
    shown = rendered(server.sign_in(Terminal()), tmp_path / "owner")
    assert "Dashboard" in shown
    assert "Logout" in shown
    # The browser stays signed in.
    assert "hf-token" in rendered(f"{server.ui}/blocks", tmp_path / "owner")


class Terminal:
    def isatty(self) -> bool:
        return True


def rendered(url: str, profile: Path) -> str:
    """Return the page's document after its scripts have run, in a browser with that profile."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    command = [CHROMIUM, *options, f"--user-data-dir={profile}", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout  # type: ignore[list-item]


def serve(environment: dict[str, str], log: Path, directory: Path | None = None) -> "subprocess.Popen[bytes]":
    # Start it as a shell starts a program in the background.
    command = ["sh", "-c", "trap '' INT; exec \"$0\" -P -m quantize_gemma.deployments.serve", sys.executable]
    with log.open("wb") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, cwd=directory)


def wait_until_served(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 180
    while "deployment run quantize-gemma/tiny" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.long
def test_serve_runs_everything_on_one_machine_and_ends_with_it(
    released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        api = f"http://127.0.0.1:{reserved.getsockname()[1]}/api"
    # The environment of a shell that does not know about the server.
    other_shell = {**command_line.environment(), "PREFECT_HOME": str(tmp_path)}
    log = tmp_path / "log"
    process = serve({**other_shell, "PREFECT_API_URL": api}, log)
    try:
        wait_until_served(process, log)
        command = [*PREFECT, "deployment", "run", "quantize-gemma/tiny", "--watch"]
        done = subprocess.run(command, env=other_shell, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-3000:]
        assert httpx.post(f"{api}/deployments/filter", json={}, timeout=30).status_code == 401
        started = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        assert process.wait(60) == 143
    assert not psutil.wait_procs(started, timeout=30)[1]
    show = [*PREFECT, "config", "view"]
    shown = subprocess.run(show, env=other_shell, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "PREFECT_PROFILE='ephemeral'" in shown
    assert api not in shown


def test_serve_ends_when_its_server_does(command_line: CommandLine, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    environment = {**command_line.environment(), "PREFECT_HOME": str(tmp_path)}
    environment |= {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    log = tmp_path / "log"
    with another_program() as http:
        directory = hostile_directory(tmp_path / "model", f"http://127.0.0.1:{http.server_port}/api")
        process = serve(environment, log, directory)
        wait_until_served(process, log)
        assert http.requests == []
    assert not (tmp_path / "model.marker").exists()
    started = psutil.Process(process.pid).children(recursive=True)
    (server,) = [child for child in started if "quantize_gemma.flows.local_server" in child.cmdline()]
    server.send_signal(signal.SIGKILL)
    # Its port stays in use, so that no other program receives the requests that the worker and other shells still send.
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", port))
    assert process.wait(60) == 1
    assert log.read_text().splitlines()[-1].startswith("serve: the local Prefect server ended with SIGKILL")
    assert not psutil.wait_procs(started, timeout=30)[1]


def test_serve_sends_nothing_to_another_program_on_its_port(command_line: CommandLine, tmp_path: Path) -> None:
    with another_program() as http:
        environment = {**command_line.environment(), "PREFECT_HOME": str(tmp_path), "HF_TOKEN": SECRET}
        environment |= {"PREFECT_API_URL": f"http://127.0.0.1:{http.server_port}/api"}
        process = serve(environment, tmp_path / "log")
        try:
            assert process.wait(60) == 2
        finally:
            process.kill()
        assert http.requests == []
    (sentence,) = (tmp_path / "log").read_text().splitlines()
    assert f"127.0.0.1:{http.server_port}" in sentence
    assert "PREFECT_API_URL" in sentence


def test_a_run_with_the_wrong_password_is_one_sentence(server: LocalServer, tmp_path: Path) -> None:
    outcome = CommandLine(tmp_path / "store", tmp_path / "prefect")(
        "run", PREFECT_API_URL=server.url, PREFECT_API_AUTH_STRING="not:this"
    )
    assert outcome.code == 2
    (sentence,) = outcome.stderr.splitlines()
    assert "returned HTTP 401: set PREFECT_API_AUTH_STRING" in sentence
    assert "not:this" not in sentence


def test_a_run_on_a_server_without_the_limits_is_rejected_before_any_stage(server: LocalServer, tmp_path: Path) -> None:
    command_line = CommandLine(tmp_path / "store", tmp_path / "prefect")
    outcome = command_line("run", **server.client_settings())
    assert outcome.code == 2
    (sentence,) = outcome.stderr.splitlines()
    assert "has no limit quantize-gemma-accelerator: set it up with `make deploy`" in sentence
    assert not (command_line.home / "download").exists()


@pytest.mark.parametrize("url", ["https://api.prefect.cloud/api", "http://192.0.2.1:4200/api", "nonsense"])
def test_serve_rejects_the_url_of_another_machine(command_line: CommandLine, tmp_path: Path, url: str) -> None:
    process = serve({**command_line.environment(), "PREFECT_API_URL": url}, tmp_path / "log")
    assert process.wait(60) == 2
    (sentence,) = (tmp_path / "log").read_text().splitlines()
    assert url in sentence


def test_the_profile_is_private_and_leaves_the_users_own_server_alone(server: LocalServer, tmp_path: Path) -> None:
    import tomllib

    from prefect.settings import PREFECT_PROFILES_PATH, temporary_settings

    from quantize_gemma.deployments.serve import PROFILE, profile

    path = tmp_path / "profiles.toml"

    def write(text: str) -> None:
        path.write_text(text)
        path.chmod(0o644)

    with temporary_settings({PREFECT_PROFILES_PATH: path}):
        write('active = "mine"\n[profiles.mine]\nPREFECT_LOGGING_LEVEL = "WARNING"\n')
        with profile(server) as command:
            assert command == "prefect"
            assert path.stat().st_mode & 0o777 == 0o600
            saved = tomllib.loads(path.read_text())
            assert saved["active"] == PROFILE
            assert saved["profiles"][PROFILE] == {"PREFECT_LOGGING_LEVEL": "WARNING", **server.client_settings()}
        assert tomllib.loads(path.read_text())["active"] == "mine"
        write('active = "cloud"\n[profiles.cloud]\nPREFECT_API_URL = "https://cloud/api"\nPREFECT_API_KEY = "pnu_1"\n')
        with profile(server) as command:
            assert command == f"prefect --profile {PROFILE}"
            saved = tomllib.loads(path.read_text())
            assert saved["active"] == "cloud"
            assert saved["profiles"][PROFILE] == server.client_settings()
            assert saved["profiles"]["cloud"] == {"PREFECT_API_URL": "https://cloud/api", "PREFECT_API_KEY": "pnu_1"}
        # The profile is still active after a killed `make serve`.
        write(f'active = "{PROFILE}"\n[profiles.{PROFILE}]\nPREFECT_API_URL = "http://127.0.0.1:1/api"\n')
        with profile(server) as command:
            assert command == "prefect"
        assert tomllib.loads(path.read_text())["active"] == "ephemeral"

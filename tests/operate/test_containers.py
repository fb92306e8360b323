"""No container engine is available: the files are linted, and the image's commands run outside of a container."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import CommandLine
from tests.operate import wait_for

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_compose_files_are_valid(name: str) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_does_not_run_as_root_and_its_versions_are_exact() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):", text, re.MULTILINE)
    assert int(user) > 0
    (python,) = re.findall(r"^ARG PYTHON=(\d+\.\d+\.\d+)$", text, re.MULTILINE)
    assert python.startswith(("3.11.", "3.12.", "3.13."))
    for service in compose()["services"].values():
        if service["image"] != "quantize-gemma":
            assert re.search(r":\d+\.\d+[\w.-]*$", service["image"])


def test_the_server_has_the_same_version_of_prefect_as_the_worker() -> None:
    (pinned,) = re.findall(r"^prefect==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert compose()["services"]["server"]["image"].startswith(f"prefecthq/prefect:{pinned}-")


def test_no_secret_is_in_a_file_and_every_required_variable_is_in_the_example() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    example = (DOCKER / ".env.example").read_text()
    for variable in re.findall(r"\$\{(\w+)", text):
        assert re.search(rf"^#?{variable}=", example, re.MULTILINE), variable
    for variable in re.findall(r"\$\{(\w+):\?", text):
        assert re.search(rf"^{variable}=$", example, re.MULTILINE), f"{variable} must be empty in the example"
    # In both files, a password, token, or authorization is a variable.
    for line in (*text.splitlines(), *(DOCKER / "Dockerfile").read_text().splitlines()):
        if re.search(r"(PASSWORD|TOKEN|AUTH_STRING|SECRET|KEY)\w*\s*[:=]", line) and "${" not in line:
            pytest.fail(line)
        assert not re.search(r"://[^/\s]*:[^/\s]*@", line), line
    assert "docker/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_images_commands_work_with_the_servers_password_on(tmp_path: Path, command_line: CommandLine) -> None:
    services = compose()["services"]
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, health = one.getsockname()[1], other.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    shared = {**command_line.environment(), "PREFECT_HOME": str(tmp_path), "PATH": f"{BIN}:/usr/bin:/bin"}
    storage = services["server"]["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    locked = {"PREFECT_SERVER_API_AUTH_STRING": "ours:pass", "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": storage}
    worker_environment = {
        **shared,
        "PREFECT_API_URL": api,
        "PREFECT_API_AUTH_STRING": "ours:pass",
        "PREFECT_WORKER_WEBSERVER_PORT": str(health),
    }
    log = (tmp_path / "log").open("w")
    start = [*services["server"]["command"], "--port", str(port)]
    start[start.index("0.0.0.0")] = "127.0.0.1"
    processes = [subprocess.Popen(start, env={**shared, **locked}, stdout=log, stderr=log)]
    try:
        wait_for(f"{api}/health", 120)
        assert httpx.post(f"{api}/flows/filter", json={}, timeout=30).status_code == 401
        deploy = services["deploy"]["command"]
        done = subprocess.run(deploy, env=worker_environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        allowed = httpx.post(f"{api}/deployments/filter", json={}, auth=("ours", "pass"), timeout=30).json()
        assert {deployment["name"] for deployment in allowed} == {"default", "nightly", "tiny", "prune"}
        (command,) = re.findall(r"^CMD (\[.*\])$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
        processes.append(subprocess.Popen(yaml.safe_load(command), env=worker_environment, stdout=log, stderr=log))
        (check,) = re.findall(r"^    CMD (\[.*\])$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
        assert "http://127.0.0.1:8080/health" in check
        wait_for(f"http://127.0.0.1:{health}/health", 60)
        healthy = yaml.safe_load(check.replace("8080", str(health)))
        assert subprocess.run(healthy, env=worker_environment).returncode == 0
        probe = [word.replace("4200", str(port)) for word in services["server"]["healthcheck"]["test"][1:]]
        assert subprocess.run(probe, env=shared).returncode == 0
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)
        log.close()
    assert shutil.which("quantize-gemma", path=str(BIN))


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_job_template_defines_every_variable_that_it_uses_and_uses_every_one(kind: str) -> None:
    import json

    from prefect.client.schemas.actions import WorkPoolCreate

    template = json.loads((ROOT / "deployments" / "pools" / f"{kind}.json").read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    pool = WorkPoolCreate(name="quantize-gemma", type=kind, base_job_template=template)
    assert pool.base_job_template == template
    assert template["variables"]["properties"]["env"]["default"]["QUANTIZE_GEMMA_HOME"] == "/store"

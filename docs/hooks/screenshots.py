"""Take the screenshots of the dashboard: `python docs/hooks/screenshots.py`. It needs Chromium.

This starts the server of `make serve` with its own store and Prefect home, runs the built-in model, signs in with a
browser, and writes docs/run.png and docs/card.png. It takes a few minutes.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import httpx

DOCS = Path(__file__).parents[1]
# The time that a page gets to load its data and render, in milliseconds of the browser's virtual clock.
BUDGET = 30_000


def main() -> None:
    """The command line."""
    chromium = shutil.which("chromium") or sys.exit("screenshots: chromium is not installed")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()
        home = Path(folder)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment |= {"PREFECT_HOME": f"{home}/prefect", "QUANTIZE_GEMMA_HOME": f"{home}/store"}
        server_environment = {**environment, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-P", "-m", "quantize_gemma.deployments.serve"]
        log = home / "log"
        with log.open("wb") as stream:
            server = subprocess.Popen(command, env=server_environment, stdout=stream, stderr=stream)
        try:
            wait_until_deployed(server, log)
            run = [sys.executable, "-m", "prefect", "deployment", "run", "quantize-gemma/tiny", "--watch"]
            subprocess.run(run, env=environment, check=True)
            password = (home / "prefect" / "quantize-gemma-password").read_text()
            shoot(chromium, f"http://127.0.0.1:{port}", password, home / "browser")
        finally:
            server.terminate()
            server.wait()


def wait_until_deployed(server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when the server says how to run a deployment."""
    while "deployment run quantize-gemma/tiny" not in log.read_text():
        if server.poll() is not None:
            sys.exit(f"screenshots: the server ended\n{log.read_text()}")
        time.sleep(0.5)


def shoot(chromium: str, ui: str, password: str, profile: Path) -> None:
    """Write the screenshots of the only finished run, and of its card."""
    user, word = password.split(":")
    with httpx.Client(base_url=f"{ui}/api", auth=(user, word), timeout=30) as api:
        cards = api.post("/artifacts/filter", json={"artifacts": {"key": {"any_": ["card"]}}}).json()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    options.append(f"--virtual-time-budget={BUDGET}")
    sign_in = f"{ui}/sign-in#{quote(password, safe=':')}"
    subprocess.run([chromium, *options, "--dump-dom", sign_in], check=True, capture_output=True)
    pages = {
        "run": (f"/runs/flow-run/{cards[0]['flow_run_id']}", "1300,560"),
        "card": (f"/artifacts/artifact/{cards[0]['id']}", "1500,1000"),
    }
    for name, (path, size) in pages.items():
        # The last events of a run are written after it has ended.
        time.sleep(2)
        command = [chromium, *options, f"--window-size={size}", f"--screenshot={DOCS / name}.png", ui + path]
        subprocess.run(command, check=True, capture_output=True)
        print(f"docs/{name}.png")


if __name__ == "__main__":
    main()

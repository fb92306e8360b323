"""The flow against a local Hub: `python -m tests.hub.demo` downloads, evaluates and publishes there."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from tests.hub.access import Tokens
from tests.hub.server import serve
from tests.texts import WIKITEXT, write_wikitext

TOKEN = "hf_localdemo00"
MODEL, BENCHMARK, TARGET = "local/tiny-gemma3", "cais/mmlu", "local/tiny-gemma3-HQQ-INT8-INT4"


def main() -> int:
    """Returns the run's exit code."""
    tokens: Tokens = {TOKEN: {"user": "local", "role": "write"}}
    with tempfile.TemporaryDirectory() as root, serve(Path(root) / "hub", tokens) as hub:
        hub.add("model", MODEL, BUILTIN["tiny-gemma3"])
        hub.add("dataset", BENCHMARK, BUILTIN_BENCHMARKS["mmlu-mini"])
        hub.add("dataset", "HuggingFaceM4/ChartQA", BUILTIN_BENCHMARKS["chartqa-mini"])
        hub.add("dataset", WIKITEXT, write_wikitext(Path(root) / "wikitext"))
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        run = ["run", "--model", MODEL, "--target", TARGET, "--tag"]
        code = subprocess.run(
            [sys.executable, "-m", "quantize_gemma.flows.cli", *run], env={**os.environ, **environment}
        ).returncode
        if code == 0:
            print(f"published as {hub.url}/{TARGET}/commit/{hub.head('model', TARGET)}, with:")
            for name, file in hub.files("model", TARGET).items():
                print(f"{file['size']:>12,}  {name}")
        return code


if __name__ == "__main__":
    sys.exit(main())

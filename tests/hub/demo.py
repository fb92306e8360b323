"""Run the flow against a local Hub: `python -m tests.hub.demo` downloads, evaluates, and publishes there.

With `--checkpoint DIR`, the Hub serves this checkpoint instead of the built-in model; with `--text FILE`, it serves
this text as WikiText-2's test split. All other flags are those of `quantize-gemma run`, for example:

    python -m tests.hub.demo --checkpoint ./gemma-3-270m --text wikitext-2-raw.test.txt --tasks mmlu --limit 2
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from tests.hub.access import Tokens
from tests.hub.server import serve
from tests.texts import TINY_TEXT, WIKITEXT, write_wikitext

TOKEN = "hf_localdemo00"
BENCHMARK = "cais/mmlu"


def main() -> int:
    """Return the run's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub.demo")
    parser.add_argument("--checkpoint", type=Path, default=BUILTIN["tiny-gemma3"])
    parser.add_argument("--text", type=Path, default=TINY_TEXT)
    options, run_flags = parser.parse_known_args()
    model = f"local/{options.checkpoint.resolve().name}"
    target = f"{model}-HQQ-INT8-INT4"
    tokens: Tokens = {TOKEN: {"user": "local", "role": "write"}}
    with tempfile.TemporaryDirectory() as root, serve(Path(root) / "hub", tokens) as hub:
        hub.add("model", model, options.checkpoint)
        hub.add("dataset", BENCHMARK, BUILTIN_BENCHMARKS["mmlu-mini"])
        hub.add("dataset", "HuggingFaceM4/ChartQA", BUILTIN_BENCHMARKS["chartqa-mini"])
        hub.add("dataset", WIKITEXT, write_wikitext(Path(root) / "wikitext", options.text))
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        run = ["run", "--model", model, "--target", target, "--tag", *run_flags]
        code = subprocess.run(
            [sys.executable, "-m", "quantize_gemma.flows.cli", *run], env={**os.environ, **environment}
        ).returncode
        if code == 0:
            print(f"published as {hub.url}/{target}/commit/{hub.head('model', target)}, with:")
            for name, file in hub.files("model", target).items():
                print(f"{file['size']:>12,}  {name}")
        return code


if __name__ == "__main__":
    sys.exit(main())

"""Prefill with a program that returns all logits, and with one that returns only those of the last token:
`python -m benchmarks.prefill --shape 270m`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_quantized_checkpoint
from benchmarks.side_by_side import format_line, machine, make_result, print_result, run, version

TOKENS = 1000


def measure(shape: str, folder: Path) -> dict[str, Any]:
    """Export both programs, and prefill the same prompt with each. Return the results, and the lines to print."""
    checkpoint = make_quantized_checkpoint(shape, folder)
    steps, answers = {}, []
    with tempfile.TemporaryDirectory(dir=folder) as programs_folder:
        for name, last_logits in (("all logits", False), ("last logits only", True)):
            target = Path(programs_folder) / name
            target.mkdir()
            run("benchmarks.prefill:export", {}, target=target, checkpoint=checkpoint, last_logits_only=last_logits)
            steps[name] = run("benchmarks.prefill:measure_reading", {}, program=target, checkpoint=checkpoint)
            answers.append(steps[name]["answer"])
    all_logits, last_logits = ({**step, "seconds": step["prefill_seconds"]} for step in steps.values())
    equal = answers[0] == answers[1]
    result = make_result("prefill", {"shape": shape, "tokens": TOKENS}, all_logits, last_logits, equal)
    lines = [
        f"{shape}, {TOKENS} tokens, {version()}, {machine()}",
        format_line("all logits", all_logits),
        format_line("last logits only", last_logits),
        *(f"{quantity}: {ratio:.2f}" for quantity, ratio in result["ratio"].items()),
        "the last logits are identical" if equal else "the last logits DIFFER",
    ]
    return {**result, "lines": lines}


def export(target: str, checkpoint: str, last_logits_only: bool) -> dict[str, Any]:
    """Export as the flow does."""
    from quantize_gemma.tasks.export import export

    export(Path(target), Path(checkpoint), TOKENS + 24, last_logits_only=last_logits_only)
    return {}


def measure_reading(program: str, checkpoint: str) -> dict[str, Any]:
    """Prefill a prompt in one chunk; return the seconds that it takes, and the digest of the last logits."""
    import hashlib
    import time

    import torch

    from quantize_gemma.tasks.models.pte import PteProgram

    pte = PteProgram(Path(program) / "model.pte")
    ids = torch.randint(10, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    logits = pte.decode(pte.embed_tokens(ids), {TOKENS - 1})
    seconds = time.monotonic() - start
    return {"prefill_seconds": seconds, "answer": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--folder", type=Path, help="directory to keep checkpoints in [default: temporary]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print_result(measure(options.shape, folder), options.json)


if __name__ == "__main__":
    main()

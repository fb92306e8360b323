"""Measure what each patch to a library saves in an export: `python -m benchmarks.patches --shape 270m`.

Each patch is left out --repeats times, between exports with all of them; the table shows medians. CPU time varies less
than wall time if the machine has other work. The program must be byte-identical in every row.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_quantized_checkpoint
from benchmarks.side_by_side import machine, run, version
from quantize_gemma.tasks.runtime.patches import DISABLE, export_patches, loading_patches
from quantize_gemma.tasks.runtime.units import human_size

MEASURED = ("seconds", "cpu_seconds", "peak_rss_bytes")


def measure(shape: str, max_seq_len: int, folder: Path, names: list[str], repeats: int) -> dict[str, Any]:
    """Export with all patches, without each of the named ones, and with all again. Return the rows."""
    checkpoint = make_quantized_checkpoint(shape, folder)
    steps: dict[str, list[dict[str, Any]]] = {}
    for name in [*["none", *names] * repeats, "none"]:
        with tempfile.TemporaryDirectory(dir=folder) as target:
            arguments = {"target": Path(target), "checkpoint": checkpoint, "max_seq_len": max_seq_len}
            step = run("benchmarks.patches:export", {DISABLE: name}, **arguments)
        steps.setdefault(name, []).append({key: step[key] for key in (*MEASURED, "sha256")})
        print(json.dumps({"disabled": name, **steps[name][-1]}), flush=True)
    rows = [
        {"disabled": name, **{key: statistics.median(step[key] for step in exports) for key in MEASURED}}
        for name, exports in steps.items()
    ]
    equal = len({step["sha256"] for exports in steps.values() for step in exports}) == 1
    base, *others = rows
    return {"shape": shape, "machine": machine(), "version": version(), "base": base, "rows": others, "equal": equal}


def export(target: str, checkpoint: str, max_seq_len: int) -> dict[str, Any]:
    """Export as the flow does; return the CPU time and the program's SHA-256."""
    import hashlib

    from quantize_gemma.tasks.export import export

    before = time.process_time()
    export(Path(target), Path(checkpoint), max_seq_len)
    seconds = time.process_time() - before
    with (Path(target) / "model.pte").open("rb") as program:
        return {"cpu_seconds": seconds, "sha256": hashlib.file_digest(program, "sha256").hexdigest()}


def table(result: dict[str, Any]) -> list[str]:
    """Return a Markdown table with a row per patch: how much more time and memory an export takes without it."""
    base = result["base"]
    lines = [
        f"{result['shape']}, {result['version']}, {result['machine']}: with all patches {base['seconds']:.1f} s, "
        f"{base['cpu_seconds']:.1f} s of CPU time, {human_size(round(base['peak_rss_bytes']))}",
        "| patch left out | wall time | CPU time | peak memory |",
        "|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        changes = [f"{100 * (row[key] / base[key] - 1):+.1f}%" for key in MEASURED]
        lines.append(f"| {row['disabled']} | {' | '.join(changes)} |")
    return [*lines, "the programs are byte-identical" if result["equal"] else "the programs DIFFER"]


def main() -> None:
    """Run the command line."""
    patches = [patch.__name__ for patch in (*loading_patches(), *export_patches())]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patches", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="directory to keep checkpoints in [default: temporary]")
    parser.add_argument("--patches", nargs="+", choices=["all", *patches], default=["all", *patches])
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(*table(measure(options.shape, options.max_seq_len, folder, options.patches, options.repeats)), sep="\n")


if __name__ == "__main__":
    main()

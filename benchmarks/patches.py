"""What each patch to a library is worth: an export without it, in turn: `python -m benchmarks.patches --shape 270m`.

Time is the processor's: on a busy machine it varies less than the clock's. The program is the same bytes in every row.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_checkpoint, quantized_checkpoint
from benchmarks.side_by_side import machine, run, version
from quantize_gemma.tasks.runtime.patches import DISABLE, export_patches, loading_patches
from quantize_gemma.tasks.runtime.units import human_size


def measure(shape: str, max_seq_len: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Exports with all patches, without each of those named, and with all again. Returns the rows."""
    checkpoint = folder / f"quantized-{shape}"
    if not (checkpoint / "config.json").exists():
        checkpoint.mkdir(parents=True)
        quantized_checkpoint(make_checkpoint(shape, folder), checkpoint)
    rows = []
    for name in ("none", *names, "none"):
        with tempfile.TemporaryDirectory(dir=folder) as target:
            arguments = {"target": Path(target), "checkpoint": checkpoint, "max_seq_len": max_seq_len}
            step = run("benchmarks.patches:export", {DISABLE: name}, **arguments)
        rows.append({"disabled": name, **{key: step[key] for key in ("cpu_seconds", "peak_rss_bytes", "sha256")}})
        print(json.dumps(rows[-1]), flush=True)
    first, *rest = rows
    base = {key: (first[key] + rest.pop()[key]) / 2 for key in ("cpu_seconds", "peak_rss_bytes")}
    equal = all(row["sha256"] == first["sha256"] for row in rest)
    return {"shape": shape, "machine": machine(), "version": version(), "base": base, "rows": rest, "equal": equal}


def export(target: str, checkpoint: str, max_seq_len: int) -> dict[str, Any]:
    """Exports as the flow's stage does; returns the processor's time and the program's SHA-256."""
    import hashlib

    from quantize_gemma.tasks.export import export

    before = time.process_time()
    export(Path(target), Path(checkpoint), max_seq_len)
    seconds = time.process_time() - before
    with (Path(target) / "model.pte").open("rb") as program:
        return {"cpu_seconds": seconds, "sha256": hashlib.file_digest(program, "sha256").hexdigest()}


def table(result: dict[str, Any]) -> list[str]:
    """Returns a row of Markdown per patch: how much more time and memory an export takes without it."""
    base = result["base"]
    lines = [
        f"{result['shape']}, {result['version']}, {result['machine']}: {base['cpu_seconds']:.1f} s of processor time "
        f"and {human_size(round(base['peak_rss_bytes']))} with all patches",
        "| without | time | memory |",
        "|---|---:|---:|",
    ]
    for row in result["rows"]:
        more = [f"{100 * (row[key] / base[key] - 1):+.1f} %" for key in ("cpu_seconds", "peak_rss_bytes")]
        lines.append(f"| {row['disabled']} | {' | '.join(more)} |")
    return [*lines, "the same bytes" if result["equal"] else "the bytes DIFFER"]


def main() -> None:
    """The command line."""
    patches = [patch.__name__ for patch in (*loading_patches(), *export_patches())]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patches", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made, and kept for the next time")
    parser.add_argument("--patches", nargs="+", choices=["all", *patches], default=["all", *patches])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(*table(measure(given.shape, given.max_seq_len, folder, given.patches)), sep="\n")


if __name__ == "__main__":
    main()

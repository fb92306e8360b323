"""Compare programs with bidirectional and causal attention within images: `python -m benchmarks.images --shape 4b`.

Both prefill a text, decode, and prefill an image. The logits of the text must be bit-identical.
"""

import argparse
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import make_quantized_checkpoint
from benchmarks.side_by_side import format_line, machine, make_result, print_result, run, version

TOKENS = 512
DECODED = 64
ROUNDS = 5
# The times that are compared: title, and key of measure_reading()'s.
TIMES = {
    "prefill of a text": "prefill_seconds",
    "decoding": "decode_seconds",
    "prefill of an image": "image_seconds",
}


def measure(shape: str, folder: Path) -> dict[str, Any]:
    """Export both programs, and run them one after the other. Return the results, and the lines to print."""
    checkpoint = make_quantized_checkpoint(shape, folder)
    programs, steps = {}, {}
    with tempfile.TemporaryDirectory(dir=folder) as programs_folder:
        for name, bidirectional in (("causal", False), ("bidirectional", True)):
            programs[name] = Path(programs_folder) / name
            programs[name].mkdir()
            inputs = {"target": programs[name], "checkpoint": checkpoint, "bidirectional_images": bidirectional}
            run("benchmarks.images:export", {}, **inputs)
        sizes = {name: (program / "model.pte").stat().st_size for name, program in programs.items()}
        for _ in range(2):
            for name, program in programs.items():
                result = run("benchmarks.images:measure_reading", {}, program=program)
                best = steps.get(name, result)
                steps[name] = {**result, **{key: min(result[key], best[key]) for key in TIMES.values()}}
    causal, both = steps.values()
    equal = causal["logits"] == both["logits"]
    comparison = make_result("images", {"shape": shape, "text": TOKENS, "decoded": DECODED}, causal, both, equal)
    ratios = {title: causal[key] / both[key] for title, key in TIMES.items()}
    size = sizes["bidirectional"] / sizes["causal"]
    lines = [
        f"{shape}, {TOKENS} tokens of text, {DECODED} decoded, {version()}, {machine()}",
        *(
            f"{title:20} causal {causal[key]:8.3f} s   bidirectional {both[key]:8.3f} s   ratio {ratios[title]:.2f}"
            for title, key in TIMES.items()
        ),
        format_line("causal", causal),
        format_line("bidirectional", both),
        f"size: {sizes['causal']:,} and {sizes['bidirectional']:,} bytes, ratio {size:.4f}",
        "the logits of the text are identical" if equal else "the logits of the text DIFFER",
    ]
    return {**comparison, "ratio": ratios, "bytes": sizes, "lines": lines}


def export(target: str, checkpoint: str, bidirectional_images: bool) -> dict[str, Any]:
    """Export as the flow does."""
    from quantize_gemma.tasks.export import export

    export(Path(target), Path(checkpoint), TOKENS + 2 * DECODED, bidirectional_images=bidirectional_images)
    return {}


def measure_reading(program: str) -> dict[str, Any]:
    """Prefill a text in one chunk, decode, and prefill an image; return the seconds and a digest of the logits.

    Each time is the fastest of ROUNDS.
    """
    import torch

    from quantize_gemma.tasks.models.pte import PteProgram

    pte = PteProgram(Path(program) / "model.pte")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (1, TOKENS + DECODED), generator=generator)
    embeddings = pte.embed_tokens(ids)
    image = torch.randn(1, 256, pte.without_channel(embeddings).shape[-1], generator=generator)
    if pte.has_image_channel:
        image = torch.cat([image, torch.ones(1, 256, 1)], dim=-1)
    seconds: dict[str, list[float]] = {key: [] for key in TIMES.values()}
    for _ in range(ROUNDS):
        start = time.monotonic()
        first = pte.decode(embeddings[:, :TOKENS], {TOKENS - 1})
        seconds["prefill_seconds"].append(time.monotonic() - start)
        start = time.monotonic()
        # The same sequence continues, so that the time does not include another prefill.
        rest = pte.decode(embeddings[:, TOKENS:], set(range(TOKENS, TOKENS + DECODED)), TOKENS)
        seconds["decode_seconds"].append(time.monotonic() - start)
        start = time.monotonic()
        pte.decode(image, {255})
        seconds["image_seconds"].append(time.monotonic() - start)
    digest = hashlib.sha256(torch.cat([first, rest]).numpy().tobytes()).hexdigest()
    return {**{name: min(values) for name, values in seconds.items()}, "logits": digest}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", "4b"), default="tiny")
    parser.add_argument("--folder", type=Path, help="directory to keep checkpoints in [default: temporary]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print_result(measure(options.shape, folder), options.json)


if __name__ == "__main__":
    main()

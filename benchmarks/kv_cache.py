"""Compare programs with int8 and float32 KV caches: `python -m benchmarks.kv_cache --checkpoint DIR --base DIR …`.

Both prefill the beginning of the text in one chunk, and decode the rest one token at a time; their predictions are
compared with the base model's. With `--shape`, weights and tokens are random, and nothing is compared.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_quantized_checkpoint
from benchmarks.side_by_side import describe, format_line, machine, print_result, run, version

MAX_SEQ_LEN = 1024
PREFILL = 768
DECODED = 192


def measure(checkpoint: Path, base: Path | None, text: Path | None, folder: Path) -> dict[str, Any]:
    """Export and run both programs. Return the results, and the lines to print."""
    steps = {}
    with tempfile.TemporaryDirectory(dir=folder) as programs_folder:
        for dtype in ("float32", "int8"):
            target = Path(programs_folder) / dtype
            target.mkdir()
            run("benchmarks.kv_cache:export", target=target, checkpoint=checkpoint, kv_cache_dtype=dtype)
            inputs = {"program": target, "checkpoint": checkpoint, "text": text and str(text)}
            steps[dtype] = run("benchmarks.kv_cache:measure_reading", **inputs)
            steps[dtype] |= {"planned_bytes": run("benchmarks.kv_cache:planned_bytes", program=target)["planned_bytes"]}
        kl = run("benchmarks.kv_cache:compare", folder=programs_folder, base=base)["kl"] if base else None
    baseline, int8 = steps.values()
    names = ("planned_bytes", "peak_rss_bytes", "prefill_seconds", "decode_seconds")
    ratios = {name: baseline[name] / int8[name] for name in names}
    lines = [
        f"{checkpoint.name}, {PREFILL} tokens of prefill, {DECODED} decoded, {version()}, {machine()}",
        *(format_line(dtype, {**step, "seconds": step["prefill_seconds"]}) for dtype, step in steps.items()),
        *(f"{name}: {baseline[name]:,.6g} and {int8[name]:,.6g}, ratio {ratios[name]:.2f}" for name in names),
    ]
    if kl is not None:
        lines.append(f"KL divergence from the base model: {kl[0]:.4f} and {kl[1]:.4f} nats")
    case = {"checkpoint": checkpoint.name, "max_seq_len": MAX_SEQ_LEN, "prefill": PREFILL, "decoded": DECODED}
    return {**describe("kv_cache", case), **steps, "ratio": ratios, "kl": kl, "equal": None, "lines": lines}


def export(target: str, checkpoint: str, kv_cache_dtype: str) -> dict[str, Any]:
    """Export as the flow does."""
    from quantize_gemma.tasks.export import export

    export(Path(target), Path(checkpoint), MAX_SEQ_LEN, kv_cache_dtype=kv_cache_dtype)
    return {}


def measure_reading(program: str, checkpoint: str, text: str | None) -> dict[str, Any]:
    """Return the times of prefill and decoding, and write the logits next to the program."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.pte import PteProgram

    count = PREFILL + DECODED
    ids = torch.randint(10, 200, (1, count), generator=torch.Generator().manual_seed(0))
    if text:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        ids = torch.tensor([tokenizer(Path(text).read_text(encoding="utf-8")[: 20 * count])["input_ids"][:count]])
    pte = PteProgram(Path(program) / "model.pte")
    embeddings = pte.embed_tokens(ids)
    start = time.monotonic()
    pte.decode(embeddings[:, :PREFILL], {PREFILL - 1})
    prefill_seconds = time.monotonic() - start
    start = time.monotonic()
    logits = pte.decode(embeddings, set(range(PREFILL - 1, count)))
    decode_seconds = time.monotonic() - start - prefill_seconds
    save_file({"ids": ids, "logits": logits}, Path(program) / "logits.safetensors")
    return {"prefill_seconds": prefill_seconds, "decode_seconds": decode_seconds}


def planned_bytes(program: str) -> dict[str, Any]:
    """Return the decoder's planned memory: KV caches, and intermediate results outside of XNNPACK."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    plans = deserialize_pte_binary((Path(program) / "model.pte").read_bytes()).program.execution_plan
    return {"planned_bytes": max(sum(plan.non_const_buffer_sizes) for plan in plans)}


def compare(folder: str, base: str) -> dict[str, Any]:
    """Return the mean KL divergence of each program's predictions from the base model's."""
    import torch
    from safetensors.torch import load_file

    from quantize_gemma.tasks.models.checkpoint import load_model
    from quantize_gemma.tasks.verify.distances import mean_kl

    outputs = [load_file(Path(folder) / dtype / "logits.safetensors") for dtype in ("float32", "int8")]
    with torch.no_grad():
        logits = load_model(Path(base), torch.float32)(outputs[0]["ids"]).logits[0, PREFILL - 1 :]
    return {"kl": [mean_kl(logits, output["logits"]) for output in outputs]}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_cache", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=("tiny", *SHAPES), help="random weights of this shape")
    source.add_argument("--checkpoint", type=Path, help="the directory of a quantized checkpoint")
    parser.add_argument("--base", type=Path, help="the directory of its base model's checkpoint")
    parser.add_argument("--text", type=Path, help="the text to read")
    parser.add_argument("--folder", type=Path, help="directory for checkpoints and programs [default: temporary]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = make_quantized_checkpoint(options.shape, folder) if options.shape else options.checkpoint
        text = options.text and options.text.resolve()
        base = options.base and options.base.resolve()
        print_result(measure(checkpoint.resolve(), base, text, folder.resolve()), options.json)


if __name__ == "__main__":
    main()

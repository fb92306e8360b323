"""Compare programs with int8 and float32 KV caches: `python -m benchmarks.kv_cache --checkpoint DIR --base DIR …`.

Both prefill the beginning of the text in one chunk, and decode the rest one token at a time; their predictions are
compared with the base model's. Without `--text`, tokens are random, and with `--shape`, weights are, too; then nothing
is compared.
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
ROUNDS = 5


def measure(checkpoint: Path, base: Path | None, text: Path | None, folder: Path) -> dict[str, Any]:
    """Export and run both programs. Return the results, and the lines to print."""
    ids = run("benchmarks.kv_cache:choose_tokens", checkpoint=checkpoint, text=text and str(text))["ids"]
    steps = {}
    with tempfile.TemporaryDirectory(dir=folder) as programs_folder:
        for dtype in ("float32", "int8"):
            target = Path(programs_folder) / dtype
            target.mkdir()
            run("benchmarks.kv_cache:export", target=target, checkpoint=checkpoint, kv_cache_dtype=dtype)
            steps[dtype] = run("benchmarks.kv_cache:measure_reading", program=target, ids=ids)
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


def choose_tokens(checkpoint: str, text: str | None) -> dict[str, Any]:
    """Return the ids of the text's first tokens, or of random tokens."""
    import torch
    from transformers import AutoTokenizer

    count = PREFILL + DECODED
    if text is None:
        return {"ids": torch.randint(10, 200, (count,), generator=torch.Generator().manual_seed(0)).tolist()}
    ids = AutoTokenizer.from_pretrained(checkpoint)(Path(text).read_text(encoding="utf-8")[: 20 * count])["input_ids"]
    assert len(ids) >= count, f"{text} has {len(ids)} tokens, but {count} are needed: use a longer text"
    return {"ids": ids[:count]}


def export(target: str, checkpoint: str, kv_cache_dtype: str) -> dict[str, Any]:
    """Export as the flow does."""
    from quantize_gemma.tasks.export import export

    export(Path(target), Path(checkpoint), MAX_SEQ_LEN, kv_cache_dtype=kv_cache_dtype)
    return {}


def measure_reading(program: str, ids: list[int]) -> dict[str, Any]:
    """Return the times of prefill and decoding, and write the logits next to the program.

    Each time is the fastest of ROUNDS.
    """
    import torch
    from safetensors.torch import save_file

    from quantize_gemma.tasks.models.pte import PteProgram

    pte = PteProgram(Path(program) / "model.pte")
    embeddings = pte.embed_tokens(torch.tensor([ids]))
    seconds: dict[str, list[float]] = {"prefill_seconds": [], "decode_seconds": []}
    for _ in range(ROUNDS):
        start = time.monotonic()
        first = pte.decode(embeddings[:, :PREFILL], {PREFILL - 1})
        seconds["prefill_seconds"].append(time.monotonic() - start)
        start = time.monotonic()
        # The same sequence continues, so that the time does not include another prefill.
        rest = pte.decode(embeddings[:, PREFILL:], set(range(PREFILL, len(ids))), PREFILL)
        seconds["decode_seconds"].append(time.monotonic() - start)
    tensors = {"ids": torch.tensor([ids]), "logits": torch.cat([first, rest])}
    save_file(tensors, Path(program) / "logits.safetensors")
    return {name: min(values) for name, values in seconds.items()}


def planned_bytes(program: str) -> dict[str, Any]:
    """Return the decoder's planned memory: KV caches, and intermediate results outside of XNNPACK."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    plans = deserialize_pte_binary((Path(program) / "model.pte").read_bytes()).program.execution_plan
    # In a multimodal program, the vision encoder's plan can be larger.
    decoder = next(plan for plan in plans if plan.name in ("text_decoder", "forward"))
    return {"planned_bytes": sum(decoder.non_const_buffer_sizes)}


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
    if options.shape and (options.base or options.text):
        parser.error("--base and --text need --checkpoint: with --shape, weights and tokens are random")
    if options.base and not options.text:
        parser.error("--base needs --text: predictions of random tokens say nothing about quality")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = make_quantized_checkpoint(options.shape, folder) if options.shape else options.checkpoint
        text = options.text and options.text.resolve()
        base = options.base and options.base.resolve()
        print_result(measure(checkpoint.resolve(), base, text, folder.resolve()), options.json)


if __name__ == "__main__":
    main()

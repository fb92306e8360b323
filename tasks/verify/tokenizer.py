"""Verify that the runner's C++ tokenizer tokenizes text exactly like transformers' tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from quantize_gemma.tasks.models.metrics import RunnerCheck
from quantize_gemma.tasks.models.requests import read_requests
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.strict_json import JsonObject
from quantize_gemma.tasks.verify.scenarios import MAX_EXAMPLES, load_runner_tokenizer

# Many scripts, emoji, whitespace, code, and chat markers.
TEXTS = Path(__file__).with_name("tokenizer_texts.json")
# Characters of a text in a message.
SHOWN = 60
# The number of prompts of each benchmark that are tokenized, evenly spaced.
PROMPTS = 200


@stage()
def verify_tokenizer(target: Path, checkpoint: Path, requests: list[Path]) -> Output:
    """Write tokenizer.json: the number of texts that the C++ tokenizer tokenizes differently, with examples.

    Args:
        target: The directory to write to.
        checkpoint: The checkpoint, for its tokenizer.
        requests: The recorded requests of the benchmarks, whose prompts are tokenized, too.

    Raises:
        StageFailed: The C++ tokenizer cannot read the checkpoint's.
    """
    result: JsonObject = {"runner": [asdict(check_tokenizer(checkpoint, requests))]}
    (target / "tokenizer.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {"metadata": result}


def check_tokenizer(checkpoint: Path, requests: list[Path]) -> RunnerCheck:
    """Check that both tokenizers return the same token ids for TEXTS and for prompts of recorded requests."""
    from transformers import AutoTokenizer

    library, runner = AutoTokenizer.from_pretrained(checkpoint), load_runner_tokenizer(checkpoint)
    texts: list[str] = json.loads(TEXTS.read_text(encoding="utf-8"))
    for folder in requests:
        texts += read_prompts(folder)
    differences = []
    for text in texts:
        expected, ids = library(text)["input_ids"], runner.encode(text, 1, 0)
        if ids != expected:
            place = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
            before = len(library.decode(expected[:place], skip_special_tokens=True))
            start = max(before - SHOWN // 2, 0)
            differences.append(
                f"the runner tokenizes {text[start : start + SHOWN]!r} as {_around(ids, place)}, but transformers "
                f"tokenizes it as {_around(expected, place)}"
            )
    return RunnerCheck(name="tokenizer", cases=len(texts), failed=len(differences), examples=differences[:MAX_EXAMPLES])


def read_prompts(folder: Path) -> list[str]:
    """Return at most PROMPTS distinct prompts of recorded requests, evenly spaced."""
    shards = read_requests(folder).values()
    prompts = list(dict.fromkeys(str(request.arguments[0]) for shard in shards for request in shard))
    step = max(len(prompts) / PROMPTS, 1)
    return [prompts[int(step * number)] for number in range(min(len(prompts), PROMPTS))]


def _around(ids: list[int], place: int) -> str:
    """Return the token ids near a position."""
    start, end = max(place - 2, 0), place + 3
    before, after = "…, " if start else "", ", …" if end < len(ids) else ""
    return f"[{before}{', '.join(map(str, ids[start:end]))}{after}]"

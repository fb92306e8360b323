"""Verify: generate from model.pte in the C++ runner, and compare the program with its checkpoint.

runner.py generates text, scenarios.py tests the runner on prompts, conversations, and images, and compare.py compares
the methods one by one. tokenizer.py is a separate stage, which depends on the benchmarks.
(Sections "Mobile Inference" and "Exporting to ExecuTorch" of PyTorch's card.)
"""

import json
from dataclasses import asdict
from pathlib import Path

from quantize_gemma.tasks.models.checkpoint import is_multimodal
from quantize_gemma.tasks.runtime import machine, store
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.verify.compare import compare
from quantize_gemma.tasks.verify.runner import generate_from_image, generate_from_text


@stage(memory=1.7)
def verify(target: Path, checkpoint: Path, program: Path, max_seq_len: int, max_new_tokens: int) -> Output:
    """Write verify.json: the program's responses to a text and an image, and its distance from the checkpoint.

    Args:
        target: The directory to write to.
        checkpoint: The quantized checkpoint.
        program: The artifact of `export`.
        max_seq_len: The program's maximum sequence length, in tokens.
        max_new_tokens: The maximum number of tokens generated from a prompt.

    Raises:
        StageFailed: The program generates nothing, fails on a prompt, or returns logits that are not finite.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    multimodal = is_multimodal(config.to_dict())
    report_progress(0, 3, "generating with the C++ runner")
    generations = {"text": generate_from_text(program, checkpoint, multimodal, max_new_tokens)}
    if multimodal:
        generations["image"] = generate_from_image(program, checkpoint, max_new_tokens)
    report_progress(1, 3, "comparing with the checkpoint")
    bidirectional_images = store.read_artifact(program).metadata["bidirectional_images"]
    agreement, checks = compare(program, checkpoint, config, max_seq_len, bidirectional_images)
    result = {
        **{name: {"prompt": each.prompt, "response": each.response} for name, each in generations.items()},
        "agreement": asdict(agreement),
        "runner": [asdict(check) for check in checks],
    }
    speed = {
        "processor": machine.processor(),
        "threads": generations["text"].threads,
        "speed": {name: each.speed for name, each in generations.items()},
    }
    (target / "verify.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {"metadata": result, "extra": {"speed": speed}}

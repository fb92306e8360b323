"""The reference outputs for the program are those of transformers for the same checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.export import expected_metadata
from quantize_gemma.tasks.models.pte import insert_image_features
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.verify.compare import compare
from quantize_gemma.tasks.verify.image_inputs import format_image_prompt, make_image_input
from tests.conftest import Outcome
from tests.flows.test_run import metrics_of
from tests.tasks.verify.conftest import export

TINY = BUILTIN["tiny-gemma3"]


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.mark.parametrize("both_ways", [False, True])
def test_inserted_image_features_give_the_logits_of_transformers(both_ways: bool, model: Any) -> None:
    import torch

    image = make_image_input(TINY, model.config.image_token_id)
    pixels = image.pixels
    assert (image.ids == model.config.get_text_config().bos_token_id).sum() == 1
    assert image.is_image.sum() == model.config.mm_tokens_per_image
    types = {"token_type_ids": image.is_image[None].long()} if both_ways else {}
    with torch.no_grad():
        expected = model(input_ids=image.ids, pixel_values=pixels, **types).logits
        empty = model.get_input_embeddings()(image.ids.masked_fill(image.is_image, 0))
        merged = insert_image_features(model.get_image_features(pixels), empty, image.is_image)
        logits = model(inputs_embeds=merged, **types).logits
    assert torch.equal(logits, expected)


def test_a_chat_template_that_only_the_tokenizer_has_is_used_for_images(tiny_copy: Any) -> None:
    from transformers import AutoProcessor

    prompt = format_image_prompt(AutoProcessor.from_pretrained(TINY))
    checkpoint = tiny_copy()
    template = checkpoint / "chat_template.jinja"
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template.read_text()}))
    template.unlink()
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.chat_template is None
    assert format_image_prompt(processor) == prompt


def test_an_images_tokens_attend_to_each_other_in_the_program_as_in_the_model(released: Outcome) -> None:
    program = metrics_of(released)["program"]
    assert program["bidirectional_images"]
    image = program["agreement"]["image"]
    assert image["kl_causal_image"] > 10 * image["kl_program"]


@pytest.mark.long
def test_a_causal_program_is_compared_with_the_model_with_causal_attention(released: Outcome, tmp_path: Path) -> None:
    from transformers import AutoConfig

    release = Path(released.summary["release"])
    options = {"max_seq_len": 64, "bidirectional_images": False}
    program = export("quantize_gemma.tasks.export:export", release, tmp_path, **options)
    config = AutoConfig.from_pretrained(release)
    image = compare(program, release, config, 64, False)[0].image
    assert image is not None
    assert 0 < image.kl_program < image.kl_act_quant
    # The effect of causal attention is measured in the checkpoint, whatever attention the program has.
    bidirectional = metrics_of(released)["program"]["agreement"]["image"]
    assert image.kl_causal_image == pytest.approx(bidirectional["kl_causal_image"], rel=1e-3)


def test_the_programs_metadata_matches_the_model(released: Outcome) -> None:
    # These are the values in tiny-gemma3's config.json and generation_config.json.
    expected = {
        "get_max_seq_len": 1024,
        "get_max_context_len": 1024,
        "get_head_dim": 32,
        "get_n_layers": 3,
        "get_n_kv_heads": 2,
        "get_vocab_size": 2048,
        "get_bos_id": 2,
        "get_eos_ids": [1, 6],
        "modality": "vision",
        "vision_token_id": 9,
    }
    release = Path(released.summary["release"])
    assert expected_metadata(release, 1024) == expected
    arguments = {"program": str(release / "model.pte"), "names": list(expected)}
    metadata = worker.run("quantize_gemma.tasks.export:read_metadata", arguments, lambda *_: None, None)["metadata"]
    assert metadata == expected


def rotary_tables(program: Path) -> int:
    """Return how many tables of cosines and sines, [1, 1, tokens, head_dim], the decoder computes."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import KernelCall

    plans = deserialize_pte_binary(program.read_bytes()).program.execution_plan
    decoder = next(plan for plan in plans if plan.name == "text_decoder")
    calls = [instruction.instr_args for instruction in decoder.chains[0].instructions]
    outputs = [
        decoder.values[call.args[-1]].val
        for call in calls
        if isinstance(call, KernelCall) and decoder.operators[call.op_index].name == "aten::unsqueeze_copy"
    ]
    return sum(list(output.sizes) == [1, 1, 1023, 32] for output in outputs)


def test_the_layers_share_one_cosine_and_one_sine_of_each_kind(released: Outcome) -> None:
    """tiny-gemma3 has three layers of two kinds."""
    assert rotary_tables(Path(released.summary["release"]) / "model.pte") == 4

"""A program accepts prompts of any length in the stock runners, and one that does not is not released."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.gate.checks import judge
from quantize_gemma.tasks.models.checkpoint import is_multimodal
from quantize_gemma.tasks.models.metrics import Agreement, RunnerCheck, parse_metrics
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.patches import patched_export
from quantize_gemma.tasks.verify.compare import compare
from quantize_gemma.tasks.verify.long_prompts import make_prompt, prompt_lengths
from quantize_gemma.tasks.verify.scenarios import run_scenarios
from tests.conftest import Outcome
from tests.flows.test_run import metrics_of
from tests.tasks.verify.conftest import MAX_SEQ_LEN, WINDOW, export

LENGTHS = [31, 32, 33, 64, 192]


@pytest.mark.parametrize(
    ("window", "max_seq_len", "lengths"),
    [
        (512, 1024, [511, 512, 513, 1016]),
        (512, 1032, [511, 512, 513, 1024]),
        (1024, 4096, [1023, 1024, 1025, 2048, 4088]),
        (1024, 1024, [1016]),
        (1024, 1033, [1023, 1024, 1025]),
        (1024, 320, [312]),
    ],
)
def test_prompt_lengths_are_around_the_window_and_leave_room_for_an_answer(
    window: int, max_seq_len: int, lengths: list[int]
) -> None:
    assert prompt_lengths(window, max_seq_len) == lengths


def test_a_prompt_has_exactly_the_requested_tokens() -> None:
    from pytorch_tokenizers import CppHFTokenizer
    from transformers import AutoTokenizer

    tokenizer = CppHFTokenizer()
    tokenizer.load(str(BUILTIN["tiny-gemma3"] / "tokenizer.json"))
    library = AutoTokenizer.from_pretrained(BUILTIN["tiny-gemma3"])
    for length in (31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 1016, 4088):
        text = make_prompt(tokenizer, length)
        assert len(tokenizer.encode(text, 1, 0)) == length
        assert library(text)["input_ids"] == tokenizer.encode(text, 1, 0)


def export_as_the_library(target: Path, checkpoint: Path, max_seq_len: int) -> dict[str, Any]:
    """Export with optimum-executorch's own cache, a ring buffer of twice the sliding window."""
    import torch
    from optimum.exporters.executorch.convert import export_to_executorch
    from optimum.exporters.executorch.tasks.causal_lm import load_causal_lm_model

    from quantize_gemma.tasks.export import expected_metadata

    settings = {"dtype": "float32", "use_custom_sdpa": True, "use_custom_kv_cache": True, "max_seq_len": max_seq_len}
    module = load_causal_lm_model(str(checkpoint), **settings)
    module.model.to(torch.float32)
    module.metadata.update(expected_metadata(checkpoint, max_seq_len))
    with patched_export():
        export_to_executorch(module, "text-generation", "xnnpack", str(target))
    return {"metadata": {}}


def measure(
    program: Path, checkpoint: Path, max_seq_len: int = MAX_SEQ_LEN
) -> tuple[Agreement, dict[str, RunnerCheck]]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    agreement, checks = compare(program, checkpoint, config, max_seq_len, is_multimodal(config.to_dict()))
    return agreement, {check.name: check for check in checks}


def failed_checks(released: Outcome, agreement: Agreement, runner: dict[str, RunnerCheck]) -> set[str]:
    """Return the failed checks of a release with this program, including those of the stock runner."""
    metrics = parse_metrics(metrics_of(released))
    program = replace(metrics.program, agreement=agreement, runner=list(runner.values()))
    verdict = judge(metrics.benchmarks, replace(metrics, program=program), metrics.pairs, metrics.gate.limits)
    return {check.name for check in verdict.checks if check.status == "fail"}


def test_a_text_only_program_answers_prompts_of_any_length_in_the_stock_runner(
    program: Path, small: Path, released: Outcome
) -> None:
    agreement, runner = measure(program, small)
    assert agreement.prompts.lengths == LENGTHS
    assert agreement.prompts.tokens > len(LENGTHS)
    assert runner["prompts"].cases == len(LENGTHS)
    assert failed_checks(released, agreement, runner) == set()


def test_a_text_only_program_whose_sequences_fit_into_the_window_is_correct(
    small: Path, released: Outcome, tmp_path: Path
) -> None:
    """Its sliding-window layers have no mask, as in gemma-3-4b with the default of 1,024 tokens."""
    program = export("quantize_gemma.tasks.export:export", small, tmp_path, max_seq_len=WINDOW)
    agreement, runner = measure(program, small, WINDOW)
    assert agreement.prompts.lengths == [WINDOW - 8]
    assert runner["prompts"].cases == 1
    assert failed_checks(released, agreement, runner) == set()


@pytest.mark.long
@pytest.mark.parametrize("cache_dtype", ["float32", pytest.param("int8", marks=pytest.mark.longest)])
def test_a_multimodal_program_whose_sequences_fit_into_the_window_is_correct(
    cache_dtype: str, released: Outcome, tmp_path: Path
) -> None:
    release = Path(released.summary["release"])
    options = {"max_seq_len": 64, "kv_cache_dtype": cache_dtype}
    program = export("quantize_gemma.tasks.export:export", release, tmp_path, **options)
    agreement, runner = measure(program, release, 64)
    assert runner["prompts"].cases == 1
    assert failed_checks(released, agreement, runner) == set()
    assert agreement.image is not None
    assert agreement.image.kl_causal_image > 10 * agreement.image.kl_program
    assert agreement.late_image is None


def int8_caches(program: Path) -> list[int]:
    """Return the slots of the program's int8 tensors that have the shape of a layer's keys, [1, slots, 1, 32]."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import ScalarType, Tensor

    plans = deserialize_pte_binary((program / "model.pte").read_bytes()).program.execution_plan
    tensors = [value.val for plan in plans for value in plan.values if isinstance(value.val, Tensor)]
    shapes = [list(tensor.sizes) for tensor in tensors if tensor.scalar_type == ScalarType.CHAR]
    return [slots for slots in (WINDOW, MAX_SEQ_LEN) if shapes.count([1, slots, 1, 32]) >= 2]


def test_a_program_with_an_int8_cache_answers_prompts_of_any_length(
    program: Path, small: Path, released: Outcome, tmp_path: Path
) -> None:
    int8 = export("quantize_gemma.tasks.export:export", small, tmp_path, kv_cache_dtype="int8")
    agreement, runner = measure(int8, small)
    assert agreement.prompts.lengths == LENGTHS
    assert runner["prompts"].cases == len(LENGTHS)
    assert failed_checks(released, agreement, runner) == set()
    # The program differs, because its keys and values are rounded.
    assert agreement.text_decoder != measure(program, small)[0].text_decoder
    # The keys and values of the sliding-window layer and of the full-attention layer are int8.
    assert int8_caches(int8) == [WINDOW, MAX_SEQ_LEN]
    assert int8_caches(program) == []


def test_a_multimodal_program_answers_prompts_of_any_length_in_the_stock_runner(released: Outcome) -> None:
    release = Path(released.summary["release"])
    # A short prompt after a long one: nothing of the long one is left.
    lengths = [40, 63, 64, 65, 128, 300, 1016, 40]
    answers, _, checks = run_scenarios(release, release, lengths)
    assert not any(check.failed for check in checks), checks
    assert [len(answer.ids) for answer in answers] == lengths
    assert answers[0].answer == answers[-1].answer
    assert answers[0].logits.equal(answers[-1].logits)


@pytest.mark.slow
def test_a_program_with_the_librarys_cache_fails_at_the_window_and_is_not_released(small: Path, tmp_path: Path) -> None:
    program = export("tests.tasks.verify.test_long_prompts:export_as_the_library", small, tmp_path)
    with pytest.raises(StageFailed, match="the program fails on a prompt of 32 tokens: "):
        measure(program, small)


def test_a_program_with_half_the_window_fails_the_gate(small: Path, released: Outcome, tmp_path: Path) -> None:
    """Its cache has only half of the tokens that the model's sliding-window layers attend to."""
    forgetful = shutil.copytree(small, tmp_path / "forgetful")
    config = json.loads((forgetful / "config.json").read_text())
    (forgetful / "config.json").write_text(json.dumps({**config, "sliding_window": WINDOW // 2}))
    (tmp_path / "program").mkdir()
    program = export("quantize_gemma.tasks.export:export", forgetful, tmp_path / "program")
    assert "program_kl_prompts" in failed_checks(released, *measure(program, small))


@pytest.mark.parametrize(
    "chunks",
    [[1] * 300, [63, 1, 64, 1, 65, 1, 128, 1, 700], [1023, 1], [200] * 5, [10, 64, 5, 128, 7], [64] * 15, [1, 1000]],
)
def test_a_sequence_can_be_read_in_chunks_of_any_length(
    chunks: list[int], released: Outcome, checkpoint_logits: tuple[Any, Any, Any]
) -> None:
    """The chunks follow another sequence, start anywhere in the ring buffer, and can be as long as the sequence."""
    import torch

    from quantize_gemma.tasks.models.pte import PteProgram
    from quantize_gemma.tasks.verify.distances import mean_kl

    ids, eager, plain = checkpoint_logits
    pte = PteProgram(Path(released.summary["release"]) / "model.pte")
    pte.decode(pte.embed_tokens(ids.flip(1)[:, :500]), {499})
    embedded = pte.embed_tokens(ids)
    ends = torch.tensor(chunks).cumsum(0)
    ran = pte.decode(embedded[:, : int(ends[-1])], set((ends - 1).tolist()))
    kl, baseline = (mean_kl(eager[ends - 1], other) for other in (ran, plain[ends - 1]))
    assert kl < baseline, f"{kl} nats, and the activation-quantization baseline is {baseline}"


@pytest.fixture(scope="module")
def checkpoint_logits(released: Outcome) -> tuple[Any, Any, Any]:
    """Token ids, [1, 1024], the checkpoint's logits, and those without quantized activations."""
    import torch
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, load_model
    from quantize_gemma.tasks.verify.long_prompts import TEXT as WORDS

    release = Path(released.summary["release"])
    ids = AutoTokenizer.from_pretrained(release)(WORDS * 30, return_tensors="pt")["input_ids"][:, :1024]
    model = load_model(release, torch.float32)
    with torch.no_grad():
        eager = model(input_ids=ids).logits[0]
        disable_activation_quantization(model)
        return ids, eager, model(input_ids=ids).logits[0]


def test_the_mask_admits_a_window_and_nothing_of_an_earlier_sequence() -> None:
    import torch

    from quantize_gemma.tasks.models.kv_cache import sliding_mask

    window = 5
    for start in range(17):
        for count in (1, 2, 4, 5, 6, 12):
            # The last position before the chunk in each slot, or None.
            cached = [max((p for p in range(start) if p % window == slot), default=None) for slot in range(window)]
            keys = [*cached, *range(start, start + count)]
            mask = sliding_mask(torch.arange(start, start + count), window)
            expected = [
                [0.0 if k is not None and q - window < k <= q else float("-inf") for k in keys]
                for q in range(start, start + count)
            ]
            assert mask.tolist() == expected, (start, count)


def test_the_mask_admits_an_images_whole_chunk_and_changes_nothing_else() -> None:
    import torch

    from quantize_gemma.tasks.models.kv_cache import sliding_mask

    window = 5
    for start in range(17):
        for count in (1, 2, 5, 6, 12):
            positions = torch.arange(start, start + count)
            causal = sliding_mask(positions, window)
            image = sliding_mask(positions, window, torch.tensor(data=True))
            assert torch.equal(sliding_mask(positions, window, torch.tensor(data=False)), causal)
            # Each token attends to the same tokens before the chunk.
            assert torch.equal(image[:, :window], causal[:, :window])
            assert torch.equal(image[:, window:], torch.zeros(count, count))


def test_full_attention_over_an_image_is_bidirectional_and_over_text_causal() -> None:
    import torch

    from quantize_gemma.tasks.models.image_attention import attend_in_image

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 3, 4, 32, generator=generator)
    key, value = (torch.randn(1, 20, 4, 32, generator=generator) for _ in range(2))
    # Three tokens at the positions 5, 6, and 7; the later entries of the cache do not belong to them.
    causal = torch.ops.llama.custom_sdpa(query, key, value, 5, None, 0.0, True, 0.5)
    visible = torch.arange(20) <= 7
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(each.transpose(1, 2) for each in (query, key, value)), attn_mask=visible.expand(3, 20), scale=0.5
    ).transpose(1, 2)
    for is_image, attended in ((True, expected), (False, causal)):
        output = attend_in_image(causal, torch.tensor(is_image), query, key, value, torch.tensor([7]), 0.5)
        assert torch.allclose(output, attended, atol=1e-6)
    assert not torch.allclose(causal, expected, atol=1e-2)

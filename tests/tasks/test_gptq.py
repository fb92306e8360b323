"""GPTQ matches its definition in our format, and resumes at the block where it stopped."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.calibrate import (
    OVERLAP,
    answer_prompts,
    calibrate,
    digest_text,
    find_overlap,
    read_dataset,
    spread_windows,
)
from quantize_gemma.tasks.check import check_calibration
from quantize_gemma.tasks.models.calibration import MAX_BYTES, CalibrationSource, parse_source, read_calibration
from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, load_model
from quantize_gemma.tasks.models.recipe import Calibration, load_recipe
from quantize_gemma.tasks.quantize import blocks, gptq, quantize
from quantize_gemma.tasks.quantize.hidden_states import HiddenStates
from quantize_gemma.tasks.quantize.search import search_scales
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.untie import untie

GROUP = 32


def example(rows: int = 70, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs = torch.randn(1000, columns, generator=generator) @ mixed
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs.T @ inputs


def output_error(weight: torch.Tensor, hessian: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor) -> float:
    error = (integers.double() * scales.double().repeat_interleave(GROUP, 1)) - weight
    return float(((error @ hessian.double()) * error).sum())


def naive_gptq(weight: torch.Tensor, scales: torch.Tensor, curvature: gptq.Curvature) -> torch.Tensor:
    """Round column by column in float64; spread each error with the inverse of the remaining Hessian."""
    remaining = weight.double()[:, curvature.order]
    per_column = scales.double().repeat_interleave(GROUP, 1)[:, curvature.order]
    inverse = torch.linalg.inv(curvature.hessian.double())
    integers = torch.zeros_like(remaining)
    for column in range(remaining.shape[1]):
        scale = per_column[:, column]
        integers[:, column] = (remaining[:, column] / scale).round().clamp(-8, 7)
        error = (remaining[:, column] - integers[:, column] * scale) / inverse[column, column]
        remaining -= error[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return integers[:, curvature.order.argsort()]


def test_gptq_matches_column_by_column_rounding_in_float64() -> None:
    weight, hessian = example()
    curvature = gptq.prepare(hessian.clone(), GROUP, 0.01)
    integers, scales = gptq.quantize_matrix(weight, curvature)
    assert (integers == naive_gptq(weight, scales, curvature)).double().mean() > 0.999
    assert sorted(curvature.order.tolist()) == list(range(96))


def test_no_candidate_scale_has_a_smaller_error_in_the_first_group() -> None:
    weight, hessian = example(rows=5, columns=32)
    curvature = gptq.prepare(hessian.clone(), GROUP, 0.01)
    integers, scales = gptq.quantize_matrix(weight, curvature)
    best = output_error(weight[:1, curvature.order], curvature.hessian, integers[:1, curvature.order], scales[:1])
    for share in torch.linspace(gptq.SMALLEST, gptq.LARGEST, gptq.CANDIDATES):
        scale = (weight[:1].abs().amax(1, keepdim=True) * share / 7.5).bfloat16()
        other = naive_gptq(weight[:1], scale, curvature)
        assert (
            best
            <= output_error(weight[:1, curvature.order], curvature.hessian, other[:, curvature.order], scale) * 1.0001
        )


def test_the_measured_error_is_that_of_rounding_and_not_what_compensation_changes() -> None:
    weight, hessian = example()
    settings = load_recipe("GPTQ-INT8-INT4").calibration
    assert settings is not None
    curvature = gptq.prepare(hessian.clone(), GROUP, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    # This is the case where the full-precision model's inputs are twice the quantized model's, so that compensation
    # doubles the weights.
    shift = weight @ hessian
    errors = []
    for compensation in (0.0, 1.0):
        changed = replace(settings, compensation=compensation)
        matrix = blocks.compensate_and_quantize(lambda first, count: (weight, shift), len(weight), curvature, changed)
        errors.append(matrix.error)
        target = weight + compensation * curvature.solve(shift)
        expected = output_error(target, damped, matrix.integers, matrix.scales)
        assert matrix.error == pytest.approx(expected / float(((target @ damped) * target).sum()), rel=1e-3)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_integers_and_scales_are_valid_in_a_program() -> None:
    weight, hessian = example()
    weight[3] = 0
    weight[5, 32:64] = 0
    weight[7] *= 1e-38
    hessian[:, 11] = hessian[11] = 0  # A channel without activations.
    integers, scales = gptq.quantize_matrix(weight, gptq.prepare(hessian.clone(), GROUP, 0.01))
    assert integers.min() == -8
    assert integers.max() == 7
    assert scales.dtype == torch.bfloat16
    assert scales.float().isfinite().all()
    assert (scales.float() >= 2.0**-126).all()
    assert not integers[3].any()


def test_the_damped_hessian_is_inverted_in_the_columns_own_order() -> None:
    weight, hessian = example()
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(96)
    solved = gptq.prepare(hessian.clone(), GROUP, 0.01).solve(weight)
    assert torch.allclose(solved.double(), weight.double() @ torch.linalg.inv(damped), rtol=1e-3, atol=1e-9)


def test_work_in_panels_and_chunks_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = example(rows=200, columns=160)
    curvature = gptq.prepare(hessian.clone(), GROUP, 0.01)
    expected = gptq.quantize_matrix(weight, curvature)
    monkeypatch.setattr(gptq, "PANEL", 48)
    monkeypatch.setattr(gptq, "CHUNK", 64 * 160)
    spare = torch.full_like(hessian, torch.nan)
    pieces = gptq.prepare(hessian.clone(), GROUP, 0.01, spare)
    assert torch.equal(pieces.order, curvature.order)
    torch.testing.assert_close(pieces.factor, curvature.factor, rtol=1e-4, atol=1e-6)
    for part, whole in zip(gptq.quantize_matrix(weight, curvature), expected, strict=True):
        assert torch.equal(part, whole)
    inverse = torch.linalg.inv(curvature.hessian.double())
    torch.testing.assert_close(pieces.factor.T.double() @ pieces.factor.double(), inverse, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [130, 200])
def test_linears_are_quantized_and_multiplied_a_few_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix with fewer rows than columns is multiplied with the cross products before it is quantized."""
    weight, hessian = example(rows=rows, columns=160)
    activations = torch.randn(2, 3, 160, generator=torch.Generator().manual_seed(4))
    matrices = []
    for chunk in (gptq.CHUNK, 64 * 160):
        monkeypatch.setattr(gptq, "CHUNK", chunk)
        linear = blocks.StoredLinear(weight)
        torch.testing.assert_close(linear(activations), activations @ weight.T)
        moments = blocks.Moments(hessian.clone(), 0.05 * hessian.roll(1, 0))
        linear.matrix = blocks.prepare_linears({"up": linear}, moments, GROUP, Calibration())["up"]()
        torch.testing.assert_close(linear(activations), activations @ linear.matrix.dequantize().T)
        matrices.append(linear.matrix)
    whole, pieces = matrices
    # The last bits of a product can depend on the number of rows.
    assert (pieces.integers == whole.integers).double().mean() > 0.999
    assert (pieces.scales == whole.scales).double().mean() > 0.999
    assert pieces.error == pytest.approx(whole.error, rel=1e-3)


def test_columns_are_rounded_in_their_own_order_if_the_recipe_says_so() -> None:
    weight, hessian = example()
    curvature = gptq.prepare(hessian.clone(), GROUP, 0.01, sort_columns=False)
    assert curvature.order.tolist() == list(range(96))
    integers, scales = gptq.quantize_matrix(weight, curvature)
    assert (integers == naive_gptq(weight, scales, curvature)).double().mean() > 0.999


def test_activations_that_are_not_finite_are_an_error_and_not_an_endless_loop() -> None:
    _, hessian = example()
    hessian[3, 3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        gptq.prepare(hessian, GROUP, 0.01)


def test_a_block_returns_the_same_as_the_librarys_own(untied: Path) -> None:
    from transformers import AutoConfig

    model = load_model(untied, torch.float32)
    config = AutoConfig.from_pretrained(untied, attn_implementation="sdpa").get_text_config()
    tokens = torch.randint(10, 2000, (3, 90), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, output_hidden_states=True).hidden_states
    stored = model.state_dict()
    for number, kind in enumerate(config.layer_types):
        start = next(name for name in stored if f"layers.{number}.mlp.up_proj" in name).partition("mlp.")[0]
        weights = {name.removeprefix(start): one for name, one in stored.items() if name.startswith(start)}
        hidden = expected[number].detach().clone()
        full = hidden.clone()
        blocks.replay_block(tuple(blocks.Block(config, number, weights) for _ in range(2)), (hidden, full))
        assert torch.equal(hidden, full)
        if number + 1 < len(config.layer_types):  # The output of the last block is normalized.
            torch.testing.assert_close(hidden, expected[number + 1], rtol=1e-4, atol=1e-3, msg=kind)


def test_hidden_states_in_a_file_are_read_and_replaced_a_few_sequences_at_a_time(tmp_path: Path) -> None:
    expected = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    states = HiddenStates(expected, tmp_path, "cpu")
    assert len(states) == 5
    assert torch.equal(states[:], expected)
    assert torch.equal(states[4:6], expected[4:])
    # The new states are not contiguous in memory.
    expected[1:3] = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
    states[1:3] = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
    assert torch.equal(states[:], expected)
    assert not list(tmp_path.iterdir())


def test_a_search_without_data_chooses_positive_scales_that_lose_less_than_the_largest_weights() -> None:
    weight = example()[0]
    integers, scales = search_scales(weight, GROUP, "int4")
    plain = (weight.view(70, -1, GROUP).abs().amax(2) / 7.5).bfloat16()
    rounded = (weight / plain.float().repeat_interleave(GROUP, 1)).round().clamp(-8, 7)
    identity = torch.eye(96)
    assert output_error(weight, identity, integers, scales) < output_error(weight, identity, rounded, plain)
    assert (scales > 0).all()
    expected = (weight / scales.float().repeat_interleave(GROUP, 1)).round().clamp(-8, 7)
    assert torch.equal(integers.float(), expected)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied tiny-gemma3 in a store, so that finished blocks are stored."""
    return store.produce(
        "untie", "0" * 64, lambda target: untie(target, BUILTIN["tiny-gemma3"]), tmp_path_factory.mktemp("store")
    ).path


@pytest.fixture(scope="module")
def calibration(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("calibration")
    text = target.with_suffix(".txt")
    text.write_text("\n".join(path.read_text("utf-8") for path in sorted(Path("docs").rglob("*.md"))), encoding="utf-8")
    calibrate(target, untied, 4, 96, text=str(text), digest=digest_text(str(text)))
    return target


def recipe() -> dict[str, Any]:
    return load_recipe("GPTQ-INT8-INT4").to_json()


def run(target: Path, untied: Path, calibration: Path, refresh: bool = False) -> bytes:
    target.mkdir()
    output = quantize(target, untied, recipe(), "cpu", calibration, refresh)
    # The reported errors are part of the artifact's digest, too.
    return (target / "model.safetensors").read_bytes() + json.dumps(output["metadata"]).encode()


def test_a_calibrated_checkpoint_loads_and_is_closer_to_the_base_model_on_its_text(
    untied: Path, calibration: Path, tmp_path: Path
) -> None:
    run(tmp_path / "gptq", untied, calibration)
    (tmp_path / "hqq").mkdir()
    quantize(tmp_path / "hqq", untied, load_recipe("HQQ-INT8-INT4").to_json(), "cpu")
    tokens = torch.tensor(read_calibration(calibration))
    logs = {
        path: torch.log_softmax(load_model(path, torch.float32)(tokens).logits.detach(), -1)
        for path in (untied, tmp_path / "gptq", tmp_path / "hqq")
    }
    gptq_kl, hqq_kl = (
        float((logs[untied].exp() * (logs[untied] - logs[tmp_path / name])).sum(-1).mean()) for name in ("gptq", "hqq")
    )
    assert gptq_kl < hqq_kl


def test_the_same_tokens_give_the_same_bytes_again(untied: Path, calibration: Path, tmp_path: Path) -> None:
    expected = run(tmp_path / "one", untied, calibration, refresh=True)
    assert run(tmp_path / "two", untied, calibration, refresh=True) == expected


def test_equal_weights_in_another_dtype_give_the_same_bytes(untied: Path, calibration: Path, tmp_path: Path) -> None:
    outputs = []
    # These weights are exact in bfloat16, in float16, and in float32.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        (tmp_path / str(dtype)).mkdir()
        model = tmp_path / str(dtype) / "model"
        shutil.copytree(untied, model, ignore=shutil.ignore_patterns("*.safetensors"))
        for path in untied.glob("*.safetensors"):
            tensors = {name: tensor.bfloat16().half().to(dtype) for name, tensor in load_file(path).items()}
            save_file(tensors, model / path.name, {"format": "pt"})
        outputs.append(run(tmp_path / str(dtype) / "gptq", model, calibration))
    assert outputs[0] == outputs[1] == outputs[2]


def test_blocks_from_another_number_of_threads_are_not_reused(
    untied: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "one", untied, calibration)
    quantized: list[int] = []
    real = blocks.quantize_block

    def count(*arguments: Any) -> dict[str, blocks.QuantizedMatrix]:
        quantized.append(1)
        return real(*arguments)

    monkeypatch.setattr(blocks, "quantize_block", count)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(tmp_path / "other", untied, calibration)
    finally:
        torch.set_num_threads(threads)
    assert len(quantized) == 3


def test_a_killed_run_resumes_at_the_block_where_it_stopped(
    untied: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the same store, but with different settings, so that no block is stored yet.
    content = recipe()
    content["calibration"]["damping"] = 0.02
    started: list[int] = []
    real = blocks.quantize_block

    def stop_in_the_third(*arguments: Any) -> dict[str, blocks.QuantizedMatrix]:
        started.append(1)
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(blocks, "quantize_block", stop_in_the_third)
    files = []
    for name in ("killed", "resumed", "uninterrupted"):
        (tmp_path / name).mkdir()
        arguments = tmp_path / name, untied, content, "cpu", calibration, name == "uninterrupted"
        if name == "killed":
            with pytest.raises(KeyboardInterrupt):
                quantize(*arguments)
        else:
            quantize(*arguments)
            files.append((tmp_path / name / "model.safetensors").read_bytes())
            assert len(started) == {"resumed": 4, "uninterrupted": 7}[name]
    assert files[0] == files[1]


def test_a_head_is_calibrated_on_blocks_that_are_quantized_without_data(
    untied: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe()
    for rule in content["rules"]:
        if rule["match"] == "linear":
            rule["algorithm"] = "search"
    (tmp_path / "search").mkdir()
    quantize(tmp_path / "search", untied, content, "cpu", calibration)
    head_inputs: list[torch.Tensor] = []
    real = blocks.Moments.from_pieces

    def from_pieces(inputs: Any, targets: Any) -> blocks.Moments:
        pieces = list(inputs)
        head_inputs.append(torch.cat(pieces))
        return real(pieces, targets)

    monkeypatch.setattr(blocks.Moments, "from_pieces", from_pieces)
    (tmp_path / "again").mkdir()
    quantize(tmp_path / "again", untied, content, "cpu", calibration, refresh=True)
    tokens = torch.tensor(read_calibration(calibration))
    model = load_model(tmp_path / "search", torch.float32)
    disable_activation_quantization(model)
    hidden = model(tokens, output_hidden_states=True).hidden_states[-1].detach()
    plain = load_model(untied, torch.float32)(tokens, output_hidden_states=True).hidden_states[-1].detach()
    # Only the head is calibrated. Its inputs come from the quantized decoder, not from the full-precision one.
    assert len(head_inputs) == 1
    assert (head_inputs[-1] - hidden).norm() < 0.1 * (head_inputs[-1] - plain).norm()


def test_finished_blocks_are_not_computed_again(
    untied: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "first", untied, calibration)

    def fail(*_: Any) -> None:
        raise AssertionError("all blocks are in the store")

    for function in ("quantize_block", "replay_block"):
        monkeypatch.setattr(blocks, function, fail)
    assert run(tmp_path / "second", untied, calibration) == expected


def test_recipes_that_differ_only_in_the_head_share_their_blocks(
    untied: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "int4", untied, calibration)

    def fail(*_: Any) -> None:
        raise AssertionError("all blocks are in the store")

    monkeypatch.setattr(blocks, "quantize_block", fail)
    (tmp_path / "int8").mkdir()
    quantize(tmp_path / "int8", untied, load_recipe("GPTQ-INT8-INT4-HEAD8").to_json(), "cpu", calibration)


def test_a_calibration_text_is_required_only_for_a_calibrated_recipe(
    untied: Path, calibration: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="needs a calibration text"):
        quantize(tmp_path, untied, recipe(), "cpu")
    with pytest.raises(UserError, match="needs no calibration text"):
        quantize(tmp_path, untied, load_recipe("HQQ-INT8-INT4").to_json(), "cpu", calibration)


def test_a_calibration_text_that_shares_a_run_of_tokens_with_the_fidelity_text_is_rejected(
    untied: Path, tmp_path: Path
) -> None:
    lines = Path("docs/how-to/nightly.md").read_text("utf-8").splitlines()
    (tmp_path / "mine.txt").write_text("Something else. " * 50 + "\n".join(lines[:20]), encoding="utf-8")
    (tmp_path / "theirs.txt").write_text("Nothing of it. " * 50 + "\n".join(lines[:20]), encoding="utf-8")
    target = tmp_path / "target"
    target.mkdir()
    text = str(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="shares 32 tokens in a row"):
        calibrate(target, untied, 2, 32, text=text, digest=digest_text(text), fidelity_text=tmp_path / "theirs.txt")
    with pytest.raises(UserError, match="use a longer text"):
        calibrate(target, untied, 2, 100_000, text=text, digest=digest_text(text))
    with pytest.raises(UserError, match="changed during the run"):
        calibrate(target, untied, 2, 32, text=text, digest="0" * 64)


def test_only_a_full_run_of_tokens_counts_as_overlap() -> None:
    run_of = list(range(OVERLAP))
    assert find_overlap([9, *run_of], [*run_of, 7]) == 1
    assert find_overlap(run_of[:-1], run_of) is None


def test_windows_are_spread_over_the_text_and_start_with_bos() -> None:
    assert spread_windows(list(range(100)), 777, 3, 11) == [[777, *range(start, start + 10)] for start in (0, 30, 60)]
    assert len(spread_windows(list(range(100)), 777, 50, 11)) == 10


def test_the_base_models_own_answers_are_added_in_the_chat_template(untied: Path, tmp_path: Path) -> None:
    text = str(Path("docs/how-to/nightly.md"))
    output = calibrate(tmp_path, untied, 2, 16, 2, text, digest_text(text))
    tokenizer = AutoTokenizer.from_pretrained(untied)
    rows = read_calibration(tmp_path)
    assert output["metadata"] == {"sequences": 2, "answers": 2, "length": 16, "tokens": 64}
    assert {len(row) for row in rows} == {16}
    assert tokenizer.decode(rows[2]).startswith("<bos><start_of_turn>user")


def test_answers_end_with_their_stop_token_whatever_fills_the_batch(untied: Path, tmp_path: Path) -> None:
    """As in a fine-tune without a pad_token_id, for which transformers fills the batch with <eos>."""
    model = shutil.copytree(untied, tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    del config["pad_token_id"]
    (model / "generation_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    assert answer_prompts(model, tokenizer, 1) == answer_prompts(untied, tokenizer, 1)


def test_a_text_that_is_too_large_to_be_tokenized_is_rejected(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        with (tmp_path / name).open("wb") as stream:
            os.truncate(stream.fileno(), MAX_BYTES)
    check_calibration(load_recipe("GPTQ-INT8-INT4"), str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="is 32 MB, but at most 16 MB can be tokenized"):
        read_dataset(tmp_path)
    os.truncate(tmp_path / "a.txt", MAX_BYTES + 1)
    with pytest.raises(UserError, match="use a shorter one"):
        check_calibration(load_recipe("GPTQ-INT8-INT4"), str(tmp_path / "a.txt"))


def test_a_text_that_is_too_large_is_rejected_even_if_its_compressed_file_is_small(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["word " * 4_000_000]}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < MAX_BYTES / 2
    with pytest.raises(UserError, match="is 20 MB, but at most 16 MB can be tokenized"):
        read_dataset(tmp_path)


def test_a_dataset_is_read_from_text_and_parquet_files_in_order(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one\n", "", None, "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("three", encoding="utf-8")
    assert read_dataset(tmp_path) == "one\ntwo\nthree"
    for table, reason in (({"words": ["one"]}, ""), ({"text": [["one"], None]}, "its type is list<")):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
        message = rf"c\.parquet of the calibration dataset has no readable column 'text' \(.*{reason}"
        with pytest.raises(UserError, match=message):
            read_dataset(tmp_path)


def test_a_calibration_is_a_file_or_files_of_a_dataset_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words", encoding="utf-8")
    assert not parse_source(str(tmp_path / "text")).on_hub
    assert not parse_source("text.txt").on_hub
    assert parse_source("org/name@main:a.txt") == CalibrationSource("org/name", True, "main", "a.txt")
    assert parse_source("org/name") == CalibrationSource("org/name", True)
    assert parse_source("org/name@v1:raw/train-*") == CalibrationSource("org/name", True, "v1", "raw/train-*")

"""Distillation brings a checkpoint closer to its base model, in the same format, and resumes where it stopped."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.shapes import write_checkpoint
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_TEXTS
from quantize_gemma.tasks.calibrate import calibrate, digest_text
from quantize_gemma.tasks.models.calibration import DISTILLATION, read_calibration
from quantize_gemma.tasks.models.checkpoint import load_model
from quantize_gemma.tasks.models.recipe import HELD_OUT, STEP_SEQUENCES, Distillation, load_recipe
from quantize_gemma.tasks.quantize import distill as stages
from quantize_gemma.tasks.quantize import gptq, quantize, student, training
from quantize_gemma.tasks.quantize.distill import distill
from quantize_gemma.tasks.quantize.source import embed, look_up, open_tensors
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.untie import untie
from tests.tasks.verify.conftest import SMALL

STEPS = 24


@pytest.fixture(scope="module", params=["DISTILL-INT8-INT4", "DISTILL-INT8-INT4-HEAD8"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of distill(), except `target`: artifacts of a store, and a recipe with few steps.

    The checkpoint is calibrated on one short sequence, so that distillation can improve it.
    """
    root = tmp_path_factory.mktemp("store")
    recipe = replace(load_recipe(request.param), distillation=Distillation(120, STEPS, 0.004))
    base = store.produce("untie", "0" * 64, lambda target: untie(target, BUILTIN["tiny-gemma3"]), root).path
    text = str(BUILTIN_TEXTS["tiny-text"] / "text.txt")

    def make_few_tokens(target: Path) -> dict[str, Any]:
        return calibrate(target, base, 1, 32, text=text, digest=digest_text(text))

    def make_tokens(target: Path) -> dict[str, Any]:
        return calibrate(target, base, 8, 96, text=text, digest=digest_text(text), distilled=120)

    def make_checkpoint(target: Path) -> dict[str, Any]:
        return quantize(target, base, recipe.to_json(), "cpu", few_tokens)

    few_tokens = store.produce("calibrate", "1" * 64, make_few_tokens, root).path
    tokens = store.produce("calibrate", "0" * 64, make_tokens, root).path
    checkpoint = store.produce("quantize", "0" * 64, make_checkpoint, root).path
    arguments = {"checkpoint": checkpoint, "base": base, "recipe": recipe.to_json(), "calibration": tokens}
    return {**arguments, "device": "cpu"}


def run(target: Path, inputs: dict[str, Any], **changed: Any) -> tuple[bytes, dict[str, Any]]:
    target.mkdir()
    output: dict[str, Any] = distill(target, **inputs, **changed)["metadata"]  # type: ignore[assignment]
    return (target / "model.safetensors").read_bytes(), output


def divergence(inputs: dict[str, Any], checkpoint: Path) -> float:
    """Return the mean KL divergence of a checkpoint from the base model on the held-out sequences, in nats."""
    tokens = torch.tensor(read_calibration(inputs["calibration"], DISTILLATION))[HELD_OUT // 2 :: HELD_OUT]
    expected, actual = (
        torch.log_softmax(load_model(path, torch.float32)(tokens).logits.detach(), -1)
        for path in (inputs["base"], checkpoint)
    )
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


def test_scales_and_norms_are_trained_and_nothing_else_changes(inputs: dict[str, Any], tmp_path: Path) -> None:
    _, output = run(tmp_path / "distilled", inputs)
    measured = [one["kl"] for one in output["held_out_kl"]]
    assert min(measured) < 0.95 * measured[0]
    before, after = (load_file(path / "model.safetensors") for path in (inputs["checkpoint"], tmp_path / "distilled"))
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        name: tensor.dtype for name, tensor in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for name in changed:
        assert name.endswith(("_weight_scale", "norm.weight"))
        assert not any(part in name for part in ("vision", "embed_tokens"))
    assert any("lm_head" in name for name in changed)
    assert any("layernorm" in name for name in changed)
    assert all((tensor > 0).all() for name, tensor in after.items() if name.endswith("_weight_scale"))
    # The checkpoint is also closer as torchao and transformers load it.
    assert divergence(inputs, tmp_path / "distilled") < 0.97 * divergence(inputs, inputs["checkpoint"])


def test_embeddings_are_scaled_as_in_transformers_in_float32(tmp_path: Path) -> None:
    """In bfloat16, the square root of this width would be rounded; that of the built-in model's width would not."""
    write_checkpoint(tmp_path, SMALL)
    tokens = torch.arange(40).view(2, 20)
    with open_tensors(tmp_path) as sources:
        embeddings = embed(*look_up(sources["model.embed_tokens.weight"], tokens))
    assert torch.equal(embeddings, load_model(tmp_path, torch.float32).get_input_embeddings()(tokens))


def test_a_student_is_the_checkpoint_as_transformers_loads_it(inputs: dict[str, Any]) -> None:
    tokens = torch.tensor(read_calibration(inputs["calibration"]))[:2]
    loaded = []

    def keep(one: student.Student, data: training.TrainingData, *_: Any) -> None:
        loaded.append(torch.log_softmax(one.head(one(data.embed(tokens))), -1).detach())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", keep)
        with pytest.raises(KeyboardInterrupt):
            distill(Path("/nonexistent"), **inputs)
    expected = torch.log_softmax(load_model(inputs["checkpoint"], torch.float32)(tokens).logits.detach(), -1)
    # The last bit of an activation can round it to another one of 256 levels.
    assert float((expected.exp() * (expected - loaded[0])).sum(-1).mean()) < 1e-4


def test_a_killed_training_resumes_at_its_last_measurement_and_ends_with_the_same_bytes(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, metadata = run(tmp_path / "whole", inputs, refresh=True)
    # With the same settings, only `refresh` starts again from the first step.
    steps: list[int] = []

    def stop_at_nine(step: int, _total: int, unit: str) -> None:
        if unit == "steps":
            steps.append(step)
            if step == 9:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "report_progress", stop_at_nine)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", inputs, refresh=True)
    assert list((tmp_path / "killed").iterdir()) == []
    steps.clear()
    monkeypatch.setattr(training, "report_progress", lambda step, *_: steps.append(step))
    assert run(tmp_path / "resumed", inputs) == (expected, metadata)
    assert steps == list(range(9, metadata["steps"] + 1))


def test_the_base_models_states_are_computed_once(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "first", inputs)

    def fail(*_: Any) -> None:
        raise AssertionError("the base model ran again")

    monkeypatch.setattr(stages, "_run_base", fail)
    other = {**inputs["recipe"], "distillation": {"sequences": 40, "steps": 2, "learning_rate": 0.001}}
    run(tmp_path / "second", {**inputs, "recipe": other})


def test_a_single_sequence_is_too_little_to_train_and_to_measure_on(inputs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One sequence of a few words is all there is.")
    text = str(tmp_path / "text.txt")
    with pytest.raises(UserError, match="distillation needs another to measure on"):
        calibrate(tmp_path, inputs["base"], 8, 10, text=text, digest=digest_text(text), distilled=8)
    # A recipe may calibrate on a single sequence if the text is long enough for distillation.
    (tmp_path / "text.txt").write_text("Several sequences of a few words are here. " * 4)
    calibrate(tmp_path, inputs["base"], 1, 10, text=text, digest=digest_text(text), distilled=2)
    assert len(read_calibration(tmp_path, DISTILLATION)) == 2


def test_a_training_that_diverges_says_so_and_keeps_nothing(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = iter([0.1, 0.09, float("nan")])
    monkeypatch.setattr(training, "measure", lambda *_: next(measurements))
    with pytest.raises(UserError, match=r"the distillation diverged .* after 4 steps\): use a smaller learning_rate"):
        run(tmp_path / "distilled", inputs, refresh=True)
    assert list((tmp_path / "distilled").iterdir()) == []


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("chunk", [gptq.CHUNK, 64 * 64])
def test_gradients_match_those_of_the_dequantized_product(
    groups: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (70, 64), dtype=torch.int8, generator=generator)
    activations = torch.randn(2, 5, 64, generator=generator)
    scales = torch.rand(70, groups, generator=generator) + 0.5
    output_gradients = torch.randn(2, 5, 70, generator=generator)
    gradients = []
    for dense in (False, True):
        inputs, trained = activations.clone().requires_grad_(), scales.clone().requires_grad_()
        rounded = activations.round(decimals=1)
        if dense:
            # A straight-through estimator: the rounded values, with the gradient of the inputs.
            through = inputs + (rounded - inputs).detach()
            outputs = through @ (integers * trained.repeat_interleave(64 // groups, 1)).T
        else:
            outputs = student._Product.apply(inputs, rounded, trained, integers)
        (outputs * output_gradients).sum().backward()
        gradients.append((outputs.detach(), inputs.grad, trained.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_every_sequence_is_used_once_per_epoch() -> None:
    learned = list(range(3, 3 + 5 * STEP_SEQUENCES))
    steps = [training.choose_batch(learned, step, 600) for step in range(10)]
    for first in (0, 5):
        epoch = [int(one) for sequences, _ in steps[first : first + 5] for one in sequences]
        assert sorted(epoch) == learned
    assert not torch.equal(steps[0][0], steps[5][0])
    for sequences, positions in steps:
        assert len(positions) == len(sequences)
        assert all(len(set(row.tolist())) == len(row) for row in positions)
        assert all(0 <= place < 600 for place in itertools.chain(*positions.tolist()))
    assert all(torch.equal(*pair) for pair in zip(steps[3], training.choose_batch(learned, 3, 600), strict=True))


def test_a_training_without_improvement_stops_with_its_best_parameters() -> None:
    history = [(0, 0.2), (10, 0.1), *((20, 0.1 + number / 100) for number in range(training.PATIENCE))]
    assert training.State(step=30, history=history).stops(100)
    assert not training.State(step=30, history=history[:-1]).stops(100)
    assert not training.State(step=30, history=[*history[1:], (30, 0.05)]).stops(100)
    assert training.State(step=100, history=history[:1]).stops(100)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {"steps": 0}}, "distillation needs sequences >= 2, steps >= 1"),
        ({"distillation": {"learning_rate": 1.5}}, "0 < learning_rate < 1"),
        ({"distillation": {"epochs": 3}}, "distillation.epochs is not a field of a distillation: use sequences, steps"),
        ({"distillation": {"steps": "many"}}, "distillation.steps must be an integer"),
    ],
)
def test_a_distillation_is_checked_before_anything_starts(file: Path, changes: dict[str, Any], message: str) -> None:
    content = {**load_recipe("DISTILL-INT8-INT4").to_json(), "name": "mine", **changes}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_recipe(str(file))


def test_only_a_calibrated_recipe_is_distilled(file: Path) -> None:
    file.write_text(json.dumps({**load_recipe("SEARCH-INT8-INT4").to_json(), "distillation": {}}))
    with pytest.raises(UserError, match="distillation needs a calibrated recipe"):
        load_recipe(str(file))

"""Fidelity's numbers match an independent computation, regardless of interruptions and chunk sizes."""

from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_TEXTS
from quantize_gemma.tasks.fidelity import summarize_quantized
from quantize_gemma.tasks.fidelity.fidelity_base import fidelity_base
from quantize_gemma.tasks.fidelity.fidelity_quantized import fidelity_quantized
from quantize_gemma.tasks.fidelity.sequences import (
    WINDOW,
    make_windows,
    read_sequences,
    sample,
)
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.untie import untie
from tests.tasks.fidelity.conftest import halve, halve_states, in_a_store
from tests.text_only import write_text_only

TINY, TEXT = BUILTIN["tiny-gemma3"], BUILTIN_TEXTS["tiny-text"]
WINDOWS = 6


def read_text() -> str:
    return (TEXT / "text.txt").read_text(encoding="utf-8")


def run(folder: Path, base: Path, checkpoint: Path, parts: int = 1) -> dict[str, Any]:
    """Run both stages in parts, outside a store; write their artifacts to `folder`, and return the metrics."""
    states = [folder / f"states-{part}" for part in range(parts)]
    tokens = [folder / f"tokens-{part}" for part in range(parts)]
    for part in range(parts):
        states[part].mkdir()
        fidelity_base(states[part], base, TEXT, WINDOWS, "cpu", part, parts)
    for part in range(parts):
        tokens[part].mkdir()
        fidelity_quantized(tokens[part], base, states, checkpoint, "cpu", part, parts)
    return summarize_quantized(tokens)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity")
    for name in ("untied", "checkpoint"):
        (folder / name).mkdir()
    untie(folder / "untied", TINY)
    quantize(folder / "checkpoint", folder / "untied", load_recipe("HQQ-INT8-INT4").to_json(), "cpu")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def measured(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("measured")
    return folder, run(folder, TINY, quantized)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["as shipped", "weights_only"])
def test_two_plain_models_give_the_same_divergence(variant: str, measured: Any, quantized: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    shipped = variant == "as shipped"
    dtype = torch.bfloat16 if shipped else torch.float32
    base = Gemma3ForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    other = Gemma3ForConditionalGeneration.from_pretrained(quantized, dtype=torch.bfloat16)
    if not shipped:
        other.to(torch.float32)
    for module in other.modules():
        if not shipped and hasattr(getattr(module, "weight", None), "activation_quantization"):
            module.weight.activation_quantization = None
    ids = AutoTokenizer.from_pretrained(TINY)((TEXT / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    kl, nll = [], []
    for number in range(WINDOWS):
        window = torch.tensor([[2, *ids[number * 511 : (number + 1) * 511]]])
        with torch.no_grad():
            p, q = (model(window).logits[0, :-1].float().log_softmax(-1) for model in (base, other))
        kl.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
        nll.append(torch.nn.functional.nll_loss(q, window[0, 1:]))
    results = measured[1] if shipped else measured[1]["weights_only"]
    assert results["tokens"] == WINDOWS * 511
    assert results["kl_mean"] > 0.01
    assert results["kl_mean"] == pytest.approx(float(torch.stack(kl).mean()), rel=5e-5)
    assert results["ppl"] == pytest.approx(float(torch.stack(nll).mean().exp()), rel=5e-5)


def test_the_distance_of_a_checkpoint_from_itself_is_zero(measured: Any, tmp_path: Path) -> None:
    fidelity_quantized(tmp_path, TINY, [measured[0] / "states-0"], TINY, "cpu")
    results = summarize_quantized([tmp_path])
    for part in (results, results["weights_only"], results["second_half"], results["chat"]):
        assert part["kl_max"] == pytest.approx(0, abs=1e-5)
        assert part["same_top"] == 1
        assert part["ppl"] == part["ppl_base"]
    assert results["kl_histogram"]["counts"][0] == results["tokens"]


@pytest.mark.long
def test_several_parts_together_write_what_one_part_writes(quantized: Path, measured: Any, tmp_path: Path) -> None:
    """Three parts share two groups of windows of the text and four groups of chats."""
    assert run(tmp_path, TINY, quantized, parts=3) == measured[1]

    def files(folder: Path, pattern: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for part in folder.glob(pattern) for path in part.iterdir()}

    for pattern in ("states-*", "tokens-*"):
        assert files(tmp_path, pattern) == files(measured[0], pattern)
    assert [len(list((tmp_path / f"tokens-{part}").iterdir())) for part in range(3)] == [4, 3, 1]


def test_second_half_and_chat_use_only_their_own_tokens(measured: Any) -> None:
    folder, results = measured
    assert results["second_half"]["tokens"] == WINDOWS * 255
    chats = read_sequences([folder / "states-0"], "chat")
    assert results["chat"]["windows"] == len(chats) == 16
    assert results["chat"]["tokens"] == sum(len(chat.targets) for chat in chats)
    assert results["chat"]["tokens"] > 100


def test_a_text_only_checkpoint_gives_the_numbers_of_the_multimodal_one(
    quantized: Path, measured: Any, tmp_path: Path
) -> None:
    base = write_text_only(TINY, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (tmp_path / "untied").mkdir()
    (tmp_path / "checkpoint").mkdir()
    untie(tmp_path / "untied", base)
    recipe = load_recipe("HQQ-INT8-INT4").to_json()
    quantize(tmp_path / "checkpoint", tmp_path / "untied", recipe, "cpu")
    results = run(tmp_path, base, tmp_path / "checkpoint")
    assert results["kl_mean"] == measured[1]["kl_mean"]
    assert results["weights_only"] == measured[1]["weights_only"]
    # Without a chat template, there are no chats.
    assert "chat" not in results


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_are_in_memory_for_one_chunk_at_a_time(chunk: int) -> None:
    import torch

    from quantize_gemma.tasks.fidelity.tokens import compare_states

    generator = torch.Generator().manual_seed(0)
    base, other, weight = (torch.randn(rows, 8, generator=generator) for rows in (50, 50, 30))
    targets = torch.arange(50) % 30
    sizes: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden @ weight.T

    columns = compare_states((head, base), (head, other), targets, chunk)
    assert max(sizes) == min(chunk, 50)
    whole = compare_states((head, base), (head, other), targets, 50)
    for name, values in columns.items():
        torch.testing.assert_close(values, whole[name])


def test_results_in_the_store_are_not_computed_again(
    quantized: Path, measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the stage is killed in the second weights-only group, the next run computes that group and the rest."""
    from quantize_gemma.tasks.fidelity import states

    checkpoint = in_a_store("quantize", quantized, tmp_path / "store")
    base = in_a_store("download", TINY, tmp_path / "store")
    groups: list[str] = []
    real, load = states.hidden_states, states.load_layers

    def load_layers(path: Path, variant: Any, device: str) -> Any:
        model = load(path, variant, device)
        model.variant = variant
        return model

    def hidden_states(model: Any, rows: Any) -> Any:
        groups.append(model.variant)
        if groups.count("weights_only") == stop:
            raise KeyboardInterrupt
        return real(model, rows)

    monkeypatch.setattr(states, "load_layers", load_layers)
    monkeypatch.setattr(states, "hidden_states", hidden_states)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        fidelity_quantized(tmp_path / "first", base, [measured[0] / "states-0"], checkpoint, "cpu")
    assert groups == ["as_shipped"] * 2 + ["weights_only"] * 2
    groups.clear()
    stop = 0
    fidelity_quantized(tmp_path / "second", base, [measured[0] / "states-0"], checkpoint, "cpu")
    assert groups == ["weights_only", *["as_shipped"] * 4]
    assert summarize_quantized([tmp_path / "second"]) == measured[1]


@pytest.mark.parametrize("changed", ["base", "checkpoint"])
def test_hidden_states_that_have_changed_are_compared_again(
    changed: str, quantized: Path, measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device or different code gives different hidden states for the same sequences; here, they are halved."""
    from quantize_gemma.tasks.fidelity import states

    base, checkpoint = (
        in_a_store(stage, folder, tmp_path / "store") for stage, folder in (("download", TINY), ("quantize", quantized))
    )
    base_states = measured[0] / "states-0"
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    fidelity_quantized(first, base, [base_states], checkpoint, "cpu")
    assert summarize_quantized([first]) == measured[1]
    if changed == "base":
        base_states = halve_states(base_states, tmp_path / "base")
    else:
        real = states.group_states

        def group_states(reader: Any, variant: Any, *arguments: Any) -> dict[int, Path]:
            files = real(reader, variant, *arguments)
            folder = tmp_path / variant / str(len(files))
            folder.mkdir(parents=True)
            return {number: halve(file, folder / f"{number}.safetensors") for number, file in files.items()}

        monkeypatch.setattr(states, "group_states", group_states)
    fidelity_quantized(second, base, [base_states], checkpoint, "cpu")
    results = summarize_quantized([second])
    for part, previous in ((results, measured[1]), (results["weights_only"], measured[1]["weights_only"])):
        assert part["kl_mean"] > 2 * previous["kl_mean"]
        assert (part["ppl_base"] == previous["ppl_base"]) == (changed == "checkpoint")


def test_a_text_shorter_than_a_window_is_rejected() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(UserError, match="but one window takes 511: use a longer text"):
        make_windows("short", tokenizer, 1)
    windows = make_windows(read_text(), tokenizer, 10_000)
    assert len(windows) > 10
    assert {len(window.ids) for window in windows} == {WINDOW}
    assert all(window.ids[0] == tokenizer.bos_token_id for window in windows)
    ids = tokenizer(read_text(), add_special_tokens=False)["input_ids"]
    assert [token for window in windows for token in window.targets] == ids[: len(windows) * 511]


def test_the_built_in_text_is_what_its_script_writes() -> None:
    from tests.builtin.make_tiny_text import make_text

    assert read_text() == make_text()


def test_a_sample_is_evenly_spaced() -> None:
    assert sample(16, 4) == [0, 4, 8, 12]
    assert sample(3, 10) == [0, 1, 2]

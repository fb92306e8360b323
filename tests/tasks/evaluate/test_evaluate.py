"""Our evaluation is bit-identical to lm-eval's own command line on the same directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.evaluate import command_line, compare
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.runtime import store, worker
from quantize_gemma.tasks.untie import untie
from tests.evaluation import PACKAGE, evaluate, record, run_stage

ROOT = Path(__file__).parents[3]
# lm-eval passes transformers the configuration that it has just read from the same checkpoint.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    untied, quantized = tmp_path_factory.mktemp("untied"), tmp_path_factory.mktemp("quantized")
    untie(untied, BUILTIN["tiny-gemma3"])
    quantize(quantized, untied, load_recipe("HQQ-INT8-INT4").to_json(), "cpu")
    return {"base": BUILTIN["tiny-gemma3"], "quantized": quantized}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let worker processes import the tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


MMLU = BUILTIN_BENCHMARKS["mmlu-mini"]


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param("base", marks=pytest.mark.longest), "quantized"])
def test_questions_and_scores_match_those_of_the_command_line(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    paths = {"checkpoint": str(checkpoints[name]), "dataset": str(MMLU)}
    arguments = {"target": str(theirs), **paths, "task": "mmlu", "limit": 2, "batch_size": "1", "device": "cpu"}
    worker.run(f"{command_line.__module__}:{command_line.__name__}", arguments, lambda *_: None, None)
    answered = evaluate(ours, checkpoints[name], MMLU, "mmlu", 2)
    assert compare(theirs, ours / "results") == {
        "questions": 114,
        "different_predictions": 0,
        "different_responses": 0,
        "different_scores": [],
        "scores_out_of_error": [],
    }
    assert answered["progress"][-1] == (114, 114, "questions")
    results = json.loads((ours / "results" / "results.json").read_text())
    assert results["samples"] == 114
    assert len(results["tasks"]) == 57
    assert list(results["groups"]) == ["stem", "other", "social_sciences", "humanities"]
    assert all(score["stderr"] is not None for score in results["tasks"].values())


def in_a_store(checkpoint: Path, home: Path) -> Path:
    def copy(target: Path) -> dict[str, Any]:
        shutil.copytree(checkpoint, target, dirs_exist_ok=True)
        return {}

    return store.produce("quantize", "0" * 64, copy, home).path


def test_answers_are_stored_and_a_lost_shard_is_computed_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    requests = record(tmp_path / "requests", checkpoints["quantized"], MMLU, "mmlu", 1)
    checkpoint = in_a_store(checkpoints["quantized"], tmp_path / "store")

    def answer(name: str, **inputs: Any) -> tuple[Any, dict[str, bytes]]:
        paths = {"requests": requests, "checkpoint": checkpoint, "dataset": MMLU}
        output = run_stage(f"{PACKAGE}.answer:answer", tmp_path / name, paths, device="cpu", **inputs)
        progress = output["progress"][-1][:2] if output["progress"] else None
        return progress, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    progress, files = answer("a")
    assert progress == (57, 57)
    shards = sorted((tmp_path / "store").glob("responses/*/manifest.json"))
    assert len(shards) == len(files) == 57
    # No model answers: it would report its progress.
    assert answer("b") == (None, files)
    # Only a shard that is damaged or missing is computed again.
    shutil.rmtree(shards[3].parent)
    (shards[40].parent / "data" / "responses.json").write_text("[]")
    assert answer("c") == ((2, 2), files)
    # A refreshed stage computes all shards again.
    assert answer("d", refresh=True) == ((57, 57), files)
    # Two parts together have all shards, with the same answers.
    parts = [answer(f"part {part}", part=part, parts=2)[1] for part in range(2)]
    assert sorted(map(len, parts)) == [28, 29]
    assert {**parts[0], **parts[1]} == files


@pytest.fixture(scope="module")
def packed(checkpoints: dict[str, Path]) -> Callable[..., Any]:
    def load(name: str, batch_size: int | str = "auto") -> Any:
        from quantize_gemma.tasks.evaluate.packed_lm import PackedLM

        return PackedLM(checkpoints[name], "cpu", batch_size)

    return load


def requests(lengths: list[int], continuations: list[int]) -> list[Any]:
    """Return requests with random tokens. Each context has continuations of all these lengths, the first one twice."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 2048, (count,), generator=generator).tolist()

    contexts = [tokens(length) for length in lengths]
    return [(None, context, tokens(n)) for context in contexts for n in (continuations[0], *continuations)]


def alone(model: Any, batch: list[Any]) -> list[Any]:
    """Answer each request in its own forward pass, with log-softmax over every position, like the library's model."""
    import torch

    answers = []
    for _, context, continuation in batch:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])[:, :-1]).logits[0]
        logs = torch.log_softmax(logits, -1)[-len(continuation) :]
        tokens = torch.tensor(continuation)
        answers.append((float(logs.gather(1, tokens[:, None]).sum()), bool((logs.argmax(-1) == tokens).all())))
    return answers


@pytest.mark.parametrize("name", ["base", "quantized"])
def test_packed_log_likelihoods_equal_those_of_single_forward_passes(
    name: str, checkpoints: dict[str, Path], packed: Callable[..., Any]
) -> None:
    """Lengths on both sides of the sliding window of 64; continuations of one token and of several."""
    import torch

    from quantize_gemma.tasks.models.checkpoint import load_model

    batch = requests([5, 90, 63, 64, 65, 130, 90, 1, 31, 200], [1, 4, 2])
    expected = alone(load_model(checkpoints[name], torch.bfloat16), batch)
    assert packed(name)._loglikelihood_tokens(batch) == expected
    assert packed(name, 3)._loglikelihood_tokens(batch) == expected


def test_a_prefix_is_shared_where_its_last_bits_are_the_same(packed: Callable[..., Any]) -> None:
    """Attention sums the last `length % 16` tokens separately; a prefix of 60 ends among them in shorter sequences."""
    model = packed("base")
    batch = requests([60, 48], [3, 40, 20])
    computed: list[list[int]] = []
    compute = model._logits

    def count(groups: list[Any], *rest: Any) -> Any:
        logits = compute(groups, *rest)
        computed.append([len(group.endings) for group in groups] + [len(logits)])
        return logits

    model._logits = count
    assert model._loglikelihood_tokens(batch) == alone(model.model, batch)
    # Two contexts with four continuations each; two of the longer context are computed again, together.
    assert computed == [[4, 4, 6], [2, 2]]


def test_a_continuation_that_the_model_would_write_is_greedy(
    checkpoints: dict[str, Path], packed: Callable[..., Any]
) -> None:
    import torch

    from quantize_gemma.tasks.models.checkpoint import load_model

    model = load_model(checkpoints["base"], torch.bfloat16)
    context = requests([40], [1])[0][1]
    written = list(context)
    for _ in range(3):
        with torch.no_grad():
            written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
    answers = packed("base")._loglikelihood_tokens(
        [(None, context, written[-3:]), (None, context, [*written[-3:-1], 11])]
    )
    assert [greedy for _, greedy in answers] == [True, False]


def test_a_request_that_is_too_long_is_truncated_on_the_left_as_in_lm_eval(packed: Callable[..., Any]) -> None:
    model = packed("base")
    model._max_length = 50
    long, short = requests([90, 90], [2])[::2]
    cut = (None, long[1][-49:], long[2])
    assert model._loglikelihood_tokens([long, short])[0] == model._loglikelihood_tokens([cut])[0]


@pytest.mark.parametrize(
    "message", ["cuda", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"]
)
def test_a_batch_that_does_not_fit_shrinks(
    message: str, packed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    batch = requests([5, 90, 63, 64, 65, 130, 90, 31], [1])
    expected = packed("base")._loglikelihood_tokens(batch)
    model = packed("base")
    sizes: list[int] = []

    def run_out_of_memory(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        sizes.append(keywords["input_ids"].shape[1])
        if sizes[-1] > 200:
            raise torch.OutOfMemoryError(message) if message == "cuda" else RuntimeError(message)

    model.model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    assert model._loglikelihood_tokens(batch) == expected
    assert sizes[0] > 200
    # Once the limit is known, no later batch is as large.
    assert max(sizes[[size <= 200 for size in sizes].index(True) :]) <= 200


def test_answers_that_do_not_fit_together_are_divided(packed: Callable[..., Any]) -> None:
    """Three questions with four answers each: 117 tokens if the answers share the question's, 56 to 69 one by one."""
    import torch

    batch = requests([50, 50, 50], [20, 10, 20])
    model = packed("base")
    expected = model._loglikelihood_tokens(batch)
    sizes: list[int] = []

    def run_out_of_memory(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        sizes.append(keywords["input_ids"].shape[1])
        if sizes[-1] > 110:
            raise torch.OutOfMemoryError

    model.model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    assert model._loglikelihood_tokens(batch) == expected
    # Only for the first question; then the limit applies to all.
    assert sum(size > 110 for size in sizes) <= 4


def test_a_question_that_does_not_fit_alone_fails(packed: Callable[..., Any]) -> None:
    import torch

    model = packed("base")

    def run_out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    model.model.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model._loglikelihood_tokens(requests([20, 30], [1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_dequantized_once_give_the_same_logits(dtype: str, checkpoints: dict[str, Path]) -> None:
    import torch

    from quantize_gemma.tasks.models import dequantize
    from quantize_gemma.tasks.models.checkpoint import load_model

    tokens = torch.arange(2, 152).reshape(2, 75)
    model = load_model(checkpoints["quantized"], torch.bfloat16).to(getattr(torch, dtype))
    with torch.no_grad():
        expected = model(tokens).logits
        dequantize.replace_quantized_modules(model)
        assert torch.equal(model(tokens).logits, expected)
    remaining = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert remaining == []


@pytest.mark.parametrize("dequantized", ["backbone", "none"])
def test_chunks_of_a_weight_give_the_same_logits(
    dequantized: Literal["backbone", "none"], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from quantize_gemma.tasks.models import dequantize
    from quantize_gemma.tasks.models.checkpoint import load_model

    monkeypatch.setattr(dequantize, "CHUNK", 64 * 300)
    model = load_model(checkpoints["quantized"], torch.bfloat16)
    tokens = torch.arange(2, 90)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        dequantize.replace_quantized_modules(model, dequantized)
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [64, 640, 1001])
@pytest.mark.parametrize("size", [1e-38, 1e-3, 1.0, 50.0, 1e30])
def test_activations_are_quantized_as_in_torchao(size: float, width: int, dtype: str) -> None:
    """Another test compares the reference with torchao's own linear, through logits in float32."""
    import torch

    from quantize_gemma.tasks.models.activation_quantization import fake_quantize_per_token
    from quantize_gemma.tasks.models.dequantize import quantize_dequantize as reference

    activations = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(1)) * size
    activations[0, 0] = 0
    activations[0, 1] = activations[0, 1].abs()
    activations[0, 2] = -activations[0, 2].abs()
    activations[0, 3, 5] = size * 1e5
    activations = activations.to(getattr(torch, dtype))
    assert torch.equal(fake_quantize_per_token(activations), reference(activations))
    broken = activations.clone()
    broken[1, 3, 2] = torch.nan
    result = fake_quantize_per_token(broken)
    assert torch.equal(result.isnan(), reference(broken).isnan())
    assert result.isnan().all(dim=-1).sum() == 1
    assert torch.equal(fake_quantize_per_token(activations[:, ::2]), reference(activations[:, ::2].contiguous()))

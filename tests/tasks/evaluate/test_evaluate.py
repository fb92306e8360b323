"""Our evaluation gives what lm-eval's own command line gives on the same directory, to the bit."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluate import command_line, compare
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.runtime import store, worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.untie import untie

ROOT = Path(__file__).parents[3]
# lm-eval hands transformers the configuration that it has just read from the same checkpoint.
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


def in_its_process(function: str, monkeypatch: pytest.MonkeyPatch, /, **arguments: Any) -> dict[str, Any]:
    """Calls a function as a stage's work is called; returns its progress, too."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    reported: list[Any] = []
    log = logging.getLogger(__name__)
    result = worker.run(function, arguments, lambda *progress: reported.append(progress), log)
    return {**result, "progress": reported}


def evaluated(checkpoint: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """Evaluates as the stage does, on the built-in questions."""
    target.mkdir(exist_ok=True)
    paths = {"checkpoint": str(checkpoint), "dataset": str(BUILTIN_BENCHMARKS["mmlu-mini"])}
    values = {"batch_size": "auto", "device": "cpu", **settings}
    call = {
        "function": "quantize_gemma.tasks.evaluate:evaluate_mmlu",
        "target": str(target),
        "paths": paths,
        "values": values,
    }
    return in_its_process("quantize_gemma.tasks.runtime.worker_main:call", monkeypatch, **call)


@pytest.mark.parametrize("name", ["base", "quantized"])
def test_questions_and_scores_are_those_of_the_command_line(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    paths = {"checkpoint": str(checkpoints[name]), "questions": str(BUILTIN_BENCHMARKS["mmlu-mini"])}
    reference = f"{command_line.__module__}:{command_line.__name__}"
    in_its_process(reference, monkeypatch, target=str(theirs), **paths, limit=2, batch_size="1", device="cpu")
    made = evaluated(checkpoints[name], ours, monkeypatch, limit=2)
    assert compare(theirs, ours) == {
        "questions": 114,
        "different_predictions": 0,
        "different_loglikelihoods": 0,
        "different_scores": [],
    }
    assert made["progress"][-1] == (114, 114, "questions")
    results = json.loads((ours / "results.json").read_text())
    assert results["questions"] == 114
    assert all(score["stderr"] is not None for score in results["subjects"].values())


def in_a_store(checkpoint: Path, home: Path) -> Path:
    def copy(target: Path) -> dict[str, Any]:
        shutil.copytree(checkpoint, target, dirs_exist_ok=True)
        return {}

    return store.produce("quantize", "0" * 64, copy, home).path


@pytest.mark.long
def test_responses_are_stored_and_a_lost_shard_is_computed_again(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(made: dict[str, Any]) -> Any:
        return made["progress"][-1][:2]

    def files(target: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in target.iterdir()}

    one = in_a_store(checkpoints["quantized"], tmp_path / "one")
    assert progress(evaluated(one, tmp_path / "a", monkeypatch, limit=1)) == (57, 57)
    shards = sorted((tmp_path / "one").glob("responses/*/manifest.json"))
    assert len(shards) == 57
    # A shard that is damaged or was never finished is computed again, and nothing else.
    shutil.rmtree(shards[3].parent)
    (shards[40].parent / "data" / "responses.json").write_text("[]")
    assert progress(evaluated(one, tmp_path / "c", monkeypatch, limit=1)) == (2, 2)
    assert files(tmp_path / "a") == files(tmp_path / "c")
    # A refreshed stage computes all of them again.
    assert progress(evaluated(one, tmp_path / "d", monkeypatch, limit=1, refresh=True)) == (57, 57)


SCORER = "tests.tasks.evaluate.test_evaluate:load_echo"


def load_echo(path: str, device: str = "cpu") -> Callable[[list[Any]], list[Any]]:
    """Load a scorer of [context, continuation] that needs no model; a file says which requests come together."""

    def answer(requests: list[Any]) -> list[Any]:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(requests) + "\n")
        if ["stop", ""] in requests:
            raise KeyboardInterrupt
        return [[len(context), continuation] for context, continuation in requests]

    return answer


def echoed(store_of_run: Path, requests: dict[str, list[Any]], **settings: Any) -> dict[str, list[Any]]:
    from quantize_gemma.tasks.evaluate import shards

    settings = {"identity": {"checkpoint": "0", "device": "cpu"}, "settings": {}, **settings}
    return shards.respond(
        requests,
        scorer=SCORER,
        paths={"path": store_of_run / "asked.txt"},
        root=store_of_run,
        **settings,
    )


def test_a_shards_key_follows_from_name_requests_and_identity(tmp_path: Path) -> None:
    def key(name: str = "a", more: bool = False, **settings: Any) -> str:
        before = set(tmp_path.glob("responses/*/manifest.json"))
        echoed(tmp_path, {name: [["Question:", " A"], *([["Another:", " A"]] if more else [])]}, **settings)
        new = set(tmp_path.glob("responses/*/manifest.json")) - before
        return new.pop().parent.name if new else ""

    device = {"identity": {"checkpoint": "0", "device": "cuda"}}
    checkpoint = {"identity": {"checkpoint": "1", "device": "cpu"}}
    keys = [key(), key("b"), key(more=True), key(**device), key(**checkpoint)]
    assert len(set(keys)) == 5
    assert "" not in keys
    # Workers do not count.
    assert key(workers=2, cluster="tcp://somewhere:8786") == ""


def test_small_shards_are_computed_together_and_an_interrupted_evaluation_keeps_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize_gemma.tasks.evaluate import shards

    monkeypatch.setattr(shards, "QUESTIONS", 2)
    four = {name: [[f"Question {name}:", letter] for letter in "ABCD"] for name in "abcd"}
    stopped = {**four, "x": [["stop", ""]]}
    with pytest.raises(KeyboardInterrupt):
        echoed(tmp_path, stopped)
    asked = [json.loads(line) for line in (tmp_path / "asked.txt").read_text().splitlines()]
    assert [len(together) for together in asked] == [8, 8, 1]
    (tmp_path / "asked.txt").unlink()
    assert echoed(tmp_path, four)["c"] == [[11, letter] for letter in "ABCD"]
    assert not (tmp_path / "asked.txt").exists()


def test_on_a_gpu_the_batches_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    four = {name: [[f"Question {name}:", letter] for letter in "ABCD"] for name in "abcd"}
    echoed(tmp_path, four, settings={"device": "cuda"})
    asked = [json.loads(line) for line in (tmp_path / "asked.txt").read_text().splitlines()]
    assert [len(together) for together in asked] == [4, 4, 4, 4]


def test_the_largest_shards_come_first_and_every_worker_gets_some() -> None:
    from quantize_gemma.tasks.evaluate.shards import _group

    assert _group({"a": 30, "b": 90, "c": 120, "d": 30}, 100) == [["c"], ["b", "a"], ["d"]]
    assert _group({"a": 1, "b": 1, "c": 1}, 2) == [["a", "b"], ["c"]]
    assert _group({"a": 1, "b": 5}, 1) == [["b"], ["a"]]
    assert _group({}, 1) == []


def test_a_machine_with_other_code_or_libraries_computes_nothing(tmp_path: Path) -> None:
    from quantize_gemma.tasks.evaluate import shards

    requests = shards._write_requests({"a": [["Question:", " A"]]}, tmp_path)
    part = {"root": str(tmp_path), "requests": requests, "shards": {"a": "1" * 64}, "scorer": SCORER}
    here = fingerprint(SCORER, shards.RESPOND)
    other = {**here, "libraries": {"torch": "1.0"}}
    with pytest.raises(StageFailed, match=r"has torch \S+ instead of 1\.0: install what the run's machine has"):
        shards.respond_part("evaluation", 0, {**part, "made_by": other})
    with pytest.raises(StageFailed, match="has other code of this program: install"):
        shards.respond_part("evaluation", 0, {**part, "made_by": {**here, "code": "0"}})


def test_a_machine_without_the_runs_store_fails_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize_gemma.tasks.evaluate import shards

    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path / "another"))
    part = {"root": None, "requests": "0" * 64, "shards": {"a": "1" * 64}}
    with pytest.raises(StageFailed, match=r"the requests are not in .*another: all machines need the store"):
        shards.respond_part("evaluation", 0, part)


@pytest.fixture(scope="module")
def packed(checkpoints: dict[str, Path]) -> Callable[..., Any]:
    def load(name: str, batch_size: int | str = "auto") -> Any:
        from quantize_gemma.tasks.evaluate.packed_lm import PackedLM

        return PackedLM(checkpoints[name], "cpu", batch_size)

    return load


def requests(lengths: list[int], continuations: list[int]) -> list[Any]:
    """Makes requests of random tokens. Each context has all these lengths of continuation, the first one twice."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 2048, (count,), generator=generator).tolist()

    contexts = [tokens(length) for length in lengths]
    return [(None, context, tokens(n)) for context in contexts for n in (continuations[0], *continuations)]


def alone(model: Any, asked: list[Any]) -> list[Any]:
    """Answers each request by a forward of its own, with log-softmax over every position, as the library's model."""
    import torch

    answers = []
    for _, context, continuation in asked:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])[:, :-1]).logits[0]
        logs = torch.log_softmax(logits, -1)[-len(continuation) :]
        tokens = torch.tensor(continuation)
        answers.append((float(logs.gather(1, tokens[:, None]).sum()), bool((logs.argmax(-1) == tokens).all())))
    return answers


@pytest.mark.parametrize("name", ["base", "quantized"])
def test_packed_log_likelihoods_are_those_of_single_forwards(
    name: str, checkpoints: dict[str, Path], packed: Callable[..., Any]
) -> None:
    """Lengths on both sides of the sliding window of 64; continuations of one token and of several."""
    import torch

    from quantize_gemma.tasks.models.checkpoint import load_model

    asked = requests([5, 90, 63, 64, 65, 130, 90, 1, 31, 200], [1, 4, 2])
    expected = alone(load_model(checkpoints[name], torch.bfloat16), asked)
    assert packed(name)._loglikelihood_tokens(asked) == expected
    assert packed(name, 3)._loglikelihood_tokens(asked) == expected


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


def test_too_long_a_request_is_truncated_on_the_left_as_in_lm_eval(packed: Callable[..., Any]) -> None:
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

    asked = requests([5, 90, 63, 64, 65, 130, 90, 31], [1])
    expected = packed("base")._loglikelihood_tokens(asked)
    model = packed("base")
    seen: list[int] = []

    def refuse(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        seen.append(keywords["input_ids"].shape[1])
        if seen[-1] > 200:
            raise torch.OutOfMemoryError(message) if message == "cuda" else RuntimeError(message)

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert model._loglikelihood_tokens(asked) == expected
    assert seen[0] > 200
    # Once it is known, no batch is as large again.
    assert max(seen[[size <= 200 for size in seen].index(True) :]) <= 200


def test_a_question_that_does_not_fit_alone_fails(packed: Callable[..., Any]) -> None:
    import torch

    model = packed("base")

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    model.model.register_forward_pre_hook(refuse)
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
        dequantize.dequantize_once(model)
        assert torch.equal(model(tokens).logits, expected)
    left = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert left == []


def test_chunks_of_a_weight_give_the_same_logits(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from quantize_gemma.tasks.models import dequantize
    from quantize_gemma.tasks.models.checkpoint import load_model

    monkeypatch.setattr(dequantize, "CHUNK", 64 * 300)
    model = load_model(checkpoints["quantized"], torch.bfloat16)
    tokens = torch.arange(2, 90)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        dequantize.dequantize_once(model)
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("width", [64, 640, 1001])
@pytest.mark.parametrize("size", [1e-38, 1e-3, 1.0, 50.0, 1e30])
def test_activations_are_quantized_as_by_torchao(size: float, width: int) -> None:
    """The reference is tested against torchao's own linear, by logits in float32."""
    import torch

    from quantize_gemma.tasks.models.activation_quantization import fake_quantize_per_token
    from quantize_gemma.tasks.models.dequantize import quantize_dequantize as reference

    activations = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(1)) * size
    activations[0, 0] = 0
    activations[0, 1] = activations[0, 1].abs()
    activations[0, 2] = -activations[0, 2].abs()
    activations[0, 3, 5] = size * 1e5
    activations = activations.bfloat16()
    assert torch.equal(fake_quantize_per_token(activations), reference(activations))
    broken = activations.clone()
    broken[1, 3, 2] = torch.nan
    found = fake_quantize_per_token(broken)
    assert torch.equal(found.isnan(), reference(broken).isnan())
    assert found.isnan().all(dim=-1).sum() == 1
    assert torch.equal(fake_quantize_per_token(activations[:, ::2]), reference(activations[:, ::2].contiguous()))

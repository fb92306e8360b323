"""Answers are stored shard by shard, under keys that depend on everything that determines the answers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.evaluate import answer
from quantize_gemma.tasks.evaluate.answer import Scorer, choose_part, choose_scorer, draw_sample, group_shards, respond
from quantize_gemma.tasks.models.requests import Request, Shards, read_requests, shard_requests, write_requests
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import UserError

pytestmark = pytest.mark.slow

ECHO = "tests.tasks.evaluate.test_answer:load_echo"


def load_echo(log: str, device: str = "cpu", batch_size: int = 1) -> Callable[[list[Request]], list[Any]]:
    """Return a scorer that needs no model; a file records which requests come together."""
    file = Path(log) / "requests.txt"

    def score(requests: list[Request]) -> list[Any]:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([request.task for request in requests]) + "\n")
        if any(request.task == "stop" for request in requests):
            raise KeyboardInterrupt
        return [[len(str(request.arguments[0])), request.index] for request in requests]

    return score


def requests_of(task: str, documents: int = 1, kind: str = "loglikelihood") -> list[Request]:
    return [
        Request(task, doc_id, index, kind, [f"Question {task} {doc_id}:", letter])
        for doc_id in range(documents)
        for index, letter in enumerate("ABCD")
    ]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact in a store on which the answers depend."""

    def write(target: Path) -> dict[str, Any]:
        (target / "file").write_text("content")
        return {}

    return store.produce("quantize", "0" * 64, write, tmp_path / "store").path


@pytest.fixture
def echo(artifact: Path, tmp_path: Path) -> Scorer:
    return Scorer(ECHO, {"log": artifact}, {"device": "cpu", "batch_size": 1})


def calls(artifact: Path) -> list[list[str]]:
    return [json.loads(line) for line in (artifact / "requests.txt").read_text().splitlines()]


def test_a_shards_key_depends_on_name_requests_artifacts_and_settings(echo: Scorer, tmp_path: Path) -> None:
    def key(name: str = "a", documents: int = 1, **settings: Any) -> str:
        before = set(tmp_path.glob("store/responses/*/manifest.json"))
        scorer = replace(echo, settings={**echo.settings, **settings})
        respond({name: requests_of("a", documents)}, scorer)
        new = set(tmp_path.glob("store/responses/*/manifest.json")) - before
        return new.pop().parent.name if new else ""

    keys = [key(), key("b"), key(documents=2), key(device="cuda:0"), key(device="cuda:0", batch_size=2)]
    assert len(set(keys)) == 5
    assert "" not in keys
    # On a CPU, the batch size is not part of the key.
    assert key(batch_size=2) == ""


def test_small_shards_are_answered_together_and_an_interrupted_part_keeps_finished_shards(
    echo: Scorer, artifact: Path
) -> None:
    scorer = replace(echo, min_questions=2)
    four: Shards = {name: requests_of(name) for name in "abcd"}
    with pytest.raises(KeyboardInterrupt):
        respond({**four, "x": requests_of("stop")}, scorer)
    assert [len(together) for together in calls(artifact)] == [8, 8, 4]
    (artifact / "requests.txt").unlink()
    assert respond(four, scorer)["c"] == [[13, index] for index in range(4)]
    assert not (artifact / "requests.txt").exists()


def test_on_a_gpu_and_in_float32_the_batches_depend_on_no_other_shard(tmp_path: Path) -> None:
    settings: tuple[Any, ...] = (tmp_path, None, None, False)
    assert choose_scorer(*settings, "cpu", "auto", "loglikelihood").min_questions == answer.MIN_QUESTIONS
    assert choose_scorer(*settings, "cuda", "auto", "loglikelihood").min_questions == 1
    assert choose_scorer(*settings, "cpu", "auto", "generate_until").min_questions == 1
    # In float32, the last bit of a product can depend on the number of rows.
    assert choose_scorer(tmp_path, None, None, True, "cpu", "auto", "loglikelihood").min_questions == 1
    # Programs, and models with images, answer one question at a time.
    assert choose_scorer(tmp_path, None, tmp_path, False, "cpu", "auto", "loglikelihood").min_questions == 1
    assert choose_scorer(tmp_path, tmp_path, None, False, "cpu", "auto", "generate_until").min_questions == 1


def test_a_missing_cuda_device_is_an_error(echo: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="has no CUDA device: pass --device cpu"):
        respond({"a": requests_of("a")}, replace(echo, settings={"device": "cuda"}))


def test_the_largest_shards_come_first_and_every_part_gets_some() -> None:
    assert group_shards({"a": 30, "b": 90, "c": 120, "d": 30}, 100) == [["c"], ["b", "a"], ["d"]]
    assert group_shards({"a": 1, "b": 1, "c": 1}, 2) == [["a", "b"], ["c"]]
    assert group_shards({"a": 1, "b": 5}, 1) == [["b"], ["a"]]
    assert group_shards({}, 1) == []
    sizes = {"a": 30, "b": 90, "c": 120, "d": 30}
    assert [choose_part(sizes, part, 2) for part in range(2)] == [["c", "d"], ["b", "a"]]
    assert choose_part(sizes, 0, 1) == ["c", "b", "a", "d"]
    assert choose_part(sizes, 5, 6) == []


def test_a_large_task_has_several_shards_and_a_documents_requests_stay_together(tmp_path: Path) -> None:
    assert list(shard_requests([*requests_of("small", 3), *requests_of("other", 3)])) == ["small", "other"]
    shards = shard_requests(requests_of("large", 120, "generate_until"))
    assert {name: len(shard) for name, shard in shards.items()} == {"large-0": 200, "large-1": 200, "large-2": 80}
    write_requests(shards, tmp_path)
    assert read_requests(tmp_path) == shards


def test_the_sample_does_not_depend_on_the_order_of_the_shards() -> None:
    shards = {name: requests_of(name, 50) for name in "cab"}
    sample = draw_sample(shards, 20)
    assert sample == draw_sample(dict(sorted(shards.items())), 20)
    documents = {(request.task, request.doc_id) for shard in sample.values() for request in shard}
    assert len(documents) == 20
    assert {task for task, _ in documents} == {"a", "b", "c"}
    # The sample has all requests of a document.
    assert sum(map(len, sample.values())) == 80
    assert draw_sample(shards, None) == draw_sample(shards, 150) == draw_sample(shards, 1000) == shards

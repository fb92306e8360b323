"""Answers in shards, one per subject, each an artifact of its own in the store as soon as it is there.

lm-eval asks for the whole benchmark at once. What is in the store is read from there; the rest is answered here, or
by several processes, each with its own model. An evaluation that is killed has lost only what was in work.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from tasks import process, store

STAGE = "evaluate-shard"
# Goes up when the same request may be answered differently.
VERSION = 1
LIBRARIES = ("torch", "torchao", "transformers", "lm-eval")
# Small shards are answered together until there are so many questions, which fills batches.
QUESTIONS = 100

Pairs = list[list[str]]


class ShardedLM(LM):
    """An lm-eval model whose answers go through the store. It answers log-likelihoods and nothing else."""

    def __init__(
        self, checkpoint: Path, digest: str, root: Path, device: str, batch_size: int | str, workers: int, refresh: bool
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.digest = digest
        self.root = root
        self.device_name = device
        self.batch_size = batch_size
        self.workers = workers
        self.refresh = refresh

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Returns lm-eval's answers, in the order of the requests."""
        subjects: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            subjects.setdefault(request.task_name, []).append(number)
        pairs = {subject: [list(requests[n].args) for n in numbers] for subject, numbers in subjects.items()}
        keys = {subject: self._key(subject, pairs[subject]) for subject in subjects}
        missing = [subject for subject in subjects if self.refresh or _load(keys[subject], self.root) is None]
        if len(missing) < len(subjects):
            process.report(f"{len(subjects) - len(missing)} of {len(subjects)} subjects were answered before")
        sizes = {subject: len(str(pairs[subject])) for subject in missing}
        jobs: list[dict[str, Any]] = [
            {
                "checkpoint": str(self.checkpoint),
                "root": str(self.root),
                "device": self.device_name,
                "batch_size": self.batch_size,
                "refresh": self.refresh,
                "shards": [{"key": keys[subject], "pairs": pairs[subject]} for subject in part],
            }
            for part in deal(missing, sizes, self.workers)
        ]
        if len(jobs) == 1:
            answer(**jobs[0])
        elif jobs:
            _answer_in_processes(jobs)
        answers: list[Any] = [None] * len(requests)
        for subject, numbers in subjects.items():
            found = _load(keys[subject], self.root)
            if found is None:
                raise store.StageFailed(f"the answers of {subject} have gone from the store: start the run again")
            for number, (score, greedy) in zip(numbers, found, strict=True):
                answers[number] = score, greedy
        return answers

    def _key(self, subject: str, pairs: Pairs) -> str:
        """The requests' text stands for dataset, task, few-shot examples and limit."""
        text = hashlib.sha256(store.canonical_json(pairs)).hexdigest()
        parameters = {"subject": subject, "requests": text, "device": self.device_name}
        return store.key(STAGE, VERSION, [self.digest], parameters, list(LIBRARIES))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Is not needed for questions."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Is not needed for questions."""
        raise NotImplementedError


def deal(subjects: list[str], sizes: dict[str, int], workers: int) -> list[list[str]]:
    """Returns each worker's subjects, about the same work for all; nobody gets none."""
    parts: list[list[str]] = [[] for _ in range(min(workers, len(subjects)))]
    for subject in sorted(subjects, key=lambda subject: (-sizes[subject], subject)):
        min(parts, key=lambda part: sum(sizes[one] for one in part)).append(subject)
    return parts


def answer(
    checkpoint: str, root: str, device: str, batch_size: int | str, refresh: bool, shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Answers shards, {"key", "pairs": [[context, continuation]]}, and puts each into the store when it is there."""
    from tasks.evaluate.model import PackedLM

    model = PackedLM(Path(checkpoint), device, batch_size)
    model.expected = sum(_questions(shard) for shard in shards)
    for together in _rounds(shards):
        requests = [_request(*pair) for shard in together for pair in shard["pairs"]]
        answers = iter(model.loglikelihood(requests, disable_tqdm=True))
        for shard in together:
            found = [next(answers) for _ in shard["pairs"]]

            def write(target: Path, found: Any = found) -> dict[str, Any]:
                (target / "answers.json").write_text(json.dumps(found), encoding="utf-8")
                return {}

            store.produce(STAGE, shard["key"], write, Path(root), refresh)
    return {}


def _rounds(shards: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yields the shards in groups of at least QUESTIONS questions, but for the last."""
    together: list[dict[str, Any]] = []
    for shard in shards:
        together.append(shard)
        if sum(_questions(one) for one in together) >= QUESTIONS:
            yield together
            together = []
    if together:
        yield together


def _questions(shard: dict[str, Any]) -> int:
    return len({context for context, _ in shard["pairs"]})


def _answer_in_processes(jobs: list[dict[str, Any]]) -> None:
    """Runs each job in a process of its own, on a device or a part of the processor's cores of its own."""
    import torch

    done = [(0, sum(_questions(shard) for shard in job["shards"])) for job in jobs]
    one_at_a_time = threading.Lock()

    def work(number: int) -> None:
        def progress(count: int, total: int, what: str) -> None:
            with one_at_a_time:
                done[number] = count, total
                process.report_progress(sum(d for d, _ in done), sum(t for _, t in done), what)

        job = dict(jobs[number])
        if job["device"] == "cuda":
            job["device"] = f"cuda:{number % torch.cuda.device_count()}"
        threads = str(max(1, torch.get_num_threads() // len(jobs)))
        process.run("tasks.evaluate.shards:answer", job, progress, _Log(), {"OMP_NUM_THREADS": threads})

    with ThreadPoolExecutor(len(jobs)) as pool:
        for future in as_completed([pool.submit(work, number) for number in range(len(jobs))]):
            try:
                future.result()
            except BaseException:
                # What the others have answered so far is kept.
                process.kill_all()
                raise


class _Log:
    """What a process of this process says goes on to the parent."""

    def info(self, message: str) -> None:
        process.report(message)


def _request(context: str, continuation: str) -> Any:
    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


def _load(key: str, root: Path) -> list[Any] | None:
    artifact = store.load(STAGE, key, root)
    if artifact is None:
        return None
    store.hold(STAGE, key, root)
    answers: list[Any] = json.loads((artifact.path / "answers.json").read_text(encoding="utf-8"))
    return answers

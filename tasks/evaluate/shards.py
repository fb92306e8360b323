"""Answers in shards, each an artifact of its own in the store as soon as it is there.

What is in the store is read from there. The rest is handed to the flow run, which has it answered by mapped tasks, in
processes of this machine or on a cluster; where there is no flow run, it is answered here. An evaluation that is killed
has lost only what was in work.
"""

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import model_workers, store, worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import difference, fingerprint

STAGE = "answers"
ASKED = "evaluate-requests"
# What a shard is made by, with its answerer.
ANSWER = "quantize_gemma.tasks.evaluate.shards:answer_part"
# Small shards are answered together until there are so many questions, which fills batches and hides a task's cost.
QUESTIONS = 100


def answers(
    asked: dict[str, list[Any]],
    answerer: str,
    settings: dict[str, Any],
    paths: dict[str, Path],
    identity: dict[str, Any],
    root: Path,
    workers: int = 1,
    cluster: str | None = None,
    refresh: bool = False,
) -> dict[str, list[Any]]:
    """Returns the answers to each shard's requests, by the shards' names, which are fit for names of files.

    The answerer (see residents.py) is loaded with `settings` and `paths`, which may be on another machine: there a
    path in the store `root` is that store's. A shard's key is made of its name, its requests, `identity`, and the
    answerer with its code and libraries. Shards of the same key in the store are not answered again, unless `refresh`.
    """
    keys = {name: _key(name, requests, answerer, identity) for name, requests in asked.items()}
    found = {} if refresh else _load_all(keys, root)
    if found:
        worker.report(f"{len(found)} of {len(asked)} shards were answered before")
    # What was pruned meanwhile is answered again.
    while missing := [name for name in asked if name not in found]:
        common = {
            "answerer": answerer,
            "settings": settings,
            "paths": {
                name: str(path.relative_to(root) if root in path.parents else path) for name, path in paths.items()
            },
            "root": None if root.resolve() == store.home().resolve() else str(root),
            "requests": _write_requests(asked, root),
            "made_by": fingerprint(answerer, ANSWER),
            "refresh": refresh,
            # A cluster's worker lives on: what it pins would never be pruned.
            "pinned": cluster is None,
        }
        # A GPU's sums depend on what is answered together: that must not depend on who answers, or was interrupted.
        alone = cluster is not None or settings.get("device", "cpu") != "cpu"
        parts = _parts({name: _questions(asked[name]) for name in missing}, keys, common, workers, alone)
        if not worker.spread_parts(ANSWER, parts, workers, cluster):
            _answer_here(parts)
        answered = _load_all({name: keys[name] for name in missing}, root)
        if not answered:
            raise StageFailed(f"the answers of {missing[0]} are not in {root}: whoever answers needs the same store")
        found |= answered
    return {name: found[name] for name in asked}


def answer_part(evaluation: str, number: int, part: dict[str, Any]) -> int:
    """Has a resident of the evaluation answer a part; returns the most memory that it has taken, in bytes."""
    settings, asked = _open(part)
    pool = model_workers.pool_of(evaluation)
    given, process_id, peak = pool.answers(part["answerer"], settings, _all(asked), number)
    _keep(part, asked, given, process_id)
    return peak


def _answer_here(parts: list[dict[str, Any]]) -> None:
    settings, _ = _open(parts[0])
    answer = worker.named(parts[0]["answerer"])(**settings)
    done, total = 0, sum(part["questions"] for part in parts)
    for part in parts:
        _, asked = _open(part)
        with worker.as_part(done, part["questions"], total):
            given = answer(_all(asked))
        _keep(part, asked, given, os.getpid())
        done += part["questions"]


def _parts(
    sizes: dict[str, int], keys: dict[str, str], common: dict[str, Any], workers: int, alone: bool
) -> list[dict[str, Any]]:
    """Returns what is answered by a task each: small values, of shards of so many questions."""
    # A cluster does not say how many its workers are: there, too, each shard is a part of its own.
    enough = 1 if alone else min(QUESTIONS, -(-sum(sizes.values()) // workers))
    return [
        {
            **common,
            "name": together[0] + (f" and {len(together) - 1} more" if together[1:] else ""),
            "questions": sum(sizes[name] for name in together),
            "shards": {name: keys[name] for name in together},
        }
        for together in _groups(sizes, enough)
    ]


def _open(part: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Returns the answerer's settings on this machine, and the requests of each shard of the part."""
    root = _root(part)
    artifact = store.load(ASKED, part["requests"], root)
    if artifact is None:
        raise StageFailed(f"the questions are not in {root}: whoever answers needs the store of the run")
    differs = difference(part["made_by"], fingerprint(part["answerer"], ANSWER))
    if differs:
        raise StageFailed(f"{socket.gethostname()} has {differs}: install what the run's machine has")
    asked = {name: json.loads((artifact.path / f"{name}.json").read_text("utf-8")) for name in part["shards"]}
    return {**part["settings"], **{name: str(root / path) for name, path in part["paths"].items()}}, asked


def _keep(part: dict[str, Any], asked: dict[str, list[Any]], answers: list[Any], process_id: int) -> None:
    """Puts the answers to each shard of a part into the store."""
    given = iter(answers)
    for name, key in part["shards"].items():
        text = json.dumps([next(given) for _ in asked[name]])

        def write(target: Path, text: str = text) -> dict[str, Any]:
            (target / "answers.json").write_text(text, encoding="utf-8")
            return {"measured": {"host": socket.gethostname(), "process": process_id}}

        store.produce(STAGE, key, write, _root(part), part["refresh"], part["pinned"])


def _root(part: dict[str, Any]) -> Path:
    return Path(part["root"]) if part["root"] else store.home()


def _all(asked: dict[str, list[Any]]) -> list[Any]:
    return [request for requests in asked.values() for request in requests]


def _key(name: str, requests: list[Any], answerer: str, identity: dict[str, Any]) -> str:
    """The requests' text stands for dataset, task, few-shot examples and limit."""
    text = hashlib.sha256(store.canonical_json(requests)).hexdigest()
    parameters = {"shard": name, "requests": text, "answerer": answerer, **identity}
    return store.key(STAGE, [], parameters, fingerprint(answerer, ANSWER))


def _write_requests(asked: dict[str, list[Any]], root: Path) -> str:
    """Puts all requests into the store, where every worker finds its own; returns their key."""

    def write(target: Path) -> dict[str, Any]:
        for name, requests in asked.items():
            (target / f"{name}.json").write_text(json.dumps(requests), encoding="utf-8")
        return {}

    key = store.key(ASKED, [], {"asked": asked}, fingerprint("quantize_gemma.tasks.evaluate.shards:_write_requests"))
    store.produce(ASKED, key, write, root, pinned=True)
    return key


def _groups(sizes: dict[str, int], enough: int) -> list[list[str]]:
    """Returns the shards in groups of at least so many questions, but for the last; the largest come first."""
    groups: list[list[str]] = []
    count = enough
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if count >= enough:
            groups.append([])
            count = 0
        groups[-1].append(name)
        count += sizes[name]
    return groups


def _questions(requests: list[Any]) -> int:
    """Counts the requests; those with the same context, as the letters of a question, are one."""
    return len({request[0] if isinstance(request, list) else request for request in requests})


def _load_all(keys: dict[str, str], root: Path) -> dict[str, list[Any]]:
    """Returns the answers that are in the store, and pins them."""
    found = {}
    for name, key in keys.items():
        artifact = store.pin(STAGE, key, root, whole=True)
        if artifact is not None:
            found[name] = json.loads((artifact.path / "answers.json").read_text(encoding="utf-8"))
    return found

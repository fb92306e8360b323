"""Answers in shards, each an artifact of its own in the store as soon as it is there.

What is in the store is read from there. The rest is handed to the flow run, which has it answered by mapped tasks, in
processes of this machine or on a cluster; where there is no flow run, it is answered here. An evaluation that is killed
has lost only what was in work.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import process, residents, store
from tasks.store import StageFailed

STAGE = "evaluate-shard"
ASKED = "evaluate-requests"
# Goes up when a shard's artifact is written differently; what answers differently belongs into `identity`.
VERSION = 2
# Small shards are answered together until there are so many questions, which fills batches and hides a task's cost.
QUESTIONS = 100

# Answers, and the process that gave them.
Answered = tuple[list[Any], int]


def answers(
    asked: dict[str, list[Any]],
    answerer: str,
    settings: dict[str, Any],
    paths: dict[str, Path],
    identity: dict[str, Any],
    libraries: tuple[str, ...],
    root: Path,
    workers: int = 1,
    cluster: str | None = None,
    refresh: bool = False,
) -> dict[str, list[Any]]:
    """Returns the answers to each shard's requests, by the shards' names, which are fit for names of files.

    The answerer (see residents.py) is loaded with `settings` and `paths`, which may be on another machine: there a
    path in the store `root` is that store's. A shard's key is made of its name, its requests, the answerer, `identity`
    and the libraries' versions. Shards of the same key in the store are not answered again, unless `refresh`.
    """
    keys = {name: _key(name, requests, answerer, identity, libraries) for name, requests in asked.items()}
    missing = [name for name in asked if refresh or _load(keys[name], root) is None]
    if len(missing) < len(asked):
        process.report(f"{len(asked) - len(missing)} of {len(asked)} shards were answered before")
    if missing:
        sizes = {name: _questions(asked[name]) for name in missing}
        # A cluster says nothing of how many its workers are: there each shard is a part of its own.
        enough = 1 if cluster else min(QUESTIONS, -(-sum(sizes.values()) // workers))
        elsewhere = root.resolve() != store.home().resolve()
        common = {
            "root": str(root) if elsewhere else None,
            "requests": _write_requests(asked, root),
            "answerer": answerer,
            "settings": settings,
            "paths": {name: _portable(path, root) for name, path in paths.items()},
            "refresh": refresh,
        }
        parts = [
            {
                **common,
                "name": together[0] + (f" and {len(together) - 1} more" if together[1:] else ""),
                "questions": sum(sizes[name] for name in together),
                "shards": {name: keys[name] for name in together},
            }
            for together in _groups(sizes, enough)
        ]
        if not process.spread_parts("tasks.evaluate.shards:answer_part", parts, workers, cluster):
            _answer_here(parts)
    found = {name: _load(keys[name], root) for name in asked}
    lost = [name for name in asked if found[name] is None]
    if lost:
        raise StageFailed(f"the answers of {lost[0]} are not in {root}: whoever answers needs the same store")
    return {name: kept for name, kept in found.items() if kept is not None}


def answer_part(evaluation: str, number: int, part: dict[str, Any]) -> int:
    """Has a resident of the evaluation answer a part; returns the most memory that it has taken, in bytes."""
    peak = 0

    def answer(settings: dict[str, Any], requests: list[Any]) -> Answered:
        nonlocal peak
        pool = residents.pool_of(evaluation)
        answers, process_id, peak = pool.answers(part["answerer"], settings, requests, number)
        return answers, process_id

    _answer(part, answer)
    return peak


def _answer_here(parts: list[dict[str, Any]]) -> None:
    loaded: list[Callable[[list[Any]], list[Any]]] = []

    def answer(settings: dict[str, Any], requests: list[Any]) -> Answered:
        if not loaded:
            loaded.append(process.named(parts[0]["answerer"])(**settings))
        return loaded[0](requests), os.getpid()

    done = 0
    for part in parts:
        with process.as_part(done, part["questions"], sum(part["questions"] for part in parts)):
            _answer(part, answer)
        done += part["questions"]


def _answer(part: dict[str, Any], answer: Callable[[dict[str, Any], list[Any]], Answered]) -> None:
    """Puts the answers to each shard of a part into the store."""
    root = Path(part["root"]) if part["root"] else store.home()
    artifact = store.load(ASKED, part["requests"], root)
    if artifact is None:
        raise StageFailed(f"the questions are not in {root}: whoever answers needs the store of the run")
    asked = {name: json.loads((artifact.path / f"{name}.json").read_text("utf-8")) for name in part["shards"]}
    settings = {**part["settings"], **{name: str(root / path) for name, path in part["paths"].items()}}
    answers, process_id = answer(settings, [request for requests in asked.values() for request in requests])
    measured = {"host": socket.gethostname(), "process": process_id}
    given = iter(answers)
    for name, key in part["shards"].items():
        text = json.dumps([next(given) for _ in asked[name]])

        def write(target: Path, text: str = text) -> dict[str, Any]:
            (target / "answers.json").write_text(text, encoding="utf-8")
            return {"measured": measured}

        store.produce(STAGE, key, write, root, part["refresh"])


def _key(name: str, requests: list[Any], answerer: str, identity: dict[str, Any], libraries: tuple[str, ...]) -> str:
    """The requests' text stands for dataset, task, few-shot examples and limit."""
    text = hashlib.sha256(store.canonical_json(requests)).hexdigest()
    parameters = {"shard": name, "requests": text, "answerer": answerer, **identity}
    return store.key(STAGE, VERSION, [], parameters, list(libraries))


def _write_requests(asked: dict[str, list[Any]], root: Path) -> str:
    """Puts all requests into the store, where every worker finds its own; returns their key."""

    def write(target: Path) -> dict[str, Any]:
        for name, requests in asked.items():
            (target / f"{name}.json").write_text(json.dumps(requests), encoding="utf-8")
        return {}

    key = store.key(ASKED, VERSION, [], {"asked": asked}, [])
    store.produce(ASKED, key, write, root)
    store.hold(ASKED, key, root)
    return key


def _portable(path: Path, root: Path) -> str:
    """Returns a path relative to the store, if it is in there."""
    inside = path.is_relative_to(root)
    return str(path.relative_to(root) if inside else path)


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


def _load(key: str, root: Path) -> list[Any] | None:
    artifact = store.load(STAGE, key, root)
    if artifact is None:
        return None
    store.hold(STAGE, key, root)
    found: list[Any] = json.loads((artifact.path / "answers.json").read_text(encoding="utf-8"))
    return found

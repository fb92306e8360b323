"""Responses in shards, each an artifact of its own in the store as soon as it is complete.

Shards in the store are read from there. The others are passed to the flow run, which maps tasks over them, in processes
of this machine or on a cluster; where there is no flow run, this process computes them. An evaluation that is killed
loses only the shards in progress.
"""

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any, TypedDict

from quantize_gemma.tasks.runtime import model_workers, parent_process, store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import Fingerprint, difference, fingerprint
from quantize_gemma.tasks.runtime.stage import import_function

STAGE = "responses"
REQUESTS = "evaluate-requests"
# What computes a shard, with its scorer; its code is in the shard's key.
RESPOND = "quantize_gemma.tasks.evaluate.shards:respond_part"
# Small shards are computed together until there are so many questions, which fills batches and hides a task's cost.
QUESTIONS = 100

# {shard: requests}, and {shard: responses}: JSON values, as the scorer takes and returns them.
Shards = dict[str, list[Any]]
Settings = dict[str, Any]


class Part(TypedDict):
    """What one mapped task computes: JSON values.

    Attributes:
        name: The first shard's, for people.
        questions: How many questions its shards have.
        shards: {shard: its key in the store}.
        scorer: "module:function", see model_workers.py.
        settings: The scorer's settings that are no paths.
        paths: Those that are paths, relative to the store if they are in it.
        root: The store's path; None for the store of the machine.
        requests: The key of all requests in the store.
        made_by: The run's fingerprint of scorer and shards.
        refresh: Whether shards in the store are computed again.
        pinned: Whether the process pins what it stores: a cluster's worker lives on, and its pins would never end.
    """

    name: str
    questions: int
    shards: dict[str, str]
    scorer: str
    settings: Settings
    paths: dict[str, str]
    root: str | None
    requests: str
    made_by: Fingerprint
    refresh: bool
    pinned: bool


def respond(
    requests: Shards,
    scorer: str,
    settings: Settings,
    paths: dict[str, Path],
    identity: dict[str, str | int],
    root: Path,
    workers: int = 1,
    cluster: str | None = None,
    refresh: bool = False,
) -> Shards:
    """Return the responses to each shard's requests.

    It takes more than seven parameters because two stages share it, which bind all but `requests`.

    Args:
        requests: Each shard's; shards' names are valid file names.
        scorer: "module:function", which loads a scorer from `settings` and `paths`; see model_workers.py.
        settings: JSON values.
        paths: May be on another machine, where a path in `root` is one in its store.
        identity: What else the responses depend on. A shard's key consists of its name, its requests, `identity`, and
            the scorer with its code and libraries.
        root: The store.
        workers: Processes that respond, in a flow run.
        cluster: Address of a Dask or Ray cluster that responds instead.
        refresh: Compute shards again that are in the store.

    Raises:
        StageFailed: The responses did not reach the store.
    """
    keys = {name: _key(name, shard, scorer, identity) for name, shard in requests.items()}
    responses = {} if refresh else _load_responses(keys, root)
    if responses:
        parent_process.log(f"{len(responses)} of {len(requests)} shards are in the store")
    # In a loop: what was pruned meanwhile is computed again.
    while missing := [name for name in requests if name not in responses]:
        common = {
            "scorer": scorer,
            "settings": settings,
            "paths": {
                name: str(path.relative_to(root) if root in path.parents else path) for name, path in paths.items()
            },
            "root": None if root.resolve() == store.home().resolve() else str(root),
            "requests": _write_requests(requests, root),
            "made_by": fingerprint(scorer, RESPOND),
            "refresh": refresh,
            "pinned": cluster is None,
        }
        # A GPU's sums depend on the batch: it must not depend on who responds, or on what was interrupted.
        alone = cluster is not None or settings.get("device", "cpu") != "cpu"
        parts = _make_parts({name: _count_questions(requests[name]) for name in missing}, keys, common, workers, alone)
        if not parent_process.spread_parts(RESPOND, parts, workers, cluster):
            _respond_here(parts)
        computed = _load_responses({name: keys[name] for name in missing}, root)
        if not computed:
            raise StageFailed(f"the responses of {missing[0]} are not in {root}: all machines need the same store")
        responses |= computed
    return {name: responses[name] for name in requests}


def respond_part(evaluation: str, number: int, part: Part) -> int:
    """Have one of the evaluation's model workers compute a part; return its peak memory in bytes."""
    settings, requests = _open_part(part)
    pool = model_workers.pool_of(evaluation)
    responses, process_id, peak = pool.respond(part["scorer"], settings, _flatten(requests), number)
    _store_responses(part, requests, responses, process_id)
    return peak


def _respond_here(parts: list[Any]) -> None:
    settings, _ = _open_part(parts[0])
    score = import_function(parts[0]["scorer"])(**settings)
    done, total = 0, sum(part["questions"] for part in parts)
    for part in parts:
        _, requests = _open_part(part)
        with parent_process.as_part(done, part["questions"], total):
            responses = score(_flatten(requests))
        _store_responses(part, requests, responses, os.getpid())
        done += part["questions"]


def _make_parts(
    sizes: dict[str, int], keys: dict[str, str], common: dict[str, Any], workers: int, alone: bool
) -> list[dict[str, Any]]:
    """Return the parts, each with shards of at least QUESTIONS or a worker's share; `sizes` are shards' questions."""
    # A cluster does not say how many workers it has: there, too, each shard is a part of its own.
    enough = 1 if alone else min(QUESTIONS, -(-sum(sizes.values()) // workers))
    return [
        {
            **common,
            "name": group[0] + (f" and {len(group) - 1} more" if group[1:] else ""),
            "questions": sum(sizes[name] for name in group),
            "shards": {name: keys[name] for name in group},
        }
        for group in _group(sizes, enough)
    ]


def _open_part(part: Part) -> tuple[Settings, Shards]:
    """Return the scorer's settings on this machine, and the requests of each shard of the part."""
    root = _root(part)
    artifact = store.load(REQUESTS, part["requests"], root)
    if artifact is None:
        raise StageFailed(f"the requests are not in {root}: all machines need the store of the run")
    mismatch = difference(part["made_by"], fingerprint(part["scorer"], RESPOND))
    if mismatch:
        raise StageFailed(f"{socket.gethostname()} has {mismatch}: install what the run's machine has")
    requests = {name: json.loads((artifact.path / f"{name}.json").read_text("utf-8")) for name in part["shards"]}
    return {**part["settings"], **{name: str(root / path) for name, path in part["paths"].items()}}, requests


def _store_responses(part: Part, requests: Shards, responses: list[Any], process_id: int) -> None:
    """Put the responses to each shard of a part into the store."""
    remaining = iter(responses)
    for name, key in part["shards"].items():
        text = json.dumps([next(remaining) for _ in requests[name]])

        def write(target: Path, text: str = text) -> dict[str, Any]:
            (target / "responses.json").write_text(text, encoding="utf-8")
            return {"measured": {"host": socket.gethostname(), "process": process_id}}

        store.produce(STAGE, key, write, _root(part), part["refresh"], part["pinned"])


def _root(part: Part) -> Path:
    return Path(part["root"]) if part["root"] else store.home()


def _flatten(requests: Shards) -> list[Any]:
    return [request for shard in requests.values() for request in shard]


def _key(name: str, requests: list[Any], scorer: str, identity: dict[str, str | int]) -> str:
    """Return a shard's key. The requests' text stands for dataset, task, few-shot examples and limit."""
    digest = hashlib.sha256(store.canonical_json(requests)).hexdigest()
    parameters = {"shard": name, "requests": digest, "scorer": scorer, **identity}
    return store.key(STAGE, [], parameters, fingerprint(scorer, RESPOND))


def _write_requests(requests: Shards, root: Path) -> str:
    """Put all requests into the store, where every worker reads its own; return their key."""

    def write(target: Path) -> dict[str, Any]:
        for name, shard in requests.items():
            (target / f"{name}.json").write_text(json.dumps(shard), encoding="utf-8")
        return {}

    code = fingerprint("quantize_gemma.tasks.evaluate.shards:_write_requests")
    key = store.key(REQUESTS, [], {"requests": requests}, code)
    store.produce(REQUESTS, key, write, root, pinned=True)
    return key


def _group(sizes: dict[str, int], enough: int) -> list[list[str]]:
    """Return the shards in groups of at least `enough` questions, except for the last; the largest come first."""
    groups: list[list[str]] = []
    count = enough
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if count >= enough:
            groups.append([])
            count = 0
        groups[-1].append(name)
        count += sizes[name]
    return groups


def _count_questions(requests: list[Any]) -> int:
    """Count the requests; those with the same context, as the letters of a question, are one."""
    return len({request[0] if isinstance(request, list) else request for request in requests})


def _load_responses(keys: dict[str, str], root: Path) -> Shards:
    """Return the responses that are in the store, and pin them."""
    responses = {}
    for name, key in keys.items():
        artifact = store.pin(STAGE, key, root, whole=True)
        if artifact is not None:
            responses[name] = json.loads((artifact.path / "responses.json").read_text(encoding="utf-8"))
    return responses

"""The requests of a benchmark, in shards."""

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from quantize_gemma.tasks.runtime.strict_json import JsonValue

# Documents per shard, by the kind of request: a run that is killed loses only the shards in progress. MMLU's subjects
# are not split, and questions about the same image, which are neighbors, mostly stay together.
DOCUMENTS = {"loglikelihood": 2000, "loglikelihood_rolling": 50, "generate_until": 50}
# The file, next to the requests, that says whether their prompts are in the model's chat template.
CHAT_TEMPLATE = "chat_template.json"


@dataclass(frozen=True)
class Request:
    """One request of lm-eval to a model.

    Attributes:
        task: The lm-eval task.
        doc_id: The number of the document in the task.
        index: The number of the request for that document.
        kind: "loglikelihood", "loglikelihood_rolling", or "generate_until".
        arguments: lm-eval's arguments as JSON values, for example [context, continuation].
    """

    task: str
    doc_id: int
    index: int
    kind: str
    arguments: list[JsonValue]


# By name; names are valid file names.
Shards = dict[str, list[Request]]
# Returns the answers to requests, JSON values; None to one that is longer than the program's sequences.
Score = Callable[[list[Request]], list[JsonValue]]


def shard_requests(requests: Sequence[Request]) -> Shards:
    """Group requests by task, and split large tasks into several shards; a document's requests stay together."""
    tasks: Shards = {}
    for request in requests:
        tasks.setdefault(request.task, []).append(request)
    shards: Shards = {}
    for task, rows in tasks.items():
        documents = list(dict.fromkeys(request.doc_id for request in rows))
        size = DOCUMENTS[rows[0].kind]
        shard_of = {doc_id: index // size for index, doc_id in enumerate(documents)}
        for request in rows:
            name = f"{task}-{shard_of[request.doc_id]}" if len(documents) > size else task
            shards.setdefault(name, []).append(request)
    return shards


def count_documents(requests: Sequence[Request]) -> int:
    """Return the number of documents of the requests."""
    return len({(request.task, request.doc_id) for request in requests})


def write_requests(shards: Shards, folder: Path) -> None:
    """Write one file for each shard, and the shards' order."""
    for name, requests in shards.items():
        rows = [astuple(request) for request in requests]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "order.json").write_text(json.dumps(list(shards)), encoding="utf-8")


def read_requests(folder: Path) -> Shards:
    """Read the shards, in their order."""
    names = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    return {
        name: [Request(*row) for row in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))]
        for name in names
    }


def to_request(
    task: str, doc_id: int, index: int, kind: str, arguments: tuple[object, ...], row: int | None
) -> Request:
    """Convert an lm-eval request to JSON values; images are replaced by their row numbers in the dataset."""
    values = [
        {"row": row} if isinstance(argument, dict) and "visual" in argument else argument for argument in arguments
    ]
    return Request(task, doc_id, index, kind, json.loads(json.dumps(values)))

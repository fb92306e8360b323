"""Answer: one column's answers to a part of a benchmark's requests, in a process that loads its model once.

Each shard becomes a separate artifact in the store as soon as it is complete, so that a run that is killed loses only
the shards in progress. If the store has all of them, no model is loaded.
"""

import hashlib
import json
import os
import random
import socket
from dataclasses import astuple, dataclass, field
from pathlib import Path

from quantize_gemma.tasks.models.requests import Request, Score, Shards, count_documents, read_requests
from quantize_gemma.tasks.runtime import machine, reporting, store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.stage import Output, import_function, stage
from quantize_gemma.tasks.runtime.strict_json import JsonObject, JsonValue

STAGE = "responses"
# The functions that compute a shard, besides its scorer; their code is part of the shard's key.
RESPOND = "quantize_gemma.tasks.evaluate.answer:_respond"
CHECKPOINT = "quantize_gemma.tasks.evaluate.packed_lm:load_checkpoint_scorer"
IMAGES = "quantize_gemma.tasks.evaluate.chartqa:load_chartqa_scorer"
IMAGES_PROGRAM = "quantize_gemma.tasks.evaluate.chartqa:load_chartqa_program_scorer"
PROGRAM = "quantize_gemma.tasks.evaluate.program_lm:load_program_scorer"
# Small shards are answered together, with at least this many questions, to fill batches and hide per-task overhead.
MIN_QUESTIONS = 100
# The seed is fixed: otherwise, a failing release could be run again until a sample passes.
SEED = 20


@dataclass(frozen=True)
class Scorer:
    """How to load the model that answers requests.

    Attributes:
        load: The function "module:name" that loads the model from `paths` and `settings`, and returns a function that
            answers requests.
        paths: Its artifacts, whose content affects the answers.
        settings: Its other arguments, which also affect the answers, except for `batch_size` on a CPU.
        min_questions: The minimum number of questions that it answers at a time.
    """

    load: str
    paths: dict[str, Path]
    settings: JsonObject = field(default_factory=dict)
    min_questions: int = 1


@stage(ignored_on_cpu=("batch_size",), resumes=True, memory=3.3, accelerated=True)
def answer(
    target: Path,
    requests: Path,
    checkpoint: Path,
    dataset: Path,
    device: str,
    program: Path | None = None,
    no_act_quant: bool = False,
    sample_size: int | None = None,
    batch_size: int | str = "auto",
    exact: bool = False,
    part: int = 0,
    parts: int = 1,
    refresh: bool = False,
) -> Output:
    """Write the answers to each shard of the part, one file each.

    A file has {"answers": [one for each request; None for those that were not answered], "left_out": [documents that do
    not fit into the program's sequence length]}. This function has more than seven parameters because each one is part
    of the stage's cache key.

    Args:
        target: The directory to write to.
        requests: The recorded requests.
        checkpoint: A plain or quantized checkpoint; for a program, the one that it was exported from.
        dataset: The benchmark's dataset, for its images.
        device: "cpu" or "cuda".
        program: The directory of model.pte, if the program answers.
        no_act_quant: Whether the checkpoint answers in float32 without quantized activations, for reference.
        sample_size: The number of documents to sample, always the same ones; None for all.
        batch_size: The maximum number of sequences in a batch; "auto" limits only the tokens.
        exact: Whether to generate text bit-identical to lm-eval's own model with one sequence at a time, which is
            slower.
        part: The number of the part, from 0.
        parts: The number of parts.
        refresh: Compute answers again even if they are in the store.

    Raises:
        UserError: There is no CUDA device.
    """
    all_shards = read_requests(requests)
    sample = draw_sample(all_shards, sample_size)
    names = choose_part({name: count_documents(shard) for name, shard in sample.items()}, part, parts)
    shards = {name: sample[name] for name in names}
    first = next(iter(all_shards.values()))[0]
    images = dataset if _has_image(first) else None
    scorer = choose_scorer(checkpoint, images, program, no_act_quant, device, batch_size, first.kind, exact)
    answers = respond(shards, scorer, part, refresh)
    left_out = 0
    for name in names:
        values = {
            (request.doc_id, request.index): value for request, value in zip(shards[name], answers[name], strict=True)
        }
        too_long = sorted({doc_id for (doc_id, _), value in values.items() if value is None})
        responses = [
            None if request.doc_id in too_long else values.get((request.doc_id, request.index))
            for request in all_shards[name]
        ]
        content = json.dumps({"answers": responses, "left_out": too_long})
        (target / f"{name}.json").write_text(content, encoding="utf-8")
        left_out += len(too_long)
    return {"metadata": {"questions": sum(map(count_documents, shards.values())) - left_out, "left_out": left_out}}


def draw_sample(shards: Shards, size: int | None) -> Shards:
    """Return the requests of `size` documents (None: all), always the same ones, regardless of the shards' order."""
    if size is None:
        return shards
    documents = sorted({(request.task, request.doc_id) for shard in shards.values() for request in shard})
    numbers = random.Random(SEED).sample(range(len(documents)), min(size, len(documents)))
    sample_documents = {documents[number] for number in numbers}
    sample = {
        name: [request for request in shard if (request.task, request.doc_id) in sample_documents]
        for name, shard in shards.items()
    }
    return {name: shard for name, shard in sample.items() if shard}


def choose_part(sizes: dict[str, int], part: int, parts: int) -> list[str]:
    """Return the names of a part's shards: the largest shards are assigned first, each to the smallest part so far."""
    totals = [0] * parts
    names = []
    for name in _largest_first(sizes):
        smallest = totals.index(min(totals))
        totals[smallest] += sizes[name]
        if smallest == part:
            names.append(name)
    return names


def choose_scorer(
    checkpoint: Path,
    images: Path | None,
    program: Path | None,
    no_act_quant: bool,
    device: str,
    batch_size: int | str,
    kind: str,
    exact: bool = False,
) -> Scorer:
    """Return the scorer of a program or a checkpoint, which reads the dataset's images if there are any.

    `kind` is the requests'; the other parameters are those of the stage.
    """
    if program is not None and images is not None:
        return Scorer(IMAGES_PROGRAM, {"checkpoint": checkpoint, "program": program, "dataset": images})
    if program is not None:
        return Scorer(PROGRAM, {"checkpoint": checkpoint, "program": program})
    if images is not None:
        return Scorer(IMAGES, {"checkpoint": checkpoint, "dataset": images}, {"device": device})
    generates = kind == "generate_until"
    settings: JsonObject = {
        "device": device,
        "batch_size": batch_size,
        "no_act_quant": no_act_quant,
        "generates": generates,
        "exact": exact,
    }
    # Sums on a GPU depend on the batch, and sometimes the last float32 bit on a CPU does, too. So the batch must not
    # depend on the number of workers or on interruptions. A shard of texts fills a batch.
    min_questions = MIN_QUESTIONS if device == "cpu" and not generates and not no_act_quant else 1
    return Scorer(CHECKPOINT, {"checkpoint": checkpoint}, settings, min_questions)


def respond(shards: Shards, scorer: Scorer, part: int = 0, refresh: bool = False) -> dict[str, list[JsonValue]]:
    """Return the answers to each shard's requests, from the store where it has them; store the others.

    A shard's key consists of its name, its requests, and the scorer with its artifacts, code, and libraries.

    Args:
        shards: The shards.
        scorer: The scorer that answers.
        part: The number of the part: the parts share the GPUs.
        refresh: Compute answers again even if they are in the store.
    """
    with store.open_store(scorer.paths) as (root, digests):
        keys = {name: _key(name, shard, scorer, digests) for name, shard in shards.items()}
        answers = {} if refresh else _load_answers(keys, root)
        if answers:
            reporting.log(f"{len(answers)} of {len(shards)} shards are in the store")
        sizes = {name: count_documents(shard) for name, shard in shards.items() if name not in answers}
        if not sizes:
            return answers
        score: Score = import_function(scorer.load)(**_load_arguments(scorer, part))
        count, total = 0, sum(sizes.values())
        for group in group_shards(sizes, scorer.min_questions):
            size = sum(sizes[name] for name in group)
            with reporting.as_part(count, size, total):
                answers |= _respond(score, {name: shards[name] for name in group}, keys, root, refresh)
            count += size
    return answers


def group_shards(sizes: dict[str, int], min_size: int) -> list[list[str]]:
    """Return the shards in groups of at least `min_size` questions, except for the last; the largest come first."""
    groups: list[list[str]] = []
    count = min_size
    for name in _largest_first(sizes):
        if count >= min_size:
            groups.append([])
            count = 0
        groups[-1].append(name)
        count += sizes[name]
    return groups


def _respond(
    score: Score, shards: Shards, keys: dict[str, str], root: Path, refresh: bool
) -> dict[str, list[JsonValue]]:
    """Answer some shards together, and store the answers for each shard."""
    requests = [request for shard in shards.values() for request in shard]
    values = score(requests)
    if len(values) != len(requests):
        raise StageFailed(f"there are {len(values)} answers to {len(requests)} requests")
    iterator = iter(values)
    answers = {name: [next(iterator) for _ in shard] for name, shard in shards.items()}
    for name in shards:

        def write(target: Path, text: str = json.dumps(answers[name])) -> JsonObject:
            (target / "responses.json").write_text(text, encoding="utf-8")
            return {"measured": {"host": socket.gethostname(), "process": os.getpid()}}

        store.produce(STAGE, keys[name], write, root, refresh)
    return answers


def _has_image(request: Request) -> bool:
    """Tell whether a request has an image, which is a row of the dataset."""
    return any(isinstance(value, dict) and "row" in value for value in request.arguments)


def _load_arguments(scorer: Scorer, part: int) -> JsonObject:
    """Return the arguments of the function that loads the scorer. Raises UserError if there is no CUDA device."""
    arguments = {**{name: str(path) for name, path in scorer.paths.items()}, **scorer.settings}
    if "device" in arguments:
        arguments["device"] = machine.device_of_part(str(arguments["device"]), part)
    return arguments


def _key(name: str, shard: list[Request], scorer: Scorer, digests: dict[str, str]) -> str:
    """Return a shard's key. It covers dataset, task, few-shot examples, and limit through the requests' text."""
    requests = hashlib.sha256(store.canonical_json([list(astuple(request)) for request in shard])).hexdigest()
    # On a CPU, the results in bfloat16 are bit-identical for any batches.
    exact = scorer.settings.get("device") == "cpu" and not scorer.settings.get("no_act_quant")
    ignored_settings = ("batch_size",) if exact else ()
    settings = {name: value for name, value in scorer.settings.items() if name not in ignored_settings}
    parameters: JsonObject = {"shard": name, "requests": requests, "scorer": scorer.load, **settings, **digests}
    return store.key(STAGE, [], parameters, fingerprint(scorer.load, RESPOND))


def _load_answers(keys: dict[str, str], root: Path) -> dict[str, list[JsonValue]]:
    """Return the answers that are in the store."""
    answers: dict[str, list[JsonValue]] = {}
    for name, key in keys.items():
        artifact = store.load(STAGE, key, root, rehash=True)
        if artifact is not None:
            answers[name] = json.loads((artifact.path / "responses.json").read_text(encoding="utf-8"))
    return answers


def _largest_first(sizes: dict[str, int]) -> list[str]:
    return sorted(sizes, key=lambda name: (-sizes[name], name))

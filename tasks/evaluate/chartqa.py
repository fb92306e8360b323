"""Evaluate on ChartQA: its test split, as an lm-eval task of ours. (Card section: Model Quality.)

Prompt, generation and score are those of lmms-eval's `chartqa` task and its gemma3 model, which measured the card's
row: the system prompt "You are a helpful assistant.", image, question and "Answer the question with a single word."
in the chat template, one BOS token, greedy, 16 new tokens, relaxed accuracy. (lmms-eval also re-encodes each image as
JPEG; here the model gets the dataset's own pixels.) The normalized score beside it ignores an answer's form.

The model is lm-eval's own `hf-multimodal`; see chartqa_model.py.
"""

from __future__ import annotations

import functools
import io
import json
import re
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.evaluate import locate_in_store, shards
from quantize_gemma.tasks.models.checkpoint import is_multimodal
from quantize_gemma.tasks.models.datasets import CHARTQA_SPLITS, read_chartqa
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.parent_process import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage

if TYPE_CHECKING:
    from PIL.Image import Image

SYSTEM_PROMPT = "You are a helpful assistant."
POST_PROMPT = "\nAnswer the question with a single word."
# lm-eval's placeholder for an image.
PLACEHOLDER = "<image>"
GENERATION = {"until": [], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
# How far a number may be from the label, relative to the label.
TOLERANCE = 0.05
# fmt: off
NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
]
# fmt: on
CURRENCIES = "$€£¥₹"

# Documents per shard.
SHARD = 50

# Numbers of documents in the dataset -> the model's responses.
Scorer = Callable[[list[int]], list[str]]


@stage(ignored=("workers", "cluster"), resumes=True, memory=3.3, accelerated=True)
def evaluate_chartqa(
    target: Path,
    checkpoint: Path,
    dataset: Path,
    limit: int | None,
    device: str,
    workers: int = 1,
    cluster: str | None = None,
    refresh: bool = False,
) -> Output:
    """Write results.json (relaxed accuracy and its standard error, overall and per kind) and samples.jsonl.

    It has more than seven parameters because each is a value of the stage's key, or says who answers.

    Accuracies are fractions; the standard error of a single question is None. Responses are stored as those of MMLU.

    Args:
        target: The directory to write to.
        checkpoint: A plain or quantized multimodal checkpoint.
        dataset: A directory in the layout of HuggingFaceM4/ChartQA.
        limit: Questions per kind, human and augmented; None for all.
        device: "cpu" or "cuda".
        workers: Processes that respond, in a flow run.
        cluster: Address of a Dask or Ray cluster that responds instead.
        refresh: Compute responses again that are in the store.

    Raises:
        UserError: The checkpoint is text-only.
    """
    from transformers import AutoConfig

    if not is_multimodal(AutoConfig.from_pretrained(checkpoint).to_dict()):
        raise UserError(f"{checkpoint} is a text-only checkpoint: it cannot be evaluated on ChartQA")
    with tempfile.TemporaryDirectory() as folder:
        digest, root = locate_in_store(checkpoint, Path(folder))
        dataset_digest, dataset_root = locate_in_store(dataset, Path(folder))
        if dataset_root != root:
            # Without the digests of both, a response must not be reused.
            root = Path(folder) / "store"
        respond = functools.partial(
            shards.respond,
            scorer="quantize_gemma.tasks.evaluate.chartqa:load_chartqa_scorer",
            settings={"device": device},
            paths={"checkpoint": checkpoint, "dataset": dataset},
            identity={"checkpoint": digest, "dataset": dataset_digest, "device": device},
            root=root,
            workers=workers,
            cluster=cluster,
            refresh=refresh,
        )

        def replay(numbers: list[int]) -> list[str]:
            # An image's questions are neighbors and share its features: they stay together.
            requests = {f"chartqa-{i}": numbers[i : i + SHARD] for i in range(0, len(numbers), SHARD)}
            responses = respond(requests)
            return [text for name in requests for text in responses[name]]

        results, samples = score_responses(replay, dataset, limit)
    results |= {"device": device, "limit": limit}
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (target / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for sample in samples:
            stream.write(json.dumps(sample) + "\n")
    accuracy = results["relaxed_accuracy"]["overall"]["accuracy"]
    return {"metadata": {"accuracy": accuracy, "questions": results["questions"]}}


def load_chartqa_scorer(checkpoint: str, dataset: str, device: str) -> Scorer:
    """Load a checkpoint as what responds to documents, by their numbers in the dataset."""
    from quantize_gemma.tasks.evaluate.chartqa_model import ChartQALM

    model = ChartQALM(Path(checkpoint), device)
    table = read_chartqa(Path(dataset))

    def respond(numbers: list[int]) -> list[str]:
        texts = []
        for number in numbers:
            row = table.slice(number, 1).to_pylist()[0]
            texts.append(model.generate_from_image(open_image(row), make_messages(row["query"]), GENERATION))
            report_progress(len(texts), len(numbers), "questions")
        return texts

    return respond


def open_image(row: dict[str, Any]) -> Image:
    """Return the image of a row of the dataset."""
    from PIL import Image

    return Image.open(io.BytesIO(row["image"]["bytes"]))


def make_messages(query: str) -> list[dict[str, Any]]:
    """Return the chat with an image and a question, as the processor's chat template takes it."""
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{query}{POST_PROMPT}"}]},
    ]


def score_responses(respond: Scorer, dataset: Path, limit: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of results.json and samples.jsonl, from lm-eval's evaluation of the responses."""
    from lm_eval import simple_evaluate

    from quantize_gemma.tasks.evaluate.chartqa_model import ReplayLM

    output = simple_evaluate(ReplayLM(respond), tasks=[make_chartqa_task(dataset, limit)], log_samples=True)
    if output is None:
        raise StageFailed("lm-eval returned no result")
    samples = []
    for sample in sorted(output["samples"]["chartqa"], key=lambda sample: sample["doc"]["number"]):
        doc, text = sample["doc"], sample["filtered_resps"][0]
        samples.append(
            {
                "question": doc["number"],
                "kind": CHARTQA_SPLITS[doc["human_or_machine"]],
                "query": doc["query"],
                "label": doc["label"],
                "answer": text,
                "relaxed": is_relaxed_correct(text, doc["label"]),
                "normalized": is_normalized_correct(text, doc["label"]),
            }
        )
    return _summarize(output["results"]["chartqa"], samples), samples


def make_chartqa_task(dataset: Path, limit: int | None) -> dict[str, Any]:
    """Return the lm-eval task over the first `limit` questions of each kind."""
    table = read_chartqa(dataset)
    kinds = table["human_or_machine"].to_pylist()
    each = [[number for number, kind in enumerate(kinds) if kind == one] for one in range(len(CHARTQA_SPLITS))]
    numbers = sorted(number for numbers in each for number in numbers[:limit])

    def read(**_metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        columns = {name: table[name].to_pylist() for name in ("query", "label")}
        docs = [
            {
                "number": number,
                "query": columns["query"][number],
                # lmms-eval's copy of the dataset keeps the first.
                "label": columns["label"][number][0],
                "human_or_machine": kinds[number],
            }
            for number in numbers
        ]
        return {"test": Dataset.from_list(docs)}

    def read_images(doc: dict[str, Any]) -> list[Image]:
        return [open_image(table.slice(doc["number"], 1).to_pylist()[0])]

    scores = [f"{score}_{part}" for score in ("relaxed", "normalized") for part in ("overall", *CHARTQA_SPLITS)]
    return {
        "task": "chartqa",
        "custom_dataset": read,
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": dict(GENERATION),
        "doc_to_image": read_images,
        "doc_to_text": f"{PLACEHOLDER}{{{{query}}}}{POST_PROMPT}",
        "doc_to_target": "label",
        "process_results": _scores,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in scores],
    }


def _scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    kind = CHARTQA_SPLITS[doc["human_or_machine"]]
    relaxed = float(is_relaxed_correct(results[0], doc["label"]))
    normalized = float(is_normalized_correct(results[0], doc["label"]))
    return {
        "relaxed_overall": relaxed,
        f"relaxed_{kind}": relaxed,
        "normalized_overall": normalized,
        f"normalized_{kind}": normalized,
    }


def _summarize(scores: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {kind: sum(sample["kind"] == kind for sample in samples) for kind in CHARTQA_SPLITS}
    counts = {"overall": len(samples), **{kind: count for kind, count in counts.items() if count}}

    def score(name: str) -> dict[str, Any]:
        parts = {}
        for part, count in counts.items():
            stderr = scores[f"{name}_{part}_stderr,none"]
            parts[part] = {
                "accuracy": scores[f"{name}_{part},none"],
                "stderr": stderr if isinstance(stderr, float) else None,
                "questions": count,
            }
        return parts

    return {
        "task": "chartqa",
        "questions": len(samples),
        "relaxed_accuracy": score("relaxed"),
        "normalized": score("normalized"),
    }


def is_relaxed_correct(answer: str, label: str) -> bool:
    """Return the official score: numbers within 5 % of the label, anything else equal except for case.

    What ends in % counts as a fraction; a label that is 0 is compared as text.
    """
    value, expected = _to_number(answer), _to_number(label)
    if value is None or not expected:
        return answer.lower() == label.lower()
    return abs(value - expected) / abs(expected) <= TOLERANCE


def is_normalized_correct(answer: str, label: str) -> bool:
    """Return the score that ignores an answer's form.

    That is punctuation around it, "two" for 2, 1,000 for 1000, a currency sign, % or no %. What is officially correct
    is correct.
    """
    value, expected = _normalize(answer), _normalize(label)
    if value == expected or is_relaxed_correct(answer, label):
        return True
    forms = (value, expected), (value.removesuffix("%"), expected.removesuffix("%"))
    return any(_is_near(_to_number(one), _to_number(other)) for one, other in forms)


def _is_near(value: float | None, expected: float | None) -> bool:
    return value is not None and expected is not None and abs(value - expected) <= TOLERANCE * abs(expected)


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _normalize(text: str) -> str:
    """Return a number as digits, and other text in lower case without the punctuation around it."""
    text = " ".join(text.lower().replace("−", "-").split())
    inner = text.rstrip(_edges("%")).lstrip(_edges(".-"))
    number = re.fullmatch(rf"(-?)[{CURRENCIES}]? ?([0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]*)(\.[0-9]+)? ?(%?)", inner)
    if number and any(map(str.isdigit, inner)):
        sign, whole, fraction, percent = number.groups(default="")
        return sign + whole.replace(",", "") + fraction + percent
    word = inner.strip(_edges("")) or text
    return str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word


def _edges(kept: str) -> str:
    """Return the characters around an answer that mean nothing, except for `kept`."""
    return "".join(set(string.punctuation + string.whitespace + CURRENCIES + "“”‘’") - set(kept))

"""Evaluate on charts: ChartQA's test split, as an lm-eval task of ours. (Card section: Model Quality.)

Prompt, generation and score are those of lmms-eval's `chartqa` task and its gemma3 model, which measured the card's
row: the system prompt "You are a helpful assistant.", picture, question and "Answer the question with a single word."
in the chat template, one BOS token, greedy, 16 new tokens, relaxed accuracy. (lmms-eval also re-encodes each picture as
JPEG; here the model gets the dataset's own pixels.) The normalized score beside it forgives an answer's form.

lm-eval's own `hf-multimodal` model answers; see chart_model.py.
"""

import functools
import io
import json
import re
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.evaluate import kept, shards
from quantize_gemma.tasks.models.checkpoint import is_multimodal
from quantize_gemma.tasks.models.datasets import CHARTQA_SPLITS, read_chartqa
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.worker import report_progress

SYSTEM_PROMPT = "You are a helpful assistant."
POST_PROMPT = "\nAnswer the question with a single word."
# What lm-eval's models take for the place of a picture.
PLACEHOLDER = "<image>"
GENERATION = {"until": [], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
# How far a number may be from the right one, relative to that.
TOLERANCE = 0.05
# fmt: off
NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
]
# fmt: on
CURRENCIES = "$€£¥₹"

# Questions of a shard.
SHARD = 50

# Numbers of questions -> the model's texts.
Answerer = Callable[[list[int]], list[str]]


@stage(ignored=("workers", "cluster"), resumes=True, memory=3.3, accelerated=True)
def evaluate_chartqa(
    target: Path,
    checkpoint: Path,
    questions: Path,
    limit: int | None,
    device: str,
    workers: int = 1,
    cluster: str | None = None,
    refresh: bool = False,
) -> Output:
    """Writes results.json (relaxed accuracy and its standard error, overall and per kind) and samples.jsonl.

    `questions` is a directory in the layout of HuggingFaceM4/ChartQA; `limit` is questions per kind, human and
    augmented. Accuracies are fractions; the standard error of a single question is None. Answers are kept in the store
    as those of MMLU are. Raises UserError if the checkpoint reads no pictures.
    """
    from transformers import AutoConfig

    if not is_multimodal(AutoConfig.from_pretrained(checkpoint).to_dict()):
        raise UserError(f"{checkpoint} is a text-only checkpoint: it cannot be asked about charts")
    with tempfile.TemporaryDirectory() as folder:
        digest, root = kept(checkpoint, Path(folder))
        asked, known = kept(questions, Path(folder))
        if known != root:
            # What has no digest is not to be found again.
            root = Path(folder) / "store"
        ask = functools.partial(
            shards.answers,
            answerer="quantize_gemma.tasks.evaluate.charts:load_chart_answerer",
            settings={"device": device},
            paths={"checkpoint": checkpoint, "questions": questions},
            identity={"checkpoint": digest, "questions": asked, "device": device},
            root=root,
            workers=workers,
            cluster=cluster,
            refresh=refresh,
        )

        def answer(numbers: list[int]) -> list[str]:
            # A picture's questions are neighbours and share its features: they stay together.
            parts = {f"charts-{i}": numbers[i : i + SHARD] for i in range(0, len(numbers), SHARD)}
            given = ask(parts)
            return [text for name in parts for text in given[name]]

        results, samples = score_answers(answer, questions, limit)
    results |= {"device": device, "limit": limit}
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (target / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for sample in samples:
            stream.write(json.dumps(sample) + "\n")
    accuracy = results["relaxed_accuracy"]["overall"]["accuracy"]
    return {"metadata": {"accuracy": accuracy, "questions": results["questions"]}}


def load_chart_answerer(checkpoint: str, questions: str, device: str) -> Answerer:
    """Returns what answers questions, given by their numbers in the dataset, with the text that the model writes."""
    from quantize_gemma.tasks.evaluate.chart_model import ChartLM

    model = ChartLM(Path(checkpoint), device)
    table = read_chartqa(Path(questions))

    def answer(numbers: list[int]) -> list[str]:
        texts = []
        for number in numbers:
            row = table.slice(number, 1).to_pylist()[0]
            texts.append(model.ask(picture(row), messages_of(row["query"]), GENERATION))
            report_progress(len(texts), len(numbers), "questions")
        return texts

    return answer


def picture(row: dict[str, Any]) -> Any:
    """Returns the picture of a row of the dataset."""
    from PIL import Image

    return Image.open(io.BytesIO(row["image"]["bytes"]))


def messages_of(query: str) -> list[dict[str, Any]]:
    """Returns the chat about a picture and a question, as it reaches the processor's chat template."""
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{query}{POST_PROMPT}"}]},
    ]


def score_answers(answer: Answerer, questions: Path, limit: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the content of results.json and samples.jsonl, from lm-eval's evaluation of what `answer` gives."""
    from lm_eval import simple_evaluate

    from quantize_gemma.tasks.evaluate.chart_model import AnsweredLM

    output = simple_evaluate(AnsweredLM(answer), tasks=[chart_task(questions, limit)], log_samples=True)
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


def chart_task(questions: Path, limit: int | None) -> dict[str, Any]:
    """Returns the lm-eval task over the first `limit` questions of each kind."""
    table = read_chartqa(questions)
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

    def look(doc: dict[str, Any]) -> list[Any]:
        return [picture(table.slice(doc["number"], 1).to_pylist()[0])]

    scores = [f"{score}_{part}" for score in ("relaxed", "normalized") for part in ("overall", *CHARTQA_SPLITS)]
    return {
        "task": "chartqa",
        "custom_dataset": read,
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": dict(GENERATION),
        "doc_to_image": look,
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
    """Returns the official score: numbers within 5 % of the label, anything else the same but for upper and lower case.

    What ends in % counts as a fraction; a label that is 0 is compared as text.
    """
    value, wanted = _to_number(answer), _to_number(label)
    if value is None or not wanted:
        return answer.lower() == label.lower()
    return abs(value - wanted) / abs(wanted) <= TOLERANCE


def is_normalized_correct(answer: str, label: str) -> bool:
    """Returns the score that forgives an answer's form: what stands around it, "two" for 2, 1,000 for 1000, a currency
    sign, % or no %. What is officially right is right.
    """
    given, wanted = _normalize(answer), _normalize(label)
    if given == wanted or is_relaxed_correct(answer, label):
        return True
    forms = (given, wanted), (given.removesuffix("%"), wanted.removesuffix("%"))
    return any(_is_near(_to_number(one), _to_number(other)) for one, other in forms)


def _is_near(value: float | None, wanted: float | None) -> bool:
    return value is not None and wanted is not None and abs(value - wanted) <= TOLERANCE * abs(wanted)


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _normalize(text: str) -> str:
    """Returns a number as digits, and other text in lower case without the punctuation around it."""
    text = " ".join(text.lower().replace("−", "-").split())
    inner = text.rstrip(_edges("%")).lstrip(_edges(".-"))
    number = re.fullmatch(rf"(-?)[{CURRENCIES}]? ?([0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]*)(\.[0-9]+)? ?(%?)", inner)
    if number and any(map(str.isdigit, inner)):
        sign, whole, fraction, percent = number.groups(default="")
        return sign + whole.replace(",", "") + fraction + percent
    word = inner.strip(_edges("")) or text
    return str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word


def _edges(kept: str) -> str:
    """Returns what may stand around an answer and say nothing, but for what is kept."""
    return "".join(set(string.punctuation + string.whitespace + CURRENCIES + "“”‘’") - set(kept))

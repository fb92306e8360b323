"""ChartQA: its test split as our own lm-eval task, and its scorers.

Section "Model Quality" of PyTorch's card.

Prompt, generation, and score are those of lmms-eval's `chartqa` task and its gemma3 model, which produced the published
card's row: the system prompt "You are a helpful assistant.", image, question, and "Answer the question with a single
word." in the chat template, one BOS token, greedy decoding, 16 new tokens, relaxed accuracy. (lmms-eval also re-encodes
each image as JPEG; here, the model gets the dataset's own pixels.) The normalized score accepts equivalent forms.

The model is lm-eval's own `hf-multimodal`; see chartqa_model.py.
"""

from __future__ import annotations

import io
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.models.chat import format_chat
from quantize_gemma.tasks.models.checkpoint import is_multimodal
from quantize_gemma.tasks.models.datasets import CHARTQA_SPLITS, read_chartqa
from quantize_gemma.tasks.models.pte import PteProgram, insert_image_features
from quantize_gemma.tasks.models.requests import Request, Score
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.strict_json import JsonValue

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import ProcessorMixin

SYSTEM_PROMPT = "You are a helpful assistant."
POST_PROMPT = "\nAnswer the question with a single word."
# lm-eval's placeholder for an image.
PLACEHOLDER = "<image>"
GENERATION_TOKENS = 16
GENERATION = {"until": [], "max_gen_toks": GENERATION_TOKENS, "do_sample": False, "temperature": 0.0}
# How far a number may be from the label, relative to the label.
TOLERANCE = 0.05
# fmt: off
NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
]
# fmt: on
CURRENCIES = "$€£¥₹"


def load_chartqa_scorer(checkpoint: str, dataset: str, device: str) -> Score:
    """Load a checkpoint; return a function that answers requests, each about a row of the dataset.

    Raises:
        UserError: The checkpoint is text-only.
    """
    from transformers import AutoConfig

    from quantize_gemma.tasks.evaluate.chartqa_model import ChartQALM

    if not is_multimodal(AutoConfig.from_pretrained(checkpoint).to_dict()):
        raise UserError(f"{checkpoint} is text-only and cannot be evaluated on ChartQA: leave chartqa out of --tasks")
    model = ChartQALM(Path(checkpoint), device)
    return _answer_rows(
        Path(dataset),
        lambda row: model.generate_from_image(open_image(row), make_messages(row["query"]), GENERATION),
    )


def load_chartqa_program_scorer(checkpoint: str, program: str, dataset: str) -> Score:
    """Load a program; return a function that answers requests, None if prompt and answer exceed its sequence length."""
    from transformers import AutoProcessor

    pte = PteProgram(Path(program) / "model.pte")
    processor = AutoProcessor.from_pretrained(checkpoint)
    image_token = processor.image_token_id
    encoded: tuple[bytes, Tensor] | None = None

    def respond(row: dict[str, Any]) -> str | None:
        nonlocal encoded
        prompt = make_prompt(processor, make_messages(row["query"]))
        inputs = processor(images=[[open_image(row).convert("RGB")]], text=[prompt], return_tensors="pt")
        ids = inputs["input_ids"]
        if ids.shape[1] >= pte.max_seq_len:
            return None
        is_image = ids[0] == image_token
        # Neighboring requests are about the same image.
        if encoded is None or encoded[0] != row["image"]["bytes"]:
            encoded = row["image"]["bytes"], pte.encode_image(inputs["pixel_values"])
        embeddings = insert_image_features(encoded[1], pte.embed_tokens(ids.masked_fill(is_image, 0)), is_image)
        tokens, is_complete = pte.generate_until(embeddings, lambda answer: len(answer) >= GENERATION_TOKENS)
        return str(processor.tokenizer.decode(tokens, skip_special_tokens=True)) if is_complete else None

    return _answer_rows(Path(dataset), respond)


def _answer_rows(dataset: Path, answer: Callable[[dict[str, Any]], str | None]) -> Score:
    """Turn a function that answers a row of the dataset into one that answers requests, each about a row."""
    table = read_chartqa(dataset)

    def respond(requests: list[Request]) -> list[JsonValue]:
        texts: list[JsonValue] = []
        for request in requests:
            *_, image = request.arguments
            assert isinstance(image, dict)
            texts.append(answer(table.slice(image["row"], 1).to_pylist()[0]))
            report_progress(len(texts), len(requests), "questions")
        return texts

    return respond


def open_image(row: dict[str, Any]) -> Image:
    """Return the image of a row of the dataset."""
    from PIL import Image

    return Image.open(io.BytesIO(row["image"]["bytes"]))


def make_messages(query: str) -> list[dict[str, object]]:
    """Return the chat with an image and a question, in the format of the processor's chat template."""
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{query}{POST_PROMPT}"}]},
    ]


def make_prompt(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> str:
    """Return the text of a chat; a base model, which has no chat template, gets the image and the user's text."""
    chat = format_chat(processor, messages)
    if chat is None:
        _system, user = messages
        return f"{processor.boi_token}{user['content'][1]['text']}"
    # The tokenizer adds one to every text.
    return chat.removeprefix(processor.tokenizer.bos_token)


def make_chartqa_task(dataset: Path, limit: int | None) -> dict[str, object]:
    """Return the lm-eval task over the first `limit` questions of each kind."""
    table = read_chartqa(dataset)
    kinds = table["human_or_machine"].to_pylist()
    numbers_by_kind = [
        [number for number, kind in enumerate(kinds) if kind == split] for split in range(len(CHARTQA_SPLITS))
    ]
    numbers = sorted(number for numbers in numbers_by_kind for number in numbers[:limit])

    def load_questions(**_metadata: object) -> dict[str, object]:
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

    def read_images(doc: dict[str, object]) -> list[Image]:
        return [open_image(table.slice(doc["number"], 1).to_pylist()[0])]

    scores = [f"{score}_{part}" for score in ("relaxed", "normalized") for part in ("overall", *CHARTQA_SPLITS)]
    return {
        "task": "chartqa",
        "custom_dataset": load_questions,
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


def is_relaxed_correct(answer: str, label: str) -> bool:
    """Return the official score: numbers within 5% of the label; anything else must be equal except for case.

    A number that ends in % counts as a fraction; a label of 0 is compared as text.
    """
    value, expected = _to_number(answer), _to_number(label)
    if value is None or not expected:
        return answer.lower() == label.lower()
    return abs(value - expected) / abs(expected) <= TOLERANCE


def is_normalized_correct(answer: str, label: str) -> bool:
    """Return the score that ignores an answer's form.

    The form is punctuation around it, "two" for 2, 1,000 for 1000, a currency sign, and a percent sign. An answer that
    is correct by the official score is always correct.
    """
    value, expected = _normalize(answer), _normalize(label)
    if value == expected or is_relaxed_correct(answer, label):
        return True
    forms = (value, expected), (value.removesuffix("%"), expected.removesuffix("%"))
    return any(_is_near(_to_number(first), _to_number(second)) for first, second in forms)


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
        sign, integer, fraction, percent = number.groups(default="")
        return sign + integer.replace(",", "") + fraction + percent
    word = inner.strip(_edges("")) or text
    return str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word


def _edges(meaningful: str) -> str:
    """Return the characters around an answer that mean nothing, except for `meaningful`."""
    return "".join(set(string.punctuation + string.whitespace + CURRENCIES + "“”‘’") - set(meaningful))

"""What a run measured, as frozen dataclasses: the content of a release's metrics.json.

The gate writes it; the card, the report and the next release read it. What was not measured is None, in every column.
After a change here, `python -m quantize_gemma.tasks.models.metrics` writes the JSON Schema, metrics.schema.json.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from quantize_gemma.tasks.runtime.paired_stats import Pairs

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).parent / "metrics.schema.json"
# A field that this version does not know is an error, not something to drop silently.
STRICT = {"extra": "forbid"}

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """An accuracy, a fraction, with its standard error and the number of questions, where they are known."""

    accuracy: float
    stderr: float | None
    questions: int | None = None


@dataclass(frozen=True, kw_only=True)
class MmluScore(Score):
    """lm-evaluation-harness's score on MMLU, by category and by subject."""

    task: str
    task_version: str | None
    num_fewshot: int
    categories: dict[str, Score]
    subjects: dict[str, Score]
    device: str
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class ChartqaScore:
    """ChartQA's relaxed and normalized accuracy, each {"overall" | "human" | "augmented": score}."""

    task: str
    questions: int
    relaxed_accuracy: dict[str, Score]
    normalized: dict[str, Score]
    device: str
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A choice, and its log-likelihood's margin over the next best choice's, in nats."""

    answer: str
    margin: float


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A question that program and checkpoint answer differently."""

    subject: str
    doc_id: int
    question: str
    choices: list[str]
    target: str
    checkpoint: Answer
    no_act_quant: Answer
    program: Answer


@dataclass(frozen=True, kw_only=True)
class SampleScore(Score):
    """The program's score on a sample of the MMLU questions, and the checkpoint's on the same questions.

    `no_act_quant` is the checkpoint without activation quantization. `agreement` and `agreement_act_quant` are the
    shares of the questions that the checkpoint answers like the program and like `no_act_quant`. `differing` counts the
    answers that differ from those of `no_act_quant`: both, only the program's (first), only the checkpoint's (second),
    neither.
    """

    checkpoint: Score
    no_act_quant: Score
    agreement: float
    agreement_act_quant: float
    differing: Pairs
    disagreements: list[Disagreement]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL divergences in nats per token from the checkpoint.

    `kl_program` is the program's; `kl_act_quant` is the baseline, what activation quantization alone causes.
    """

    kl_program: float | None
    kl_act_quant: float | None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Positions:
    """KL divergences in nats, one per position."""

    kl_program: list[float]
    kl_act_quant: list[float]


@dataclass(frozen=True, kw_only=True)
class PromptDivergence(Divergence):
    """KL divergences of the answers to prompts of several lengths."""

    lengths: list[int] | None = None
    positions: Positions | None = None
    same_argmax: float | None = None


@dataclass(frozen=True, kw_only=True)
class ImageDivergence(Divergence):
    """KL divergences of the text after an image; `kl_causal_image` is what the program's causal mask causes."""

    kl_causal_image: float | None = None


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Largest and mean absolute difference between two tensors."""

    max: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class VisionError:
    """The vision encoder's squared error over the mean square: the program's, and activation quantization's."""

    error: float | None
    error_act_quant: float | None
    images: int | None = None
    max: float | None = None
    mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class Agreement(Divergence):
    """How far the program is from the checkpoint that it was exported from, part by part."""

    same_argmax: float | None = None
    nll_checkpoint: float | None = None
    nll_program: float | None = None
    last: Divergence | None = None
    step_by_step: Divergence | None = None
    prompts: PromptDivergence | None = None
    image: ImageDivergence | None = None
    vision_encoder: VisionError | None = None
    text_decoder: Distance | None = None
    token_embedding: Distance | None = None


@dataclass(frozen=True, kw_only=True)
class Response:
    """What was generated from a prompt."""

    prompt: str
    response: str


@dataclass(frozen=True, kw_only=True)
class Smoke(Response):
    """What the checkpoint generates from a prompt."""

    chat_template: bool
    new_tokens: int
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The C++ runner's speed and peak memory for one prompt."""

    prompt_tokens: int
    generated_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """The column of the base model."""

    bytes: int
    mmlu: MmluScore | None
    chartqa: ChartqaScore | None


@dataclass(frozen=True, kw_only=True)
class Quantized(Base):
    """The column of the quantized checkpoint; `weight_error` is a relative squared error by role."""

    weight_error: dict[str, float]
    smoke: Smoke


@dataclass(frozen=True, kw_only=True)
class Program:
    """The column of the program. `delegation` is {method: {"xnnpack" | "custom" | "portable": {operator: calls}}}."""

    bytes: int
    task: str
    backend: str
    dtype: str
    custom_sdpa: bool
    custom_kv_cache: bool
    last_logits_only: bool
    delegation: dict[str, dict[str, dict[str, int]]]
    text: Response
    image: Response | None
    agreement: Agreement
    speed: dict[str, Speed]
    mmlu: SampleScore | None
    chartqa: ChartqaScore | None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the quality table, which a run's summary has without the rest of the metrics."""

    __pydantic_config__: ClassVar = STRICT

    base: Base
    quantized: Quantized
    program: Program

    def mmlu_columns(self) -> tuple[MmluScore, MmluScore] | None:
        """Return MMLU's scores of the base model and of the checkpoint, None if either was not measured."""
        base, quantized = self.base.mmlu, self.quantized.mmlu
        return None if base is None or quantized is None else (base, quantized)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A benchmark's dataset: its name, its commit or digest, and whether it is the built-in fixture."""

    name: str
    revision: str
    fixture: bool


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage took: wall time, peak memory of its process, and the size of what it wrote."""

    seconds: float
    peak_rss_bytes: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of the gate.

    Attributes:
        name: For example "mmlu_drop".
        status: "uninformative" where there was nothing to compare, which is no failure.
        low_confidence: It passes, with a confidence below 95 %.
        value: What was measured; None if it is not a finite number.
        limit: What the value is compared with.
        margin: The distance to the limit, negative beyond it.
        stderr: The value's standard error, where it can be estimated.
        confidence: The probability that the true value is within the limit, where there is a standard error.
        message: One sentence for people.
    """

    name: str
    status: Literal["pass", "fail", "uninformative"]
    low_confidence: bool
    value: float | None
    limit: float | None
    margin: float | None
    stderr: float | None
    confidence: float | None
    message: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's verdict: whether no check fails, whether any passes with low confidence, the limits, the checks."""

    passed: bool
    low_confidence: bool
    limits: dict[str, float]
    checks: list[Check]


@dataclass(frozen=True, kw_only=True)
class Metrics(Columns):
    """The content of metrics.json. `pairs` counts the questions that base and checkpoint each answer correctly."""

    schema_version: Literal[1] = 1
    base_model: str
    base_revision: str
    license: dict[str, str]
    fixture_model: bool
    benchmark: str
    benchmark_revision: str
    fixture_benchmark: bool
    chartqa: Dataset | None
    recipe: str
    recipe_hash: str
    max_seq_len: int
    run_id: str
    commands: dict[str, str]
    versions: dict[str, str]
    loads_in: list[dict[str, str]]
    pairs: dict[str, Pairs]
    stages: dict[str, StageCost]
    gate: Verdict


def parse_metrics(content: Mapping[str, Any]) -> Metrics:
    """Return the metrics in a JSON object of this schema version. Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(Metrics).validate_python(content)


def parse_columns(content: Mapping[str, Any]) -> Columns:
    """Return the columns of a JSON object. Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(Columns).validate_python(content)


def parse_verdict(content: Mapping[str, Any]) -> Verdict:
    """Return the verdict in a JSON object. Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(Verdict).validate_python(content)


def to_json(value: Metrics | Columns | Base | Program | Verdict | Check) -> Json:
    """Return the JSON object of one of these dataclasses."""
    return dataclasses.asdict(value)


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Write metrics.json."""
    path.write_text(json.dumps(to_json(metrics), indent=1) + "\n", encoding="utf-8")


def json_schema() -> str:
    """Return the JSON Schema of metrics.json, as the text of metrics.schema.json."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Metrics).json_schema(mode="serialization")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "metrics.json", **schema}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(json_schema(), encoding="utf-8")

"""The measurements of a run, as frozen dataclasses: the content of a release's metrics.json.

The gate writes it; the card, the reports, and the next release read it. Anything that was not measured is None, in
every column. After a change to this module, run `python -m quantize_gemma.tasks.models.metrics` to update the JSON
Schema, metrics.schema.json.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from quantize_gemma.tasks.models.device_report import DeviceReport
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.text_fidelity import Fidelity, ProgramFidelity, ReferenceFidelity
from quantize_gemma.tasks.runtime.paired_stats import Pairs

SCHEMA = Path(__file__).parent / "metrics.schema.json"
# With a probability of 5%, guessing scores at least this many standard errors above chance.
ABOVE_CHANCE = 1.645
# An unknown field is an error: it must not be dropped silently.
STRICT = {"extra": "forbid"}

Json = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric, with its standard error and the number of documents if they are known. Accuracies are fractions."""

    value: float
    stderr: float | None
    samples: int | None = None

    def is_at_chance(self, chance: float | None) -> bool:
        """Tell whether an accuracy is at chance: at most ABOVE_CHANCE standard errors above that of guessing.

        The score of a single document is always at chance; without a standard error, the value alone is compared.

        Args:
            chance: The accuracy of random guessing; None for 0.
        """
        above = self.value - (chance or 0.0)
        if self.stderr is None:
            return above <= 0 or self.samples == 1
        return above <= 0 or above < ABOVE_CHANCE * self.stderr


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore(Score):
    """lm-evaluation-harness's score on a benchmark: the headline metric, by group and by task where there are several.

    Attributes:
        value: The headline metric; an accuracy is a fraction.
        stderr: Its standard error.
        samples: The number of documents.
        task: The task or group of lm-eval.
        task_version: The version that lm-eval gives it.
        num_fewshot: The number of examples in a prompt.
        chat_template: Whether prompts are in the model's chat template.
        metric: The headline metric's name.
        metrics: Further metrics.
        groups: The headline metric by group of tasks.
        tasks: The headline metric by task, such as an MMLU subject.
        left_out: The number of documents that do not fit into the program's sequence length.
        device: The device that computed the answers.
        limit: The maximum number of documents per task; None for all.
    """

    task: str
    task_version: str | None
    num_fewshot: int
    chat_template: bool
    metric: str
    metrics: dict[str, Score]
    groups: dict[str, Score]
    tasks: dict[str, Score]
    left_out: int
    device: str
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A choice or a text, and the margin of the choice's log-likelihood over the next best choice's, in nats.

    A text has no margin, and neither does a choice that is the best one only after length normalization.
    """

    answer: str
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A document that program and checkpoint answer differently."""

    task: str
    doc_id: int
    prompt: str
    target: str
    checkpoint: Answer
    no_act_quant: Answer | None
    program: Answer


@dataclass(frozen=True, kw_only=True)
class SampleScore(BenchmarkScore):
    """The program's score on a sample of a benchmark's documents, and the checkpoint's on the same documents.

    `no_act_quant` is the checkpoint without activation quantization, where it was measured. `agreement` and
    `agreement_act_quant` are the shares of the documents that the checkpoint answers like the program and like
    `no_act_quant`: with the same choice; a text is correct or incorrect in both. `differing` counts the answers that
    differ from those of `no_act_quant`: both, only the program's (first), only the checkpoint's (second), neither.
    `pairs` counts the documents that the checkpoint (first) and the program (second) answer correctly.
    """

    checkpoint: Score | None
    no_act_quant: Score | None
    agreement: float | None
    agreement_act_quant: float | None
    differing: Pairs | None
    pairs: Pairs | None
    disagreements: list[Disagreement]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Mean KL divergences from the checkpoint, in nats per token.

    Attributes:
        tokens: The number of tokens that were compared; after an image, the length of the prompt in tokens.
        kl_program: The program's divergence.
        kl_act_quant: The baseline: the divergence that activation quantization alone causes in the checkpoint.
    """

    tokens: int
    kl_program: float
    kl_act_quant: float


@dataclass(frozen=True, kw_only=True)
class Positions:
    """KL divergences at each position, in nats."""

    kl_program: list[float]
    kl_act_quant: list[float]


@dataclass(frozen=True, kw_only=True)
class PromptDivergence(Divergence):
    """KL divergences of the answers to prompts around the sliding window and to the longest one, each in one chunk.

    Attributes:
        lengths: The prompts' lengths in tokens.
        positions: The KL divergences at each position: there are few, so the gate needs the standard error of the mean.
        same_argmax: The share of positions with the same most likely token.
    """

    lengths: list[int]
    positions: Positions
    same_argmax: float


@dataclass(frozen=True, kw_only=True)
class ImageDivergence(Divergence):
    """KL divergences of the text after an image; `kl_causal_image` is the one that causal attention would cause."""

    kl_causal_image: float


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Largest and mean absolute difference between two tensors."""

    max: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class VisionError:
    """The distance of the vision encoder's output for an image from the checkpoint's.

    Attributes:
        max, mean: Largest and mean absolute difference.
        error: Mean squared error over the mean square.
        error_act_quant: The error that activation quantization alone causes in the checkpoint.
    """

    max: float
    mean: float
    error: float
    error_act_quant: float


@dataclass(frozen=True, kw_only=True)
class Agreement(Divergence):
    """How far the program is from the checkpoint that it was exported from, part by part.

    The inherited fields are for the start of a text, decoded one token at a time.

    Attributes:
        same_argmax: The share of these tokens whose most likely token is the same.
        nll_checkpoint, nll_program: Mean negative log-likelihoods of the text, in nats per token.
        text_decoder: The difference of the text's logits.
        prompts: The KL divergences of the answers to prompts of several lengths.
        token_embedding: The difference of the text's embeddings; this and the following are None for a text-only model.
        vision_encoder: The error of the vision encoder's output.
        image: The KL divergences of the text after an image.
        late_image: The KL divergences of the text after an image that follows a text as long as the sliding window;
            None if this does not fit into the program's sequences.
    """

    same_argmax: float
    nll_checkpoint: float
    nll_program: float
    text_decoder: Distance
    prompts: PromptDivergence
    token_embedding: Distance | None = None
    vision_encoder: VisionError | None = None
    image: ImageDivergence | None = None
    late_image: Divergence | None = None


@dataclass(frozen=True, kw_only=True)
class Response:
    """A prompt and the generated response."""

    prompt: str
    response: str


@dataclass(frozen=True, kw_only=True)
class Smoke(Response):
    """A prompt and the checkpoint's response."""

    chat_template: bool
    new_tokens: int
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The C++ runner's speed and peak memory for one prompt, which it answers `rounds` times.

    `first_token_seconds` is counted from the start of inference. Like `prefill_tokens_per_second`, it includes the
    encoding of an image.
    """

    rounds: int
    prompt_tokens: int
    generated_tokens: int
    load_seconds: float
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunnerCheck:
    """In how many cases the C++ runner differs from the program; tasks/models/runner_checks.py describes the checks.

    Attributes:
        name: The name of the check.
        cases: The number of cases; 0 if the check was not exercised.
        failed: The number of cases in which they differ.
        examples: Descriptions of the first failed cases.
    """

    name: str
    cases: int
    failed: int
    examples: list[str]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The column of the base model. In JSON, `scores` are fields of the column, under the benchmarks' names."""

    bytes: int
    scores: dict[str, BenchmarkScore | None]


@dataclass(frozen=True, kw_only=True)
class Quantized(Base):
    """The column of the quantized checkpoint.

    Attributes:
        fidelity: Its distance from the base model on text.
        reference: Its distance from a reference model, if one was named.
        weight_error: The relative squared error of the weights by role; like `output_error`, before distillation.
        lossless: Whether every quantized weight of the language model equals its integer times its scale, rounded to
            the checkpoint's dtype.
        packed_bytes: Its size with integers packed at their bit widths, including scales and unquantized weights.
        output_error: For a calibrated recipe, the relative squared error that rounding adds to each module's outputs on
            the calibration tokens.
    """

    fidelity: Fidelity
    weight_error: dict[str, float]
    smoke: Smoke
    lossless: bool
    packed_bytes: int
    output_error: dict[str, float] | None = None
    reference: ReferenceFidelity | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """The column of the program.

    Attributes:
        bytes: The size of model.pte.
        fidelity: Its distance from the base model on text.
        task: Its task in optimum-executorch, which says whether it reads images.
        backend, dtype: The backend that it is lowered to, and the dtype that it computes in.
        custom_sdpa, custom_kv_cache, kv_cache_dtype, last_logits_only, bidirectional_images: The options of the export.
        delegation: {method: {"xnnpack" | "custom" | "portable": {operator: calls}}}.
        text, image: Its responses to a text and to an image.
        agreement: How far it is from the checkpoint.
        runner: The checks of the C++ runner.
        processor, threads: The machine on which its speed was measured.
        speed: The C++ runner's speed, by kind of prompt.
    """

    bytes: int
    fidelity: ProgramFidelity
    task: str
    backend: str
    dtype: str
    custom_sdpa: bool
    custom_kv_cache: bool
    kv_cache_dtype: str
    last_logits_only: bool
    bidirectional_images: bool
    delegation: dict[str, dict[str, dict[str, int]]]
    text: Response
    image: Response | None
    agreement: Agreement
    runner: list[RunnerCheck]
    processor: str
    threads: int
    speed: dict[str, Speed]
    scores: dict[str, SampleScore | None]

    @property
    def multimodal(self) -> bool:
        """Whether it reads images."""
        return self.task == GEMMA3.multimodal.task


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the quality table, which a run's summary has without the rest of the metrics."""

    __pydantic_config__: ClassVar = STRICT

    base: Base
    quantized: Quantized
    program: Program


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A benchmark's dataset, or a text: its name, its commit or digest, and whether it is a built-in fixture."""

    name: str
    revision: str
    fixture: bool


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The calibration data: sequences of the dataset or text, and of the base model's own answers."""

    dataset: Dataset
    sequences: int
    answers: int
    length: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The KL divergence from the base model on the held-out sequences after a number of steps, in nats."""

    step: int
    kl: float


@dataclass(frozen=True, kw_only=True)
class DistillationData:
    """How a distilled recipe's scales and norms were trained: the number of sequences and of steps.

    `held_out` is the number of sequences that are not trained on, and `held_out_kl` has the measurements on them.
    """

    sequences: int
    held_out: int
    steps: int
    held_out_kl: list[HeldOut]


@dataclass(frozen=True, kw_only=True)
class BenchmarkInfo:
    """A benchmark: its row of the table in benchmarks.py, and its dataset.

    Attributes:
        title: Its name on the card.
        metric: The headline metric.
        metrics: Further metrics, with their titles.
        higher_is_better: Whether a larger value of the headline metric is better.
        chance: The headline metric of random guessing; None if guesses never score.
        task_type: The task type in the Hub's model index.
        is_own_task: Whether the task is part of quantize-gemma, so that the lm_eval command line does not have it.
        words: A description for the card of how it is measured.
        dataset: The dataset that it was measured on.
    """

    title: str
    metric: str
    metrics: dict[str, str]
    higher_is_better: bool
    chance: float | None
    task_type: str
    is_own_task: bool
    words: str
    dataset: Dataset


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """The cost of a stage: wall time, peak memory of its process, and the size of its output."""

    seconds: float
    peak_rss_bytes: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of the gate.

    Attributes:
        name: For example "mmlu_drop".
        status: "uninformative", which does not fail the gate, if there was nothing to compare, the base model scores
            at chance level, or no limit was set.
        low_confidence: Whether it passes with a confidence below 95%.
        value: The measured value; None if it is not a finite number.
        limit: The limit on the value; None if the value is only recorded.
        margin: The distance to the limit, negative beyond it.
        stderr: The value's standard error, if it can be estimated.
        confidence: The probability that the true value is within the limit, if there is a standard error.
        message: The result in one sentence.
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
    limits: dict[str, float | None]
    checks: list[Check]


@dataclass(frozen=True, kw_only=True)
class Metrics(Columns):
    """The content of metrics.json.

    Attributes:
        base, quantized, program: The columns of the quality table.
        schema_version: The version of the schema, which changes when a field is removed or changes its meaning.
        base_model, base_revision: The model and its commit, or the digest of a directory.
        license: The license fields of the base model's card.
        fixture_model: Whether it is the built-in model.
        text: The text on which the distance from the base model was measured.
        benchmarks: The benchmarks, by name.
        recipe, recipe_hash: The recipe's name, and the hash of its rules.
        max_seq_len: The program's maximum sequence length, in tokens.
        run_id: The id of the flow run in Prefect.
        commands: The command of this run, and lm_eval's command for each benchmark of the base model.
        versions: The versions of the libraries.
        loads_in: The versions with which the card's loading code was tested.
        pairs: The number of documents of each benchmark that both base model and checkpoint, only one of them, or
            neither answer correctly.
        stages: The cost of each stage.
        gate: The gate's verdict.
        calibration, distillation: How the recipe was calibrated and distilled, if it was.
        device_report: The program's speed on a phone, if it was measured.
    """

    schema_version: Literal[2] = 2
    base_model: str
    base_revision: str
    license: dict[str, str]
    fixture_model: bool
    text: Dataset
    benchmarks: dict[str, BenchmarkInfo]
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
    calibration: CalibrationData | None = None
    distillation: DistillationData | None = None
    device_report: DeviceReport | None = None


# The columns of the quality table.
COLUMNS: dict[str, type] = {"base": Base, "quantized": Quantized, "program": Program}


def parse_metrics(content: Mapping[str, object]) -> Metrics:
    """Return the metrics in a JSON object of this schema version. Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(Metrics).validate_python(_nest_scores(content))


def parse_columns(content: Mapping[str, object]) -> Columns:
    """Return the columns of a JSON object. Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(Columns).validate_python(_nest_scores(content))


def parse_verdict(content: Mapping[str, object]) -> Verdict:
    """Return the verdict in a JSON object. Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(Verdict).validate_python(content)


def to_json(value: Metrics | Columns | Verdict | Check) -> Json:
    """Return the JSON object of one of these dataclasses."""
    content = dataclasses.asdict(value)
    for name in COLUMNS:
        if name in content:
            content[name] |= content[name].pop("scores")
    return content


def column_fields(column: str) -> set[str]:
    """Return the names of a column's fields other than the benchmarks."""
    return {field.name for field in dataclasses.fields(COLUMNS[column])} - {"scores"}


def _nest_scores(content: Mapping[str, object]) -> Json:
    """Return a JSON object whose columns have the benchmarks' scores in a separate field."""
    nested = dict(content)
    for name in COLUMNS:
        fields = column_fields(name)
        column = content.get(name)
        if isinstance(column, Mapping):
            scores = {key: value for key, value in column.items() if key not in fields}
            nested[name] = {**{key: value for key, value in column.items() if key in fields}, "scores": scores}
    return nested


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Write metrics.json."""
    path.write_text(json.dumps(to_json(metrics), indent=1) + "\n", encoding="utf-8")


def json_schema() -> str:
    """Return the JSON Schema of metrics.json, as the text of metrics.schema.json."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Metrics).json_schema(mode="serialization")
    for kind in COLUMNS.values():
        column = schema["$defs"][kind.__name__]
        column["additionalProperties"] = column["properties"].pop("scores")["additionalProperties"]
        column["required"].remove("scores")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "metrics.json", **schema}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(json_schema(), encoding="utf-8")

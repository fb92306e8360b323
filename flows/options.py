"""The options of a run: the flow's parameters, the fields of Prefect's form, and the flags of the command line.

Each group is a pydantic model. Prefect shows it as a section of the form and validates it before it creates a flow run;
the command line turns its fields into flags and lists them under the same heading in `--help`.
"""

import shlex
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from cyclopts import Group, Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from quantize_gemma.tasks.calibrate import digest_text
from quantize_gemma.tasks.models.resolved import ResolvedDataset, ResolvedModel

StageName = Literal[
    "download",
    "download_mmlu",
    "untie",
    "calibrate",
    "quantize",
    "smoke",
    "export",
    "download_chartqa",
    "evaluate_mmlu_base",
    "evaluate_mmlu_quantized",
    "evaluate_program",
    "evaluate_chartqa_base",
    "evaluate_chartqa_quantized",
    "verify",
    "gate",
    "card",
]

# The upper limit of every count.
LARGEST = 1_000_000
# Shown on the card even if they have their default values, which may change in a later version.
ALWAYS_SHOWN = {"model", "recipe", "mmlu", "chartqa", "max_seq_len", "program_samples", "max_new_tokens"}
# Options that do not affect what is in a release.
NOT_IN_RELEASE = {"target", "offline", "refresh", "batch_size", "workers", "cluster", "max_regression"}
MODEL_PLACEHOLDER, RECIPE_PLACEHOLDER, TEXT_PLACEHOLDER = "MODEL", "RECIPE.json", "CALIBRATION.txt"


def _require_printable(value: str) -> str:
    # Such a name is a mistake or an attack: it breaks log lines, paths, and requests to the Hub.
    if not value.isprintable():
        raise ValueError("must be printable text without line breaks or control characters")
    return value


def _empty_to_none(value: object) -> object:
    """Return None for an empty form field or for a deployment's unset environment variable."""
    return None if value == "" else value


# A name or a path.
Text = Annotated[str, Field(max_length=1000), AfterValidator(_require_printable)]
OptionalText = Annotated[Text | None, BeforeValidator(_empty_to_none)]
ModelName = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_require_printable)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Refresh = Annotated[tuple[StageName, ...], Parameter(consume_multiple=True, negative=(), show_default=False)]
# Off unless the flag is passed.
Flag = Annotated[bool, Parameter(negative=())]
MmluSource = Literal["mmlu-mini", "cais/mmlu"]
ChartqaSource = Annotated[
    Literal["auto", "chartqa-mini", "HuggingFaceM4/ChartQA", "none"], BeforeValidator(lambda value: value or "auto")
]


class Options(BaseModel):
    """A group of options: unknown names and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


@Parameter(name="*", group=Group.create_ordered("Evaluation"))
class EvaluationOptions(Options):
    """What the model is evaluated on, and where."""

    mmlu: MmluSource = Field(
        default="mmlu-mini", description="MMLU dataset: the built-in fixture mmlu-mini, or cais/mmlu from the Hub."
    )
    mmlu_revision: OptionalText = Field(
        default=None, description="Branch, tag, or commit of the MMLU dataset. [default: the default branch]"
    )
    chartqa: ChartqaSource = Field(
        default="auto",
        description=(
            "ChartQA dataset; auto: chartqa-mini with mmlu-mini, HuggingFaceM4/ChartQA with cais/mmlu; none: skip "
            "ChartQA."
        ),
    )
    chartqa_revision: OptionalText = Field(
        default=None, description="Branch, tag, or commit of the ChartQA dataset. [default: the default branch]"
    )
    limit: Count | None = Field(
        default=None, description="Number of samples per MMLU subject and per ChartQA split. [default: all]"
    )
    batch_size: Count | Literal["auto"] = Field(
        default="auto",
        description=(
            "Maximum number of MMLU requests per batch; auto: as many as fit into 4,096 tokens (32,768 on a GPU)."
        ),
    )
    program_samples: Count = Field(
        default=100, description="Size of the fixed MMLU sample that the exported program is evaluated on."
    )
    max_new_tokens: Count = Field(default=64, description="Maximum number of tokens generated in each smoke test.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device for the evaluation; auto: a GPU if there is one; cuda: quantize on the GPU, too.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Number of worker processes for the evaluation; each loads its own model.",
    )
    cluster: OptionalText = Field(
        default=None,
        description=(
            "Address of the cluster that runs the evaluation: tcp://… (Dask) or ray://… (Ray); it must share the "
            "store. [default: none, run on this machine]"
        ),
    )

    def chartqa_source(self) -> str | None:
        """Return the name of the ChartQA dataset, or None to skip ChartQA."""
        if self.chartqa == "auto":
            return "chartqa-mini" if self.mmlu == "mmlu-mini" else "HuggingFaceM4/ChartQA"
        return None if self.chartqa == "none" else self.chartqa


@Parameter(name="*", group=Group.create_ordered("Export"))
class ExportOptions(Options):
    """How the quantized checkpoint is exported to an ExecuTorch program."""

    max_seq_len: int = Field(
        default=1024,
        ge=64,
        le=LARGEST,
        description="Maximum sequence length of the program in tokens, prompt and response together.",
    )
    custom_sdpa: bool = Field(default=True, description="Use ExecuTorch's custom SDPA kernel for attention.")
    custom_kv_cache: bool = Field(
        default=True, description="Use ExecuTorch's custom KV cache kernels; requires custom_sdpa."
    )
    last_logits_only: bool = Field(
        default=True, description="Return the logits of the last token only, which is all that generation needs."
    )

    @model_validator(mode="after")
    def _check_kernels(self) -> Self:
        if self.custom_kv_cache and not self.custom_sdpa:
            raise ValueError("custom_kv_cache requires custom_sdpa: turn off custom_kv_cache, too")
        return self


@Parameter(name="*", group=Group.create_ordered("Gate"))
class GateOptions(Options):
    """The limits that a release must meet before it is published."""

    max_mmlu_drop: float = Field(default=5.0, ge=0, description="Maximum drop in MMLU accuracy, in points.")
    max_chartqa_drop: float = Field(
        default=10.0, ge=0, description="Maximum drop in ChartQA relaxed accuracy, in points."
    )
    min_recovery: float = Field(
        default=80.0, ge=0, description="Minimum recovery on each benchmark, in percent of the base model's score."
    )
    max_disagreement: float = Field(
        default=2.0,
        ge=0,
        description=(
            "Maximum share of answers that the program changes beyond those that activation quantization changes, "
            "in points."
        ),
    )
    max_kl_ratio: float = Field(
        default=2.0,
        gt=0,
        description=(
            "Maximum KL divergence of the program from the checkpoint, as a multiple of the KL divergence due to "
            "activation quantization."
        ),
    )
    max_regression: float = Field(
        default=1.0, ge=0, description="Maximum drop in MMLU accuracy from the previously published release, in points."
    )


@Parameter(name="*", group=Group.create_ordered("Publishing"))
class PublishingOptions(Options):
    """How the release is published, if a target is set."""

    branch: OptionalText = Field(
        default=None, description="Branch of the target to publish to. [default: the default branch]"
    )
    create_pr: Flag = Field(default=False, description="Open a pull request instead of committing to the branch.")
    private: Flag = Field(default=False, description="If the target does not exist, create it as a private repository.")
    tag: Flag = Field(default=False, description="Tag the commit as v<date>-<recipe hash>.")
    adopt: Flag = Field(
        default=False, description="Publish even if the target contains files that quantize-gemma did not write."
    )

    @model_validator(mode="after")
    def _check_pull_request(self) -> Self:
        if self.create_pr and (self.branch or self.tag):
            raise ValueError("a pull request targets the default branch and has no tag: leave out branch and tag")
        return self


@Parameter(name="*", group=Group.create_ordered("Model", sort_key=-1))
class RunOptions(Options):
    """All options of a run: the most common ones, and the groups."""

    model: ModelName = Field(
        default="tiny-gemma3",
        description="Hub repository such as google/gemma-3-4b-it, local directory, or the built-in tiny-gemma3.",
    )
    recipe: Text = Field(
        default="HQQ-INT8-INT4", description="Name of a built-in recipe, or path to a JSON recipe file."
    )
    calibration: OptionalText = Field(
        default=None, description="Text file that a calibrated recipe is calibrated on. [default: none]"
    )
    target: OptionalText = Field(
        default=None, description="Hub repository to publish the release to. [default: none, not published]"
    )
    revision: OptionalText = Field(
        default=None, description="Branch, tag, or commit of the model repository. [default: the default branch]"
    )
    refresh: Refresh = Field(
        default=(), description="Stages to run again even if their results are cached. [default: none]"
    )
    offline: Flag = Field(
        default=False, description="Use only what is already in the store, without contacting the Hub."
    )
    evaluation: EvaluationOptions = EvaluationOptions()
    export: ExportOptions = ExportOptions()
    gate: GateOptions = GateOptions()
    publishing: PublishingOptions = PublishingOptions()

    def check_inputs(self) -> dict[str, Any]:
        """Return the arguments of check_run()."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "max_seq_len": self.export.max_seq_len,
            "device": self.evaluation.device,
            "cluster": self.evaluation.cluster,
            "custom_kv_cache": self.export.custom_kv_cache,
            "workers": self.evaluation.workers,
        }

    def local_workers(self) -> int:
        """Return how many models the evaluation loads on this machine at a time."""
        return self.evaluation.workers if self.evaluation.cluster is None else 1

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target and self.offline:
            raise ValueError("a release cannot be published offline: leave out target or offline")
        if self.target and self.target.strip("/").lower() == self.model.strip("/").lower():
            raise ValueError(
                "target is the model itself, whose weights would be overwritten: choose another repository"
            )
        return self


def command_line(
    options: RunOptions,
    model: ResolvedModel,
    mmlu: ResolvedDataset,
    chartqa: ResolvedDataset | None,
    recipe_hash: str,
) -> str:
    """Return the command that reproduces the release, with every revision pinned.

    A local model or recipe becomes a placeholder, with its digest in a comment.

    Args:
        options: The run's options.
        model: The resolved model.
        mmlu: The resolved MMLU dataset.
        chartqa: The resolved ChartQA dataset, or None if ChartQA is skipped.
        recipe_hash: The hash of the recipe.
    """
    pinned: dict[str, object] = {"model": model.name, "chartqa": chartqa.name if chartqa else "none"}
    for name, source in (("revision", model), ("mmlu_revision", mmlu), ("chartqa_revision", chartqa)):
        pinned[name] = source.revision if source and source.on_hub else None
    comment = ""
    if not model.on_hub and not model.fixture:
        pinned["model"] = MODEL_PLACEHOLDER
        comment += f"  # {MODEL_PLACEHOLDER}: the directory whose files have the digest {model.revision}"
    if options.recipe.endswith(".json"):
        pinned["recipe"] = RECIPE_PLACEHOLDER
        comment += f"  # {RECIPE_PLACEHOLDER}: the recipe with the hash {recipe_hash}"
    if options.calibration:
        pinned["calibration"] = TEXT_PLACEHOLDER
        comment += f"  # {TEXT_PLACEHOLDER}: the text with the SHA-256 {digest_text(options.calibration)}"
    words = ["quantize-gemma", "run"]
    for name, field, value in _release_options(options):
        value = pinned.get(name, value)
        if value is None or (value == field.default and name not in ALWAYS_SHOWN):
            continue
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words) + comment


def _release_options(options: RunOptions) -> Iterator[tuple[str, FieldInfo, object]]:
    """Yield the name, field, and value of each option that affects what is in a release."""
    for group in (options, options.evaluation, options.export, options.gate):
        for name, field in type(group).model_fields.items():
            value = getattr(group, name)
            if name not in NOT_IN_RELEASE and not isinstance(value, Options):
                yield name, field, value

"""What the flow takes. Prefect shows it as a form and refuses a bad value before a run exists."""

import inspect
import shlex
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Stage = Literal[
    "download",
    "download_mmlu",
    "untie",
    "quantize",
    "smoke",
    "export",
    "download_chartqa",
    "evaluate_mmlu_base",
    "evaluate_mmlu_quantized",
    "evaluate_program",
    "evaluate_chartqa_base",
    "evaluate_chartqa_quantized",
    "smoke_program",
    "gate",
    "card",
]


def _one_line(value: str) -> str:
    # Such a name is a mistake or an attack: it breaks log lines, paths, and requests to the Hub.
    if not value.isprintable():
        raise ValueError("it has line breaks, control characters or characters that are not text in it")
    return value


# A name or a path.
Text = Annotated[str, Field(max_length=1000), AfterValidator(_one_line)]
# No count is ever larger.
LARGEST = 1_000_000


# How a release is made and where it goes, but not what is in it.
SHAPES_NOTHING = {"batch_size", "workers", "cluster", "max_regression", "offline", "refresh"}
SHAPES_NOTHING |= {"target", "branch", "create_pr", "private", "tag", "adopt"}
# On the card even if they are the defaults, which may change.
ALWAYS_SAID = {"model", "recipe", "benchmark", "charts", "max_seq_len", "program_questions", "max_new_tokens"}
MODEL, RECIPE = "MODEL", "RECIPE.json"


class Parameters(BaseModel):
    """One run: which model, how it is quantized, how it is measured, where it goes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Text = Field(
        "tiny-gemma3",
        min_length=1,
        description="A Hub repository such as google/gemma-3-4b-it, a directory, or the built-in tiny-gemma3.",
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a Hub repository; its default branch.")
    recipe: Text = Field("HQQ-INT8-INT4", description="The recipe's name, or the path of a recipe's JSON file.")
    benchmark: Literal["mmlu-mini", "cais/mmlu"] = Field(
        "mmlu-mini", description="Questions to measure on: the built-in fixture, or MMLU from the Hub."
    )
    benchmark_revision: Text | None = Field(
        None, description="Branch, tag or commit of the benchmark; its default branch."
    )
    charts: Literal["chartqa-mini", "HuggingFaceM4/ChartQA", "none"] | None = Field(
        None, description="Charts to measure on: the fixture with the benchmark's, ChartQA with MMLU, or none."
    )
    charts_revision: Text | None = Field(None, description="Branch, tag or commit of the charts; their default branch.")
    limit: int | None = Field(
        None, ge=1, le=LARGEST, description="Questions per subject, and per kind of chart question; all."
    )
    batch_size: Annotated[int, Field(ge=1, le=LARGEST)] | Literal["auto"] = Field(
        "auto", description="Most questions per batch; auto: as many as have 4,096 tokens, or 32,768 on a GPU."
    )
    program_questions: int = Field(
        100,
        ge=1,
        le=LARGEST,
        description="Questions that the program answers, too: a sample of the checkpoint's, always the same.",
    )
    workers: int = Field(1, ge=1, le=1000, description="Processes that answer the questions, each with its own model.")
    cluster: Text | None = Field(
        None, description="Cluster that answers them instead and shares the store: tcp://… of Dask, ray://… of Ray."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the evaluation runs; with cuda, quantizing too."
    )
    max_seq_len: int = Field(
        1024, ge=64, le=LARGEST, description="Longest sequence of the exported program, prompt and answer, in tokens."
    )
    backend: Literal["xnnpack"] = Field("xnnpack", description="What the program is lowered to.")
    dtype: Literal["float32"] = Field("float32", description="Type of the program's activations and scales.")
    custom_sdpa: bool = Field(True, description="Let ExecuTorch's own kernel do the program's attention.")
    custom_kv_cache: bool = Field(
        True, description="Let ExecuTorch's own kernels keep the attention's cache, which needs custom_sdpa."
    )
    last_logits_only: bool = Field(
        True, description="Let the program return the logits of the last token alone, as generating needs them."
    )
    max_new_tokens: int = Field(64, ge=1, le=LARGEST, description="Length of the smoke tests' answers, in tokens.")
    max_mmlu_drop: float = Field(5.0, ge=0, description="Points of MMLU accuracy that the gate lets a release lose.")
    max_chartqa_drop: float = Field(
        10.0, ge=0, description="Points of ChartQA's relaxed accuracy that the gate lets a release lose."
    )
    min_recovery: float = Field(
        80.0, ge=0, description="Percent of the base's score that a release must keep, on each benchmark."
    )
    max_disagreement: float = Field(
        2.0,
        ge=0,
        description="Points by which rounding may change more of the program's answers than the checkpoint's.",
    )
    max_kl_ratio: float = Field(
        2.0, gt=0, description="How far the program may be from the checkpoint, in times the activation rounding."
    )
    max_regression: float = Field(
        1.0, ge=0, description="Points of MMLU accuracy that a release may be below the one published before it."
    )
    offline: bool = Field(False, description="Go on with what was downloaded before, if the Hub cannot be reached.")
    target: Text | None = Field(None, description="Hub repository to publish to; without it nothing is uploaded.")
    branch: Text | None = Field(None, description="Branch of the target to publish on; its default branch.")
    create_pr: bool = Field(False, description="Publish as a pull request instead of a commit on the branch.")
    private: bool = Field(False, description="Make the target private, if it has to be made.")
    tag: bool = Field(False, description="Tag the commit v<date>-<recipe hash>.")
    adopt: bool = Field(False, description="Publish to a target that holds files which no release of ours wrote.")
    refresh: list[Stage] = Field(default_factory=list, description="Stages that run again though they are cached.")

    @field_validator(
        "revision", "benchmark_revision", "charts", "charts_revision", "cluster", "target", "branch", mode="before"
    )
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        """A field of the form that was left empty, and a deployment's variable that was not set, are nothing."""
        return value or None

    def chart_benchmark(self) -> str | None:
        """Returns the charts that are measured on, None for none."""
        given = self.charts or ("chartqa-mini" if self.benchmark == "mmlu-mini" else "HuggingFaceM4/ChartQA")
        return None if given == "none" else given

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.custom_kv_cache and not self.custom_sdpa:
            raise ValueError("custom_kv_cache needs custom_sdpa: turn it off, too")
        if self.target and self.offline:
            raise ValueError("offline, nothing can be published: leave target or offline out")
        if self.target and self.target.strip("/").lower() == self.model.strip("/").lower():
            raise ValueError("target is the model itself, whose weights would be replaced: give the release its own")
        if self.create_pr and (self.branch or self.tag):
            raise ValueError("a pull request goes to the default branch and has no tag: leave branch and tag out")
        return self


def command_line(
    p: Parameters, model: dict[str, Any], benchmark: dict[str, Any], charts: dict[str, Any] | None, recipe_hash: str
) -> str:
    """Returns the command that makes the same release again, from what the run's names were resolved to.

    What only this machine has is a placeholder, with what identifies it in a comment.
    """
    pinned: dict[str, Any] = {"model": model["name"], "charts": charts["name"] if charts else "none"}
    for name, resolved in (("revision", model), ("benchmark_revision", benchmark), ("charts_revision", charts)):
        pinned[name] = resolved["revision"] if resolved and "kind" in resolved else None
    comment = ""
    if "kind" not in model and not model["fixture"]:
        pinned["model"] = MODEL
        comment += f"  # {MODEL}: the directory whose files have the digest {model['revision']}"
    if p.recipe.endswith(".json"):
        pinned["recipe"] = RECIPE
        comment += f"  # {RECIPE}: the recipe with the hash {recipe_hash}"
    words = ["quantize-gemma", "run"]
    for name, field in Parameters.model_fields.items():
        value = pinned.get(name, getattr(p, name))
        if name in SHAPES_NOTHING or value is None or (value == field.default and name not in ALWAYS_SAID):
            continue
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words) + comment


def taking_parameters(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a function of `**given` the parameters above as its signature and documentation.

    Prefect makes its form, its checks and `--param name=value` from these.
    """
    fields = Parameters.model_fields.items()
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.get_default(call_default_factory=True),
                annotation=Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation,
            )
            for name, field in fields
        ]
    )
    described = "\n".join(f"    {name}: {field.description}" for name, field in fields)
    function.__doc__ = f"{inspect.getdoc(function)}\n\nArgs:\n{described}\n"
    return function

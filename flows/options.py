"""The options of a run: the flow's parameters, the fields of Prefect's form, and the flags of the command line.

Each group is a pydantic model. Prefect shows it as a section of the form and validates it before it creates a flow run;
the command line turns its fields into flags and lists them under the same heading in `--help`.
"""

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from cyclopts import Group, Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.download import is_path
from quantize_gemma.tasks.models.benchmarks import ALL_COLUMNS, BENCHMARKS, DEFAULT_TASKS, FIXTURE_TASKS
from quantize_gemma.tasks.models.calibration import parse_source
from quantize_gemma.tasks.models.datasets import WIKITEXT
from quantize_gemma.tasks.models.resolved import ResolvedDataset, ResolvedModel

# The upper limit of every count.
LARGEST = 1_000_000
# The stages that make the quantized checkpoint, in order.
QUANTIZING = ("download", "untie", "download_text", "download_calibration", "calibrate", "quantize", "distill")
# Shown on the card even if they have their default values, which may change in a later version.
ALWAYS_SHOWN = {"model", "recipe", "tasks", "max_seq_len", "program_samples", "max_new_tokens"}
# Options that do not affect what is in a release.
NOT_IN_RELEASE = {
    *("target", "offline", "refresh", "workers", "cluster", "max_regression"),
    *("branch", "create_pr", "private", "tag", "adopt"),
}
MODEL_PLACEHOLDER, RECIPE_PLACEHOLDER, DATASET_PLACEHOLDER = "MODEL", "RECIPE.json", "DATASET"
TEXT_PLACEHOLDER, CALIBRATION_PLACEHOLDER, REFERENCE_PLACEHOLDER = "./TEXT", "CALIBRATION.txt", "./REFERENCE"
DEVICE_REPORT_PLACEHOLDER = "DEVICE_REPORT.json"
# The text of the built-in model.
FIXTURE_TEXT = "tiny-text"


def _require_printable(value: str) -> str:
    # Any other name is a mistake or an attack: it breaks log lines, paths, and requests to the Hub.
    if not value.isprintable():
        raise ValueError("must be printable text without line breaks or control characters")
    return value


def _split_revision(source: str) -> tuple[str, str | None]:
    """Return the two parts of NAME@REVISION; a path has no revision."""
    name, sign, revision = source.partition("@")
    return (name, revision) if sign and not is_path(source) else (source, None)


def _default_drops() -> list[str]:
    return [f"{row.name}={row.max_drop:g}" for row in BENCHMARKS.values() if row.max_drop is not None]


def _empty_to_none(value: object) -> object:
    """Return None for an empty form field or for a deployment's unset environment variable."""
    return None if value == "" else value


def _none_to_null(value: object) -> object:
    """Return None for the word none."""
    return None if value == "none" else value


# A name or a path.
Text = Annotated[str, Field(max_length=1000), AfterValidator(_require_printable)]
OptionalText = Annotated[Text | None, BeforeValidator(_empty_to_none)]
ModelName = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_require_printable)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
# A limit of the gate; "none" is no limit.
Limit = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_none_to_null)]
# Several values after one flag, or repeated flags with one value each.
Texts = Annotated[tuple[Text, ...], Parameter(consume_multiple=True, negative=(), show_default=False)]
# Off unless the flag is passed.
Flag = Annotated[bool, Parameter(negative=())]


class Options(BaseModel):
    """A group of options: unknown names and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


@Parameter(name="*", group=Group.create_ordered("Evaluation"))
class EvaluationOptions(Options):
    """What the model is evaluated on, and where."""

    tasks: OptionalText = Field(
        default=None,
        description=(
            f"Benchmarks, separated by commas: {', '.join(BENCHMARKS)}, or any other lm-eval task or group. Those with "
            f"images are skipped for a text-only model. [default: {','.join(DEFAULT_TASKS)}; for the built-in model, "
            f"{','.join(FIXTURE_TASKS)}]"
        ),
    )
    dataset: Texts = Field(
        default=(),
        description=(
            "Another source with the same layout for a benchmark's dataset, as in mmlu=./mirror or "
            "mmlu=org/mirror@revision. [default: the benchmark's own; for the built-in model, the built-in fixtures]"
        ),
    )
    text: OptionalText = Field(
        default=None,
        description=(
            "Text on which the release is compared with its base model, token by token: a file such as ./notes.txt, or "
            f"{WIKITEXT} or a mirror of it, optionally with @REVISION. [default: {WIKITEXT}; for the built-in model, "
            "tiny-text]"
        ),
    )
    reference_model: OptionalText = Field(
        default=None,
        description=(
            "Another model to compare the release with on that text, such as the one before quantization-aware "
            "training: Hub repository, optionally with @REVISION, or local directory. [default: none]"
        ),
    )
    text_windows: Count = Field(
        default=16,
        description="Maximum number of windows of that text, with 511 scored tokens each; also capped by limit.",
    )
    limit: Count | None = Field(
        default=None, description="Maximum number of documents per task; each MMLU subject is a task. [default: all]"
    )
    batch_size: Count | Literal["auto"] = Field(
        default="auto",
        description=("Maximum number of requests per batch; auto: as many as fit in 4,096 tokens (32,768 on a GPU)."),
    )
    program_samples: Count = Field(
        default=100,
        description=(
            "Maximum number of documents per benchmark on which the exported program is evaluated; the sample is fixed."
        ),
    )
    max_new_tokens: Count = Field(default=64, description="Maximum number of tokens generated in each smoke test.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device for the evaluation; auto: a GPU if there is one; cuda: also quantize on the GPU.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Number of processes for evaluation and fidelity; each loads its own copy of the model.",
    )
    cluster: OptionalText = Field(
        default=None,
        description=(
            "Address of the cluster that runs evaluation and fidelity: tcp://… (Dask) or ray://… (Ray); its machines "
            "must share the store. [default: none, run on this machine]"
        ),
    )

    device_report: OptionalText = Field(
        default=None,
        description=(
            "JSON file from `python -m benchmarks.device_report` with the program's speed on a phone, for the card. "
            "[default: none]"
        ),
    )

    def benchmark_names(self, fixture_model: bool) -> list[str]:
        """Return the names of the benchmarks, without duplicates; `fixture_model`: whether the model is built in."""
        if self.tasks is None:
            return list(FIXTURE_TASKS if fixture_model else DEFAULT_TASKS)
        return list(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))

    def dataset_sources(self) -> dict[str, tuple[str, str | None]]:
        """Return {benchmark: (directory, fixture, or repository; revision)} for benchmarks with another source."""
        pairs = [text.partition("=") for text in self.dataset]
        return {name: _split_revision(source) for name, _, source in pairs}

    def text_source(self, fixture_model: bool) -> tuple[str, str | None]:
        """Return the text (file, fixture, or repository) and its revision; `fixture_model`: whether it is built in."""
        return _split_revision(self.text or (FIXTURE_TEXT if fixture_model else WIKITEXT))

    def reference_source(self) -> tuple[str, str | None] | None:
        """Return the reference model and its revision; None if there is none."""
        return None if self.reference_model is None else _split_revision(self.reference_model)

    def windows(self) -> int:
        """Return the number of windows of the text."""
        return min(self.text_windows, self.limit or self.text_windows)


@Parameter(name="*", group=Group.create_ordered("Export"))
class ExportOptions(Options):
    """How the quantized checkpoint is exported to an ExecuTorch program."""

    max_seq_len: int = Field(
        default=1024,
        ge=64,
        le=LARGEST,
        description=(
            "Maximum sequence length of the program in tokens, prompt and response together; memory grows with its "
            "square."
        ),
    )
    custom_sdpa: bool = Field(default=True, description="Use ExecuTorch's custom SDPA kernel for attention.")
    custom_kv_cache: bool = Field(
        default=True, description="Use ExecuTorch's custom KV cache kernels; requires custom_sdpa."
    )
    kv_cache_dtype: Literal["float32", "int8"] = Field(
        default="float32",
        description=(
            "Data type of the KV cache; int8 takes little more than a quarter of the memory, and requires "
            "custom_kv_cache."
        ),
    )
    last_logits_only: bool = Field(
        default=True, description="Return only the logits of the last token, which is all that generation needs."
    )
    bidirectional_images: bool = Field(
        default=True,
        description="Let the tokens of an image attend to each other in both directions, as in the model; requires "
        "custom_kv_cache. If off, attention is causal, as in optimum-executorch's programs.",
    )

    @model_validator(mode="after")
    def _check_kernels(self) -> Self:
        if self.custom_kv_cache and not self.custom_sdpa:
            raise ValueError("custom_kv_cache requires custom_sdpa: pass --no-custom-kv-cache, too")
        if self.kv_cache_dtype != "float32" and not self.custom_kv_cache:
            raise ValueError(f"a KV cache in {self.kv_cache_dtype} requires custom_kv_cache: turn on --custom-kv-cache")
        return self


@Parameter(name="*", group=Group.create_ordered("Gate"))
class GateOptions(Options):
    """The limits that a release must meet before it is published."""

    max_kl: Limit = Field(
        default=0.25,
        description=(
            "Maximum mean KL divergence of the quantized checkpoint from the base model on the text, in nats; none: "
            "record it without a limit."
        ),
    )
    min_same_top: Limit = Field(
        default=70.0,
        description=(
            "Minimum share of positions in the text at which the most likely token is also the base model's, in "
            "percent; none: record it without a limit."
        ),
    )
    limit_drop: Annotated[Text, Parameter(show_default=False)] = Field(
        default="",
        description=(
            "Maximum drop of each benchmark's score from the base model's, in points (for a perplexity, maximum "
            f"increase in percent), as in mmlu=2,gsm8k=5. [default: {', '.join(_default_drops())}]"
        ),
    )
    min_recovery: float = Field(
        default=80.0, ge=0, description="Minimum recovery on each benchmark, in percent of the base model's score."
    )
    max_disagreement: float = Field(
        default=2.0,
        ge=0,
        description=(
            "Maximum share of answers that the program changes, in points above the share that activation quantization "
            "alone changes."
        ),
    )
    max_kl_ratio: float = Field(
        default=2.0,
        gt=0,
        description=(
            "Maximum KL divergence of the program from the checkpoint, as a multiple of the KL divergence that "
            "activation quantization alone causes."
        ),
    )
    max_regression: float = Field(
        default=1.0,
        ge=0,
        description=(
            "Maximum drop of a score from the published release's, in points; for a perplexity, maximum increase in "
            "percent."
        ),
    )

    def drops(self) -> dict[str, float]:
        """Return {benchmark: maximum drop} for the benchmarks in limit_drop."""
        pairs = [text.partition("=") for text in self.limit_drop.split(",") if text.strip()]
        return {name.strip(): float(value) for name, _, value in pairs}

    @model_validator(mode="after")
    def _check_drops(self) -> Self:
        try:
            valid = all(math.isfinite(value) and value >= 0 for value in self.drops().values())
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f"--limit-drop {self.limit_drop!r}: must be a comma-separated list of BENCHMARK=POINTS, with POINTS at "
                "least 0"
            )
        return self


@Parameter(name="*", group=Group.create_ordered("Publishing"))
class PublishingOptions(Options):
    """How the release is published, if a target is set."""

    branch: OptionalText = Field(
        default=None, description="Branch of the target to publish to. [default: the default branch]"
    )
    create_pr: Flag = Field(default=False, description="Open a pull request instead of committing to the branch.")
    private: Flag = Field(default=False, description="If the target does not exist, create it as a private repository.")
    tag: Flag = Field(default=False, description="Tag the commit as v<date>-<recipe hash>.")
    publish_samples: Flag = Field(
        default=False,
        description=(
            "Add the prompts and responses behind every score to the release, which include the questions of the "
            "benchmarks' datasets."
        ),
    )
    adopt: Flag = Field(
        default=False,
        description=(
            "Publish even if the target contains files that quantize-gemma did not write: files with the same names "
            "are overwritten, and none are deleted."
        ),
    )

    @model_validator(mode="after")
    def _check_pull_request(self) -> Self:
        if self.create_pr and (self.branch or self.tag):
            raise ValueError("a pull request targets the default branch and has no tag: leave out --branch and --tag")
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
        default=None,
        description=(
            "Text file, or Hub dataset such as org/name@revision:files, for a calibrated recipe. [default: none]"
        ),
    )
    target: OptionalText = Field(
        default=None, description="Hub repository to publish the release to. [default: none, not published]"
    )
    revision: OptionalText = Field(
        default=None, description="Branch, tag, or commit of the model repository. [default: the default branch]"
    )
    refresh: Texts = Field(
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
            "revision": self.revision,
            "recipe": self.recipe,
            "max_seq_len": self.export.max_seq_len,
            "device": self.evaluation.device,
            "cluster": self.evaluation.cluster,
            "custom_kv_cache": self.export.custom_kv_cache,
            "bidirectional_images": self.export.bidirectional_images,
            "workers": self.evaluation.workers,
            "calibration": self.calibration,
            "device_report": self.evaluation.device_report,
        }

    def local_workers(self) -> int:
        """Return how many models the evaluation loads on this machine at a time."""
        return self.evaluation.workers if self.evaluation.cluster is None else 1

    def quantization_device(self) -> Literal["cpu", "cuda"]:
        """Return the device on which the checkpoint is quantized, always on this machine.

        Results are byte-identical on every machine unless a GPU is requested, which sums in a different order.
        """
        return "cuda" if self.evaluation.device == "cuda" and self.evaluation.cluster is None else "cpu"

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = self.evaluation.benchmark_names(self.model in BUILTIN)
        if not names:
            raise ValueError(f"--tasks is empty: use {', '.join(BENCHMARKS)}, or an lm-eval task")
        for text in self.evaluation.dataset:
            name, sign, source = text.partition("=")
            if not sign or not source or name not in names:
                raise ValueError(
                    f"--dataset {text!r}: must be BENCHMARK=SOURCE, for one of the tasks {', '.join(names)}"
                )
        if unknown := sorted(set(self.gate.drops()) - set(names)):
            raise ValueError(f"--limit-drop names {unknown[0]!r}, which is not one of the tasks {', '.join(names)}")
        stages = stage_names(names)
        if unknown := [name for name in self.refresh if name not in stages]:
            raise ValueError(f"--refresh: there is no stage {unknown[0]!r}, only {', '.join(map(repr, stages))}")
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target and self.offline:
            raise ValueError("a release cannot be published offline: leave out --target or --offline")
        if self.target and self.target.strip("/").lower() == self.model.strip("/").lower():
            raise ValueError(
                "--target is the model itself, whose weights would be overwritten: choose another repository"
            )
        return self


@Parameter(name="*", group=Group.create_ordered("Diagnosis"))
class DiagnoseOptions(Options):
    """The model, the recipe, and the text of a diagnosis."""

    model: ModelName = Field(
        default="tiny-gemma3",
        description="Hub repository such as google/gemma-3-4b-it, local directory, or the built-in tiny-gemma3.",
    )
    recipe: Text = Field(
        default="HQQ-INT8-INT4", description="Name of a built-in recipe, or path to a JSON recipe file."
    )
    revision: OptionalText = Field(
        default=None, description="Branch, tag, or commit of the model repository. [default: the default branch]"
    )
    calibration: OptionalText = Field(
        default=None, description="Text to calibrate on, for a calibrated recipe, as in a run. [default: none]"
    )
    text: OptionalText = Field(
        default=None,
        description=f"Text to measure on: a file, such as ./a.txt, or a mirror of {WIKITEXT}. [default: as in a run]",
    )
    text_windows: Count = Field(
        default=2, description="Number of windows of that text; the first 256 tokens of each are used."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Device; auto: a GPU if there is one.")
    refresh: Texts = Field(
        default=(), description="Stages to run again even if their results are cached. [default: none]"
    )
    offline: Flag = Field(
        default=False, description="Use only what is already in the store, without contacting the Hub."
    )

    def run_options(self) -> RunOptions:
        """Return the options of a run on the same model, recipe, and text."""
        evaluation = EvaluationOptions(text=self.text, text_windows=self.text_windows, device=self.device)
        # A run has no stage named diagnose; leaving it out is safe, because it writes little.
        refresh = tuple(name for name in self.refresh if name != "diagnose")
        names = ("model", "recipe", "revision", "calibration", "offline")
        return RunOptions(evaluation=evaluation, refresh=refresh, **{name: getattr(self, name) for name in names})

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        # A diagnosis uses the recipe without distillation.
        stages = [*(name for name in QUANTIZING if name != "distill"), "diagnose"]
        if unknown := [name for name in self.refresh if name not in stages]:
            raise ValueError(f"--refresh: there is no stage {unknown[0]!r}, only {', '.join(map(repr, stages))}")
        return self


def stage_names(benchmarks: list[str]) -> list[str]:
    """Return the names of all stages of a run, in order."""
    names = [*QUANTIZING, "smoke", "export"]
    names += ["download_reference", "fidelity_reference_base", "fidelity_reference"]
    names += ["fidelity_base", "fidelity_quantized", "fidelity_program", "fidelity"]
    for benchmark in benchmarks:
        names += [f"download_{benchmark}", f"record_{benchmark}"]
        names += [f"{stage}_{benchmark}_{column}" for column in ALL_COLUMNS for stage in ("answer", "evaluate")]
    return [*names, "verify_tokenizer", "verify", "gate", "card"]


def command_line(
    options: RunOptions,
    model: ResolvedModel,
    datasets: Mapping[str, ResolvedDataset],
    text: ResolvedDataset,
    recipe_hash: str,
    calibration: ResolvedDataset | None = None,
    reference: ResolvedModel | None = None,
) -> str:
    """Return the command that reproduces the release, with every revision pinned.

    Local files and directories become placeholders, with their digests in comments.

    Args:
        options: The run's options.
        model: The resolved model.
        datasets: The resolved datasets by benchmark.
        text: The resolved text.
        recipe_hash: The hash of the recipe.
        calibration: The resolved calibration text or dataset.
        reference: The resolved reference model.
    """
    pinned_values: dict[str, object] = {"model": model.name, "tasks": ",".join(datasets)}
    pinned_values["revision"] = model.revision if model.on_hub else None
    comment = ""
    if not model.on_hub and not model.fixture:
        pinned_values["model"] = MODEL_PLACEHOLDER
        comment += f"  # {MODEL_PLACEHOLDER}: the directory whose files have the digest {model.revision}"
    if options.recipe.endswith(".json"):
        pinned_values["recipe"] = RECIPE_PLACEHOLDER
        comment += f"  # {RECIPE_PLACEHOLDER}: the recipe with the hash {recipe_hash}"
    pinned_values["text"] = _pin(text)
    if not text.on_hub and not text.fixture:
        pinned_values["text"] = TEXT_PLACEHOLDER
        comment += f"  # {TEXT_PLACEHOLDER}: the text file with the digest {text.revision}"
    sources = []
    for benchmark, dataset in datasets.items():
        source = _pin(dataset)
        if not dataset.on_hub and not dataset.fixture:
            source = f"{DATASET_PLACEHOLDER}_{benchmark.upper()}"
            comment += f"  # {source}: the directory whose files have the digest {dataset.revision}"
        sources.append(f"{benchmark}={source}")
    pinned_values["dataset"] = tuple(sources)
    if calibration is not None and calibration.on_hub:
        files = parse_source(options.calibration or "").files
        pinned_values["calibration"] = f"{calibration.name}@{calibration.revision}" + (f":{files}" if files else "")
    elif calibration is not None:
        pinned_values["calibration"] = CALIBRATION_PLACEHOLDER
        comment += f"  # {CALIBRATION_PLACEHOLDER}: the text with the SHA-256 {calibration.revision}"
    if reference is not None:
        pinned_values["reference_model"] = _pin(reference)
        if not reference.on_hub and not reference.fixture:
            pinned_values["reference_model"] = REFERENCE_PLACEHOLDER
            comment += f"  # {REFERENCE_PLACEHOLDER}: the directory whose files have the digest {reference.revision}"
    if options.evaluation.device == "cuda" and options.quantization_device() == "cpu":
        comment += "  # with --cluster, so that only the evaluation runs on a GPU"
    if options.evaluation.device_report is not None:
        pinned_values["device_report"] = DEVICE_REPORT_PLACEHOLDER
        comment += f"  # {DEVICE_REPORT_PLACEHOLDER}: the device_report object in metrics.json"
    words = ["quantize-gemma", "run"]
    for name, field, value in _release_options(options):
        value = pinned_values.get(name, value)
        if value == field.default and (value is None or name not in ALWAYS_SHOWN):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else ["none" if value is None else str(value)])]
    return shlex.join(words) + comment


def _pin(source: ResolvedDataset | ResolvedModel) -> str:
    """Return the name of a dataset or model, with its commit if it is on the Hub."""
    return f"{source.name}@{source.revision}" if source.on_hub else source.name


def _release_options(options: RunOptions) -> Iterator[tuple[str, FieldInfo, object]]:
    """Yield the name, field, and value of each option that affects what is in a release."""
    for group in (options, options.evaluation, options.export, options.gate, options.publishing):
        for name, field in type(group).model_fields.items():
            value = getattr(group, name)
            if name not in NOT_IN_RELEASE and not isinstance(value, Options):
                yield name, field, value

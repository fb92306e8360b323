"""The benchmarks on which a model can be evaluated, one row each. To add a benchmark, add a row.

Any other lm-eval task or group with a single dataset works, too: find_benchmark() reads its YAML file.
"""

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# The kinds of requests that lm-eval's tasks make, by their output_type.
KINDS = {
    "multiple_choice": "loglikelihood",
    "loglikelihood": "loglikelihood",
    "loglikelihood_rolling": "loglikelihood_rolling",
    "generate_until": "generate_until",
}
# The columns of the evaluation. The last one is the quantized checkpoint in float32 without quantized activations. It
# is not released, but shows how many of the program's differences activation quantization explains.
ALL_COLUMNS = ("base", "quantized", "program", "no_act_quant")
# The metrics that lm-eval returns in percent, unlike all others.
PERCENT_METRICS = {
    *("bleu", "chrf", "chrf++", "ter", "exact"),
    *(f"{name}_{statistic}" for name in ("bleu", "rouge1", "rouge2", "rougeL") for statistic in ("max", "diff")),
}
# The module with the functions that check datasets.
DATASETS = "quantize_gemma.tasks.models.datasets"
# The files that a dataset's repository may consist of.
DATA_FILES = ("README.md", "*.parquet", "*.json", "*.jsonl", "*.csv", "*.txt")


@dataclass(frozen=True)
class Resource:
    """A ZIP archive that a task needs besides its dataset. It is not fetched if the dataset's source has its files.

    Attributes:
        url: The archive's URL.
        sha256: Its SHA-256.
        member: The folder in the archive that is needed.
        folder: The folder's path in the dataset's directory; hidden, because all other files are data.
    """

    url: str
    sha256: str
    member: str
    folder: str


# The sentence tokenizer that IFEval needs.
PUNKT = Resource(
    url=(
        "https://raw.githubusercontent.com/nltk/nltk_data/550b6625bcef1f2abff2ff770a5a0d272c9c6b2a/packages/tokenizers/"
        "punkt_tab.zip"
    ),
    sha256="e57f64187974277726a3417ca6f181ec5403676c717672eef6a748a7b20e0106",
    member="punkt_tab/english/",
    folder=".nltk_data/tokenizers/punkt_tab/english",
)


class RequestInputs(TypedDict):
    """The fields that a benchmark's requests depend on; see Benchmark."""

    task: str
    num_fewshot: int | None
    chat_template: bool


class ScoreInputs(RequestInputs):
    """The fields that a benchmark's scores depend on; see Benchmark."""

    name: str
    metric: str
    metrics: list[str]


class FileInputs(TypedDict):
    """The files that a benchmark needs; see Benchmark."""

    files: list[str]
    skipped_files: list[str]
    resources: list[dict[str, str]]
    check: str


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: Its name in options, stages, checks, and metrics.json.
        title: Its name on the card.
        task: The lm-eval task or group.
        dataset: The repository of its dataset on the Hub, pinned to a commit when a run starts.
        metric: The headline metric, with its filter if that is not "none", as in "exact_match,strict-match".
        metrics: Further metrics that the card shows, with their titles.
        kind: The kind of its requests: "loglikelihood", "loglikelihood_rolling", or "generate_until".
        higher_is_better: Whether a larger value of the headline metric is better.
        chance: The headline metric of random guessing; None to derive it from the number of choices, if there are any.
        num_fewshot: The number of examples in a prompt; None for the task's own.
        chat_template: Whether prompts are in the model's chat template, if it has one.
        max_drop: The default limit on the drop of the headline metric, in points; None for no limit.
        program_samples: The maximum size of the program's sample; None for the value in the options.
        needs_images: Whether its prompts have images, which a text-only model cannot read.
        files: Patterns of the dataset's files.
        skipped_files: Patterns of files that are not needed.
        check: The function that checks the layout of a dataset's files, as "module:name"; see datasets.py.
        resources: Other files that the task needs.
        fixture: The built-in dataset with the same layout, if there is one.
        task_type: The task type in the Hub's model index.
        is_own_task: Whether the task is part of quantize-gemma, so that the lm_eval command line does not have it.
        words: A description for the card of how it is measured.
    """

    name: str
    title: str
    task: str
    dataset: str
    metric: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    kind: str = "loglikelihood"
    higher_is_better: bool = True
    chance: float | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    max_drop: float | None = 5.0
    program_samples: int | None = None
    needs_images: bool = False
    files: tuple[str, ...] = DATA_FILES
    skipped_files: tuple[str, ...] = ()
    check: str = f"{DATASETS}:check_files"
    resources: tuple[Resource, ...] = ()
    fixture: str | None = None
    task_type: str = "text-generation"
    is_own_task: bool = False
    words: str = ""

    def columns(self) -> tuple[str, ...]:
        """Return the columns that are measured.

        Perplexities are not measured on the program: its windows would be shorter, so they could not be compared.
        """
        if self.kind == "loglikelihood_rolling":
            return ALL_COLUMNS[:2]
        return ALL_COLUMNS if self.kind == "loglikelihood" else ALL_COLUMNS[:3]

    def request_inputs(self) -> RequestInputs:
        """Return the fields that its requests depend on, besides the dataset and the chat template."""
        return {
            "task": self.task,
            "num_fewshot": self.num_fewshot,
            "chat_template": self.chat_template,
        }

    def patterns(self) -> tuple[str, ...]:
        """Return patterns of the files that a source of the dataset may contain: data, and resources."""
        return (*self.files, *(f"{resource.folder}/*" for resource in self.resources))

    def file_inputs(self) -> FileInputs:
        """Return the files in the dataset's repository, and other resources, that the benchmark needs."""
        return {
            "files": list(self.patterns()),
            "skipped_files": list(self.skipped_files),
            "resources": [asdict(resource) for resource in self.resources],
            "check": self.check,
        }

    def card_inputs(self) -> JsonObject:
        """Return the benchmark's entry in metrics.json, which the card shows."""
        return {
            "title": self.title,
            "metric": self.metric,
            "metrics": dict(self.metrics),
            "higher_is_better": self.higher_is_better,
            "chance": self.chance,
            "task_type": self.task_type,
            "is_own_task": self.is_own_task,
            "words": self.words,
        }

    def score_inputs(self) -> ScoreInputs:
        """Return the fields that its scores depend on, besides the answers."""
        return {**self.request_inputs(), "name": self.name, "metric": self.metric, "metrics": list(self.metrics)}


BENCHMARKS = {
    row.name: row
    for row in (
        Benchmark(
            name="mmlu",
            title="MMLU",
            task="mmlu",
            dataset="cais/mmlu",
            metric="acc",
            chance=0.25,
            # Skip the configurations that contain all subjects a second time.
            files=("README.md", "*/test-*.parquet", "*/validation-*.parquet", "*/dev-*.parquet"),
            skipped_files=("all/*", "auxiliary_train/*"),
            check=f"{DATASETS}:check_mmlu",
            fixture="mmlu-mini",
            task_type="multiple-choice",
            words="The evaluation is zero-shot.",
        ),
        Benchmark(
            name="chartqa",
            title="ChartQA",
            task="chartqa",
            dataset="HuggingFaceM4/ChartQA",
            metric="relaxed_overall",
            metrics={
                "relaxed_human": "human",
                "relaxed_augmented": "augmented",
                "normalized_overall": "normalized",
            },
            kind="generate_until",
            num_fewshot=0,
            chat_template=True,
            max_drop=10.0,
            program_samples=50,
            needs_images=True,
            # Skip the other splits, which are ten times as large.
            files=("README.md", "data/test-*.parquet"),
            check=f"{DATASETS}:check_chartqa",
            fixture="chartqa-mini",
            task_type="visual-question-answering",
            is_own_task=True,
            words=(
                'It follows the lmms-eval protocol: the prompt "Answer the question with a single word.", at most 16 '
                "new tokens, and relaxed accuracy. Normalized accuracy also accepts equivalent forms of an answer, "
                'such as "two" for 2. The task is part of quantize-gemma and uses the hf-multimodal model of '
                "lm-evaluation-harness; the command in the next section runs it."
            ),
        ),
        Benchmark(
            name="hellaswag",
            title="HellaSwag",
            task="hellaswag",
            dataset="Rowan/hellaswag",
            metric="acc_norm",
            metrics={"acc": "not normalized by length"},
            chance=0.25,
            num_fewshot=0,
            task_type="multiple-choice",
        ),
        Benchmark(
            name="arc_challenge",
            title="ARC Challenge",
            task="arc_challenge",
            dataset="allenai/ai2_arc",
            metric="acc_norm",
            metrics={"acc": "not normalized by length"},
            chance=0.25,
            num_fewshot=0,
            files=("README.md", "ARC-Challenge/*.parquet"),
            task_type="multiple-choice",
        ),
        Benchmark(
            name="gsm8k",
            title="GSM8K",
            task="gsm8k",
            dataset="openai/gsm8k",
            metric="exact_match,flexible-extract",
            metrics={"exact_match,strict-match": "strict match"},
            kind="generate_until",
            num_fewshot=5,
            max_drop=10.0,
            words="The last number in the response counts as the answer; strict match requires it after ####.",
            program_samples=50,
            files=("README.md", "main/*.parquet"),
            fixture="gsm8k-mini",
        ),
        Benchmark(
            name="ifeval",
            title="IFEval",
            words="It is the share of prompts for which the model follows every instruction, checked strictly.",
            task="ifeval",
            dataset="google/IFEval",
            metric="prompt_level_strict_acc",
            metrics={
                "inst_level_strict_acc": "by instruction",
                "prompt_level_loose_acc": "loose",
                "inst_level_loose_acc": "loose, by instruction",
            },
            kind="generate_until",
            num_fewshot=0,
            chat_template=True,
            max_drop=10.0,
            program_samples=50,
            resources=(PUNKT,),
        ),
        Benchmark(
            name="wikitext",
            title="WikiText-2",
            words="It is the perplexity per word on the test split.",
            task="wikitext",
            dataset="EleutherAI/wikitext_document_level",
            metric="word_perplexity",
            metrics={"byte_perplexity": "byte perplexity", "bits_per_byte": "bits per byte"},
            kind="loglikelihood_rolling",
            higher_is_better=False,
            num_fewshot=0,
            max_drop=10.0,
            files=("README.md", "wikitext-2-raw-v1/*.parquet"),
        ),
    )
}


# The benchmarks of the published card, and those with built-in fixtures.
DEFAULT_TASKS = ("mmlu", "chartqa")
FIXTURE_TASKS = tuple(row.name for row in BENCHMARKS.values() if row.fixture)


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark: its row, or one created from lm-eval's YAML file for a task or group.

    Raises:
        UserError: lm-eval has no such task, or the task is not supported.
    """
    return BENCHMARKS[name] if name in BENCHMARKS else _describe_task(name)


def _describe_task(name: str) -> Benchmark:
    manager = _task_manager()
    if name not in manager.task_index or "/" in name:
        raise UserError(
            f"there is no benchmark or lm-eval task {name!r}: use {', '.join(BENCHMARKS)}, or a name that "
            "`lm_eval ls tasks` shows"
        )
    configs = _leaf_tasks(manager, name)
    datasets = sorted({str(config.get("dataset_path")) for config in configs})
    kinds = sorted({str(config.get("output_type", "generate_until")) for config in configs})
    metrics = {_first_metric(config) for config in configs}
    if len(datasets) != 1 or "/" not in datasets[0]:
        raise UserError(f"the lm-eval task {name} does not have exactly one dataset on the Hub ({', '.join(datasets)})")
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise UserError(f"the lm-eval task {name} makes requests of an unsupported kind: {', '.join(kinds)}")
    if len(metrics) != 1:
        raise UserError(
            f"the tasks of {name} do not have the same first metric: "
            + ", ".join(sorted(metric for metric, _ in metrics))
        )
    for config in configs:
        if reason := _unsupported(config):
            raise UserError(f"the lm-eval task {config.get('task', name)} {reason}")
    metric, higher_is_better = metrics.pop()
    return Benchmark(
        name=name,
        title=name,
        task=name,
        dataset=datasets[0],
        metric=metric,
        kind=KINDS[kinds[0]],
        higher_is_better=higher_is_better,
    )


@functools.cache
def _task_manager() -> "TaskManager":
    """Return the index of lm-eval's tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unsupported(config: dict[str, Any]) -> str | None:
    """Return why a task is not supported; None if it is."""
    if "doc_to_image" in config or "doc_to_audio" in config:
        return "has images or audio: the only such benchmark that is supported is chartqa"
    if config.get("unsafe_code"):
        return "runs code that the model writes, which is not supported"
    if config.get("repeats", 1) != 1 or (config.get("generation_kwargs") or {}).get("do_sample"):
        return "samples its responses: only greedy generation of one response per document is supported"
    return None


def _leaf_tasks(manager: "TaskManager", name: str) -> list[dict[str, object]]:
    """Return the configurations of the tasks that a task, a group, or a tag stands for."""
    entry = manager.task_index[name]
    members = sorted(entry.tags) if entry.cfg is None else entry.cfg["task"]
    # SCROLLS's tasks have a "group", too, but only a group has a list.
    if not isinstance(members, list):
        return [dict(entry.cfg or {})]
    leaves: list[dict[str, object]] = []
    for member in members:
        if isinstance(member, str) and member in manager.task_index:
            leaves += _leaf_tasks(manager, member)
        elif isinstance(member, dict):
            base = manager.task_index.get(str(member.get("task")))
            leaves.append({**((base.cfg or {}) if base else {}), **member})
        else:
            raise UserError(f"the lm-eval group {name} has a member that cannot be read: {member}")
    return leaves


def _first_metric(config: dict[str, Any]) -> tuple[str, bool]:
    """Return the name of a task's headline metric, with its filter, and whether a larger value is better."""
    metric_list = config.get("metric_list") or [{"metric": "acc", "higher_is_better": True}]
    if config.get("output_type") == "loglikelihood":
        # LAMBADA's perplexity comes first, but it is not a mean of document scores, so a sample could not be compared.
        metric_list = sorted(metric_list, key=lambda metric: metric["metric"] != "acc")
    filters = config.get("filter_list") or [{"name": "none"}]
    suffix = "" if filters[0]["name"] == "none" else f",{filters[0]['name']}"
    # A function of the task's own is given by its path, but its name is that of the metric.
    name = str(metric_list[0]["metric"]).rpartition(".")[2]
    return f"{name}{suffix}", bool(metric_list[0].get("higher_is_better", "perplexity" not in name))


def is_data_file(name: str, files: Sequence[str], skipped_files: Sequence[str]) -> bool:
    """Tell whether a file of a dataset's repository matches one of the patterns, and none of the skipped ones."""

    def matches(patterns: Sequence[str]) -> bool:
        # In fnmatch, a star matches slashes, too.
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return ".." not in name.split("/") and matches(files) and not matches(skipped_files)

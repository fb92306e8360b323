"""A mistake is reported within seconds: one sentence, exit code 2, nothing left behind."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.runtime import store, store_layout
from tests.conftest import CommandLine
from tests.text_only import write_text_only

pytestmark = pytest.mark.slow


@pytest.fixture
def fresh(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "store", tmp_path / "prefect")


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def write_recipe(folder: Path, of: str, **changes: Any) -> Path:
    from quantize_gemma.tasks.models.recipe import load_recipe

    recipe = load_recipe("HQQ-INT8-INT4").to_json()
    next(rule for rule in recipe["rules"] if rule["match"] == of).update(changes)
    path = folder / "mine.json"
    path.write_text(json.dumps({**recipe, "name": "mine"}))
    return path


def enlarge(model: Path, weight_bytes: int) -> None:
    """Claim an embedding of this size, in a sparse file."""
    from quantize_gemma.tasks.models.checkpoint import read_header, write_header

    tensors = {name: (t.dtype, t.shape) for name, t in read_header(model / "model.safetensors").items()}
    tensors["language_model.model.embed_tokens.weight"] = ("BF16", [weight_bytes // 2 // 64, 64])
    with (model / "model.safetensors").open("wb") as stream:
        write_header(stream.fileno(), tensors, {"format": "pt"})


def put_nan(model: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(model / "model.safetensors"), framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    tensors["language_model.model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no safetensors": (lambda model: (model / "model.safetensors").unlink(), ["no .safetensors file"]),
    "truncated": (lambda model: os.truncate(model / "model.safetensors", 70_000), ["model.safetensors", "truncated"]),
    "corrupt": (lambda model: (model / "model.safetensors").write_bytes(b"x" * 5000), ["model.safetensors", "corrupt"]),
    "not Gemma 3": (lambda model: edit_config(model, architectures=["LlamaForCausalLM"]), ["LlamaForCausalLM"]),
    "quantized already": (
        lambda model: edit_config(model, quantization_config={"quant_method": "torchao"}),
        ["quantized already", "torchao"],
    ),
    "NaN": (put_nan, ["NaN", "language_model.model.layers.2.mlp.up_proj.weight"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_named_and_nothing_is_left_behind(
    damage: str, fresh: CommandLine, tiny_copy: Callable[[], Path]
) -> None:
    model = tiny_copy()
    work, words = DAMAGES[damage]
    work(model)
    data = ("--text", "tiny-text", "--dataset", "mmlu=mmlu-mini", "chartqa=chartqa-mini")
    check_rejected(fresh, words, "--model", str(model), *data)


def test_too_little_disk_space_is_reported_with_both_sizes(tiny_copy: Callable[[], Path], tmp_path: Path) -> None:
    from quantize_gemma.tasks.check import disk_needed

    # /dev/shm is no larger than memory, and a run writes several times the model's size: this model fits in memory, but
    # not on that disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        model = tiny_copy()
        enlarge(model, 10**12 * shutil.disk_usage(disk).total // disk_needed(10**12))
        command_line = CommandLine(Path(disk) / "store", tmp_path / "prefect")
        check_rejected(command_line, ["GB", "free", "QUANTIZE_GEMMA_HOME"], "--model", str(model))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "INT2"], ["INT2", "HQQ-INT8-INT4"]),
        (["--model", "/no/such/model"], ["/no/such/model", "tiny-gemma3"]),
        (["--max-seq-len", "4096"], ["--max-seq-len is 4,096", "2,048"]),
        (["--max-seq-len", "0"], ["max-seq-len", "0"]),
        (["--max-seq-len", "-5"], ["max-seq-len", "-5"]),
        (["--limit", "none"], ["limit", "none"]),
        (["--limit", "1" + "0" * 30], ["limit", "1000000"]),
        (["--batch-size", "much"], ["batch-size", "much"]),
        (["--limit-drop", "mmlu=inf"], ["--limit-drop", "mmlu=inf", "BENCHMARK=POINTS"]),
        (["--model", "a\nb"], ["model", "line breaks"]),
        (["--limit", "0"], ["limit", "0", "greater than or equal to 1"]),
        (["--no-custom-sdpa"], ["pass --no-custom-kv-cache, too"]),
        (["--no-custom-kv-cache"], ["bidirectional_images requires custom_kv_cache: pass --no-bidirectional-images"]),
        (
            ["--no-custom-kv-cache", "--no-bidirectional-images"],
            ["sliding window", "64 tokens: lower --max-seq-len, or turn on --custom-kv-cache"],
        ),
        (["--tasks", "mmul"], ["no benchmark or lm-eval task 'mmul'", "mmlu, chartqa, hellaswag"]),
        (["--dataset", "mmlu=./nowhere"], ["directory ./nowhere for the dataset of MMLU does not exist"]),
        (["--dataset", "boolq=org/mirror"], ["boolq=org/mirror", "one of the tasks mmlu, chartqa, gsm8k"]),
        (["--model", "me/gemma", "--target", "Me/gemma"], ["--target is the model itself"]),
        (["--device-report", "./phone.json"], ["phone.json is missing", "python -m benchmarks.device_report"]),
        (["--revision", "v2"], ["'tiny-gemma3' is the directory", "leave out --revision 'v2'"]),
        (["--limit"], ["--limit", "requires an argument"]),
        (["tiny-gemma3"], ["unexpected argument: tiny-gemma3"]),
        (["--lmit", "5"], ["--lmit", "Did you mean --limit?"]),
        (["--keep", "*.png"], ["--keep was removed", "only removes files that an earlier release wrote"]),
        (["--benchmark", "cais/mmlu"], ["--benchmark was removed: use --dataset mmlu=NAME"]),
        (["--mmlu", "cais/mmlu"], ["--mmlu was removed: use --dataset mmlu=NAME"]),
        (["--mmlu-revision=main"], ["--mmlu-revision was removed: use --dataset mmlu=NAME@REVISION"]),
        (["--charts", "none"], ["--charts was removed: use --dataset chartqa=NAME, or --tasks without chartqa"]),
        (["--chartqa", "none"], ["--chartqa was removed: use --dataset chartqa=NAME, or --tasks without chartqa"]),
        (["--chartqa-revision", "v1"], ["--chartqa-revision was removed: use --dataset chartqa=NAME@REVISION"]),
        (["--max-mmlu-drop", "2"], ["--max-mmlu-drop was removed: use --limit-drop mmlu=POINTS"]),
        (["--program-questions", "7"], ["--program-questions was removed: use --program-samples"]),
        (["--backend", "xnnpack"], ["--backend was removed", "always lowered to XNNPACK"]),
        (["--dtype", "float32"], ["--dtype was removed", "always compute in float32"]),
        (["--refresh", "quantise"], ["refresh", "quantise", "'quantize'"]),
        (["--cluster", "localhost:8786"], ["'localhost:8786'", "tcp://host:8786 (Dask)", "ray://host:10001 (Ray)"]),
        (["--cluster", "tcp://127.0.0.1:1"], ["tcp://127.0.0.1:1", "refused", "start the cluster"]),
        (["--cluster", "tcp://127.0.0.1:99999"], ["tcp://127.0.0.1:99999", "fix the address"]),
        (["--cluster", "ray://127.0.0.1:10001"], ["ray://127.0.0.1:10001", "prefect-ray", "install"]),
    ],
)
def test_a_bad_argument_is_named(arguments: list[str], words: list[str], fresh: CommandLine) -> None:
    check_rejected(fresh, words, *arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--recipe", "INT2"], "there is no recipe 'INT2'"),
        (["--limit", "0"], "--limit '0': Input should be greater than or equal to 1"),
        (["--lmit", "5"], "Unknown option: --lmit. Did you mean --limit?"),
        (["--model", "/no/such/model"], "there is no model at '/no/such/model'"),
    ],
)
def test_json_is_printed_whatever_is_wrong(arguments: list[str], error: str, fresh: CommandLine) -> None:
    outcome = fresh("run", *arguments, "--json")
    assert outcome.code == 2
    (line,) = outcome.stdout.splitlines()
    summary = json.loads(line)
    assert summary["error"].startswith(error)
    assert outcome.stderr == f"quantize-gemma: {summary.pop('error')}\n"
    assert summary == {
        "release": None,
        "gate": None,
        "metrics": {},
        "stages": [],
        "published": None,
        "publication": None,
    }


def test_an_unexpected_error_is_in_the_json_and_its_traceback_on_stderr(fresh: CommandLine) -> None:
    outcome = fresh("run", "--json", PREFECT_SERVER_LOGGING_LEVEL="LOUD")
    assert outcome.code == 1
    assert "LOUD" in outcome.summary["error"]
    assert "Traceback" in outcome.stderr


def test_a_rule_that_matches_no_module_is_named(fresh: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, of="vision.fc2", match="re:experts")
    check_rejected(fresh, ["re:experts", "matches no module"], "--recipe", str(recipe))


def test_a_group_size_that_does_not_divide_names_the_module(fresh: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, of="vision.fc2", group_size=32)
    check_rejected(fresh, ["32", "112", "fc2"], "--recipe", str(recipe))


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command_line = CommandLine(tmp_path / "file" / "store", tmp_path / "prefect")
    outcome = command_line("run")
    assert outcome.code == 2
    assert "not writable" in outcome.stderr


def check_rejected(command_line: CommandLine, words: list[str], *arguments: str) -> None:
    outcome = command_line("run", *arguments)
    assert outcome.code == 2, outcome.stderr
    assert outcome.stdout == ""
    sentence = outcome.stderr.strip().splitlines()[-1]
    assert sentence.startswith("quantize-gemma: ")
    for word in words:
        assert word in sentence
    assert "Traceback" not in outcome.stderr
    leftovers = [path for path in command_line.home.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    assert leftovers == []


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_working_directory_that_was_removed_is_rejected(verb: str, fresh: CommandLine, tmp_path: Path) -> None:
    outcome = in_a_removed_directory(tmp_path, fresh.environment(), verb)
    assert outcome.returncode == 2
    assert outcome.stderr == "quantize-gemma: the working directory was removed: change to one that exists\n"
    assert not fresh.home.exists()


def test_prune_works_if_the_working_directory_was_removed(fresh: CommandLine, tmp_path: Path) -> None:
    outcome = in_a_removed_directory(tmp_path, fresh.environment(), "prune")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("removed 0 unfinished directories")


def test_a_path_relative_to_a_working_directory_that_was_removed_is_rejected(
    fresh: CommandLine, tmp_path: Path
) -> None:
    outcome = in_a_removed_directory(tmp_path, {**fresh.environment(), "QUANTIZE_GEMMA_HOME": "store"}, "prune")
    assert outcome.returncode == 2
    assert outcome.stderr == (
        "quantize-gemma: the working directory was removed, but QUANTIZE_GEMMA_HOME is relative to it: set "
        "QUANTIZE_GEMMA_HOME to an absolute path\n"
    )


def in_a_removed_directory(folder: Path, environment: dict[str, str], verb: str) -> subprocess.CompletedProcess[str]:
    removed = folder / "removed"
    removed.mkdir()
    script = f"cd {removed} && rmdir {removed} && exec {Path(sys.executable).parent}/quantize-gemma {verb}"
    return subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)


def help_of(*verb: str) -> str:
    code = "import sys; from quantize_gemma.flows import cli; sys.argv[1:] = {words}; cli.main()"
    script = code.format(words=[*verb, "--help"])
    # Help does not need the libraries that take seconds to import.
    script = f"import sys; sys.modules.update(dict.fromkeys(['prefect', 'torch', 'transformers'])); {script}"
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return " ".join(outcome.stdout.replace("│", " ").split())


def test_help_explains_itself_without_importing_prefect_or_torch() -> None:
    text = help_of()
    assert "quantize-gemma run" in text
    assert "Exit codes" in text
    for verb in ("run", "check", "prune"):
        assert f" {verb} " in text


@pytest.mark.parametrize("verb", ["run", "check"])
def test_help_shows_every_option_in_its_group_with_its_default(verb: str) -> None:
    from quantize_gemma.flows.options import Options, RunOptions

    text = help_of(verb)
    groups: dict[str, Options] = {"Model": RunOptions()}
    groups |= {name.capitalize(): value for name, value in RunOptions() if isinstance(value, Options)}
    assert list(groups) == ["Model", "Evaluation", "Export", "Gate", "Publishing"]
    assert '[default: ""]' not in text
    for title, group in groups.items():
        assert f"─ {title} ─" in text
        for name, value in group:
            if isinstance(value, Options):
                continue
            (_, _, after) = text.partition(f" --{name.replace('_', '-')} ")
            assert after, name
            shown = after.partition("[default: ")[2].partition("]")[0]
            # Every default is shown; if the value alone is not clear, in words.
            assert shown == str(value) if value not in (None, (), "") else shown
            assert " --" not in after.partition("[default: ")[0].replace(f" --no-{name.replace('_', '-')}", "")


def test_check_reports_what_is_wrong_and_starts_nothing(fresh: CommandLine, tiny_copy: Callable[[], Path]) -> None:
    model = tiny_copy()
    good = fresh("check", "--model", str(model))
    assert good.code == 0
    assert "recipe: HQQ-INT8-INT4" in good.stdout
    put_nan(model)
    bad = fresh("check", "--model", str(model))
    assert bad.code == 2
    assert "up_proj.weight" in bad.stderr
    assert not fresh.home.exists()
    assert not fresh.prefect.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "mmlu,foo"), "no benchmark or lm-eval task 'foo'"),
        (("--dataset", "mmlu=./nowhere"), "the directory ./nowhere for the dataset of MMLU does not exist"),
        (("--text", "./nowhere"), "no text file ./nowhere"),
    ],
)
def test_check_names_a_missing_task_dataset_or_text(arguments: tuple[str, ...], words: str, fresh: CommandLine) -> None:
    outcome = fresh("check", *arguments)
    assert outcome.code == 2
    assert words in outcome.stderr


def test_check_rejects_tasks_that_the_model_cannot_do(fresh: CommandLine, tiny_copy: Callable[[], Path]) -> None:
    model = tiny_copy()
    text_only = write_text_only(model, model.with_name("text-only"))
    outcome = fresh("check", "--model", str(text_only), "--tasks", "chartqa")
    assert outcome.code == 2
    assert "the model is text-only, but ChartQA has images: choose other --tasks" in outcome.stderr
    (model / "chat_template.jinja").write_text("{{ '<bos>' if messages[0]['role'] == 'user' else raise_exception() }}")
    outcome = fresh("check", "--model", str(model))
    assert outcome.code == 2
    assert "does not accept the system message of ChartQA's prompts: leave chartqa out of --tasks" in outcome.stderr
    assert fresh("check", "--model", str(model), "--tasks", "mmlu").code == 0


def test_check_warns_of_a_long_local_distillation_even_if_a_cluster_evaluates(
    fresh: CommandLine, tmp_path: Path
) -> None:
    from quantize_gemma.tasks.models.recipe import load_recipe

    recipe = load_recipe("DISTILL-INT8-INT4").to_json()
    recipe["distillation"]["steps"] = 10**9
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    (tmp_path / "text.txt").write_text("words")
    arguments = ("--recipe", str(tmp_path / "mine.json"), "--calibration", str(tmp_path / "text.txt"))
    with socket.create_server(("127.0.0.1", 0)) as scheduler:
        cluster = ("--cluster", f"tcp://127.0.0.1:{scheduler.getsockname()[1]}", "--device", "cuda")
        outcome = fresh("check", *arguments, *cluster)
    assert outcome.code == 0, outcome.stderr
    assert "hours on this machine's CPU, but a stage is stopped after 24 hours" in outcome.stderr


def test_a_model_that_does_not_fit_into_memory_is_rejected_with_the_memory_that_it_needs(
    fresh: CommandLine, tiny_copy: Callable[[], Path]
) -> None:
    from quantize_gemma.tasks.runtime.machine import total_memory

    model = tiny_copy()
    # A run needs at least four bytes of memory per weight; the file has two.
    enlarge(model, total_memory() // 2)
    check_rejected(fresh, ["takes about", "GB of memory", "this machine has"], "--model", str(model))


def test_a_missing_cuda_device_is_an_error_before_anything_starts(
    fresh: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_rejected(fresh, ["no CUDA device", "pass --device auto or --device cpu"], "--device", "cuda")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("[]", ["no rule", "matches"]),
        ('["linear"]', ["linear", "must be an object"]),
        (
            '[{"match": "re:(", "weight": "int4", "group_size": 32, "activation": null, "algorithm": "affine"}]',
            ["re:("],
        ),
        ("7", ["rules must be a list of rules"]),
    ],
)
def test_a_malformed_recipe_is_named(rules: str, words: list[str], fresh: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(f'{{"name": "mine", "rules": {rules}}}')
    check_rejected(fresh, words, "--recipe", str(tmp_path / "mine.json"))


def test_prune_removes_unfinished_work_and_keeps_work_in_progress(fresh: CommandLine) -> None:
    dead = fresh.home / "quantize" / ".partial-0123456789abcdef-0" / "data"
    dead.mkdir(parents=True)
    whole = fresh.home / "quantize" / ("a" * 64) / "data"
    whole.mkdir(parents=True)
    (fresh.home / store_layout.MARK).touch()
    outcome = fresh("prune")
    assert outcome.code == 0
    assert "removed 1" in outcome.stdout
    assert not dead.exists()
    assert whole.exists()


@pytest.mark.parametrize("limit", ["-1", "nan", "inf", "much"])
@pytest.mark.parametrize("option", ["--max-gigabytes", "--max-age-days"])
def test_pruning_to_an_invalid_limit_is_rejected(option: str, limit: str, fresh: CommandLine) -> None:
    kept = store.produce("stage", "a" * 64, lambda _: {}, fresh.home)
    outcome = fresh("prune", option, limit)
    assert outcome.code == 2
    assert option in outcome.stderr
    assert limit in outcome.stderr
    assert store.load("stage", "a" * 64, fresh.home) == kept


@pytest.mark.parametrize("limit", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("parameter", ["max_gigabytes", "max_age_days"])
def test_the_prune_flow_rejects_invalid_limits(parameter: str, limit: float) -> None:
    from prefect.exceptions import ParameterTypeError

    from quantize_gemma.flows.prune_store import prune_store

    with pytest.raises(ParameterTypeError, match=parameter):
        prune_store.validate_parameters({parameter: limit})


def test_pruning_a_directory_that_is_not_a_store_is_rejected(fresh: CommandLine) -> None:
    project = fresh.home / "web" / "app"
    project.mkdir(parents=True)
    (project / "manifest.json").write_text("{}")
    outcome = fresh("prune", "--max-gigabytes", "0")
    assert outcome.code == 2
    assert f"{fresh.home} is not a quantize-gemma store, and nothing was removed" in outcome.stderr
    assert (project / "manifest.json").exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/api",
        "http://nowhere.invalid/api",
        "nonsense",
        "http://[::1/api",
        "http://127.0.0.1:port/api",
    ],
)
def test_an_api_that_cannot_be_reached_is_one_sentence(fresh: CommandLine, url: str) -> None:
    outcome = fresh("run", PREFECT_API_URL=url)
    assert outcome.code == 2
    (sentence,) = outcome.stderr.splitlines()
    assert url in sentence
    assert "PREFECT_API_URL" in sentence
    assert not fresh.home.exists() or not list(fresh.home.iterdir())

"""Cards with untrusted text: their metadata, Markdown structure, and Python code."""

import ast
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from quantize_gemma.tasks.card import render
from quantize_gemma.tasks.card.front_matter import front_matter
from quantize_gemma.tasks.models.device_report import Device, DeviceReport, DeviceSpeed, MeasuredProgram, Runner
from quantize_gemma.tasks.models.license import clean_license
from quantize_gemma.tasks.models.metrics import Metrics, Response, Score
from quantize_gemma.tasks.models.recipe import Recipe, Rule

# The places where untrusted text gets into a card. Our own text (versions, commands) is not listed.
PLACES = (
    "base_model",
    "base_revision",
    "dataset",
    "dataset_revision",
    "text",
    "text_revision",
    "recipe",
    "recipe_hash",
    "run_id",
    "run",
    "response",
    "text_prompt",
    "text_response",
    "image_response",
    "smoke_prompt",
    "category",
    "stage",
    "method",
    "file",
    "description",
    "pattern",
    "license",
    "license_name",
    "license_link",
    "device",
    "processor",
    "android",
    "runner",
    "executorch",
)


# Text with a special meaning in Markdown, HTML, YAML, Python, Jinja, or a formula.
PARTS = (
    *(
        "`",
        "```",
        "````\n# x\n",
        "|",
        "\n",
        "\r",
        "\n---\n",
        "---",
        "](x)",
        "[",
        "![i](j)",
        "<b>",
        "<!--",
        "-->",
        "&lt;",
    ),
    *("*", "**", "_", "~~", "#", "# ", "- ", "1. ", "> ", "=", "\\", "\\(", "$$", "'", '"', '"""', ": ", "@", "!", "&"),
    *(
        "{{",
        "%}",
        "\u2028",
        "\x00",
        "\ud800",
        "\u202e",
        "\u00ad",
        "    ",
        "\t",
        "é",
        "😀",
        "x",
        "y z",
        "null",
        "1e3",
        "on",
    ),
    *("javascript:a", "https://a.b/(c)", "www.a.b", "LICENSE", "mit", "re:", "~"),
)


def markdown_texts() -> st.SearchStrategy[str]:
    """Return a strategy for texts that could be mistaken for markup or code."""
    return st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=6).map("".join)


def card_with(metrics: Metrics, texts: dict[str, str]) -> tuple[str, Metrics]:
    """Return a card with one of these texts in each place, and its metrics.

    The texts are inserted after the metrics are parsed, because parsing rejects some of them.
    """
    score = Score(value=0.5, stderr=0.01)
    base, quantized, program = metrics.base, metrics.quantized, metrics.program
    info, base_score, quantized_score = metrics.benchmarks["mmlu"], base.scores["mmlu"], quantized.scores["mmlu"]
    assert base_score is not None
    assert quantized_score is not None
    dataset = replace(info.dataset, name=texts["dataset"], revision=texts["dataset_revision"])
    groups = {texts["category"]: score}
    smoke = replace(quantized.smoke, response=texts["response"], prompt=texts["smoke_prompt"])
    m = replace(
        metrics,
        **{name: texts[name] for name in ("base_model", "base_revision")},
        text=replace(metrics.text, name=texts["text"], revision=texts["text_revision"]),
        benchmarks={**metrics.benchmarks, "mmlu": replace(info, dataset=dataset)},
        **{name: texts[name] for name in ("recipe", "recipe_hash", "run_id")},
        commands={**metrics.commands, "run": texts["run"]},
        device_report=_device_report(texts),
        license={name: texts[name] for name in ("license", "license_name", "license_link")},
        fixture_model=False,
        stages={texts["stage"]: next(iter(metrics.stages.values()))},
        base=replace(base, scores={**base.scores, "mmlu": replace(base_score, groups=groups)}),
        quantized=replace(
            quantized, smoke=smoke, scores={**quantized.scores, "mmlu": replace(quantized_score, groups=groups)}
        ),
        program=replace(
            program,
            text=Response(prompt=texts["text_prompt"], response=texts["text_response"]),
            image=Response(prompt="What is it?", response=texts["image_response"]),
            delegation={texts["method"]: next(iter(program.delegation.values()))},
        ),
    )
    rule = Rule(f"re:{texts['pattern']}", weight="int4", group_size=32, activation="int8", algorithm="affine")
    recipe = Recipe(texts["recipe"], description=texts["description"], rules=(rule,))
    return render(m, recipe, {texts["file"]: 5}), m


def _device_report(texts: dict[str, str]) -> DeviceReport:
    speed = DeviceSpeed(
        prompt="text",
        runs=5,
        prompt_tokens=100,
        generated_tokens=156,
        load_seconds=None,
        first_token_seconds=0.25,
        prefill_tokens_per_second=400.0,
        decode_tokens_per_second=30.0,
        peak_rss_bytes=10**9,
    )
    return DeviceReport(
        schema_version=1,
        device=Device(
            model=texts["device"], processor=texts["processor"], android=texts["android"], memory_bytes=8 * 10**9
        ),
        runner=Runner(name=texts["runner"], executorch=texts["executorch"]),
        threads=4,
        program=MeasuredProgram(sha256="a" * 64, bytes=400),
        date="2026-11-26",
        measurements=[speed],
    )


def faults(metrics: Metrics, texts: dict[str, str]) -> list[str]:
    """Return what is wrong with a card that contains these texts, compared with one that contains harmless ones."""
    text, m = card_with(metrics, texts)
    # Which license fields are passed on is tested elsewhere.
    fields = dict.fromkeys(("license", "license_name", "license_link"), "") | clean_license(texts)
    if fields["license_name"]:
        fields["license_name"] = "word"
    baseline, _ = card_with(metrics, {**dict.fromkeys(PLACES, "word"), **fields})
    problems = []
    if _read_metadata(text) != front_matter(m):
        problems.append("the metadata differs from what was written")
    if _structure(text) != _structure(baseline):
        problems.append("the Markdown has a different structure")
    if any(re.match(r"(?!https?:|LICENSE|NOTICE)\w*:", target) for target in _targets(text)):
        problems.append("a link does not lead to a web page")
    if any(re.search(r"://|www\.", words, re.IGNORECASE) for words in _texts(text)):
        problems.append("a bare URL becomes a link on the Hub")
    problems += _python_faults(text, baseline, texts["base_model"])
    return problems


def _read_metadata(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "README.md"
        path.write_text(text, encoding="utf-8")
        return metadata_load(path)


def _tokens(text: str) -> list[Any]:
    body = text.split("\n---\n", 1)[1]
    # Keep text that is written as entities in separate tokens.
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("text_join").parse(body)


def _structure(text: str) -> list[tuple[str, str, int, tuple[str, ...]]]:
    """Return the blocks and spans of a card without their text."""
    return [
        (
            token.type,
            token.tag,
            token.level,
            tuple(child.type for child in token.children or [] if child.type not in ("text", "text_special")),
        )
        for token in _tokens(text)
    ]


def _targets(text: str) -> list[str]:
    return [
        str(child.attrs[name])
        for token in _tokens(text)
        for child in token.children or []
        for name in ("href", "src")
        if name in child.attrs
    ]


def _texts(text: str) -> list[str]:
    """Return the texts outside of links and code, without those written as entities."""
    texts, link_depth = [], 0
    for child in (child for token in _tokens(text) for child in token.children or []):
        link_depth += {"link_open": 1, "link_close": -1}.get(child.type, 0)
        if child.type == "text" and not link_depth:
            texts.append(child.content)
    return texts


def _python_faults(text: str, baseline: str, model: str) -> list[str]:
    def snippets(card: str) -> list[ast.Module]:
        return [ast.parse(token.content) for token in _tokens(card) if token.type == "fence" and token.info == "Py"]

    try:
        trees = snippets(text)
    except (SyntaxError, ValueError) as error:
        return [f"a snippet is not Python: {error}"]
    names = [
        node.value.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and ast.unparse(node.targets[0]) == "model_id"
    ]
    problems = [] if names == [model] else ["model_id is not the model"]
    if [_shape(tree) for tree in trees] != [_shape(tree) for tree in snippets(baseline)]:
        problems.append("a snippet has a different structure")
    return problems


def _shape(tree: ast.Module) -> str:
    """Return a program's syntax tree without its strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)

"""A card with texts of others in it, and what it comes to: its metadata, its Markdown's structure, its Python."""

import ast
import copy
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from quantize_gemma.tasks.card import render
from quantize_gemma.tasks.card.front_matter import front_matter
from quantize_gemma.tasks.models.license import clean_license

# Where text of others gets into a card. What is no text of others (versions, commands) is not here.
PLACES = (
    "base_model",
    "base_revision",
    "benchmark",
    "benchmark_revision",
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
)


# What has a meaning in Markdown, HTML, YAML, Python, Jinja or a formula.
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
    *("javascript:a", "https://a.b/(c)", "LICENSE", "mit", "re:", "~"),
)


def markdown_texts() -> st.SearchStrategy[str]:
    """Returns a strategy of texts that could be more than text."""
    return st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=6).map("".join)


def card_with(metrics: dict[str, Any], texts: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Returns a card with these texts, a place each, and its metrics."""
    m = copy.deepcopy(metrics)
    for place in ("base_model", "base_revision", "benchmark", "benchmark_revision", "recipe", "recipe_hash", "run_id"):
        m[place] = texts[place]
    m["commands"]["run"] = texts["run"]
    m["quantized"]["smoke"] |= {"response": texts["response"], "prompt": texts["smoke_prompt"]}
    m["program"]["text"] = {"prompt": texts["text_prompt"], "response": texts["text_response"]}
    m["program"]["image"] = {"prompt": "What is it?", "response": texts["image_response"]}
    for column in ("base", "quantized"):
        score = {"accuracy": 0.5, "stderr": 0.01}
        m[column]["mmlu"]["categories"] = {texts["category"]: score}
    m["stages"] = {texts["stage"]: next(iter(m["stages"].values()))}
    m["program"]["delegation"] = {texts["method"]: next(iter(m["program"]["delegation"].values()))}
    m["license"] = {name: texts[name] for name in ("license", "license_name", "license_link")}
    m |= {"fixture_model": False}
    rule = {"match": f"re:{texts['pattern']}", "weight": "int4", "group_size": 32, "activation": "int8"}
    recipe = {"name": texts["recipe"], "description": texts["description"], "rules": [rule | {"algorithm": "affine"}]}
    return render(m, recipe, {texts["file"]: 5}), m


def faults(metrics: dict[str, Any], texts: dict[str, str]) -> list[str]:
    """Returns what is wrong with a card that has these texts in it, compared with one that has harmless ones."""
    text, m = card_with(metrics, texts)
    # Which of the license's fields are passed on is another question.
    fields = dict.fromkeys(("license", "license_name", "license_link"), "") | clean_license(texts)
    if fields["license_name"]:
        fields["license_name"] = "word"
    harmless, _ = card_with(metrics, {**dict.fromkeys(PLACES, "word"), **fields})
    found = []
    if _read(text) != front_matter(m):
        found.append("other metadata are read than were written")
    if _structure(text) != _structure(harmless):
        found.append("the Markdown has another structure")
    if any(re.match(r"(?!https?:|LICENSE|NOTICE)\w*:", target) for target in _targets(text)):
        found.append("a link leads elsewhere than to a page")
    found += _python_faults(text, harmless, texts["base_model"])
    return found


def _read(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "README.md"
        path.write_text(text, encoding="utf-8")
        return metadata_load(path)


def _tokens(text: str) -> list[Any]:
    body = text.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)


def _structure(text: str) -> list[tuple[str, str, int, tuple[str, ...]]]:
    """Returns the blocks and spans of a card without their text."""
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


def _python_faults(text: str, harmless: str, model: str) -> list[str]:
    def snippets(card: str) -> list[ast.Module]:
        return [ast.parse(token.content) for token in _tokens(card) if token.type == "fence" and token.info == "Py"]

    try:
        ours = snippets(text)
    except (SyntaxError, ValueError) as error:
        return [f"a snippet is not Python: {error}"]
    names = [
        node.value.value
        for tree in ours
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and ast.unparse(node.targets[0]) == "model_id"
    ]
    found = [] if names == [model] else ["model_id is not the model"]
    if [_shape(tree) for tree in ours] != [_shape(tree) for tree in snippets(harmless)]:
        found.append("a snippet is another program")
    return found


def _shape(tree: ast.Module) -> str:
    """Returns a program without the texts in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)

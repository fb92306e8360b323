"""Render Mermaid diagrams while the site is built, so that a browser needs neither scripts nor network access.

An SVG has no colors of its own: assets/extra.css gives it those of the page, light or dark.
"""

import hashlib
import re
from typing import Any

import mermaidx
from mkdocs.config.defaults import MkDocsConfig

# Labels as SVG text: as HTML, they would inherit the page's line height and margins, for which they have no room.
SETTINGS = {"htmlLabels": False, "flowchart": {"htmlLabels": False, "nodeSpacing": 30, "rankSpacing": 30}}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let this module format the code blocks of the language mermaid."""
    fence = {"name": "mermaid", "class": "diagram", "format": render}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def render(source: str, language: str, class_name: str, *_: Any, **__: Any) -> str:
    """Return a diagram as an element of the page. Raises ValueError for an invalid diagram, which fails the build."""
    svg = mermaidx.render(source, config=SETTINGS).svg()
    if "Syntax error" in svg:
        raise ValueError(f"Mermaid cannot read this diagram:\n{source}")
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)
    # Use a unique id, because a page may have several diagrams, whose arrows refer to their markers by id.
    name = "diagram-" + hashlib.sha256(source.encode()).hexdigest()[:8]
    svg = svg.replace("my-svg", name)
    return f'<figure class="{class_name}">{svg}</figure>'

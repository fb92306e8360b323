"""Fail the build if a page loads something over the network: scripts, styles, fonts, and images are on the site."""

import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

# What a browser loads automatically; links in the text are not included.
EXTERNAL_REFERENCE = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//[^"']+|"""
    r"""<link\b(?![^>]*\brel=["'](?:canonical|prev|next)["'])[^>]*\bhref=["'](?:https?:)?//[^"']+"""
)


def on_post_page(output: str, page: Page, **_: Any) -> None:
    """Raise PluginError if a page loads something over the network."""
    if match := EXTERNAL_REFERENCE.search(output):
        raise PluginError(f"{page.file.src_uri} loads something over the network: {match[0]}")

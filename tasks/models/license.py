"""A model card's license fields, as far as they can be passed on: a bad card is no reason not to quantize."""

import re
from typing import Any
from urllib.parse import urlsplit

# Weights derived from Gemma's stay under its terms, whatever a local directory does not say.
GEMMA_TERMS = {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
# A file of the release, as the Hub allows.
FILE = re.compile(r"(LICENSE|NOTICE)[\w.-]{0,60}", re.ASCII)


def clean_license(card: Any) -> dict[str, str]:
    """Returns the license fields of a model card's metadata, those that are what they should be.

    None without a license; a name is one line of text, a link leads to a web page or to a file of the release.
    """
    fields = {name: card.get(name) for name in ("license", "license_name", "license_link")} if card else {}
    checks = {"license": _is_license, "license_name": _is_name, "license_link": _is_link}
    cleaned = {
        name: value for name, value in fields.items() if isinstance(value, str) and value and checks[name](value)
    }
    return cleaned if "license" in cleaned else {}


def _is_license(value: str) -> bool:
    return LICENSE.fullmatch(value) is not None


def _is_name(value: str) -> bool:
    return value.isprintable() and bool(value.strip()) and len(value) <= 200


def _is_link(value: str) -> bool:
    if FILE.fullmatch(value):
        return True
    if not re.fullmatch(r"https?://[!-~]{1,500}", value):
        return False
    try:
        parts = urlsplit(value)
        return bool(parts.hostname) and parts.username is None and "\\" not in value
    except ValueError:
        return False

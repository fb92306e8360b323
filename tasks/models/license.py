"""The license fields of a model card. Malformed fields are dropped, because a run should not fail because of them."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from huggingface_hub.repocard_data import CardData

# Weights derived from Gemma remain under its terms, even if a local directory does not mention them.
GEMMA_TERMS = {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
# A link to a file in the release, which the Hub allows.
FILE = re.compile(r"(LICENSE|NOTICE)[\w.-]{0,60}", re.ASCII)


def clean_license(card: "Mapping[str, object] | CardData | None") -> dict[str, str]:
    """Return the well-formed license fields of a model card's metadata; none if `license` itself is malformed.

    A name is one line of text; a link points to a web page or to a file in the release.
    """
    fields = {name: card.get(name) for name in ("license", "license_name", "license_link")} if card else {}
    checks = {"license": _is_license, "license_name": _is_name, "license_link": _is_link}
    valid_fields = {
        name: value for name, value in fields.items() if isinstance(value, str) and value and checks[name](value)
    }
    return valid_fields if "license" in valid_fields else {}


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

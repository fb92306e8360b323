"""A model or a dataset, resolved to a pinned revision before anything is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ResolvedDataset:
    """A built-in benchmark or a dataset on the Hub, at one revision.

    Attributes:
        name: The name in reports.
        revision: The commit on the Hub, or the digest of a directory's files.
        source: The repository on the Hub, or the directory, from which `download` reads it.
        fixture: Whether it is built in, so that its scores mean nothing.
        on_hub: Whether `source` is a repository on the Hub.
    """

    name: str
    revision: str
    source: str
    fixture: bool
    on_hub: bool


@dataclass(frozen=True)
class ResolvedModel(ResolvedDataset):
    """A built-in model, a local directory, or a model on the Hub, at one revision.

    Attributes:
        license: The license fields of its model card, cleaned; see license.py.
        weight_bytes: The size of its weight files in bytes.
        weights: The number of its weights; a lower bound if only their size is known.
        multimodal: Whether it reads images; True if this is not known before the download.
    """

    license: Mapping[str, str]
    weight_bytes: int
    weights: int
    multimodal: bool

"""Stages are called here as functions; in a run, a worker process keeps what they pin."""

from collections.abc import Iterator

import pytest

from quantize_gemma.tasks.runtime import store


@pytest.fixture(autouse=True, scope="package")
def pinned() -> Iterator[None]:
    with store.keep_pinned():
        yield

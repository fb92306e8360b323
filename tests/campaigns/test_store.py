"""A few cases of the campaign that use only the store."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaigns import store


@pytest.mark.parametrize("case", [store.readers, store.sizes, store.flipped_bit, store.small_disk])
def test_the_store_survives(case: Callable[[Path, random.Random], str | None], tmp_path: Path) -> None:
    for number in range(1 if case is store.readers else 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert case(folder, random.Random(number)) is None

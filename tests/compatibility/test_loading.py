"""The comparison of releases in two environments; the current environment stands in for both."""

import sys
from pathlib import Path

import pytest

from tests.compatibility.generate import LIBRARIES
from tests.compatibility.loading import generate, report
from tests.conftest import Outcome


def test_the_cards_code_runs_by_itself_and_different_tokens_are_reported(
    released: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantize_gemma.tasks.runtime.fingerprint import versions

    release = Path(released.summary["release"])
    result = generate(Path(sys.executable), release)
    assert result["versions"].items() >= versions(LIBRARIES).items()
    assert report(release, result, result)
    assert not report(release, result, {**result, "image": [*result["image"][:-1], 0]})
    text, image, other_text, other_image = capsys.readouterr().out.split(f"{release}: ")[1:]
    assert text.startswith(f"text: the same {len(result['text'])} tokens in python ")
    assert image.startswith(f"image: the same {len(result['image'])} tokens")
    assert other_text == text
    assert other_image.startswith("image: different tokens")
    assert str(result["image"]) in other_image

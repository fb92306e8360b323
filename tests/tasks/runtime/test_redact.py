"""No secret is printed, logged, raised, or stored, however it is written."""

import base64
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from quantize_gemma.tasks.runtime import reporting, worker
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.redact import keep_secret, keep_secrets, redact, redact_logs

TOKEN = "hf_AbcdEfghIjklMnopQrstUvwx12"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_TOKEN_WRITE", "HTTPS_PROXY", "https_proxy", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        f"token {TOKEN}",
        f"\\n{TOKEN}",
        f"token_{TOKEN}",
        f"x{TOKEN}x",
        f"{{'authorization': 'Bearer {TOKEN}'}}",
    ],
)
def test_unknown_tokens_are_recognized_by_their_form(text: str) -> None:
    assert TOKEN[4:] not in redact(text)
    assert "…" in redact(text)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("at http://me:pass@proxy:3128/", "at http://…@proxy:3128/"),
        ("at https://user:p@ss@host", "at https://…@host"),
        ("by me:pass@proxy:3128", "by …@proxy:3128"),
        ("Authorization: Basic bWU6cGFzcw==", "Authorization: Basic …"),
        ("get https://cdn/x?Signature=abc&Key=d", "get https://cdn/x?…"),
        ("hf_hub_download failed in hf_models/gemma", "hf_hub_download failed in hf_models/gemma"),
        ("a@b.c wrote: 5 @ 6", "a@b.c wrote: 5 @ 6"),
    ],
)
def test_passwords_in_urls_are_redacted_and_nothing_else(text: str, redacted: str) -> None:
    assert redact(text) == redacted


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "in a word": lambda secret: f"x{secret}x",
    "percent-encoded": lambda secret: quote(secret, safe=""),
    "base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "base64 of user and token": lambda secret: base64.b64encode(f"user:{secret}".encode()).decode(),
    "base64 one byte later": lambda secret: base64.b64encode(f"username:{secret}!".encode()).decode(),
    "base64 two bytes later": lambda secret: base64.urlsafe_b64encode(f"a:{secret}ab".encode()).decode(),
}
SECRETS: dict[str, tuple[str, str]] = {
    "token without its prefix": ("HF_TOKEN", "T0ken/with+signs=of-base64"),
    "token to write": ("HF_TOKEN_WRITE", "another?token~"),
    "Prefect's key": ("PREFECT_API_KEY", "pnu_0123456789"),
    "Prefect's password": ("PREFECT_API_AUTH_STRING", "admin:correct horse"),
    "alerts": ("QUANTIZE_GEMMA_ALERTS", "https://hooks.example.com/services/T0/B0/secretpath"),
    "proxy": ("https_proxy", "http://me:pa%2Fssword@proxy:3128"),
}
# The secret part of a variable, if it is not the whole value.
PARTS = {"Prefect's password": "correct horse", "alerts": "/services/T0/B0/secretpath", "proxy": "pa/ssword"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", SECRETS)
def test_a_known_secret_is_redacted_in_every_form(which: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = SECRETS[which]
    monkeypatch.setenv(name, value)
    for secret in {value, PARTS.get(which, value)}:
        written = FORMS[form](secret)
        redacted = redact(f"before {written} after")
        assert redacted.startswith("before ")
        assert redacted.endswith(" after")
        # The ends of base64 text may stay, because they also depend on the neighboring text.
        inner = written[8:-8] if form.startswith("base64") else written.removeprefix("x").removesuffix("x")
        assert len(inner) < 6 or inner not in redacted
        assert "…" in redacted


def test_secrets_of_blocks_and_of_the_login_file_are_redacted(tmp_path: Path) -> None:
    keep_secrets()
    keep_secret("from a block")
    (tmp_path / "token").write_text("from-the-login\n")
    assert redact("a from a block b from-the-login c") == "a … b … c"


def test_the_messages_of_failures_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "no-prefix-at-all")
    for kind in (UserError, StageFailed):
        assert str(kind("the answer was no-prefix-at-all")) == "the answer was …"


def test_what_a_worker_logs_prints_and_raises_is_redacted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "no-prefix-at-all")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    caplog.set_level(logging.INFO)
    with pytest.raises(StageFailed) as failure:
        worker.run(
            f"{__name__}:leak",
            {"secret": "no-prefix-at-all"},
            lambda *_: None,
            logging.getLogger("stage"),
        )
    assert "ZeroDivisionError" in str(failure.value)
    assert "no-prefix-at-all" not in str(failure.value) + caplog.text
    assert caplog.messages == ["logged …"]


def leak(secret: str) -> None:
    reporting.log(f"logged {secret}")
    print(f"printed {secret}", flush=True)
    raise ZeroDivisionError(f"raised {secret}")


def test_prefects_log_is_redacted_with_its_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "no-prefix-at-all")
    lines: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keeping()
    logger = logging.getLogger("prefect.flow_runs")
    logger.addHandler(handler)
    try:
        redact_logs()
        redact_logs()
        assert len(handler.filters) == 1
        try:
            raise ValueError("no-prefix-at-all")
        except ValueError:
            # Not through the logger, because Prefect's own handler requires a flow run.
            place = ("prefect.flow_runs", logging.ERROR, __file__, 1)
            handler.handle(logging.LogRecord(*place, "failed with %s", ("no-prefix-at-all",), sys.exc_info()))
    finally:
        logger.removeHandler(handler)
    assert "failed with …" in lines[0]
    assert "ValueError: …" in lines[0]
    assert "no-prefix" not in lines[0]

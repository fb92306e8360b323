"""Keep secrets out of output, logs, errors, and files: redact known secrets by value, and others by format."""

import base64
import contextlib
import json
import logging
import os
import re
import sys
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

TOKENS = ("HF_TOKEN", "HF_TOKEN_WRITE", "HUGGING_FACE_HUB_TOKEN", "PREFECT_API_KEY")
# Variables with values "user:password".
AUTH_STRINGS = ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")
# Variables with URLs that have a secret in their path, and may also contain a user and a password.
WEBHOOKS = ("QUANTIZE_GEMMA_ALERTS",)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# A shorter secret could be part of any word.
MIN_LENGTH = 6
HIDDEN = "…"
PATTERNS = (
    # A Hub token, even after a letter, because a line break may be written as \n; but not hf_hub_download.
    (re.compile(r"(hf|api_org)_(?=[\w.-]*\d|[A-Za-z0-9]{16})[\w.-]{6,}"), r"\1_…"),
    (re.compile(r"(?i)(authorization\W{1,6}(?:bearer|basic)\s+|bearer\s+)[^\s'\"]{6,}"), r"\1…"),
    # The user and the password in a URL, with or without a scheme.
    (re.compile(r"(\w://)[^\s/?#'\"]*@"), r"\1…@"),
    (re.compile(r"(?<![\w…])[^\s:/@'\"]{1,200}:[^\s:/@'\"]{1,200}@(?=[\w.\[-])"), "…@"),
    # A signed URL.
    (re.compile(r"(https?://[^\s?]+)\?\S+"), r"\1?…"),
)
# The secrets that a run has loaded from Prefect's Secret blocks. Prefect copies the flow's context to its tasks.
_from_blocks: ContextVar[set[str]] = ContextVar("secrets_from_blocks")


def redact(text: str) -> str:
    """Return the text without secrets: those in this process's environment, and everything that looks like one."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        for form in _forms(secret):
            text = text.replace(form, HIDDEN)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def keep_secret(value: str) -> None:
    """Make redact() remove a secret that is not in the environment. Call keep_secrets() first."""
    _from_blocks.get().add(value)


def keep_secrets() -> None:
    """Make redact() remove secrets from keep_secret() from now on, in this context and in copies of it.

    This is not undone, because Prefect logs a run's failure after the flow's function has ended.
    """
    if _from_blocks.get(None) is None:
        _from_blocks.set(set())


def redact_logs() -> None:
    """Redact what Prefect logs about flows and tasks, with tracebacks, on its way to the terminal and the API."""
    for name in ("", "prefect", "prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(log_filter, _Redacting) for log_filter in handler.filters):
                handler.addFilter(_Redacting())


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            # Formatters use this text if there is one.
            record.exc_text = redact(record.exc_text or logging.Formatter().formatException(record.exc_info))
        return True


def _secrets() -> set[str]:
    """Return the secrets of this process."""
    secrets = (
        {os.environ.get(name, "") for name in (*TOKENS, *AUTH_STRINGS, *WEBHOOKS)}
        | _from_blocks.get(set())
        | {_login_token()}
    )
    if "prefect.settings" in sys.modules:
        # If a setting is invalid, the run has failed because of it, but the message must still be redacted.
        with contextlib.suppress(ImportError, ValueError):
            from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

            for setting in (PREFECT_API_AUTH_STRING, PREFECT_API_KEY):
                value = setting.value()
                secrets.add(str(value.get_secret_value() if hasattr(value, "get_secret_value") else value or ""))
    secrets |= {secret.partition(":")[2] for secret in secrets if re.fullmatch(r"[^:/]+:[^/].*", secret)}
    for name in PROXIES:
        for address in (os.environ.get(name, ""), os.environ.get(name.lower(), "")):
            user, _, _ = address.partition("://")[2].rpartition("@")
            secrets |= {user, unquote(user), user.partition(":")[2], unquote(user.partition(":")[2])}
    for name in WEBHOOKS:
        secrets.add(_url_path(os.environ.get(name, "")))
    return {secret.strip() for secret in secrets if len(secret.strip()) >= MIN_LENGTH}


def _url_path(address: str) -> str:
    try:
        return urlsplit(address).path
    except ValueError:
        return ""


def _login_token() -> str:
    """Return the token that `hf auth login` has stored."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError):
        return ""


def _forms(secret: str) -> list[str]:
    """Return the encodings of a secret: unchanged, in a URL, in JSON, and anywhere in a base64-encoded text."""
    raw = secret.encode()
    forms = [secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1]]
    for before in range(3):
        # The characters that it shares with the preceding and following text are unknown.
        first, last = -(-8 * before // 6), (8 * (before + len(raw))) // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            forms.append(encode(b"\0" * before + raw).decode()[first:last])
    return [form for form in dict.fromkeys(forms) if len(form) >= MIN_LENGTH]

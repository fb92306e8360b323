"""The Hugging Face Hub: whose token, what its refusals mean, and files that are what the Hub says they are."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import parent_process
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed, UserError
from quantize_gemma.tasks.runtime.redact import keep_secret, redact
from quantize_gemma.tasks.runtime.retries import MAX_SECONDS_TO_WAIT, is_retryable, requested_wait

logger = logging.getLogger(__name__)

# Blocks of Prefect and environment variables that may hold a token, in the order they are asked.
READ_TOKENS = (("hf-token", "HF_TOKEN"),)
WRITE_TOKENS = (("hf-token-write", "HF_TOKEN_WRITE"), *READ_TOKENS)
# Tells a stage's own process which blocks its token may come from.
BLOCKS = "QUANTIZE_GEMMA_TOKEN_BLOCKS"
_prepared: set[str] = set()
REPORTED_BYTES = 8 * 1024 * 1024
SECONDS_OF_A_YEAR = 365 * 86_400.0


def token(write: bool = False) -> str | None:
    """Returns the Hub's token: from a Prefect Secret block, else the environment, else the login file; or None.

    A token for writing may be another one than that for reading.
    """
    from huggingface_hub import get_token

    for block, variable in WRITE_TOKENS if write else READ_TOKENS:
        value = (_secret(block) or os.environ.get(variable) or "").strip()
        if value and not re.fullmatch(r"[!-~]+", value):
            raise UserError(
                f"the token in the block {block} or in {variable} has spaces or line breaks in it: set it again"
            )
        if value:
            return value
    return get_token()


def read_environment() -> dict[str, str]:
    """Returns what a process that reads from the Hub needs in its environment: the token, where there is one."""
    value = token()
    return {**({"HF_TOKEN": value} if value else {}), BLOCKS: " and ".join(_blocks())}


def _blocks() -> list[str]:
    """Returns the Secret blocks that hold tokens: they go before environment variables, and may be old."""
    if BLOCKS in os.environ:
        return [os.environ[BLOCKS]] if os.environ[BLOCKS] else []
    # An API that is away is no reason to say nothing of the Hub's refusal.
    with contextlib.suppress(Exception):
        return [block for block, _ in WRITE_TOKENS if _secret(block)]
    return []


def _variable(read: str = "HF_TOKEN") -> str:
    """Returns where the token is to be set, for a sentence: a variable helps only where no block goes before it."""
    blocks = " and ".join(_blocks())
    return f"Prefect's Secret block {blocks}, which goes before {read}," if blocks else read


def _secret(name: str) -> str | None:
    from prefect.blocks.system import Secret
    from prefect.settings import PREFECT_API_URL

    # Without an API there are no blocks, and asking for one would start a server.
    if not PREFECT_API_URL.value():
        return None
    try:
        secret: Any = Secret.load(name)
        value = str(secret.get())
    except ValueError:
        return None
    keep_secret(value.strip())
    return value


@contextlib.contextmanager
def explained(kind: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub's refusals into UserErrors that say what to do; lets pass what may pass by itself."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    _set_time_out()
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{repository} is gated: accept its terms at {page}, and set {_variable()} to a token of yours"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{repository} has no revision {revision!r}: give a branch, tag or commit that it has"
        ) from None
    except EntryNotFoundError as error:
        raise UserError(f"{repository} lacks a file that it should have ({_said(error)})") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the Hub has no {kind} {repository!r}, or none that your token may see: check the name, and "
            f"{_variable().rstrip(',')}"
        ) from None
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a Hub repository ({_said(error)})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = _said(error.server_message or error)
        if status == 401:
            raise UserError(
                f"the Hub refuses the token for {repository}: set {_variable()} to one that is valid"
            ) from None
        if status == 403:
            raise UserError(
                f"the Hub forbids this on {repository} ({said}): set {_variable('HF_TOKEN and HF_TOKEN_WRITE')} "
                "to a token that may do it"
            ) from None
        if status in (402, 413, 507):
            raise UserError(
                f"the quota for {repository} is used up ({said}): make room there or ask for more"
            ) from None
        if status in (400, 404, 422):
            raise UserError(f"the Hub refuses the request for {repository}: {said}") from None
        later = _come_back(error.response.headers)
        raise StageFailed(f"the Hub answers {status} for {repository}: {said}{later}", *is_retryable(error)) from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it, or give --offline to go on with what is there") from None
    except httpx.ConnectError as error:
        raise StageFailed(f"the Hub cannot be reached at {constants.ENDPOINT} ({_said(error)})", True) from None
    except RunError:
        raise
    except httpx.HTTPError as error:
        # Its text may hold a header or a signed address.
        raise StageFailed(f"{type(error).__name__}: {_said(error)}", *is_retryable(error)) from None
    except ValueError as error:
        # Neither JSON nor text: what arrived is not what the Hub sent.
        if not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
            raise _unexpected(error) from None
        raise StageFailed(f"the Hub's answer for {repository} cannot be read ({_said(error)})", True) from None
    except Exception as error:
        raise _unexpected(error) from None


def _said(what: object) -> str:
    """Returns what the Hub or its client said, as a part of one sentence."""
    return textwrap.shorten(redact(str(what)), 300, placeholder=" …")


def _unexpected(error: Exception) -> StageFailed:
    """Returns the failure that an error nobody thought of is for the run; where it was raised goes into the log."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    where = redact("".join(traceback.format_exception(error)))
    try:
        get_run_logger().error(where)
    except MissingContextError:
        # A stage's own process, or none of a run.
        logger.error(where)
        parent_process.log(where)
    return StageFailed(f"{type(error).__name__}: {_said(error)}", *is_retryable(error))


def _come_back(headers: Mapping[str, str]) -> str:
    """Returns when the server wants to be asked again, as the end of a sentence, if nobody waits for that long."""
    seconds = requested_wait(headers)
    if seconds <= MAX_SECONDS_TO_WAIT:
        return ""
    if seconds > SECONDS_OF_A_YEAR:
        return "; it asks not to be asked again for more than a year"
    return f"; start the run again after {time.strftime('%Y-%m-%d %H:%M', time.gmtime(time.time() + seconds))} UTC"


def repo_info(kind: str, repository: str, revision: str | None, value: str | None) -> Any:
    """Returns the Hub's description of a repository at a revision: its commit, its files with sizes and hashes.

    `value` is the token. Raises UserError if it does not open the repository's files.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=value or False)
    with explained(kind, repository, revision):
        info: Any = api.repo_info(repository, repo_type=kind, revision=revision, files_metadata=True)
        # What a gated repository contains is public, its files are not.
        if info.gated or info.private:
            api.auth_check(repository, repo_type=kind)
        return info


def _set_time_out() -> None:
    """Gives the Hub's client a limit to how long it waits for the next bytes; it has none of its own."""
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if "client" in _prepared:
        return
    _prepared.add("client")
    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", 60))
    # The library's own: they refuse requests in offline mode, and number the others.
    hooks = get_session().event_hooks
    set_client_factory(
        lambda: httpx.Client(
            event_hooks={**hooks, "response": [*hooks["response"], _refuse_to_wait]},
            follow_redirects=True,
            timeout=httpx.Timeout(seconds, connect=min(seconds, 30)),
        )
    )


def _refuse_to_wait(response: Any) -> None:
    """Raises the Hub's error at once where its client would first sleep for as long as the server asks for."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    if response.is_error and requested_wait(response.headers) > MAX_SECONDS_TO_WAIT:
        response.read()
        hf_raise_for_status(response)


def fetch(
    folder: Path,
    kind: str,
    repository: str,
    revision: str,
    wanted: Callable[[str], bool],
    progress: Callable[[int, int], None],
) -> None:
    """Brings the wanted files of a commit into `folder`, each with the size and hash that the Hub gives for it.

    What is there and right stays; what is there in part goes on from its last byte; what is wrong is fetched once
    more. Raises StageFailed that names a file that is wrong twice.
    """
    from huggingface_hub import get_token

    # The parent's, from the environment: a stage's own process does not ask Prefect for it.
    value = get_token()
    info = repo_info(kind, repository, revision, value)
    files = [file for file in info.siblings if wanted(file.rfilename)]
    total = sum(file.size or 0 for file in files)
    arrived = 0

    def report(done: int) -> None:
        progress(arrived + done, total)

    for file in files:
        path = folder / file.rfilename
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            if not (path.is_file() and is_file(path, file)):
                with explained(kind, repository, revision):
                    _get(path, kind, repository, revision, file, value, report)
            if is_file(path, file):
                break
            path.unlink()
        else:
            raise StageFailed(
                f"{file.rfilename} of {repository} arrived twice with other content than the Hub's own hash says: "
                "nothing of it was kept"
            )
        arrived += file.size
        report(0)


def read(kind: str, repository: str, revision: str, file: Any, value: str | None) -> bytes:
    """Returns the content of a small file, as the Hub describes it. `value` is the token.

    Raises StageFailed if something else arrives.
    """
    with tempfile.TemporaryDirectory() as folder, explained(kind, repository, revision):
        path = Path(folder) / "file"
        _get(path, kind, repository, revision, file, value, lambda _: None)
        if not is_file(path, file):
            raise StageFailed(f"{file.rfilename} of {repository} is not what the Hub's own hash says", True)
        return path.read_bytes()


def is_file(path: Path, file: Any) -> bool:
    """Tells whether the file has the size and hash of the Hub's description: SHA-256, or git's SHA-1 for small ones."""
    if path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        with path.open("rb") as stream:
            return bool(hashlib.file_digest(stream, "sha256").hexdigest() == file.lfs.sha256)
    return bool(git_sha1(path.read_bytes()) == file.blob_id)


def git_sha1(content: bytes) -> str:
    """Returns a file's hash as git computes it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _get(
    path: Path,
    kind: str,
    repository: str,
    revision: str,
    file: Any,
    value: str | None,
    report: Callable[[int], None],
) -> None:
    """Fetches one file, from where an earlier try stopped: the client's own download forgets what it had."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    partial = path.with_name(f"{path.name}.incomplete")
    done = partial.stat().st_size if partial.is_file() else 0
    if done >= file.size:
        partial.unlink(missing_ok=True)
        done = 0
    # Not compressed on the way, or what is there in part could not be counted.
    headers = {**build_hf_headers(token=value or False), "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    url = hf_hub_url(repository, file.rfilename, repo_type=kind, revision=revision)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        with partial.open("ab" if response.status_code == 206 else "wb") as stream:
            said = 0
            for chunk in response.iter_raw():
                stream.write(chunk)
                # More than was announced is wrong already, and might never end.
                if stream.tell() > file.size:
                    break
                if stream.tell() - said >= REPORTED_BYTES:
                    said = stream.tell()
                    report(said)
    partial.replace(path)

"""Read settings only from the user's environment and files, never from the working directory.

That directory may contain an untrusted model, whose files could send a run and its tokens to an attacker's server.
"""

import os
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.patches.private_api import ignore_settings_files

# Environment variables with paths; a process in another directory would resolve a relative path differently.
PATHS = (
    "QUANTIZE_GEMMA_HOME",
    "PREFECT_HOME",
    "PREFECT_PROFILES_PATH",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_TOKEN_PATH",
    "XDG_CACHE_HOME",
    "SSL_CERT_FILE",
)


def ignore_working_directory() -> None:
    """Make Prefect read its settings from the environment and the user's profile only, in child processes as well.

    Prefect also reads .env, prefect.toml, and pyproject.toml in the working directory as soon as it is imported: call
    this first.

    Raises:
        UserError: There is no home directory, the path in a variable is relative to a working directory that was
            removed, or the installed pydantic-settings cannot be prevented from reading these files.
    """
    try:
        for name in PATHS:
            value = os.environ.get(name)
            if value:
                os.environ[name] = str(Path(value).expanduser().absolute())
            elif value is not None:
                # Prefect would interpret an empty value as the working directory.
                del os.environ[name]
        home = os.environ.get("PREFECT_HOME") or Path("~/.prefect").expanduser()
    except FileNotFoundError:
        raise UserError(
            f"the working directory was removed, but {name} is relative to it: set {name} to an absolute path"
        ) from None
    except RuntimeError:
        raise UserError("this user has no home directory: set HOME") from None
    # Prefect would look for it in those files otherwise.
    os.environ.setdefault("PREFECT_PROFILES_PATH", str(Path(home) / "profiles.toml"))
    ignore_settings_files()


def require_working_directory() -> None:
    """Raise UserError if the working directory was removed: MKL, which torch uses, would abort the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory was removed: change to one that exists") from None

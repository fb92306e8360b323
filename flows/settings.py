"""Settings come from the user's own environment and files, never from the directory where a run was started.

That directory may be a model that somebody else made: its files could send a run, with its tokens, to their server.
"""

import os
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.patches.private_api import ignore_settings_files

# Directories and files that the environment may name; for what is started elsewhere, a relative path is another one.
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
    """Makes Prefect take its settings from the environment and the user's profile alone, here and in what is started.

    Prefect also reads .env, prefect.toml and pyproject.toml of the working directory. To be called before Prefect is
    imported, which reads them at once. Raises UserError if there is no home directory, if a variable's path is relative
    to a working directory that was removed, or if the installed pydantic-settings cannot be kept from these files.
    """
    try:
        for name in PATHS:
            given = os.environ.get(name)
            if given:
                os.environ[name] = str(Path(given).expanduser().absolute())
            elif given is not None:
                # Prefect takes an empty one for the working directory.
                del os.environ[name]
        home = os.environ.get("PREFECT_HOME") or Path("~/.prefect").expanduser()
    except FileNotFoundError:
        raise UserError(f"the working directory was removed, and {name} is relative to it") from None
    except RuntimeError:
        raise UserError("there is no home directory of this user: set HOME") from None
    # Otherwise those files are looked at for it.
    os.environ.setdefault("PREFECT_PROFILES_PATH", str(Path(home) / "profiles.toml"))
    ignore_settings_files()


def require_working_directory() -> None:
    """Raises UserError if the working directory was removed: MKL, in torch's matrix products, ends a process there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory was removed: change to one that exists") from None

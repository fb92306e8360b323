"""The files of a local model directory that are read. Links must not point outside the directory.

A model directory may be untrusted. A link that points outside could put a private file, such as a token, into a
release. Only the Hub cache's own links, from snapshots/<commit>/ to blobs/, may leave the directory.
"""

import fnmatch
import io
import os
import stat
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The files that a release needs besides the weights, at the directory's top level: no pickles, code, training state, or
# notes. Transformers and ExecuTorch's runner read nothing else.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
TERMS = ("LICENSE*", "NOTICE*")


def is_release_file(name: str) -> bool:
    """Tell whether a file with this name, other than weights, goes into a release."""
    return name in FILES or ("/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in TERMS))


def release_files(folder: Path) -> list[str]:
    """Return the names of a directory's files, other than weights, that go into a release.

    Raises:
        UserError: One of them is not a file in this directory.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): use a model directory that can be") from None
    # A directory named LICENSES is not a license file.
    release_names = [
        name for name in names if is_release_file(name) and (name in FILES or not (folder / name).is_dir())
    ]
    for name in release_names:
        if not name.isprintable():
            raise UserError(f"the file {name!r} in {folder} has a name with control characters: rename it")
        open_source(folder, name).close()
    return release_names


def open_source(folder: Path, name: str) -> io.BufferedReader:
    """Open a file of a model directory for reading.

    The checks use the open file, so that it, or a directory above it, cannot be replaced in between. A hard link cannot
    be distinguished from a file.

    Raises:
        UserError: It is not a regular file, or is outside the directory.
    """
    path = folder / name
    try:
        # O_NONBLOCK, because opening a pipe would otherwise wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason}): replace it with the file itself") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is not a regular file: replace it with one, or remove it")
        real = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not any(real.is_relative_to(allowed_folder) for allowed_folder in _allowed_folders(folder)):
            raise UserError(
                f"{path} is a link to {str(real)!r}, outside the model directory: replace it with the file itself"
            )
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _allowed_folders(folder: Path) -> list[Path]:
    """Return where a model directory's files may be: in it, or in the blobs of the Hub cache that contains it."""
    real = folder.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [real, repository / "blobs"]
    return [real]

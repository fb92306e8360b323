"""Which files of a local model directory are read, and that they are the directory's own.

A model directory may come from anybody. A link in it that leads elsewhere would put a file of ours, a token for one,
into a release; only the Hub cache's own links, from snapshots/<commit>/ into blobs/, may leave the directory.
"""

import fnmatch
import io
import os
import stat
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a release needs beside the weights, in the directory's top level: no pickles, no code, no training state, no
# notes. transformers and ExecuTorch's runner read nothing else.
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
    """Tells whether a file of this name goes into a release, weights aside."""
    return name in FILES or ("/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in TERMS))


def release_files(folder: Path) -> list[str]:
    """Returns the names of a directory's files that go into a release, weights aside.

    Raises UserError for one that is not a file of this directory.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): give a model directory that can be") from None
    # A directory of licenses is not a file that a release needs.
    chosen = [name for name in names if is_release_file(name) and (name in FILES or not (folder / name).is_dir())]
    for name in chosen:
        if not name.isprintable():
            raise UserError(f"the file {name!r} in {folder} has a name with control characters: rename it")
        open_source(folder, name).close()
    return chosen


def open_source(folder: Path, name: str) -> io.BufferedReader:
    """Opens a file of a model directory for reading.

    Raises UserError if it is not a regular file, or lies outside of the directory. What was opened is what is looked
    at, so that nobody can exchange the file, or a directory on the way to it, in between. A hard link cannot be told
    from a file.
    """
    path = folder / name
    try:
        # Opening a pipe waits for its other end, unless it is told not to.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason}): replace it by the file itself") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is not a regular file: replace it by one, or remove it")
        real = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not any(real.is_relative_to(allowed) for allowed in _allowed(folder)):
            raise UserError(
                f"{path} is a link to {str(real)!r}, outside of the model directory: replace it by the file itself"
            )
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _allowed(folder: Path) -> list[Path]:
    """Returns where a model directory's files may lie: in it, or in the blobs of the Hub's cache that it is part of."""
    real = folder.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [real, repository / "blobs"]
    return [real]

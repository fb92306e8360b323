"""Resolve and download: a model's name and revision become a pinned commit, and that becomes files in the store."""

import hashlib
from pathlib import Path
from typing import Any

from tasks.builtin import BUILTIN
from tasks.checkpoint import find_nonfinite, read_config, read_headers, weight_files
from tasks.policies import stage
from tasks.process import report_progress
from tasks.store import UserError, canonical_json, digest_file, link

# What a release needs and nothing else: no pickles, no other frameworks' weights, no code.
PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "LICENSE*",
    "NOTICE*",
]


def resolve_model(model: str, revision: str | None) -> dict[str, Any]:
    """Returns {"model", "revision", "source"}: the revision is a commit sha, or the digest of a local directory.

    `model` is a built-in model's name, a directory, or a repository on the Hub. Raises UserError when it is none.
    """
    path = BUILTIN.get(model) or Path(model).expanduser()
    if path.is_dir():
        files = {file.name: digest_file(file) for pattern in PATTERNS for file in path.glob(pattern)}
        digest = hashlib.sha256(canonical_json(files)).hexdigest()
        return {
            "model": model if model in BUILTIN else path.name,
            "revision": digest[:40],
            "source": str(path.resolve()),
        }
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        known = ", ".join(BUILTIN)
        raise UserError(
            f"there is no model at {model!r}: give a directory, a Hub repository such as google/gemma-3-4b-it, "
            f"or a built-in model ({known})"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(model, revision=revision)
    except GatedRepoError:
        raise UserError(f"{model} is gated: accept its terms on its Hub page and log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise UserError(f"{model} has no revision {revision!r}: give a branch, tag or commit that it has") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"the Hub has no model {model!r}, or your token may not read it: check the name") from None
    assert info.sha is not None, model
    return {"model": model, "revision": info.sha, "source": model}


def download_checkpoint(target: Path, source: str, revision: str) -> dict[str, Any]:
    """Fills `target` with the checkpoint's files, checks every header and every weight. Raises UserError.

    A local directory's files are hard-linked; a Hub repository is fetched at exactly this commit.
    """
    if Path(source).is_dir():
        for pattern in PATTERNS:
            for path in Path(source).glob(pattern):
                if not (target / path.name).exists():
                    link(path, target / path.name)
    else:
        import shutil

        from huggingface_hub import snapshot_download

        snapshot_download(source, revision=revision, allow_patterns=PATTERNS, local_dir=target)
        shutil.rmtree(target / ".cache", ignore_errors=True)
    config = read_config(target)
    headers = read_headers(target)
    files = weight_files(target)
    for done, path in enumerate(files):
        report_progress(done, len(files), "checking weights")
        name = find_nonfinite(path)
        if name:
            raise UserError(
                f"the weight {name} in {Path(source) / path.name} holds a NaN or an infinity: "
                "the checkpoint is damaged, download it again"
            )
    return {
        "metadata": {
            "revision": revision,
            "architecture": config["architectures"][0],
            "tensors": len(headers),
        }
    }


download = stage(download_checkpoint, name="download", ignored=("source",), retries=3)

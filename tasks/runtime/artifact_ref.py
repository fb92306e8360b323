"""References to artifacts in the store, which stages pass to each other; Prefect stores them as JSON."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.store import Artifact


@dataclass(frozen=True)
class ArtifactRef:
    """An artifact's identity.

    Attributes:
        stage: The stage that wrote it.
        key: Its key in the store.
        digest: The digest of its content, which may differ after a rebuild.
        size: The total size of its files in bytes.
    """

    stage: str
    key: str
    digest: str
    size: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.key[:12]}"


def ref_of(artifact: Artifact) -> ArtifactRef:
    """Return a reference to an artifact."""
    return ArtifactRef(artifact.stage, artifact.key, artifact.digest, artifact.size)


def open_artifact(ref: ArtifactRef, rehash: bool = False) -> Artifact:
    """Pin and return the artifact, so that it does not change until the run ends.

    Args:
        ref: Its reference.
        rehash: Whether to hash all of its files.

    Raises:
        StageFailed: The store does not have the artifact, or has different content under its key.
    """
    artifact = store.pin(ref.stage, ref.key, digest=ref.digest, rehash=rehash)
    if artifact is not None:
        return artifact
    if store.load(ref.stage, ref.key) is not None:
        raise StageFailed(f"{ref} was rebuilt by another run with different content: start this run again")
    raise StageFailed(f"{ref} is damaged or missing in the store: start the run again")


def digest_of_files(refs: Sequence[ArtifactRef]) -> str:
    """Return a digest of the files of several artifacts, regardless of how the files are divided among them.

    Raises:
        StageFailed: The store does not have one of them.
    """
    # Several artifacts may have a file of the same name.
    files = sorted([name, file.sha256] for ref in refs for name, file in load_artifact(ref).files.items())
    return hashlib.sha256(store.canonical_json(files)).hexdigest()


def load_artifact(ref: ArtifactRef, rehash: bool = False) -> Artifact:
    """Return the artifact without pinning it; otherwise like open_artifact()."""
    artifact = store.load(ref.stage, ref.key, digest=ref.digest, rehash=rehash)
    if artifact is None:
        raise StageFailed(f"{ref} is not in {store.home()}: all machines of a run must share one store")
    return artifact

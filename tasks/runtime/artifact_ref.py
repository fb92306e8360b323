"""What stages hand to each other: a reference of an artifact in the store, small enough for Prefect to keep as JSON."""

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
        stage: The stage that made it.
        key: Its key in the store.
        digest: The digest of its content; an artifact that was made again may have another one.
        size: The bytes of its files.
    """

    stage: str
    key: str
    digest: str
    size: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.key[:12]}"


def ref_of(artifact: Artifact) -> ArtifactRef:
    """Return the reference of an artifact."""
    return ArtifactRef(artifact.stage, artifact.key, artifact.digest, artifact.size)


def open_artifact(ref: ArtifactRef, rehash: bool = False) -> Artifact:
    """Return the artifact, pinned: it stays as it is until the run ends.

    Args:
        ref: Its reference.
        rehash: Hash all of its files.

    Raises:
        StageFailed: The store does not have it, or has another content under its key.
    """
    artifact = store.pin(ref.stage, ref.key, digest=ref.digest, rehash=rehash)
    if artifact is not None:
        return artifact
    if store.load(ref.stage, ref.key) is not None:
        raise StageFailed(f"{ref} was rebuilt by another run with different content: start this run again")
    raise StageFailed(f"{ref} is damaged or missing in the store: start the run again")


def digest_of_files(refs: Sequence[ArtifactRef]) -> str:
    """Return the digest of the files of several artifacts together, however the files are divided among them.

    Raises:
        StageFailed: The store does not have one of them.
    """
    files = {name: file.sha256 for ref in refs for name, file in load_artifact(ref).files.items()}
    return hashlib.sha256(store.canonical_json(files)).hexdigest()


def load_artifact(ref: ArtifactRef, rehash: bool = False) -> Artifact:
    """Return the artifact without pinning it; open_artifact() says the rest."""
    artifact = store.load(ref.stage, ref.key, digest=ref.digest, rehash=rehash)
    if artifact is None:
        raise StageFailed(f"{ref} is not in {store.home()}: all machines of a run must share one store")
    return artifact

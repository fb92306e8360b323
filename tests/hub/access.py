"""Access control: who requests which repository, and whether this is allowed."""

from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

from fastapi import Depends, Request

from tests.hub.storage import HubError, Repo, Storage


class Token(TypedDict):
    """The user and the permissions of a token.

    It can read its namespaces (the user's own and those listed) and, with the role, write to them.
    """

    user: str
    role: str  # "read", "write", or "fineGrained", which can write only to the listed namespaces
    namespaces: NotRequired[list[str]]
    gated: NotRequired[list[str]]  # the gated repositories whose terms were accepted


Tokens = dict[str, Token]


@dataclass
class Target:
    """The repository that a request is about, and the token of the request."""

    storage: Storage
    kind: str  # "model" or "dataset"
    repo_id: str
    repo: Repo
    token: Token | None
    endpoint: str

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.repo_id

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo_id}"

    def require_write(self) -> None:
        """Raise HubError unless the token may write to the namespace."""
        require_role(self.token)
        namespace = self.repo_id.split("/")[0]
        if namespace not in namespaces(self.token):
            raise HubError(403, f"You don't have the rights to write to {self.repo_id}: pass create_pr=1 instead")

    def require_files(self) -> None:
        """Raise HubError if the repository is gated and its terms were not accepted."""
        accepted = self.token.get("gated", []) if self.token else []
        if not self.repo["gated"] or self.repo_id in accepted:
            return
        message = f"Access to {self.kind} {self.repo_id} is restricted."
        if self.token is None:
            raise HubError(401, f"{message} You must be authenticated to access it.", "GatedRepo")
        raise HubError(403, f"{message} Visit {self.url} to ask for access.", "GatedRepo")


def token_of(request: Request) -> Token | None:
    """Return the request's token, or None if it has no token. Raises HubError if the token is unknown."""
    value = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not value:
        return None
    token: Token | None = request.app.state.tokens.get(value)
    if token is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return token


def namespaces(token: Token | None) -> list[str]:
    """Return the user's own namespace and those of the user's organizations."""
    if token is None:
        return []
    further_namespaces = token.get("namespaces", [])
    return further_namespaces if token["role"] == "fineGrained" else [token["user"], *further_namespaces]


def require_role(token: Token | None) -> None:
    """Raise HubError unless the token can write."""
    if token is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    if token["role"] == "read":
        raise HubError(403, "Forbidden: you must use a write token")


async def readable(request: Request, ns: str, name: str) -> Target:
    """Return the repository of the path. Raises HubError if it does not exist, or does not exist for this token."""
    token = token_of(request)
    storage: Storage = request.app.state.storage
    kind = "dataset" if request.scope["path"].startswith(("/api/datasets/", "/datasets/")) else "model"
    repo = storage.find(kind, f"{ns}/{name}")
    if repo is None or (repo["private"] and ns not in namespaces(token)):
        # Without a token, the Hub does not reveal whether the repository exists.
        raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
    return Target(storage, kind, f"{ns}/{name}", repo, token, str(request.base_url).rstrip("/"))


async def writable(target: Annotated[Target, Depends(readable)]) -> Target:
    """Return the repository of the path. Raises HubError if the token may not write to it."""
    target.require_write()
    return target


async def proposable(target: Annotated[Target, Depends(readable)], create_pr: bool = False) -> Target:
    """Return the repository of the path. Raises HubError if the token may not write to it or open a pull request."""
    if create_pr:
        require_role(target.token)
    else:
        target.require_write()
    return target


Readable = Annotated[Target, Depends(readable)]
Writable = Annotated[Target, Depends(writable)]
Proposable = Annotated[Target, Depends(proposable)]
Json = dict[str, Any]

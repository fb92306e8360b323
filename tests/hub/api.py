"""The routes under /api: the user, repositories, their revisions and files, and commits."""

import base64
import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from tests.hub.access import Json, Proposable, Readable, Target, Token, Writable, namespaces, require_role, token_of
from tests.hub.storage import Entry, HubError, history, is_lfs, lfs_pointer, resolve

router = APIRouter(prefix="/api")
REPO = "/{kinds}/{ns}/{name}"
# The fields of a model's config.json that the Hub returns.
CONFIG = ("architectures", "model_type")


@router.get("/whoami-v2")
async def whoami(request: Request) -> Json:
    """Return the user, the user's organizations, and the token's role."""
    token = token_of(request)
    if token is None:
        raise HubError(401, "Invalid username or password.")
    return {
        "type": "user",
        "name": token["user"],
        "fullname": token["user"],
        "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in namespaces(token)[1:]],
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": "test", "role": token["role"], **scopes(token)},
        },
    }


def scopes(token: Token) -> Json:
    """Return the scopes of a fine-grained token: where it may write."""
    if token["role"] != "fineGrained":
        return {}
    entities = [{"type": "org", "name": name} for name in namespaces(token)]
    return {"fineGrained": {"scoped": [{"entity": entity, "permissions": ["repo.write"]} for entity in entities]}}


@router.post("/repos/create")
async def create_repo(request: Request) -> JSONResponse:
    """Return the new repository's URL; if it exists already, the client reads the URL from the 409 response."""
    token = token_of(request)
    body = await request.json()
    require_role(token)
    assert token is not None
    kind, namespace = body.get("type") or "model", body.get("organization") or token["user"]
    if kind not in ("model", "dataset"):
        raise HubError(400, f"this Hub has models and datasets, not {kind!r}")
    if namespace not in namespaces(token):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    repo_id = f"{namespace}/{body['name']}"
    storage = request.app.state.storage
    created = storage.create(kind, repo_id, token["user"], body.get("visibility") == "private")
    url = Target(storage, kind, repo_id, {}, token, str(request.base_url).rstrip("/")).url
    if not created:
        return JSONResponse({"error": f"You already created this {kind} repo", "url": url}, 409)
    return JSONResponse({"url": url, "name": repo_id})


@router.post("/validate-yaml")
async def validate_yaml(request: Request) -> JSONResponse:
    """Return what is wrong with a card's front matter."""
    try:
        data = front_matter((await request.json())["content"])
    except yaml.YAMLError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [], "warnings": warnings})


@router.get(REPO)
@router.get(REPO + "/revision/{rev}")
async def info(target: Readable, rev: str = "main", blobs: bool = False) -> Json:
    """Return a repository at a revision: its commit, its card, and its files."""
    sha = resolve(target.repo, unquote(rev))
    commit = target.repo["commits"][sha]
    files = commit["files"]
    card = target.storage.object(files["README.md"]["sha256"]).read_text() if "README.md" in files else ""
    config = read_object(target.storage.object(files["config.json"]["sha256"])) if "config.json" in files else {}
    weights = [target.storage.object(files[name]["sha256"]) for name in files if name.endswith(".safetensors")]
    return {
        "id": target.repo_id,
        "author": target.repo_id.split("/")[0],
        "sha": sha,
        "lastModified": commit["date"],
        "createdAt": target.repo["commits"][history(target.repo, sha)[-1]]["date"],
        "private": target.repo["private"],
        "gated": "manual" if target.repo["gated"] else False,
        "disabled": False,
        "tags": [],
        "cardData": front_matter(card),
        **({"config": {name: config[name] for name in CONFIG if name in config}} if config else {}),
        **count_weights(weights),
        "siblings": [sibling(path, entry, blobs) for path, entry in sorted(files.items())],
    }


def read_object(path: Path) -> Json:
    """Return the JSON object in a file, or {} if the file contains something else."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def count_weights(paths: list[Path]) -> Json:
    """Return the number of weights in safetensors files, by dtype and in total, from their headers; {} if none."""
    counts: Counter[str] = Counter()
    try:
        for path in paths:
            data = path.read_bytes()
            header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
            for name, tensor in header.items():
                if name != "__metadata__":
                    counts[tensor["dtype"]] += math.prod(tensor["shape"])
    except (ValueError, struct.error):
        return {}
    return {"safetensors": {"parameters": dict(counts), "total": counts.total()}} if counts else {}


@router.get(REPO + "/auth-check")
async def auth_check(target: Readable) -> None:
    """Return an empty response if the files may be read."""
    target.require_files()


@router.get(REPO + "/auth-check/write")
async def auth_check_write(target: Writable) -> None:
    """Return an empty response if the token may commit."""


@router.get(REPO + "/refs")
async def refs(target: Readable, include_prs: bool = False) -> Json:
    """Return the branches, the tags, and, on request, the pull requests, with the commits that they point to."""

    def refs_under(prefix: str, strip: str) -> list[Json]:
        return [
            {"name": ref.removeprefix(strip), "ref": ref, "targetCommit": sha}
            for ref, sha in target.repo["refs"].items()
            if ref.startswith(prefix)
        ]

    result = {
        "branches": refs_under("refs/heads/", "refs/heads/"),
        "tags": refs_under("refs/tags/", "refs/tags/"),
        "converts": [],
    }
    return result | ({"pullRequests": refs_under("refs/pr/", "")} if include_prs else {})


@router.get(REPO + "/discussions")
async def discussions(target: Readable, status: str = "all") -> Json:
    """Return the pull requests, all on one page."""
    requests = [
        {
            "num": number,
            "title": target.repo["commits"][sha]["title"],
            "author": {"name": target.repo["commits"][sha]["author"]},
            "createdAt": target.repo["commits"][sha]["date"],
            "status": "closed" if number in target.repo.get("closed", []) else "open",
            "isPullRequest": True,
            "repo": {"name": target.repo_id, "type": target.kind},
        }
        for ref, sha in target.repo["refs"].items()
        if ref.startswith("refs/pr/") and (number := int(ref.rsplit("/", 1)[1]))
    ]
    selected = [request for request in requests if status in ("all", request["status"])]
    return {"discussions": selected, "count": len(selected), "start": 0}


@router.get(REPO + "/commits/{rev}")
async def commits(target: Readable, rev: str) -> list[Json]:
    """Return the history of a revision, newest first."""
    shas_and_commits = [
        (sha, target.repo["commits"][sha]) for sha in history(target.repo, resolve(target.repo, unquote(rev)))
    ]
    return [
        {
            "id": sha,
            "title": commit["title"],
            "message": commit["message"],
            "date": commit["date"],
            "authors": [{"user": commit["author"]}],
        }
        for sha, commit in shas_and_commits
    ]


@router.post(REPO + "/branch/{branch}")
async def create_branch(request: Request, target: Writable, branch: str) -> None:
    """Create a branch, from main unless a starting point is passed."""
    start = (await request.json()).get("startingPoint", "main")
    target.storage.add_ref(*target.key, f"refs/heads/{unquote(branch)}", start)


@router.post(REPO + "/tag/{rev}")
async def create_tag(request: Request, target: Writable, rev: str) -> None:
    """Create a tag at the revision."""
    target.storage.add_ref(*target.key, f"refs/tags/{(await request.json())['tag']}", unquote(rev))


@router.get(REPO + "/tree/{rev}")
@router.get(REPO + "/tree/{rev}/{path:path}")
async def tree(target: Readable, rev: str, path: str = "", recursive: bool = False, expand: bool = False) -> list[Json]:
    """Return a folder's files and folders, on one page."""
    sha, folder = resolve(target.repo, unquote(rev)), unquote(path)
    paths = dict(children(target.repo["commits"][sha]["files"], folder, recursive))
    if folder and not paths:
        raise HubError(404, f"{folder} does not exist on {unquote(rev)!r}", "EntryNotFound")
    return [describe(target, sha, name, expand) for name in paths]


@router.post(REPO + "/paths-info/{rev}")
async def paths_info(request: Request, target: Readable, rev: str) -> list[Json]:
    """Return the requested paths that exist. The client sends a form, not JSON."""
    form = parse_qs((await request.body()).decode())
    sha = resolve(target.repo, unquote(rev))
    files = target.repo["commits"][sha]["files"]
    existing_paths = {str(parent) for path in files for parent in PurePosixPath(path).parents} | set(files)
    expand = form.get("expand") == ["true"]
    return [describe(target, sha, path, expand) for path in form.get("paths", []) if path in existing_paths]


@router.post(REPO + "/preupload/{rev}")
async def preupload(request: Request, target: Proposable, rev: str) -> Json:
    """Return how to upload each file, and the existing file of that name, so that the client can skip it."""
    requested_files = (await request.json())["files"]
    files = target.repo["commits"][resolve(target.repo, unquote(rev))]["files"]
    modes = []
    for file in requested_files:
        lfs = is_lfs(file["path"], file["size"])
        mode: Json = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        existing = files.get(file["path"])
        if existing:
            mode["oid"] = existing["sha256"] if existing["lfs"] else existing["blob_id"]
        modes.append(mode)
    return {"files": modes}


@router.post(REPO + "/commit/{rev}")
async def commit(request: Request, target: Proposable, rev: str, create_pr: bool = False) -> Json:
    """Make one commit, on the branch or on a new pull request, and return its id and URLs."""
    header: Json = {}
    additions: dict[str, Entry] = {}
    deletions: list[str] = []
    for line in (await request.body()).splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            additions[value["path"]] = target.storage.add_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            additions[value["path"]] = target.storage.entry(value["oid"], lfs=True)
        elif key == "deletedFile":
            deletions.append(value["path"])
        elif key == "deletedFolder":
            deletions.append(value["path"].rstrip("/") + "/")
        else:
            raise HubError(400, f"unknown operation {key!r}")
    assert target.token is not None
    sha, ref = target.storage.commit(
        *target.key,
        unquote(rev),
        additions,
        deletions,
        title=header["summary"],
        message=header["description"],
        author=target.token["user"],
        parent=header.get("parentCommit"),
        create_pr=create_pr,
    )
    links = {"pullRequestUrl": f"{target.url}/discussions/{ref.removeprefix('refs/pr/')}"} if create_pr else {}
    return {"success": True, "commitOid": sha, "commitUrl": f"{target.url}/commit/{sha}", "hookOutput": "", **links}


def front_matter(card: str) -> Any:
    """Return the metadata at the start of a card, or None if there is none. Raises YAMLError if it is not YAML."""
    if not card.startswith("---\n") or "\n---" not in card[3:]:
        return None
    return yaml.safe_load(card[4:].split("\n---", 1)[0])


def sibling(path: str, entry: Entry, blobs: bool) -> Json:
    """Return a file's entry in a repository's information."""
    if not blobs:
        return {"rfilename": path}
    description: Json = {"rfilename": path, "size": entry["size"], "blobId": entry["blob_id"]}
    if entry["lfs"]:
        description["lfs"] = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": pointer_size(entry)}
    return description


def describe(target: Target, sha: str, path: str, expand: bool) -> Json:
    """Return the entry of a file or folder in a tree."""
    files = target.repo["commits"][sha]["files"]
    entry = files.get(path)
    if entry:
        description: Json = {"type": "file", "path": path, "oid": entry["blob_id"], "size": entry["size"]}
        if entry["lfs"]:
            description["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": pointer_size(entry)}
    else:
        oid = hashlib.sha1(json.dumps(below(files, path), sort_keys=True).encode()).hexdigest()
        description = {"type": "directory", "path": path, "oid": oid, "size": 0}
    if expand:
        last = last_change(target, sha, path)
        commit = target.repo["commits"][last]
        description["lastCommit"] = {"id": last, "title": commit["title"], "date": commit["date"]}
    return description


def pointer_size(entry: Entry) -> int:
    """Return the size of the text that git stores instead of an LFS file."""
    return len(lfs_pointer(entry["sha256"], entry["size"]))


def children(files: dict[str, Entry], folder: str, recursive: bool) -> Iterator[tuple[str, None]]:
    """Yield the paths in a folder, each folder before its contents; a folder may be repeated."""
    start = f"{folder}/" if folder else ""
    for path in sorted(path for path in files if path.startswith(start)):
        parts = path.removeprefix(start).split("/")
        for depth in range(1, len(parts) + 1 if recursive else 2):
            yield start + "/".join(parts[:depth]), None


def below(files: dict[str, Entry], path: str) -> dict[str, Entry]:
    """Return the file, or the files of the folder, at a path."""
    return {name: entry for name, entry in files.items() if name == path or name.startswith(f"{path}/")}


def last_change(target: Target, sha: str, path: str) -> str:
    """Return the last commit that changed a file or folder."""
    shas = history(target.repo, sha)
    contents = [below(target.repo["commits"][commit_sha]["files"], path) for commit_sha in shas]
    return next(
        commit_sha
        for commit_sha, content, before in zip(shas, contents, [*contents[1:], {}], strict=True)
        if content != before
    )

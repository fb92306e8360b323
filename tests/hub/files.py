"""The routes that transfer files: resolve, and LFS in both directions.

LFS objects are served and received under this server's other host name (localhost for 127.0.0.1, and vice versa). To
the client, that is another host, like the Hub's storage: it sends no token there, so the URL is signed.
"""

import hmac
from typing import Annotated
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from tests.hub.access import Json, Readable, require_role, token_of
from tests.hub.storage import HubError, resolve

router = APIRouter()


@router.api_route("/{ns}/{name}/resolve/{rev}/{path:path}", methods=["GET", "HEAD"])
@router.api_route("/datasets/{ns}/{name}/resolve/{rev}/{path:path}", methods=["GET", "HEAD"])
async def resolve_file(request: Request, target: Readable, rev: str, path: str) -> Response:
    """Return a file's content, or a redirect to an LFS object."""
    target.require_files()
    sha = resolve(target.repo, unquote(rev))
    headers = {"X-Repo-Commit": sha}
    entry = target.repo["commits"][sha]["files"].get(unquote(path))
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    if not entry["lfs"]:
        headers["ETag"] = f'"{entry["blob_id"]}"'
        return FileResponse(target.storage.object(entry["sha256"]), headers=headers, media_type="text/plain")
    headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["sha256"]}"'}
    return RedirectResponse(signed_url(request, "GET", entry["sha256"]), 302, headers)


@router.post("/{ns}/{name}.git/info/lfs/objects/batch")
@router.post("/datasets/{ns}/{name}.git/info/lfs/objects/batch")
async def lfs_batch(request: Request, target: Readable) -> Json:
    """Return where to upload each object, or no actions for an object that exists already."""
    body = await request.json()
    # For a pull request, the client sends no ref, and any token that can write may upload.
    if "ref" in body:
        target.require_write()
    else:
        require_role(target.token)
    return {
        "transfer": "basic",
        "objects": [
            {"oid": item["oid"], "size": item["size"]}
            | ({} if target.storage.has(item["oid"], item["size"]) else {"actions": upload(request, item["oid"])})
            for item in body["objects"]
        ],
    }


def upload(request: Request, oid: str) -> Json:
    """Return the actions that upload an object."""
    verify = f"{str(request.base_url).rstrip('/')}/lfs/verify"
    return {"upload": {"href": signed_url(request, "PUT", oid), "header": {}}, "verify": {"href": verify, "header": {}}}


@router.post("/lfs/verify")
async def verify(request: Request) -> None:
    """Return an empty response if the object has arrived."""
    require_role(token_of(request))
    body = await request.json()
    if not request.app.state.storage.has(body["oid"], body["size"]):
        raise HubError(404, f"object {body['oid']} does not exist")


def signed_url(request: Request, method: str, oid: str) -> str:
    """Return the URL for downloading or uploading an object without a token."""
    host = "localhost" if request.url.hostname == "127.0.0.1" else "127.0.0.1"
    return str(request.url.replace(hostname=host, path=f"/lfs/{oid}", query=f"signature={sign(request, method, oid)}"))


def sign(request: Request, method: str, oid: str) -> str:
    """Return the signature of a URL; HEAD has the same one as GET."""
    message = f"{method.replace('HEAD', 'GET')} {oid}"
    return hmac.new(request.app.state.secret, message.encode(), "sha256").hexdigest()


async def verify_signature(request: Request, oid: str, signature: str = "") -> str:
    """Return the object's SHA-256. Raises HubError if the URL was not signed here for this method."""
    if not hmac.compare_digest(signature, sign(request, request.method, oid)):
        raise HubError(403, "the signature does not match")
    return oid


SignedOid = Annotated[str, Depends(verify_signature)]


@router.api_route("/lfs/{oid}", methods=["GET", "HEAD"])
async def read_object(request: Request, oid: SignedOid) -> Response:
    """Return an object's bytes, or the requested range."""
    path = request.app.state.storage.object(oid)
    return FileResponse(path, headers={"ETag": f'"{oid}"'}, media_type="application/octet-stream")


@router.put("/lfs/{oid}")
async def write_object(request: Request, oid: SignedOid) -> None:
    """Store an object after it was received completely."""
    storage = request.app.state.storage
    partial = storage.partial()
    with partial.open("wb") as stream:
        async for chunk in request.stream():
            stream.write(chunk)
    storage.add_object(partial, oid)

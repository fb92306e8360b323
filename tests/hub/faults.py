"""Faults on request, and a log of the requests: the layer between the connection and the Hub's routes."""

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, model_validator

from tests.hub.storage import HubError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

FLIPPED = bytes(255 - byte for byte in range(256))


class Rule(BaseModel):
    """One fault, and the requests that it affects: exactly one of delay, status, cut, and wrong_bytes.

    `method` must match the whole method, and `path` any part of the path as it was sent, without the query.
    """

    model_config = ConfigDict(extra="forbid")

    method: str = ".*"
    path: str = ""
    # The number of matching requests that are left alone first, and the number of later ones that get the fault (None:
    # all).
    after: int = 0
    times: int | None = None
    # Process the request, and make only the response fail.
    after_work: bool = False

    # Seconds to wait before the request is processed or, with after_work, before the response.
    delay: float | None = None
    # An error instead of the response.
    status: int | None = None
    headers: dict[str, str] = {}
    error_code: str | None = None
    error_message: str = "told to fail"
    # The connection is closed after this many bytes of the response's body or, for a request with a body (PUT, POST)
    # without after_work, of the request's body.
    cut: int | None = None
    # A response of the correct length with all bits flipped.
    wrong_bytes: bool = False

    @model_validator(mode="after")
    def one_fault(self) -> "Rule":
        faults = [self.delay is not None, self.status is not None, self.cut is not None, self.wrong_bytes]
        if sum(faults) != 1:
            raise ValueError("a rule needs exactly one of delay, status, cut, and wrong_bytes")
        return self


class Faults:
    """The active rules. The first one that matches a request and is not used up applies."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._matched: list[int] = []

    def add(self, **rule: Any) -> None:
        """Add a rule with the fields of Rule."""
        self._matched.append(0)
        self._rules.append(Rule(**rule))

    def clear(self) -> None:
        """Remove all rules."""
        self._rules.clear()
        self._matched.clear()

    def match(self, method: str, path: str) -> Rule | None:
        """Return the rule that applies to this request, and count the request."""
        for index, rule in enumerate(self._rules):
            if not re.fullmatch(rule.method, method) or not re.search(rule.path, path):
                continue
            self._matched[index] += 1
            match_count = self._matched[index] - rule.after
            if match_count > 0 and (rule.times is None or match_count <= rule.times):
                return rule
        return None


class Gate:
    """ASGI middleware that logs each request and injects its fault."""

    def __init__(self, app: App, faults: Faults, log: list[dict[str, Any]]) -> None:
        self.app = app
        self.faults = faults
        self.log = log

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        # Routes get the path as it was sent: a revision such as refs%2Fpr%2F1 has to stay one segment.
        scope["path"] = scope["raw_path"].decode()
        method, path = scope["method"], scope["path"]
        if path in ("/_log", "/_faults"):
            await self.app(scope, receive, send)
            return
        range_header = dict(scope["headers"]).get(b"range", b"").decode() or None
        entry = {"method": method, "path": path, "status": None, "sent": 0, "received": 0, "range": range_header}
        # Logged before the work and updated before each send, so that a client with a response finds its request in the
        # log.
        self.log.append(entry)

        async def counting_receive() -> Message:
            message = await receive()
            entry["received"] += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
            elif method != "HEAD":
                entry["sent"] += len(message.get("body", b""))
            await send(message)

        rule = self.faults.match(method, path)
        app = with_fault(self.app, rule) if rule else self.app
        await app(scope, counting_receive, counting_send)


def with_fault(app: App, rule: Rule) -> App:
    """Return the app with the rule's fault."""

    async def run(scope: Message, receive: Receive, send: Send) -> None:
        respond = await record_response(app, scope, receive) if rule.after_work else app
        uploads = scope["method"] in ("PUT", "POST") and not rule.after_work
        if rule.status is not None:
            if uploads:
                await read_body(receive)
            headers = error_headers(rule.error_code, rule.error_message) | rule.headers
            await JSONResponse({"error": rule.error_message}, rule.status, headers)(scope, receive, send)
        elif rule.cut is not None and uploads:
            await read_body(receive, rule.cut)
            await drop(scope, receive)
        elif rule.cut is not None:
            await cut_response(respond, rule.cut, scope, receive, send)
        elif rule.wrong_bytes:
            await respond(scope, receive, flip_bits(send))
        else:
            await asyncio.sleep(rule.delay or 0)
            await respond(scope, receive, send)

    return run


async def record_response(app: App, scope: Message, receive: Receive) -> App:
    """Let the app process the request, and return an app that sends the recorded response."""
    messages: list[Message] = []

    async def collect(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, collect)

    async def replay(scope: Message, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return replay


async def read_body(receive: Receive, max_bytes: int | None = None) -> None:
    """Read the request's body, or at least its first `max_bytes` bytes."""
    count = 0
    while max_bytes is None or count < max_bytes:
        message = await receive()
        count += len(message.get("body", b""))
        if not message.get("more_body"):
            return


async def cut_response(app: App, max_bytes: int, scope: Message, receive: Receive, send: Send) -> None:
    """Send the response's headers and at most `max_bytes` bytes of its body, then drop the connection.

    For a response without a body, send nothing: the headers alone would be a complete response.
    """
    head: Message | None = None
    remaining = max_bytes

    async def send_some(message: Message) -> None:
        nonlocal head, remaining
        if message["type"] == "http.response.start":
            head = message
            return
        if remaining < 0:
            return
        body = b"" if scope["method"] == "HEAD" else message.get("body", b"")
        if head and body:
            await send(head)
            head = None
        if body[:remaining]:
            await send({"type": "http.response.body", "body": body[:remaining], "more_body": True})
        remaining -= len(body)
        if remaining < 0 or not message.get("more_body"):
            remaining = -1
            await drop(scope, receive)

    await app(scope, receive, send_some)


async def drop(scope: Message, receive: Receive) -> None:
    """Close the connection, even in the middle of a response, and wait until it is closed."""
    scope["drop"]()
    while (await receive())["type"] != "http.disconnect":
        pass


def flip_bits(send: Send) -> Send:
    """Return a `send` that flips every bit of the body."""

    async def flip(message: Message) -> None:
        if "body" in message:
            message["body"] = message["body"].translate(FLIPPED)
        await send(message)

    return flip


def error_headers(code: str | None, message: str) -> dict[str, str]:
    """Return the headers from which the client chooses its exception and its message."""
    return {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Return the HTTP response for a HubError."""
    assert isinstance(error, HubError)
    return JSONResponse({"error": str(error)}, error.status, error_headers(error.code, str(error)) | error.headers)


router = APIRouter()


@router.post("/_faults")
async def set_faults(request: Request, rules: list[Rule]) -> list[Rule]:
    """Replace all rules."""
    request.app.state.faults.clear()
    for rule in rules:
        request.app.state.faults.add(**rule.model_dump())
    return rules


@router.get("/_log")
async def read_log(request: Request) -> list[dict[str, Any]]:
    """Return the requests served so far."""
    return list(request.app.state.log)


@router.delete("/_log")
async def clear_log(request: Request) -> None:
    """Clear the log."""
    request.app.state.log.clear()

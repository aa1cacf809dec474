"""What every request passes before anything looks at it: its key, its kind, its size; and what is noted of it afterwards."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError
from serving.metrics import Metrics

OPEN = ("/", "/health")  # no key is asked for: the page asks its user, and whoever watches over the server has none
BODY_SECONDS = 30.0  # for a body to arrive
LATE = "the body is late"  # why its task is cancelled
JSON = b"application/json"
MISTAKE = "the server made a mistake; its log says which"
UNKNOWN = "other"  # in the metrics, for paths that are none

log = logging.getLogger("serving")

Answering = Callable[[Request], Awaitable[Response]]


class Gate:
    """Stands around an application.  `paths` are those that the metrics know; requests that post to one of `direct` do not go
    through the application, but to who answers them."""

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        metrics: Metrics,
        paths: frozenset[str],
        direct: Mapping[str, Answering],
    ) -> None:
        self._app, self._metrics, self._paths, self._direct = app, metrics, paths, direct
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, name = time.perf_counter(), 0, os.urandom(16).hex()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        scope["arrived"], scope["name"] = began, name
        try:
            answer = await self._answer(scope, receive)
            await answer(scope, receive, noting)
        except Exception:  # the application answers its own, which comes here nevertheless
            if not status:
                await ApiError(500, MISTAKE).response()(scope, receive, noting)
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else UNKNOWN
            self._metrics.requests.labels(path, str(status or 499)).inc()
            tokens = scope.get("state", {}).get("tokens")
            log.info(
                "%s %s %s %s %.1f ms%s",
                name[:8],
                scope["method"],
                path,
                status or "left",
                1000 * (time.perf_counter() - began),
                "" if tokens is None else f", {tokens} tokens",
            )

    async def _answer(self, scope: Scope, receive: Receive) -> ASGIApp:
        """The response to a request that is refused or answered directly; to others the application's."""
        try:
            self._check(scope)
            if scope["method"] == "POST" and scope["path"] in self._direct:
                return await self._direct[scope["path"]](Request(scope, receive))
        except ApiError as error:
            return error.response()
        return self._app

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not let in, by its headers alone."""
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in OPEN and not self._knows_key(headers):
            raise ApiError(401, "a valid API key is needed: send the header Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] == "POST" and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != JSON:
            raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")

    def _knows_key(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(key.strip(), self._key or b"") and scheme.lower() == b"bearer"


async def body_of(request: Request, limit: int) -> bytes:
    """The whole body.  Raises ApiError for one that is too long, or does not come."""
    declared = dict(request.scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > limit:
        raise too_long(limit)
    task = asyncio.current_task()
    assert task is not None
    timer = asyncio.get_running_loop().call_later(BODY_SECONDS, task.cancel, LATE)  # asyncio.timeout takes longer
    body, more = b"", True
    try:
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left before its request was whole")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise too_long(limit)
    except asyncio.CancelledError as error:
        if error.args != (LATE,):
            raise
        task.uncancel()
        raise ApiError(408, f"the body has not come within {BODY_SECONDS:g} s") from None
    finally:
        timer.cancel()
    return body


def too_long(limit: int) -> ApiError:
    """What is told of a body beyond the limit."""
    return ApiError(413, f"the body is longer than {limit} bytes")

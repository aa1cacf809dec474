"""The paths of the server."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serving.answer import Answer
from serving.errors import ApiError
from serving.gate import MISTAKE, Answering, Gate, body_of
from serving.page import page
from serving.schema import Body, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, read
from serving.service import Order, Service
from serving.wire import Form

SCHEMAS = "#/components/schemas/"
BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

log = logging.getLogger("serving")

B = TypeVar("B", bound=Body)


class Gated(FastAPI):
    """With a gate in front of all of FastAPI: of its layers, each takes time of every request and of every event."""

    gate: Gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.gate(scope, receive, send)

    async def behind(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is left to FastAPI."""
        await super().__call__(scope, receive, send)


def who_answers(service: Service, log_prompts: bool) -> dict[str, Answering]:
    """Who answers the requests with bodies, by path.

    Bodies are read here and not by FastAPI, and the gate leads straight to these: the way through FastAPI's routes and
    middleware takes a third of a request's time.
    """
    identity = service.identity

    async def request_of(request: Request, kind: type[B]) -> B:
        body = await body_of(request, service.limits.body_bytes)
        if log_prompts:
            log.info("%s %s", request.url.path, json.dumps(body.decode(errors="replace"), ensure_ascii=False))
        return read(body, kind)

    def client_of(request: Request) -> str:
        return request.client.host if request.client else ""

    def answer(request: Request, order: Order, chat: bool) -> Answer:
        form = Form(chat, identity.model, identity.fingerprint, request.scope["name"])
        return Answer(service, order, form, request.scope["arrived"])

    async def chat(request: Request) -> Response:
        order = await service.chat(await request_of(request, ChatRequest), client_of(request))
        return answer(request, order, chat=True)

    async def completions(request: Request) -> Response:
        order = await service.completion(await request_of(request, CompletionRequest), client_of(request))
        return answer(request, order, chat=False)

    async def tokenize(request: Request) -> Response:
        ids = await service.tokenize(await request_of(request, TokenizeRequest))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.capacity})

    async def detokenize(request: Request) -> Response:
        return JSONResponse({"prompt": await service.detokenize(await request_of(request, DetokenizeRequest))})

    return dict(zip(BODIES, (chat, completions, tokenize, detokenize), strict=True))


def make_app(service: Service, key: str | None = None, log_prompts: bool = False) -> FastAPI:
    """The ASGI application.  key: what clients must send; log_prompts: write the bodies of requests to the log."""
    app = Gated(title="llama-megakernel", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    identity, created = service.identity, int(time.time())
    card = {"id": identity.model, "object": "model", "created": created, "owned_by": "llama-megakernel"}
    card |= {"max_model_len": service.capacity}
    html = page()

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(card)

    direct = who_answers(service, log_prompts)
    for path, answering in direct.items():  # for whoever comes by another method
        app.add_route(path, answering, methods=["POST"], include_in_schema=False)

    @app.get("/health")
    async def health() -> Response:
        told = service.scheduler.health()
        return JSONResponse(vars(told) | {"model": identity.model}, 200 if told.state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def nowhere(request: Request, error: HTTPException) -> Response:
        return await refused(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return await refused(request, ApiError(500, MISTAKE))

    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    paths = frozenset({*(str(route.path) for route in app.routes if hasattr(route, "path")), "/openapi.json"})
    app.gate = Gate(app.behind, key, service.metrics, paths, direct)
    return app


# The page has all that it needs in itself, and speaks with nobody but this server.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def described(app: FastAPI) -> dict[str, Any]:
    """What /openapi.json is, with the paths whose bodies are read here."""
    told = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, kind in BODIES.items():
        content = {"application/json": {"schema": {"$ref": SCHEMAS + kind.__name__}}}
        told["paths"][path] = {
            "post": {
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {"required": True, "content": content},
                "responses": {"200": {"description": "The answer"}},
            }
        }
    bodies = models_json_schema([(kind, "validation") for kind in BODIES.values()], ref_template=SCHEMAS + "{model}")[1][
        "$defs"
    ]
    told.setdefault("components", {}).setdefault("schemas", {}).update(bodies)
    return told

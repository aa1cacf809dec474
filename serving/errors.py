"""Refusals and failures in the form that clients of OpenAI's API expect: one object with message, type, param and code."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from models.errors import printable


class ApiError(Exception):
    """An answer that is an error.  `param` names the field of the request that is at fault; `retry_after` is in seconds."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(printable(message))
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def kind(self) -> str:
        """What OpenAI calls `type`."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Those that belong to the error."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> JSONResponse:
        """All of that."""
        return JSONResponse(self.body(), self.status, self.headers())


def busy(message: str, retry_after: int) -> ApiError:
    """The server cannot take the request now, and says when to try again."""
    return ApiError(503, message, code="overloaded", retry_after=retry_after)


def not_built(name: str) -> ApiError:
    """A parameter of the API that this server knows and does not have."""
    return ApiError(400, f"{name} is not built in this server: leave it out", name, "unsupported_parameter")

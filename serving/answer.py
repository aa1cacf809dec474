"""The answer to a queued request, whole or as a stream of events; ends the jobs when its client leaves or its time is over.

Nothing is sent before the first token is there: what goes wrong until then has a status of its own.
"""

from __future__ import annotations

import asyncio
import time

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serving.choice import Choice
from serving.errors import ApiError, busy
from serving.inbox import Late, Left
from serving.job import Burst, Failure, Job
from serving.service import Order, Service
from serving.wire import DONE, Form, Usage, event

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx shall pass on what comes when it comes
]
# After a request was queued.  The engine's thread joins it and enqueues its prompt meanwhile, and shall not wait for this one.
PREPARE_SECONDS = 0.001


class ClientLeft(Exception):
    """Nobody is there to be answered."""


class Answer(Response):
    """An ASGI response.  `arrived` is when the request came, by time.perf_counter."""

    def __init__(self, service: Service, order: Order, form: Form, arrived: float) -> None:
        super().__init__()
        self._service, self._order, self._form, self._arrived = service, order, form, arrived
        self._places: dict[Job, int] = {choice.job: place for place, choice in enumerate(order.choices)}
        self._open = len(order.choices)
        self._last = 0.0  # when the newest token came; 0: none yet
        self._pending: list[asyncio.Task[None] | asyncio.TimerHandle] = []  # what watches the client and the clock
        self._noted: dict[int, int] = {}  # tokens of each choice of which something has come

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        preparing = asyncio.get_running_loop().call_later(PREPARE_SECONDS, self._prepare, receive)
        try:
            await (self._stream(send) if self._order.request.stream else self._whole(scope, receive, send))
        except ApiError as error:
            await error.response()(scope, receive, send)
        except (ClientLeft, OSError):  # the latter where it left while something was sent
            self._service.metrics.cancelled.inc()
        finally:
            for choice in self._order.choices:
                if choice.finish is None:
                    self._service.scheduler.cancel(choice.job)
            for pending in (preparing, *self._pending):
                pending.cancel()
            scope.setdefault("state", {})["tokens"] = sum(choice.tokens for choice in self._order.choices)

    def _prepare(self, receive: Receive) -> None:
        """Watch the client and the clock, and make ready what the first text needs."""
        limits, inbox, loop = self._service.limits, self._order.inbox, asyncio.get_running_loop()
        self._pending = [
            loop.create_task(self._listen(receive)),
            *(loop.call_later(seconds, inbox.put, Late()) for seconds in (limits.queue_seconds, limits.answer_seconds)),
        ]
        for choice in self._order.choices:
            choice.prepare()
        self._form.prepare()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._order.inbox.put(Left())

    async def _next(self) -> tuple[int, Burst]:
        """What came next for some choice that has not ended, and for which.  Raises ApiError and ClientLeft."""
        while True:
            news = await self._order.inbox.get()
            if isinstance(news, Burst):
                place = self._places[news.job]
                if self._order.choices[place].finish is None:
                    return place, news
            elif isinstance(news, Failure):
                raise news.error if isinstance(news.error, ApiError) else ApiError(500, str(news.error))
            elif isinstance(news, Left):
                raise ClientLeft
            else:
                self._check_time()

    def _take(self, choice: Choice, burst: Burst) -> str:
        """The text of what came."""
        text = choice.take(burst)
        if choice.finish is not None:
            self._open -= 1
            if burst.finish is None:  # a stop string ends it before the engine does
                self._service.scheduler.cancel(choice.job)
        return text

    def _note(self, place: int, burst: Burst) -> None:
        """Count what came: once it has been sent, for nobody waits for that."""
        metrics, choice, known = self._service.metrics, self._order.choices[place], self._noted.get(place)
        if not self._last:
            metrics.first_token.observe(burst.at - self._arrived)
        elif known is not None:
            each = (burst.at - self._last) / len(burst.tokens)
            for _ in burst.tokens:
                metrics.between.observe(each)
        if known is None:
            metrics.prompt_tokens.inc(len(choice.job.prompt))
            metrics.kept_tokens.inc(burst.kept)
        self._last = burst.at
        metrics.tokens.inc(choice.tokens - (known or 0))
        self._noted[place] = choice.tokens

    def _check_time(self) -> None:
        """Raises ApiError where the time for the whole answer is over, or none of it has begun in the time for the queue."""
        limits, elapsed = self._service.limits, time.perf_counter() - self._arrived
        if elapsed >= limits.answer_seconds:
            raise ApiError(504, f"the answer took more than {limits.answer_seconds:g} s", code="timeout")
        if not any(choice.job.began for choice in self._order.choices):
            retry, load = self._service.scheduler.retry_after(), self._service.scheduler.load()
            raise busy(f"the request waited for more than {limits.queue_seconds:g} s; {load}", retry)

    def _usage(self) -> Usage:
        choices = self._order.choices
        return Usage(self._order.prompt_tokens, sum(choice.tokens for choice in choices), choices[0].job.kept)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts = [""] * len(self._order.choices)
        while self._open:
            place, burst = await self._next()
            texts[place] += self._take(self._order.choices[place], burst)
            self._note(place, burst)
        ends = [choice.finish or "" for choice in self._order.choices]
        body = self._form.whole(list(zip(texts, ends, strict=True)), self._usage())
        await JSONResponse(body)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        started: set[int] = set()
        while self._open:
            try:
                place, burst = await self._next()
            except ApiError as error:
                if not started:
                    raise
                await self._send(send, event(error.body()), more=False)
                return
            choice = self._order.choices[place]
            text, pieces = self._take(choice, burst), b""
            if text or place not in started:
                pieces = self._form.piece(place, text, first=place not in started)
            if choice.finish is not None:
                pieces += self._form.piece(place, "", choice.finish)
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            started.add(place)
            if not self._open:
                pieces += self._end()
            if pieces:
                await self._send(send, pieces, more=self._open > 0)
            self._note(place, burst)

    def _end(self) -> bytes:
        """The events after the last piece."""
        options = self._order.request.stream_options
        return (self._form.usage(self._usage()) if options is not None and options.include_usage else b"") + DONE

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})

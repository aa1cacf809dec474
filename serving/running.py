"""A server from its first connection to its last: listening, signals, a stop that lets answers end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from models.errors import UserError
from serving.service import Service

KEEP_ALIVE_SECONDS = 60
BACKLOG = 1024
AFTER_ABORT = 2  # seconds to send what those are told who were not done in time
SWITCH_SECONDS = 0.0001  # most that a thread waits for another that computes: the engine's must not, at every launch

log = logging.getLogger("serving")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.  Raises UserError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --host or --port"
        ) from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The server's address, as a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, which leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(app: FastAPI, service: Service, bound: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers end; those that are not done in time end with an error.

    A second signal ends them at once.  ready: called when connections are taken.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # what is there now stays: to look through all of it again would take milliseconds in the middle of an answer
    grace = service.limits.grace_seconds
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(grace) + AFTER_ABORT,
    )
    server = Server(config)

    async def serve() -> None:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if server.should_exit:
                service.scheduler.abort("the server is stopping")
                server.force_exit = True
                return
            log.warning("stopping: running answers have %g s", grace)
            service.scheduler.drain()
            server.should_exit = True
            loop.call_later(grace, service.scheduler.abort, "the server is stopping")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        loop.call_soon(ready)
        await server.serve(sockets=[bound])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve())

"""`llama-megakernel serve`: load a model and answer requests until told to stop.

What can be refused is refused before anything is loaded, the port included.  The log goes to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakernel.command import (
    BUNDLED,
    BUNDLED_NAME,
    EngineOptions,
    LoadEngine,
    add_engine_options,
    add_model_option,
    add_sampling_options,
    adder,
    check_context,
    chosen_model,
    loaded,
    open_text,
    sampling_of,
)
from models.command import Parser, command, note, real, whole
from models.errors import UserError
from serving.settings import MIB, Identity, Limits

if TYPE_CHECKING:
    from megakernel.engine import Engine
    from megakernel.request import SamplingParams
    from megakernel.text import TextCodec

KEY_VARIABLE = "MEGAKERNEL_API_KEY"  # of the environment: what --api-key is where it is left out
MOST_SECONDS = 86400.0


@dataclass(frozen=True)
class Options(EngineOptions):
    """One server."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    log_prompts: bool = False
    sequences: int | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (("--name", self.name), ("--api-key", self.api_key), ("--host", self.host)):
            if value == "":
                raise UserError(f"{option} is empty: write at least one character, or leave it out")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key):
            raise UserError("the API key must be of printable ASCII characters without blanks: it travels in a header")


def parse(argv: list[str] | None) -> Options:
    """The command line as Options; every default is that of the field it fills."""
    shown, limits = Options(), Limits()
    parser = Parser(prog="python -m serving", description="Answer requests of OpenAI's API over HTTP, and a page to chat in.")
    add = adder(parser)
    add_model_option(parser)
    add("--name", help="what clients call the model (default: the last part of --model)")
    add("--host", help=f"address to listen on (default: {shown.host}; 0.0.0.0 is all of this machine's)")
    add("--port", type=whole(0, 65535), metavar="N", help=f"port to listen on; 0 takes a free one (default: {shown.port})")
    add("--api-key", metavar="KEY", help=f"what clients must send (default: {KEY_VARIABLE} of the environment, else none)")
    add_sampling_options(parser)
    add_engine_options(parser)
    add("--sequences", type=whole(1, 8), metavar="N", help="that decode together, at most 8 (default: 1 on the GPU, else 8)")
    tokens = {"type": whole(1, 2**24), "metavar": "N"}
    add("--answer-tokens", **tokens, help="of an answer where a request does not say how many (default: what fits)")
    add("--queue", type=whole(1, 10**6), metavar="N", help=f"sequences that may wait (default: {limits.queue})")
    seconds = {"type": real(0.1, MOST_SECONDS), "metavar": "S"}
    add("--queue-seconds", **seconds, help=f"how long one may wait (default: {limits.queue_seconds:g})")
    add("--answer-seconds", **seconds, help=f"how long an answer may take in all (default: {limits.answer_seconds:g})")
    add("--grace-seconds", **seconds, help=f"what answers have after SIGTERM (default: {limits.grace_seconds:g})")
    most = {"type": whole(1, 2**40), "metavar": "N"}
    add("--body-bytes", **most, help=f"longest body of a request (default: {limits.body_bytes // MIB} MiB)")
    add("--log-prompts", action="store_true", help="write requests to the log, prompts included")
    given = vars(parser.parse_args(argv))
    told = {one.name: given.pop(one.name) for one in fields(Limits) if one.name in given}
    return Options(**given, limits=Limits(**told))


def model_name(model: str) -> str:
    """What clients call a model that was given no name: its file or folder, or what it is called on the hub."""
    if model == str(BUNDLED):
        return BUNDLED_NAME
    path = Path(model)
    return (path.stem if path.suffix in (".gguf", ".safetensors") else path.name) or model


def identity_of(options: Options, model: str, engine: Engine, sampling: SamplingParams) -> Identity:
    """How the server calls what it serves."""
    try:
        release = version("llama-megakernel")
    except PackageNotFoundError:  # run from a checkout
        release = "checkout"
    fingerprint = f"llama-megakernel-{release}-{engine.backend_name}"
    return Identity(options.name or model_name(model), fingerprint, tuple(engine.config.eos_token_ids), sampling)


def serve(options: Options, load: LoadEngine | None = None, ready: Callable[[str], None] = note) -> None:
    """Load and serve until told to stop.  ready: called with the server's address when it takes connections."""
    from serving.running import address_of, listening

    model, _ = chosen_model(options)
    with listening(options.host, options.port) as bound:
        checkpoint, text = open_text(model)
        check_context(options.context, checkpoint.config.max_position)
        sampling = sampling_of(options, checkpoint.sampling)
        with loaded(options, model, checkpoint, load, options.sequences) as engine:
            identity = identity_of(options, model, engine, sampling)
            note(f"{identity.model} on {engine.backend_name}, {engine.capacity} tokens of context")
            answer(options, engine, text, identity, bound, lambda: ready(f"listening on {address_of(bound)}"))


def answer(
    options: Options, engine: Engine, text: TextCodec, identity: Identity, bound: Any, ready: Callable[[], None]
) -> None:
    """Serve a loaded engine on a socket."""
    from serving.app import make_app
    from serving.decoder import EngineDecoder
    from serving.metrics import Metrics
    from serving.running import run
    from serving.scheduler import Scheduler
    from serving.service import Service

    metrics = Metrics()
    scheduler = Scheduler(EngineDecoder(engine), options.limits.queue, metrics.faults.inc)
    try:
        metrics.watch(scheduler, engine.capacity)
        sizes = (engine.config.vocab_size, engine.capacity)
        service = Service(text, scheduler, identity, options.limits, metrics, sizes)
        service.warm()
        app = make_app(service, options.api_key or os.environ.get(KEY_VARIABLE) or None, options.log_prompts)
        run(app, service, bound, ready)
        service.close()
    finally:
        scheduler.close()


@command
def main(arguments: list[str] | None = None, load: LoadEngine | None = None) -> int:
    """Exit status of one server: 0 after SIGTERM or SIGINT.  `load` stands in for `megakernel.loading.load_engine`."""
    options = parse(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    serve(options, load)
    return 0

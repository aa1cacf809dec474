"""`llama-megakernel chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from chat.commands import Session
from chat.conversation import Conversation
from chat.talk import Talk
from chat.terminal import Lines, PipedLines, talk
from megakernel.command import (
    EngineOptions,
    LoadEngine,
    add_engine_options,
    add_model_option,
    add_sampling_options,
    add_seed_option,
    adder,
    check_context,
    chosen_model,
    loaded,
    open_text,
    sampling_of,
)
from models.command import Parser, command, note
from models.errors import UserError
from models.output import output_path
from models.smollm2 import cache_directory

HISTORY = "chat-history"


@dataclass(frozen=True)
class Options(EngineOptions):
    """One chat."""

    system: str = ""
    max_tokens: int | None = None
    load: Path | None = None
    history: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max-tokens must be 1 or more, got {self.max_tokens}")


def parse(argv: list[str] | None) -> Options:
    """The command line as Options; every default is that of the field it fills."""
    parser = Parser(prog="python -m chat", description="Talk with a model; /help lists what can be done besides.")
    add = adder(parser)
    add_model_option(parser)
    add("--system", metavar="TEXT", help="the system message (default: none)")
    add("--load", type=output_path, metavar="FILE", help="go on with a conversation that /save wrote")
    add("--max-tokens", type=int, metavar="N", help="tokens of an answer at most (default: what fits)")
    add("--no-history", dest="history", action="store_false", help="do not remember from one chat to the next what was typed")
    add_sampling_options(parser)
    add_seed_option(parser)
    add_engine_options(parser)
    return Options(**vars(parser.parse_args(argv)))


def begun(options: Options) -> Conversation:
    """The conversation before anything is said."""
    conversation = Conversation() if options.load is None else Conversation.load(options.load)
    if options.system:
        conversation.system = options.system
    return conversation


@command
def main(arguments: list[str] | None = None, load: LoadEngine | None = None) -> int:
    """Exit status of one chat.  `load` stands in for `megakernel.loading.load_engine`."""
    options = parse(arguments)
    conversation = begun(options)
    model, _ = chosen_model(options)
    checkpoint, text = open_text(model)
    check_context(options.context, checkpoint.config.max_position)
    sampling = sampling_of(options, checkpoint.sampling)
    text.encode_messages([{"role": "user", "content": "a"}])  # what has no chat template is refused before it is loaded
    with loaded(options, model, checkpoint, load) as engine:
        note(f"{model} on {engine.backend_name}, {engine.capacity} tokens of context; /help, Ctrl-D ends")
        history = cache_directory() / HISTORY if options.history else None
        lines = Lines(history) if sys.stdin.isatty() else PipedLines()
        talk(Session(Talk(engine, text, sampling, options.max_tokens), conversation), lines, Console())
    return 0

"""Run a Llama from the command line: text in, text out, token by token.

    python run_llama1b.py --prompt "Why is the sky blue?"
    python run_llama1b.py --model meta-llama/Llama-3.2-1B-Instruct --chat --prompt "Why is the sky blue?" --max-tokens 200

The generated text goes to stdout as it is made, everything else to stderr.  Exit status: 0, 2 for what the user can mend
(`error: ...`, one line), 130 after Ctrl-C, 141 when the reader of stdout has gone.  Knows how to talk to a terminal; tokens and
text are `megakernel.text`'s, decoding is the engine's.
"""

from __future__ import annotations

from models.process import begin

if __name__ == "__main__":
    begin()  # before all that takes time to import

import argparse
import json
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from megakernel.command import (
    BUNDLED,
    EngineOptions,
    LoadEngine,
    Status,
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
from models.command import INTERRUPTED, Parser, command, note, start
from models.errors import UserError

if TYPE_CHECKING:
    from megakernel.generation import Generation
    from megakernel.text import TextCodec

QUESTION, OPENING = "What is the capital of France?", "The garbage collector"


@dataclass(frozen=True)
class Options(EngineOptions):
    """One run.  Raises UserError for values that no model could take.

    What is None is decided later: see `settled`, and for the sampling `sampling_of`.
    """

    prompt: str | None = None
    chat: bool | None = None
    max_tokens: int = 128
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt == "":
            raise UserError("--prompt is empty: write at least one character")
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens must be 1 or more, got {self.max_tokens}")


@dataclass(frozen=True)
class Request(Options):
    """Options of which the model, and how it is asked, are known."""

    model: str = str(BUNDLED)
    prompt: str = OPENING
    chat: bool = False


@dataclass
class Result:
    """What a run has made so far; at any moment a truthful account of it, for Ctrl-C can come at any moment."""

    model: str
    backend: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "interrupted"
    steps: int | None = None  # that chose tokens, where drafts were asked for
    kept_tokens: int = 0  # of the prompt, whose keys and values were in the cache when the request began
    started: float = 0.0  # seconds, as are the two below, by time.perf_counter
    first: float = 0.0
    last: float = 0.0

    @property
    def ttft_ms(self) -> float | None:
        """From the start of the request to its first token; None before there is one."""
        return 1000 * (self.first - self.started) if self.token_ids else None

    @property
    def ms_per_token(self) -> float | None:
        """Mean over the tokens after the first; None where there are none."""
        count = len(self.token_ids) - 1
        return 1000 * (self.last - self.first) / count if count > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """The inverse of `ms_per_token`."""
        return 1000 / self.ms_per_token if self.ms_per_token else None

    def as_json(self) -> str:
        names = ("model", "backend", "prompt_token_ids", "kept_tokens", "token_ids", "text", "finish_reason")
        timings = {
            name: None if value is None else round(value, 3)
            for name in ("ttft_ms", "ms_per_token", "tokens_per_second")
            for value in [getattr(self, name)]
        }
        return json.dumps({name: getattr(self, name) for name in names} | timings)

    def closing_line(self) -> str:
        parts = [f"{len(self.token_ids)} tokens ({self.finish_reason})"]
        if self.ttft_ms is not None:
            parts.append(f"first after {self.ttft_ms:.2f} ms")
        if self.ms_per_token is not None:
            parts.append(f"{self.ms_per_token:.3f} ms/token ({self.tokens_per_second or 0:.1f} tokens/s)")
        if self.steps:
            parts.append(f"{len(self.token_ids) / self.steps:.2f} tokens a step")
        if self.kept_tokens:
            parts.append(f"{self.kept_tokens:,} of {len(self.prompt_token_ids):,} prompt tokens kept")
        return ", ".join(parts)


def parse(argv: list[str] | None) -> Options:
    """The command line as Options; every default is that of the dataclass field it fills."""
    options = Options()
    parser = Parser(
        prog="run_llama1b.py",
        description="Decode a Llama or a relative with one persistent GPU kernel, plain PyTorch, or the kernel's CPU twin.",
    )
    add = adder(parser)
    add_model_option(parser)
    add("--prompt", metavar="TEXT", help="text to go on from, or with --chat to answer")
    add("--chat", action=argparse.BooleanOptionalAction, help="put it into the model's chat template (SmolLM2: yes)")
    add("--max-tokens", type=int, metavar="N", help=f"tokens to generate at most (default: {options.max_tokens})")
    add_sampling_options(parser)
    add_seed_option(parser)
    add_engine_options(parser)
    add("--json", action="store_true", help="print one JSON object at the end in place of text")
    return Options(**vars(parser.parse_args(argv)))


def settled(options: Options) -> Request:
    """The options with a model, and how it is asked: SmolLM2 for want of a name in chat form."""
    model, answering = chosen_model(options)
    return Request(
        **{
            **vars(options),
            "model": model,
            "prompt": options.prompt or (QUESTION if answering else OPENING),
            "chat": answering if options.chat is None else options.chat,
        }
    )


class _Reading(Status):
    """How far a long prompt has been read; what is read at one go needs no line."""

    def __call__(self, done: int, total: int) -> None:
        if done < total:
            self.show(f"reading the prompt: {done:,} of {total:,} tokens")


def run(options: Request, load: LoadEngine | None, result: Result) -> None:
    """Loads and generates, writing text as it comes unless JSON was asked for; `result` grows along."""
    checkpoint, text = open_text(options.model)
    check_context(options.context, checkpoint.config.max_position)
    sampling = sampling_of(options, checkpoint.sampling)
    result.prompt_token_ids = text.encode_chat(options.prompt) if options.chat else text.encode(options.prompt)
    began = time.perf_counter()
    engine = loaded(options, options.model, checkpoint, load)
    with engine:
        result.backend = engine.backend_name
        # The engine stops at what the request names, no more: a benchmark wants to run past the end of a text.
        sampling = replace(sampling, stop_token_ids=tuple(engine.config.eos_token_ids))
        result.started = time.perf_counter()
        reading = _Reading()
        generation = engine.generate(result.prompt_token_ids, options.max_tokens, sampling, progress=reading)
        note(f"{options.model} on {engine.backend_name}, loaded in {result.started - began:.1f} s")
        if options.model.startswith("random:"):
            note("random weights have no tokenizer: the prompt goes in as bytes, token ids come out in place of words")
        try:
            generate(generation, text, options, result, reading)
        finally:
            reading.close()


def generate(generation: Generation, text: TextCodec, options: Request, result: Result, reading: _Reading) -> None:
    from megakernel.text import terminal_safe

    detokenizer = text.detokenizer(result.prompt_token_ids)
    shown = terminal_safe if sys.stdout.isatty() else str  # what a model says must not command a terminal

    def emit(piece: str) -> None:
        reading.close()
        result.text += piece
        if not options.json:
            _write(shown(piece))

    try:
        for token_id in generation:
            result.steps = generation.steps_made if options.speculate else None
            result.last = time.perf_counter()
            result.first = result.first or result.last
            result.token_ids.append(token_id)
            emit(detokenizer.step(token_id))
    except KeyboardInterrupt:
        generation.stop()
        emit(detokenizer.finish())
        raise
    emit(detokenizer.finish())
    result.kept_tokens = generation.kept
    result.finish_reason = generation.finish_reason or result.finish_reason


def _write(text: str) -> None:
    """Writes to stdout at once."""
    print(text, end="", flush=True)


def _close_text(options: Request, result: Result) -> None:
    """Ends stdout: the JSON object, or the line of the text."""
    if options.json:
        _write(result.as_json() + "\n")
    elif result.token_ids:
        _write("\n")
    if result.token_ids:
        note(result.closing_line())


@command
def main(argv: list[str] | None = None, load: LoadEngine | None = None) -> int:
    """Exit status of one run.  `load` stands in for `megakernel.loading.load_engine`, with its arguments."""
    options = settled(parse(argv))
    result = Result(options.model)
    try:
        run(options, load, result)
    except KeyboardInterrupt:
        _close_text(options, result)
        return INTERRUPTED
    _close_text(options, result)
    return 0


def process() -> NoReturn:
    """One run as this process: what `llama-megakernel` and `python run_llama1b.py` both start."""
    start(main)


if __name__ == "__main__":
    process()

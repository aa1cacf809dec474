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
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import models
from megakernel.request import SamplingParams
from models.command import INTERRUPTED, MODEL_HELP, WEIGHTS, Parser, command, note, start
from models.errors import UserError

if TYPE_CHECKING:
    from megakernel.engine import Engine
    from megakernel.text import TextCodec
    from models.checkpoint import Checkpoint
    from models.sampling_defaults import SamplingDefaults

BUNDLED = Path(models.__path__[0]) / "bundled"
MODEL_VARIABLE = "MEGAKERNEL_MODEL"  # of the environment: what --model is where it is left out
BUNDLED_NAME = "bundled"
QUESTION, OPENING = "What is the capital of France?", "The garbage collector"
BACKENDS = ("auto", "gpu", "torch", "vm")
MAX_SMS = 200  # more than any NVIDIA GPU has

LoadEngine = Callable[..., "Engine"]


@dataclass(frozen=True)
class Options:
    """One run.  Raises UserError for values that no model could take.

    What is None is decided later: see `settled`, and for the sampling `sampling_of`.
    """

    model: str | None = None
    prompt: str | None = None
    chat: bool | None = None
    max_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = SamplingParams().seed
    weights: str | None = None
    head: str | None = None
    backend: str = "auto"
    sms: int | None = None
    context: int | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.model == "":
            raise UserError("--model is empty: give a directory, a file, a hub id or random:<preset>")
        if self.prompt == "":
            raise UserError("--prompt is empty: write at least one character")
        SamplingParams(**self.drawn)
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens must be 1 or more, got {self.max_tokens}")
        if self.sms is not None and not 1 <= self.sms <= MAX_SMS:
            raise UserError(f"--sms must lie in 1..{MAX_SMS}, got {self.sms}")
        if self.context is not None and self.context < 1:
            raise UserError(f"--context must be 1 or more, got {self.context}")

    @property
    def drawn(self) -> dict[str, Any]:
        """What was asked for of the sampling."""
        asked = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        return {name: value for name, value in asked.items() if value is not None}


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
    add = partial(parser.add_argument, default=argparse.SUPPRESS)  # what is left out takes the default of its field
    add("--model", help=f"{MODEL_HELP} (default: SmolLM2-135M-Instruct, fetched once)")
    add("--prompt", metavar="TEXT", help="text to go on from, or with --chat to answer")
    add("--chat", action=argparse.BooleanOptionalAction, help="put it into the model's chat template (SmolLM2: yes)")
    add("--max-tokens", type=int, metavar="N", help=f"tokens to generate at most (default: {options.max_tokens})")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token (default: the model's own)")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest; 0 is off (likewise)")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P (likewise)")
    add("--seed", type=int, metavar="N", help=f"of the draws (default: {options.seed})")
    add("--weights", metavar="F", choices=WEIGHTS, help=f"{', '.join(WEIGHTS)} (default: as they are stored)")
    add("--head", metavar="F", choices=WEIGHTS, help="the LM head's (default: as the other weights)")
    add("--backend", choices=BACKENDS, help="auto, the default, takes the kernel (gpu) where it runs, else torch")
    add("--sms", type=int, metavar="N", help="SMs to use or, with vm, to imitate")
    add("--context", type=int, metavar="N", help="tokens that prompt and answer may have together")
    add("--json", action="store_true", help="print one JSON object at the end in place of text")
    return Options(**vars(parser.parse_args(argv)))


def settled(options: Options) -> Request:
    """The options with a model: the one that was named, else SmolLM2, which is asked in chat form, else the bundled one."""
    named = options.model or os.environ.get(MODEL_VARIABLE)
    answering = None if named else smollm2()
    model = named or answering or BUNDLED_NAME
    return Request(
        **{
            **vars(options),
            "model": str(BUNDLED) if model == BUNDLED_NAME else model,
            "prompt": options.prompt or (QUESTION if answering else OPENING),
            "chat": bool(answering) if options.chat is None else options.chat,
        }
    )


def smollm2() -> str | None:
    """Where it lies, None where it is not to be had; says so."""
    from models.smollm2 import LICENSE, NAME, Unreachable, fetched

    try:
        path = fetched()
    except Unreachable as error:
        note(f"{NAME} cannot be fetched ({error}): going on with the small bundled model")
        return None
    note(f"no --model: {NAME}, license {LICENSE}")
    return str(path)


def sampling_of(options: Options, defaults: SamplingDefaults) -> SamplingParams:
    """What the model asks for, but for what an option says; the former is said on stderr.  Raises UserError."""
    try:
        sampling = SamplingParams(**{**defaults.values, **options.drawn})
    except UserError as error:  # the options' own values have been checked
        raise UserError(f"{defaults.origin}: {error}: say --temperature, --top-k or --top-p") from None
    if defaults.origin:
        drawn = f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}"
        ignored = f"; without its {', '.join(defaults.ignored)}" if defaults.ignored else ""
        note(f"sampling: {drawn if sampling.temperature else 'the likeliest token'} (by {defaults.origin}{ignored})")
    return sampling


class _Status:
    """A line on stderr that is redrawn in place on a terminal; where lines would pile up there is none."""

    def __init__(self) -> None:
        self._shown, self._terminal = "", sys.stderr is not None and sys.stderr.isatty()

    def show(self, shown: str) -> None:
        if self._terminal and shown != self._shown:
            self._shown = shown
            print(f"\r\x1b[K{shown}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            self._shown = ""
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _Loading(_Status):
    """Progress of loading, and a line a stage where there is no terminal."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def __call__(self, done: int, total: int) -> None:
        self.show(f"loading {self._model}: {100 * done // max(total, 1)} %")

    def stage(self, doing: str) -> None:
        """What is done beside reading weights."""
        if self._terminal:
            self.show(f"loading {self._model}: {doing}")
        else:
            note(doing)


class _Reading(_Status):
    """How far a long prompt has been read; what is read at one go needs no line."""

    def __call__(self, done: int, total: int) -> None:
        if done < total:
            self.show(f"reading the prompt: {done:,} of {total:,} tokens")


def open_text(model: str) -> tuple[Checkpoint, TextCodec]:
    """The checked model, and its tokenizer, or ids in place of text for random weights.  Neither costs GPU memory."""
    from megakernel.text import codec_of
    from models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    return checkpoint, codec_of(checkpoint)


def check_context(context: int | None, most: int) -> None:
    """Raises UserError for a longer context than the model allows."""
    if context is not None and context > most:
        raise UserError(f"--context {context}: this model has positions for {most} tokens, ask for 1 to {most}")


def run(options: Request, load: LoadEngine | None, result: Result) -> None:
    """Loads and generates, writing text as it comes unless JSON was asked for; `result` grows along."""
    checkpoint, text = open_text(options.model)
    check_context(options.context, checkpoint.config.max_position)
    sampling = sampling_of(options, checkpoint.sampling)
    result.prompt_token_ids = text.encode_chat(options.prompt) if options.chat else text.encode(options.prompt)
    if load is None:
        from megakernel.loading import load_engine

        load = load_engine
    loading, began = _Loading(options.model), time.perf_counter()
    try:
        engine = load(
            options.model,
            backend=options.backend,
            weights=options.weights,
            head=options.head,
            sms=options.sms,
            capacity=options.context,
            progress=loading,
            stage=loading.stage,
            checkpoint=checkpoint,
        )
    finally:
        loading.close()
    with engine:
        result.backend = engine.backend_name
        # The engine stops at what the request names, no more: a benchmark wants to run past the end of a text.
        sampling = replace(sampling, stop_token_ids=tuple(engine.config.eos_token_ids))
        result.started = time.perf_counter()
        reading = _Reading()
        engine.start(result.prompt_token_ids, options.max_tokens, sampling, progress=reading)
        result.kept_tokens = engine.kept
        note(f"{options.model} on {engine.backend_name}, loaded in {result.started - began:.1f} s")
        if options.model.startswith("random:"):
            note("random weights have no tokenizer: the prompt goes in as bytes, token ids come out in place of words")
        try:
            generate(engine, text, options, result, reading)
        finally:
            reading.close()


def generate(engine: Engine, text: TextCodec, options: Request, result: Result, reading: _Reading) -> None:
    from megakernel.text import terminal_safe

    detokenizer = text.detokenizer(result.prompt_token_ids)
    shown = terminal_safe if sys.stdout.isatty() else str  # what a model says must not command a terminal

    def emit(piece: str) -> None:
        reading.close()
        result.text += piece
        if not options.json:
            _write(shown(piece))

    try:
        for token_id in engine.stream():
            result.last = time.perf_counter()
            result.first = result.first or result.last
            result.token_ids.append(token_id)
            emit(detokenizer.step(token_id))
    except KeyboardInterrupt:
        engine.stop()
        emit(detokenizer.finish())
        raise
    emit(detokenizer.finish())
    result.finish_reason = engine.finish_reason or result.finish_reason


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

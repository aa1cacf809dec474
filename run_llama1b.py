"""Run a Llama from the command line: text in, text out, token by token.

    python run_llama1b.py --prompt "The garbage collector"
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
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import models
from megakernel.request import SamplingParams
from models.command import INTERRUPTED, Parser, add_model, command, note, start
from models.errors import UserError

if TYPE_CHECKING:
    from megakernel.engine import Engine
    from megakernel.text import TextCodec
    from models.checkpoint import Checkpoint

BUNDLED = Path(models.__path__[0]) / "bundled"
BACKENDS = ("auto", "gpu", "vm")
MAX_SMS = 200  # more than any NVIDIA GPU has

LoadEngine = Callable[..., "Engine"]


@dataclass(frozen=True)
class Options:
    """One run.  Raises UserError for values that no model could take."""

    model: str = str(BUNDLED)
    prompt: str = "The garbage collector"
    chat: bool = False
    max_tokens: int = 128
    sampling: SamplingParams = SamplingParams()
    backend: str = "auto"
    sms: int | None = None
    context: int | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("--model is empty: give a directory, a hub id or random:<preset>")
        if not self.prompt:
            raise UserError("--prompt is empty: write at least one character")
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens must be 1 or more, got {self.max_tokens}")
        if self.sms is not None and not 1 <= self.sms <= MAX_SMS:
            raise UserError(f"--sms must lie in 1..{MAX_SMS}, got {self.sms}")
        if self.context is not None and self.context < 1:
            raise UserError(f"--context must be 1 or more, got {self.context}")


@dataclass
class Result:
    """What a run has made so far; at any moment a truthful account of it, for Ctrl-C can come at any moment."""

    model: str
    backend: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "interrupted"
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
        names = ("model", "backend", "prompt_token_ids", "token_ids", "text", "finish_reason")
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
        return ", ".join(parts)


def parse(argv: list[str] | None) -> Options:
    """The command line as Options; every default is that of the dataclass field it fills."""
    options, sampling = Options(), SamplingParams()
    parser = Parser(
        prog="run_llama1b.py",
        description="Decode a Llama or a relative with one persistent GPU kernel, or with its CPU twin.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model(parser, default=options.model)
    add = parser.add_argument
    add("--prompt", default=options.prompt, help="text to go on from, or to answer with --chat")
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--max-tokens", type=int, default=options.max_tokens, metavar="N", help="tokens to generate at most")
    add("--temperature", type=float, default=sampling.temperature, metavar="T", help="0 takes the likeliest token")
    add("--top-k", type=int, default=sampling.top_k, metavar="K", help="draw among the K likeliest tokens; 0 is off")
    add("--top-p", type=float, default=sampling.top_p, metavar="P", help="draw among the likeliest of summed probability P")
    add("--seed", type=int, default=sampling.seed, help="of the draws")
    add("--backend", choices=BACKENDS, default=options.backend, help="auto takes the GPU where there is one")
    add("--sms", type=int, default=options.sms, metavar="N", help="SMs to use or, on the CPU, to imitate")
    add("--context", type=int, default=options.context, metavar="N", help="tokens that prompt and answer may have together")
    add("--json", action="store_true", help="print one JSON object at the end in place of streaming text")
    given = vars(parser.parse_args(argv))
    drawn = {f.name: given.pop(f.name) for f in fields(SamplingParams) if f.name in given}
    return Options(sampling=SamplingParams(**drawn), **given)


class _Loading:
    """Progress of loading on stderr: redrawn in place on a terminal, a line a stage where lines would pile up."""

    def __init__(self, model: str) -> None:
        self._model, self._shown, self._terminal = model, "", sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        if self._terminal:
            self._show(f"loading {self._model}: {100 * done // max(total, 1)} %")

    def stage(self, doing: str) -> None:
        """What is done beside reading weights."""
        if self._terminal:
            self._show(f"loading {self._model}: {doing}")
        else:
            note(doing)

    def _show(self, shown: str) -> None:
        if shown != self._shown:
            self._shown = shown
            print(f"\r\x1b[K{shown}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def open_text(model: str) -> tuple[Checkpoint, TextCodec]:
    """The checked model, and its tokenizer, or ids in place of text for random weights.  Neither costs GPU memory."""
    from megakernel.text import IdsAsText, ModelText
    from models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    return checkpoint, IdsAsText() if checkpoint.directory is None else ModelText(checkpoint.directory)


def check_context(context: int | None, most: int) -> None:
    """Raises UserError for a longer context than the model allows."""
    if context is not None and context > most:
        raise UserError(f"--context {context}: this model has positions for {most} tokens, ask for 1 to {most}")


def run(options: Options, load: LoadEngine | None, result: Result) -> None:
    """Loads and generates, writing text as it comes unless JSON was asked for; `result` grows along."""
    checkpoint, text = open_text(options.model)
    check_context(options.context, checkpoint.config.max_position)
    result.prompt_token_ids = text.encode_chat(options.prompt) if options.chat else text.encode(options.prompt)
    if load is None:
        from megakernel.loading import load_engine

        load = load_engine
    loading, began = _Loading(options.model), time.perf_counter()
    try:
        engine = load(
            options.model,
            backend=options.backend,
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
        sampling = replace(options.sampling, stop_token_ids=tuple(engine.config.eos_token_ids))
        result.started = time.perf_counter()
        engine.start(result.prompt_token_ids, options.max_tokens, sampling)
        note(f"{options.model} on {engine.backend_name}, loaded in {result.started - began:.1f} s")
        if options.model.startswith("random:"):
            note("random weights have no tokenizer: the prompt goes in as bytes, token ids come out in place of words")
        generate(engine, text, options, result)


def generate(engine: Engine, text: TextCodec, options: Options, result: Result) -> None:
    from megakernel.text import terminal_safe

    detokenizer = text.detokenizer(result.prompt_token_ids)
    shown = terminal_safe if sys.stdout.isatty() else str  # what a model says must not command a terminal

    def emit(piece: str) -> None:
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


def _close_text(options: Options, result: Result) -> None:
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
    options = parse(argv)
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

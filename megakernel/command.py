"""What commands that run a model have in common: the options that name it and say where it runs and how it is sampled, what is
said while it loads, and the engine that comes of it.

Light on purpose: bad options are refused before torch is imported.  Knows nothing of prompts.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
from megakernel.request import SamplingParams
from models.command import MODEL_HELP, WEIGHTS, note
from models.errors import UserError

if TYPE_CHECKING:
    from megakernel.engine import Engine
    from megakernel.text import TextCodec
    from models.checkpoint import Checkpoint
    from models.sampling_defaults import SamplingDefaults

BUNDLED = Path(models.__path__[0]) / "bundled"
MODEL_VARIABLE = "MEGAKERNEL_MODEL"  # of the environment: what --model is where it is left out
BUNDLED_NAME = "bundled"
BACKENDS = ("auto", "gpu", "torch", "vm")
MOST_DRAFTS = 7  # of a step
MAX_SMS = 200  # more than any NVIDIA GPU has

LoadEngine = Callable[..., "Engine"]


@dataclass(frozen=True)
class EngineOptions:
    """A model, where it runs, and how it is sampled.  Raises UserError for values that no model could take.

    What is None is decided later: see `chosen_model`, and for the sampling `sampling_of`.
    """

    model: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = SamplingParams().seed
    weights: str | None = None
    head: str | None = None
    backend: str = "auto"
    sms: int | None = None
    context: int | None = None
    speculate: int = 0

    def __post_init__(self) -> None:
        if self.model == "":
            raise UserError("--model is empty: give a directory, a file, a hub id or random:<preset>")
        SamplingParams(**self.drawn)
        if self.sms is not None and not 1 <= self.sms <= MAX_SMS:
            raise UserError(f"--sms must lie in 1..{MAX_SMS}, got {self.sms}")
        if self.context is not None and self.context < 1:
            raise UserError(f"--context must be 1 or more, got {self.context}")
        if not 0 <= self.speculate <= MOST_DRAFTS:
            raise UserError(f"--speculate must lie in 0..{MOST_DRAFTS}, got {self.speculate}")

    @property
    def drawn(self) -> dict[str, Any]:
        """What was asked for of the sampling."""
        asked = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        return {name: value for name, value in asked.items() if value is not None}


def adder(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """`parser.add_argument` for options whose defaults are those of the dataclass that they fill."""
    return partial(parser.add_argument, default=argparse.SUPPRESS)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """The option that names the model, or does not."""
    adder(parser)("--model", help=f"{MODEL_HELP} (default: SmolLM2-135M-Instruct, fetched once)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn."""
    add = adder(parser)
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token (default: the model's own)")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest; 0 is off (likewise)")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P (likewise)")


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    adder(parser)("--seed", type=int, metavar="N", help=f"of the draws (default: {EngineOptions().seed})")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Where and how large."""
    add = adder(parser)
    add("--weights", metavar="F", choices=WEIGHTS, help=f"{', '.join(WEIGHTS)} (default: as stored, small ones in bf16)")
    add("--head", metavar="F", choices=WEIGHTS, help="the LM head's (default: as the other weights)")
    add("--backend", choices=BACKENDS, help="auto, the default, takes the kernel (gpu) where it runs, else torch")
    add("--sms", type=int, metavar="N", help="SMs to use or, with vm, to imitate")
    add(
        "--speculate",
        type=int,
        metavar="K",
        nargs="?",
        const=MOST_DRAFTS,
        help=f"drafts a step, at most {MOST_DRAFTS}; 0 is off",
    )
    add("--context", type=int, metavar="N", help="tokens that prompt and answer may have together")


def chosen_model(options: EngineOptions) -> tuple[str, bool]:
    """The model that was named, else SmolLM2, else the bundled one; and whether it is SmolLM2 for want of a name."""
    named = options.model or os.environ.get(MODEL_VARIABLE)
    answering = None if named else smollm2()
    model = named or answering or BUNDLED_NAME
    return str(BUNDLED) if model == BUNDLED_NAME else model, bool(answering)


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


def sampling_of(options: EngineOptions, defaults: SamplingDefaults) -> SamplingParams:
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


class Status:
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


class Loading(Status):
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


def loaded(
    options: EngineOptions,
    model: str,
    checkpoint: Checkpoint,
    load: LoadEngine | None = None,
    sequences: int | None = None,
) -> Engine:
    """The engine, of so many sequences at once, with what is said on stderr while it loads.  `load` stands in for
    `megakernel.loading.load_engine`."""
    if load is None:
        from megakernel.loading import load_engine

        load = load_engine
    loading = Loading(model)
    try:
        return load(
            model,
            backend=options.backend,
            weights=options.weights,
            head=options.head,
            sms=options.sms,
            capacity=options.context,
            speculate=options.speculate,
            sequences=sequences,
            progress=loading,
            stage=loading.stage,
            checkpoint=checkpoint,
        )
    finally:
        loading.close()

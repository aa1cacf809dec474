"""Requests decoded with drafts and without: is every text the same?

    python -m tests.megakernel.drafted                   # 200 prompts on the CPU machine, some 20 minutes
    python -m tests.megakernel.drafted --device fake     # the GPU's backend on a fake device, a minute

Half of the requests are greedy, half are sampled, each in its own way; some end at a stop token.  Prompts repeat themselves, go
on as something before, or do neither.  Two engines that differ in nothing but drafts are asked the same; what counts is the
text and why it ended, and that some drafts were right.  Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from zlib import crc32

import numpy as np
import pytest
import torch

from megakernel.engine import Engine
from megakernel.gpu.backend import CHUNK, GpuBackend
from megakernel.gpu.drafting import DraftingBackend
from megakernel.request import SamplingParams
from megakernel.vm.backend import VmBackend
from models.command import Parser, command, start, whole
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms
from tests.support import fake_device as fake
from tests.support.compile_cases import MODELS
from tests.support.vm_models import CAPACITY, TINY, packed

PROMPTS = 200
MACHINE_COLUMNS, GPU_COLUMNS = 4, 8
STOPS, AMONG = 5, 100  # stop tokens, and the first tokens of which they are some
PASSAGE = 6  # tokens at most of what a prompt repeats
TEMPERATURES, TOP_K, TOP_P = (0.2, 0.8, 1.2), (0, 0, 20), (1.0, 1.0, 0.9)
FAKE_CONFIG, FAKE_SMS, FAKE_CAPACITY = MODELS["bundled"], 4, 256
FEW = 12  # tokens of which the fake device's text is made mostly

Engines = tuple[Engine, Engine]  # without drafts, and with them


@dataclass(frozen=True)
class Request:
    """What both engines are asked."""

    prompt: list[int]
    limit: int
    sampling: SamplingParams


@dataclass
class Outcome:
    """What was found.  `steps` are those with drafts, in which `tokens` were chosen."""

    requests: int = 0
    tokens: int = 0
    steps: int = 0
    sampled: int = 0
    stopped: int = 0
    wrong: list[str] = field(default_factory=list)


def prompt_of(draw: random.Random, vocabulary: int, longest: int) -> list[int]:
    """A passage over and over, a text that comes back to its beginning, or neither."""
    length = draw.randrange(1, longest + 1)
    words = [draw.randrange(vocabulary) for _ in range(length)]
    passage = words[: draw.randrange(1, PASSAGE + 1)]
    kind = draw.randrange(3)
    if kind == 0:
        return (passage * length)[:length]
    return words if kind == 1 else [*words[: max(1, length - len(passage))], *passage][:length]


def draw_requests(seed: int, count: int, vocabulary: int, longest: int, answer: int) -> Iterator[Request]:
    """Requests by number, every second one greedy; prompts of up to `longest` tokens, answers of up to `answer`."""
    draw = random.Random(seed)
    for number in range(count):
        chosen = draw.choice(TEMPERATURES), draw.choice(TOP_K), draw.choice(TOP_P)
        stops = tuple(draw.sample(range(min(vocabulary, AMONG)), STOPS)) if draw.random() < 0.2 else ()
        temperature, top_k, top_p = chosen if number % 2 else (0.0, 0, 1.0)
        sampling = SamplingParams(temperature, top_k, top_p, draw.randrange(2**40), stops)
        yield Request(prompt_of(draw, vocabulary, longest), draw.randrange(answer // 2, answer + 1), sampling)


def compare(engines: Engines, requests: Iterator[Request] | Sequence[Request]) -> Outcome:
    """Ask both engines."""
    outcome = Outcome()
    for request in requests:
        wanted, found = (engine.generate(request.prompt, request.limit, request.sampling, reuse=False) for engine in engines)
        expected, text = list(wanted), list(found)
        outcome.requests += 1
        outcome.tokens += len(text)
        outcome.steps += found.steps_made
        outcome.sampled += request.sampling.temperature > 0
        outcome.stopped += found.finish_reason == "stop"
        if (text, found.finish_reason) != (expected, wanted.finish_reason):
            outcome.wrong.append(f"{request}: {text} ({found.finish_reason}), without drafts {expected}")
    return outcome


@contextmanager
def machine_engines() -> Iterator[Engines]:
    """A tiny model on the CPU machine."""
    backends = (
        VmBackend(packed(), BucketPrograms(TINY, 3, CAPACITY, itemsize=4, depth=depth)) for depth in (1, MACHINE_COLUMNS)
    )
    plain, drafting = map(Engine, backends)
    with plain, drafting:
        yield plain, drafting


def fake_token(tokens: np.ndarray, vocabulary: int) -> int:
    """Hangs on the last two tokens and is one of few, so that the text repeats itself; now and then on all that came before."""
    last, all_of_it = (crc32(np.ascontiguousarray(part, dtype=np.int32).tobytes()) for part in (tokens[-2:], tokens))
    return 5 + last % FEW if all_of_it % 16 else all_of_it % vocabulary


@contextmanager
def fake_engines() -> Iterator[Engines]:
    """The GPU's backends on a fake device, where nothing is drawn: it is the host's part that is asked."""
    programs = [BucketPrograms(FAKE_CONFIG, FAKE_SMS, FAKE_CAPACITY, itemsize=2, depth=depth) for depth in (1, 1, GPU_COLUMNS)]
    tape = programs[0].shape(FAKE_CAPACITY).tape
    pages = torch.zeros(1, tape.page_elements, dtype=torch.bfloat16)
    model = PackedModel(FAKE_CONFIG, torch.bfloat16, tape, pages, torch.zeros(1), torch.zeros(FAKE_CAPACITY, 1, 2))
    with pytest.MonkeyPatch.context() as patch, fake.fake_device() as device:
        patch.setattr(fake, "next_token", lambda rows, size: fake_token(rows, size) if size == FAKE_CONFIG.vocab_size else 1)
        plain = GpuBackend(model, programs[0], device, fake.FakePrefill)
        drafting = DraftingBackend(model, programs[1], programs[2], device, fake.FakePrefill)
        with Engine(plain, chunk=CHUNK) as first, Engine(drafting, chunk=CHUNK) as second:
            yield first, second


@dataclass(frozen=True)
class Device:
    """Where it is tried, and how long prompts and answers are there."""

    engines: Callable[[], object]
    vocabulary: int
    longest: int
    answer: int


DEVICES = {
    "vm": Device(machine_engines, TINY.vocab_size, 16, 16),
    "fake": Device(fake_engines, FAKE_CONFIG.vocab_size, 100, 120),
}


def run(name: str, prompts: int, seed: int) -> Outcome:
    """So many requests on one of the devices."""
    device = DEVICES[name]
    with device.engines() as engines:  # type: ignore[attr-defined]
        return compare(engines, draw_requests(seed, prompts, device.vocabulary, device.longest, device.answer))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m tests.megakernel.drafted", description="The same texts with drafts and without.")
    parser.add_argument("--device", choices=tuple(DEVICES), default="vm", help="(default: %(default)s)")
    parser.add_argument("--prompts", type=whole(1, 10**6), default=PROMPTS, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**32), default=0, help="of every choice (default: %(default)s)")
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0 where nothing differs, else 1."""
    options = parse(arguments)
    outcome = run(options.device, options.prompts, options.seed)
    print("\n".join(outcome.wrong[:20]))
    print(json.dumps(asdict(outcome)))
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    start(main)

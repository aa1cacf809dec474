"""The engine on the GPU: stop tokens, restarts, a thousand equal requests, a hundred thousand tokens, interrupts."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from statistics import median
from types import FrameType

import pytest
import torch

from megakernel.engine import Engine
from megakernel.gpu.backend import CHUNK
from megakernel.request import SamplingParams
from tests.support.gpu_models import random_tokens

pytestmark = pytest.mark.gpu
PROMPT = random_tokens("bundled", 6, seed=1)
LONG = 90
HOT = SamplingParams(temperature=1.5, seed=4)  # many different tokens


def generate(engine: Engine, tokens: int = LONG, sampling: SamplingParams = HOT) -> list[int]:
    return list(engine.generate(PROMPT, tokens, sampling))


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[int]:
    """What the request gives when nothing happens to it."""
    tokens = generate(engine)
    assert len(tokens) == LONG
    assert len(set(tokens)) > LONG // 2
    return tokens


def stopping_at(*tokens: int) -> SamplingParams:
    return SamplingParams(temperature=HOT.temperature, seed=HOT.seed, stop_token_ids=tokens)


# The prompt is decoded in a launch of its own that chooses token 0; then CHUNK tokens a launch, two launches under way.
@pytest.mark.parametrize("place", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK + 5, LONG - 2])
def test_a_stop_token_ends_the_request_wherever_it_comes(engine: Engine, expected: list[int], place: int) -> None:
    stop = expected[place]
    until = expected.index(stop) + 1
    for sampling, tokens, reason in ((stopping_at(stop), expected[:until], "stop"), (HOT, expected, "length")):
        generation = engine.generate(PROMPT, LONG, sampling)
        assert list(generation) == tokens, "the next request knows nothing of the one before"
        assert generation.finish_reason == reason and generation.steps() == []


def test_the_first_of_several_stop_tokens_counts(engine: Engine, expected: list[int]) -> None:
    unused = next(token for token in range(engine.config.vocab_size) if token not in expected)
    stops = (expected[60], unused, expected[25], expected[40])
    until = min(expected.index(token) for token in stops if token != unused) + 1
    assert generate(engine, sampling=stopping_at(*stops)) == expected[:until]


def test_a_stop_token_in_the_prompt_does_not_stop(engine: Engine, expected: list[int]) -> None:
    assert PROMPT[2] not in expected
    assert generate(engine, sampling=stopping_at(PROMPT[2])) == expected


def test_abandoned_requests_leave_no_trace(engine: Engine, expected: list[int]) -> None:
    for taken in (1, 2, CHUNK, CHUNK + 3, 50):
        generation = engine.generate(PROMPT, 400, SamplingParams(temperature=2.0, seed=taken))
        for _ in range(taken):
            next(generation)
        generation.stop()
        assert generate(engine) == expected


def test_a_request_of_exactly_the_capacity(decoder: Engine) -> None:
    """The last token that fits, and the switch from the first context bucket to the second, in one request and in two."""
    tokens = list(decoder.generate(PROMPT, decoder.capacity - len(PROMPT)))
    assert len(PROMPT) + len(tokens) == decoder.capacity
    cut = 300
    assert list(decoder.generate([*PROMPT, *tokens[:cut]], len(tokens) - cut)) == tokens[cut:]


def test_the_last_token_that_fits_after_a_prompt_that_prefill_reads(engine: Engine) -> None:
    tokens = list(engine.generate(PROMPT, engine.capacity - len(PROMPT), reuse=False))
    assert len(PROMPT) + len(tokens) == engine.capacity
    assert len(list(engine.generate([*PROMPT, *tokens[:-1]], 1, reuse=False))) == 1


def test_a_thousand_identical_requests_have_one_output(engine: Engine) -> None:
    outputs = set()
    for _ in range(1000):
        generation = engine.generate(PROMPT, 20, HOT)
        outputs.add((tuple(generation), sha256(generation.logits().numpy().tobytes()).hexdigest()))
    assert len(outputs) == 1


def test_the_next_turn_computes_only_what_is_new(engine: Engine) -> None:
    """And the same request after the same ones has the same bits."""

    def second_turn() -> tuple[list[int], bytes, int]:
        answer = list(engine.generate(PROMPT, LONG, HOT, reuse=False))
        generation = engine.generate([*PROMPT, *answer, 7, 8, 9], 20, HOT)
        return list(generation), generation.logits().numpy().tobytes(), generation.kept

    first = second_turn()
    assert first[2] == len(PROMPT) + LONG - 1, "the last token was never looked at"
    assert second_turn() == first


def resident_bytes() -> int:
    """Memory of this process on the host."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_a_hundred_thousand_tokens(engine: Engine) -> None:
    """Requests that fill the context, one after another: the time of each stays the same, and so does the memory."""
    length = engine.capacity - len(PROMPT)
    times, host, device = [], [], []
    for _ in range(-(-100_000 // length)):
        begun = time.perf_counter()
        assert sum(1 for _ in engine.generate(PROMPT, length)) == length
        times.append(time.perf_counter() - begun)
        host.append(resident_bytes())
        device.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    tenth = len(times) // 10
    first, last = median(times[1 : 1 + tenth]), median(times[-tenth:])
    print(f"{sum(times):.1f} s, {first / length * 1e3:.4f} ms a token at first, {last / length * 1e3:.4f} at the end")
    assert last < 1.05 * first  # the host takes part in it, and is shared
    assert len(set(device[1:])) == 1
    assert host[-1] - host[2] < 16 * 2**20


def test_a_caller_s_default_device_is_nothing_to_the_engine(engine: Engine, expected: list[int]) -> None:
    with torch.device("cuda"):
        assert generate(engine) == expected


@pytest.fixture
def interrupted() -> Iterator[Callable[[float, Callable[[], object]], bool]]:
    """Runs some work and raises KeyboardInterrupt in it after some seconds, if it still runs then; says whether it did."""
    armed = threading.Event()
    main = threading.get_ident()

    def handler(number: int, frame: FrameType | None) -> None:
        if armed.is_set():
            armed.clear()
            raise KeyboardInterrupt

    def fire() -> None:
        if armed.is_set():
            signal.pthread_kill(main, signal.SIGINT)

    def during(seconds: float, work: Callable[[], object]) -> bool:
        timer = threading.Timer(seconds, fire)
        armed.set()
        try:
            try:
                timer.start()
                work()
            finally:
                armed.clear()
        except KeyboardInterrupt:
            return True
        finally:
            timer.cancel()
        return False

    before = signal.signal(signal.SIGINT, handler)
    yield during
    signal.signal(signal.SIGINT, before)


def test_interrupts_at_random_moments(
    engine: Engine, expected: list[int], interrupted: Callable[[float, Callable[[], object]], bool]
) -> None:
    """Whatever the engine was at when it came, in the host's code too, the next request gives the right tokens, soon."""
    draw = random.Random(7)
    sampling = stopping_at(expected[70])  # requests that end early as well as such that do not
    begun = time.perf_counter()
    generate(engine)
    usual = time.perf_counter() - begun
    interrupts = trial = 0
    while interrupts < 100:  # some requests end before their interrupt comes
        trial += 1
        assert trial < 400

        def requests(sampling: SamplingParams = sampling if trial % 2 else HOT) -> None:
            for _ in range(3):
                generate(engine, sampling=sampling)

        interrupts += interrupted(draw.uniform(0.0, 1.5 * usual), requests)
        begun = time.perf_counter()
        assert generate(engine) == expected, f"after interrupt {trial}"
        assert time.perf_counter() - begun < 1.0

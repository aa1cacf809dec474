"""Whatever stream or device is the current one, of whatever thread: the same tokens.  And one kernel for every bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench.rig import Rig, device_sms
from megakernel.device.kernel import megakernel
from megakernel.engine import Engine
from megakernel.request import SamplingParams
from models.packed import pack
from tests.gpu.conftest import made_engine
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import CASES, programs_of

pytestmark = pytest.mark.gpu
PROMPT = random_tokens("bundled", 6, seed=1)
HOT = SamplingParams(temperature=1.5, seed=4)
BUSY = 50_000_000  # clock cycles


def generate(engine: Engine, tokens: int = 60) -> list[int]:
    return list(engine.generate(PROMPT, tokens, HOT, reuse=False))


def test_the_current_stream_does_not_matter(engine: Engine) -> None:
    expected = generate(engine)
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY)  # what is enqueued here would come late
            assert generate(engine) == expected


def test_built_on_one_stream_used_on_another(engine: Engine) -> None:
    expected = generate(engine)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(BUSY)
        other = made_engine(prefill=True)
    with other, torch.cuda.stream(torch.cuda.Stream()):
        assert generate(other) == expected


def test_used_by_another_thread(engine: Engine) -> None:
    expected = generate(engine)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(generate, engine).result() == expected


def test_below_the_engine(bundled_rig: Rig) -> None:
    """A state and programs made while their stream is busy, and launched on another at once."""
    case = CASES["bundled"]
    bundled_rig.start(PROMPT)
    expected = bundled_rig.decode(0, case.positions)
    model = pack(weights_of(case.name), config_of(case.name), torch.bfloat16, case.capacity)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(BUSY)
        rig = Rig(model, programs_of(case, device_sms()))
        rig.program(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        rig.start(PROMPT)
        assert rig.decode(0, case.positions) == expected


def test_on_a_second_device(engine: Engine) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = generate(engine)
    with made_engine(prefill=True, device=1) as other:
        assert generate(other) == expected
        with torch.cuda.device(1):
            assert generate(engine) == expected


def test_one_kernel_serves_all_buckets() -> None:
    """Buckets with 1, 2 and 5 slices, and another length of cache."""
    case = CASES["head128"]
    compiled = megakernel.device_caches[torch.cuda.current_device()][0]
    before = len(compiled)
    for capacity in (case.capacity, case.capacity - 40):
        model = pack(weights_of(case.name), config_of(case.name), torch.bfloat16, capacity)
        programs = programs_of(case, device_sms())
        programs.capacity = capacity
        rig = Rig(model, programs)
        rig.start(random_tokens(case.name, case.prompt))
        assert len(rig.decode(0, capacity - 1)) == capacity - 1
        assert len({program.program.shape.slices for program in rig.made.values()}) > 1
    assert len(compiled) - before <= 1

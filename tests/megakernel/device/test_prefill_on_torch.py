"""Prefill's kernels, of their own source run on torch, and the tail that draws the first token: beside the CPU machine."""

from __future__ import annotations

import pytest
import torch

from instructions.base import GREEDY
from megakernel.engine import Engine
from megakernel.gpu.machine import GpuProgram, GpuState
from megakernel.gpu.sharing import SharingBackend
from megakernel.vm import DecodeState, Vm
from models.formats import PLAIN, Formats
from tests.megakernel.device.test_kernel_on_torch import CAPACITY, model_of, programs_of
from tests.support.fake_device import fake_device
from tests.support.gluon.kernel import EmulatedKernel, EmulatedPrefill
from tests.support.gpu_models import config_of, random_tokens

SMS = 3
FULL = pytest.mark.full
INT4, FP8 = Formats("int4", "int4"), Formats("fp8", "fp8")
CASES = [
    ("gqa2", 17, PLAIN),
    ("qwen3_moe", 20, PLAIN),
    ("gqa2", 30, INT4),
    *(
        pytest.param(*case, marks=FULL)
        for case in (
            ("gqa2", 1, PLAIN),
            ("qwen3", 65, PLAIN),
            ("granite_biases", 33, PLAIN),
            ("all_biases_linear_head24", 128, PLAIN),
            ("ragged_sizes", 64, PLAIN),
            ("olmoe", 70, PLAIN),
            ("mixtral", 65, PLAIN),
            ("granitemoe", 100, PLAIN),
            ("qwen3_moe", 17, FP8),
            ("mixtral", 5, INT4),
        )
    ),
]


class Read:
    """A prompt on the CPU machine, token by token, and by prefill, in chunks that end at these places."""

    def __init__(self, name: str, formats: Formats, *stops: int) -> None:
        model, length = model_of(name, formats), stops[-1]
        programs = programs_of(name, SMS, formats)
        prompt, self.shape = random_tokens(name, length), programs.shape(CAPACITY)
        truth = DecodeState(self.shape)
        truth.start(prompt)
        machine = Vm(programs_of(name, 2, formats).program(0), model, truth)
        machine.launch(length)
        self.wanted, self.wanted_rows = machine.logits(), self.rows(truth.cache.pages, length)
        with fake_device(EmulatedKernel()) as device:
            state = GpuState(model, self.shape.cache_pages, device)
            tail = GpuProgram(programs.program(programs.place(length - 1), tail=True), state)
            prefill = EmulatedPrefill(state, tail.sizes, SMS)
            state.start(prompt, GREEDY, ())
            for start, stop in zip((0, *stops), stops, strict=False):
                prefill.launch(start, stop)
            tail.launch(length - 1, 1).land()
            self.logits, self.rows_found = tail.logits(), self.rows(state.cache, length)

    def rows(self, cache: torch.Tensor, positions: int) -> torch.Tensor:
        """[positions, everything that the cache holds of one]."""
        shape = self.shape
        pages = cache.float().view(-1, shape.head_pages, shape.head_tiles, shape.page_positions, 64).movedim(3, 2)
        used = pages.flatten(1, 2)[:, :positions].movedim(1, 0)[..., : min(shape.head_rows, 64)]
        return used.flatten(1)

    @property
    def error(self) -> float:
        """Of the logits, relative, root mean square."""
        return float((self.wanted - self.logits).norm() / self.wanted.norm())

    @property
    def errors(self) -> torch.Tensor:
        """The largest of each position's rows."""
        return (self.wanted_rows - self.rows_found).abs().amax(1)


@pytest.mark.parametrize(("name", "length", "formats"), CASES)
def test_the_cpu_machine_s_rows_and_logits(name: str, length: int, formats: Formats) -> None:
    """Rounding sends few tokens to another expert, and then all that follows of that one differs."""
    read = Read(name, formats, length)
    assert torch.isfinite(read.logits).all() and torch.isfinite(read.rows_found).all()
    experts = config_of(name).num_experts > 0
    far = read.errors > 0.1
    assert int(far.sum()) <= (length // 10 if experts else 0), f"positions {far.nonzero().flatten().tolist()}"
    assert read.error <= (0.1 if experts else 0.03)


@pytest.mark.parametrize("stops", [(9, 25), pytest.param((1, 2, 67, 128), marks=FULL)])
def test_chunks_go_on_where_those_before_have_ended(stops: tuple[int, ...]) -> None:
    read = Read("gqa2", PLAIN, *stops)
    assert (read.errors <= 0.1).all()
    assert read.error <= 0.03


def test_the_engine_reads_prompts_for_several_sequences() -> None:
    """From `Engine.generate` on: prompts are read on each slot's part, one begins as the other does, both share steps."""
    name, prompt = "gqa2", random_tokens("gqa2", 12)
    model = model_of(name)
    with fake_device(EmulatedKernel()) as device:
        shared = (programs_of(name, SMS, sequences=2),)
        backend = SharingBackend(model, programs_of(name, SMS), shared, device, EmulatedPrefill)
        with Engine(backend) as engine:
            first, second = engine.generate(prompt, 4), engine.generate([*prompt[:9], 5, 7], 3)
            found = list(first), list(second)
            assert (first.kept, second.kept) == (0, 9)
    for tokens, start in zip(found, (prompt, [*prompt[:9], 5, 7]), strict=True):
        state = DecodeState(programs_of(name, 2).shape(CAPACITY))
        state.start(start)
        Vm(programs_of(name, 2).program(0), model, state).launch(len(start) + len(tokens) - 1)
        assert tokens == state.generated

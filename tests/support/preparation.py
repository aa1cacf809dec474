"""What worker processes do for the GPU tests while the first of them run: compile kernels, and decode on the CPU machine.

A compiled kernel reaches the tests through Triton's cache on disk.  The workers launch no kernel.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from instructions.shape import Shape, ceil_div
from models.formats import PLAIN, Formats
from models.packed import PackedModel, numbers, pack
from models.reference import Reference
from scheduler.buckets import BucketPrograms
from scheduler.build import build_program, make_shape
from tests.support.gpu_models import config_of, random_tokens, weights_of

VM_SMS = 2  # the slices, not the SMs, decide the bits of the CPU machine
ITEMSIZE = 2
PROCESSES = 12


@dataclass(frozen=True)
class Case:
    """A model decoded greedily on both machines: positions 0 to `positions` - 1, the first `prompt` tokens of them random.

    `buckets` are pairs of KV pages and attention slices, ascending; the last bucket ends at the capacity.
    """

    name: str
    capacity: int
    positions: int
    prompt: int
    buckets: tuple[tuple[int, int], ...] = ((1, 1), (2, 2))
    formats: Formats = PLAIN


@dataclass
class CasePrograms(BucketPrograms):
    """Buckets as a case wants them: their edges lie within the few hundred positions that a test can decode."""

    buckets: tuple[tuple[int, int], ...] = ((1, 1),)

    def shape(self, bucket: int, tail: bool = False) -> Shape:
        capacity, page = self.capacity, Shape(self.config, self.itemsize, self.capacity, self.capacity, 1).page_positions
        slices = dict(self.buckets)[ceil_div(bucket, page)]
        sizes = {"sms": self.sms, "capacity": capacity, "bucket": bucket, "itemsize": self.itemsize}
        columns = {"sequences": self.sequences, "depth": self.depth}
        return make_shape(self.config, **sizes, slices=slices, tail=tail, formats=self.formats, **columns)

    @property
    def sizes(self) -> tuple[int, ...]:
        page = self.shape(self.capacity).page_positions
        return (*(pages * page for pages, _ in self.buckets[:-1]), self.capacity)


SMALL = Case("gqa4_llama3_tied", 128, 40, 8, ((1, 1),))
# True shapes: every preset whose heads have 128 dimensions but those that differ from another in sizes alone; and heads of 64.
WIDE_HEADS = (
    "llama-3.2-3b", "llama-3-8b", "granite-8b-code", "mistral-7b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "granite-3.3-8b",
)  # fmt: skip
PRESET_CASES = {name: Case(name, 192, 150, 150, ((1, 1), (3, 3))) for name in WIDE_HEADS} | {
    "smollm2-135m": Case("smollm2-135m", 227, 150, 150)
}


def programs_of(case: Case, sms: int) -> CasePrograms:
    """The programs of a case."""
    return CasePrograms(config_of(case.name), sms, case.capacity, ITEMSIZE, formats=case.formats, buckets=case.buckets)


# KV pages hold 128 positions of these models, 64 with 128 dimensions a head.  The last position of a capacity that is no
# multiple of a page is decoded too; with the bundled model and others that are larger, a few beyond the first page.
CASES = {
    case.name: case
    for case in (
        Case("bundled", 227, 140, 120),
        Case("head128", 300, 300, 60, ((1, 1), (3, 2), (5, 5))),
        Case("mha", 227, 227, 120),
        Case("gqa8", 227, 227, 120),
        Case("head40_llama3_mha", 227, 227, 120),
        Case("all_biases_linear_head24", 227, 227, 120),
        Case("ragged_sizes", 227, 140, 120),
        Case("wide_mlp_long_k", 227, 140, 120),
        Case("sixteen_queries", 227, 227, 120),
        Case("mistral", 227, 140, 120),
        Case("qwen2_gqa7", 227, 140, 120),
        Case("qwen3", 227, 140, 120),
        Case("qwen3_head24_bias", 227, 140, 120),
        Case("qwen3_head128", 300, 300, 60, ((1, 1), (3, 2), (5, 5))),
        Case("granite", 227, 140, 120),
        Case("granite_biases", 227, 140, 120),
    )
}


# Mixtures of experts: of each family one, on both sides of a KV page's edge.
EXPERT_CASES = {
    case.name: case
    for case in (
        Case("qwen3_moe", 227, 140, 120),
        Case("olmoe", 227, 140, 120),
        Case("mixtral", 227, 140, 120),
        Case("granitemoe", 227, 140, 120),
    )
}
QUANTISED_EXPERTS = {
    f"experts in {body}": Case("mixtral", 128, 72, 60, ((1, 1), (2, 1)), Formats(body, head))
    for body, head in (("fp8", "fp8"), ("q4_1", "q8_0"))
}
EXPERT_PRESETS = {name: Case(name, 192, 150, 150, ((1, 1), (3, 3))) for name in ("qwen3-30b-a3b", "olmoe-1b-7b")}
ALL_CASES = {**CASES, **EXPERT_CASES, **QUANTISED_EXPERTS}


def engine_programs(sms: int) -> BucketPrograms:
    """The programs of the engine that the tests share."""
    return BucketPrograms(config_of("bundled"), sms, config_of("bundled").max_position, ITEMSIZE)


def sm_count_programs(sms: int) -> dict[int, BucketPrograms]:
    """Programs of a small model for other numbers of SMs, all with one attention slice."""
    return {count: programs_of(SMALL, count) for count in sorted({1, 7, 64, sms - 1, sms} - {0})}


def oversized_programs(sms: int) -> BucketPrograms:
    """Programs for one SM more than the GPU has."""
    return programs_of(SMALL, sms + 1)


@dataclass(frozen=True, eq=False)
class Expected:
    """tokens: prompt and continuation, positions + 1 of them; logits and reference: fp32 [positions, vocab], of the CPU machine
    and of the plain fp32 model with the same weights, as they were rounded or quantised."""

    tokens: list[int]
    logits: torch.Tensor
    reference: torch.Tensor


def decode_on_the_cpu(case: Case, sms: int) -> Expected:
    """The case on the CPU machine, with the attention slices of a GPU with `sms` SMs."""
    from megakernel.vm import DecodeState, Vm

    torch.set_num_threads(1)
    model = pack(weights_of(case.name), config_of(case.name), torch.bfloat16, case.capacity, case.formats)
    programs = programs_of(case, sms)
    state = DecodeState(programs.shape(case.capacity))
    machines: dict[int, Vm] = {}
    state.start(random_tokens(case.name, case.prompt))
    logits = []
    for position in range(case.positions):
        place = programs.place(position)
        if place not in machines:
            machines[place] = Vm(build_program(programs.shape(programs.sizes[place]), VM_SMS), model, state)
        machines[place].launch(1)
        logits.append(machines[place].logits())
    reference = Reference(*numbers(model)).logits(state.tokens[: case.positions])
    return Expected(list(state.tokens), torch.stack(logits), reference)


def compile_programs(programs: BucketPrograms, pasts: Sequence[int]) -> None:
    """Compile the programs that decode these positions."""
    from megakernel.gpu.machine import GpuProgram, GpuState

    tape = programs.shape(programs.capacity).tape
    pages = torch.zeros(1, tape.page_elements, dtype=torch.bfloat16)  # the code does not depend on how many there are
    model = PackedModel(programs.config, torch.bfloat16, tape, pages, torch.zeros(1), torch.zeros(1, 1, 2))
    state = GpuState(model, 1, torch.device("cuda", 0))
    for place in sorted({programs.place(past) for past in pasts}):
        GpuProgram(programs.program(place), state).compile()


class Preparation:
    """Futures by name, under way from the moment this is made: `expected` of every case, `compiled` of every case and of
    `extra`, programs with positions that they decode."""

    def __init__(self, sms: int, extra: Mapping[str, tuple[BucketPrograms, Sequence[int]]]) -> None:
        self.pool = ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"))
        self.expected = {name: self.pool.submit(decode_on_the_cpu, case, sms) for name, case in ALL_CASES.items()}
        self.compiled = {
            name: self.pool.submit(compile_programs, programs_of(case, sms), range(case.positions))
            for name, case in ALL_CASES.items()
        }
        self.compiled |= {name: self.pool.submit(compile_programs, *arguments) for name, arguments in extra.items()}

    def close(self) -> None:
        """Drop what is not yet begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)

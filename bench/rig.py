"""A model on the GPU below the engine: launches of any length from any position, and the logits of every one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property

import torch

from instructions.base import GREEDY, SamplingState
from instructions.shape import VACANT
from megakernel.engine import Engine
from megakernel.gpu.backend import CHUNK, GpuBackend
from megakernel.gpu.machine import PATIENCE, GpuProgram, GpuState
from megakernel.prefill.plan import Plan
from megakernel.prefill.prefill import Prefill
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms

ITEMSIZE = 2
HEAD_START = 2_000_000  # clock cycles: the GPU is kept busy until the launches are enqueued, about a millisecond

Launch = tuple[GpuProgram, int, int]  # program, position of its first token, tokens


def device_sms() -> int:
    """SMs of the GPU."""
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def programs_of(model: PackedModel) -> BucketPrograms:
    """The programs of a model on all SMs of the GPU."""
    return BucketPrograms(model.config, device_sms(), model.capacity, ITEMSIZE, formats=model.tape.formats)


class Rig:
    """One sequence; `start` begins it, `decode` goes on from any position whose predecessors are in the KV cache."""

    def __init__(
        self,
        model: PackedModel,
        programs: BucketPrograms | None = None,
        patience: int = PATIENCE,
        state: GpuState | None = None,
    ) -> None:
        self.patience = patience
        self.programs = programs_of(model) if programs is None else programs
        shape = self.programs.shape(model.capacity)
        self.state = GpuState(model, shape.cache_pages, torch.device("cuda", 0)) if state is None else state
        self.page_positions = shape.page_positions
        self.made: dict[tuple[int, bool], GpuProgram] = {}

    def program(self, position: int, tail: bool = False) -> GpuProgram:
        """The program that decodes a position, or its tail."""
        place = self.programs.place(position)
        if (place, tail) not in self.made:
            self.made[place, tail] = GpuProgram(self.programs.program(place, tail), self.state, patience=self.patience)
        return self.made[place, tail]

    @cached_property
    def prefill(self) -> Prefill:
        """What reads prompts, compiled when first asked for."""
        return Prefill(self.state, self.program(0).sizes, self.programs.sms)

    def read(self, prompt: Sequence[int], kept: int = 0) -> int:
        """Read a prompt of which the KV cache holds `kept` positions; returns the token that follows it."""
        self.start(prompt)
        self.prefill.launch(kept, len(prompt))
        return self.program(len(prompt) - 1, tail=True).launch(len(prompt) - 1, 1).land()[0]

    def first_logits(self, prompt: Sequence[int], kept: int = 0) -> torch.Tensor:
        """The logits after a prompt that prefill reads, fp32 [vocab]."""
        program = self.program(len(prompt) - 1, tail=True)
        program.activations.fill_(VACANT)
        self.read(prompt, kept)
        return program.logits()

    def start(
        self, prompt: Sequence[int], sampling: SamplingState = GREEDY, stop_tokens: Collection[int] = frozenset()
    ) -> None:
        """Begin a sequence; what the KV cache holds stays there."""
        self.state.start(prompt, sampling, stop_tokens)

    def launches(self, position: int, tokens: int, longest: int = 10**9) -> Iterator[Launch]:
        """The launches that decode `tokens` tokens, each of at most `longest`."""
        end = position + tokens
        while position < end:
            _, stop = self.programs.cut(position, min(end, position + longest))
            yield self.program(position), position, stop - position
            position = stop

    def decode(self, position: int, tokens: int, longest: int = 10**9) -> list[int]:
        """Decode `tokens` tokens from a position; returns the tokens that follow them, up to a stop token."""
        found: list[int] = []
        for program, start, count in self.launches(position, tokens, longest):
            landed = program.launch(start, count).land()
            found += landed
            if len(landed) < count:
                break
        return found

    def timed(self, launches: Iterable[Launch]) -> float:
        """Milliseconds a token on the GPU, by its own events, of launches back to back; the tokens before them are random."""
        enqueued = list(launches)
        position, tokens = enqueued[0][1], sum(count for _, _, count in enqueued)
        generator = torch.Generator().manual_seed(position)
        self.start(torch.randint(self.programs.config.vocab_size, (position + 1,), generator=generator).tolist())
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        flights = [program.launch(start, count) for program, start, count in enqueued]
        end.record()
        for flight in flights:
            flight.land()
        return float(begin.elapsed_time(end)) / tokens

    def logits_of(self, tokens: Sequence[int], first: int = 0) -> torch.Tensor:
        """The logits after each of `tokens` from number `first` on, fp32 [tokens - first, vocab], one launch each.

        Before every launch the activations become VACANT: what a token reads, the token itself must have written.
        """
        self.start(tokens)
        self.decode(0, first)
        rows = []
        for position in range(first, len(tokens)):
            program = self.program(position)
            program.activations.fill_(VACANT)
            program.launch(position, 1).land()
            rows.append(program.logits())
        return torch.stack(rows)

    def cache_rows(self, positions: int) -> torch.Tensor:
        """The bits of the KV cache up to a position, int16 [heads, tiles, positions, columns], on the host."""
        shape = self.programs.shape(self.state.capacity)
        pages = self.state.cache.view(torch.int16).view(-1, shape.head_pages, shape.head_tiles, shape.page_positions, 64)
        rows = pages.transpose(1, 2).flatten(2, 3)  # [heads, tiles, positions, columns]
        return rows[:, :, :positions].cpu()


def engine_of(model: PackedModel) -> Engine:
    """The product's engine on the current GPU."""
    programs = programs_of(model)
    prefill = Prefill if Plan(model.config, programs.sms, model.capacity, model.tape.formats).possible else None
    device = torch.device("cuda", torch.cuda.current_device())
    return Engine(GpuBackend(model, programs, device, prefill), chunk=CHUNK)

"""A model and its programs in GPU memory, and the launch of the kernel.

The GPU twin of `megakernel.vm`: it decodes tokens on a state that all programs of a model share, and knows no engine and no
text.  Everything is enqueued on the current stream; results land in pinned host memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from instructions.base import SamplingState
from instructions.dimensions import Dimensions
from instructions.shape import VACANT
from megakernel.control_block import CONTROL_WORDS
from megakernel.device.kernel import megakernel
from megakernel.geometry import COUNTER_STRIDE, ITEM_BYTES, beside_box, make_bucket, make_geometry, token_stride
from megakernel.gpu.control import Outcome, control_words
from megakernel.options import BESIDE_LAYOUT, OPTIONS, TMA_LAYOUT, WARPS, Sizes
from megakernel.stamps import Clock, Point, nanoseconds
from megakernel.words import device_words
from models.packed import PackedModel
from models.tape import PAGE_BYTES, Matrix
from scheduler.program import Program

LAUNCH_OPTIONS: dict[str, Any] = {"num_warps": WARPS, "launch_cooperative_grid": True, **OPTIONS}
PATIENCE = 1_000_000_000  # clock cycles after which a wait is given up: about half a second


def beside_descriptor(constants: torch.Tensor, first: Matrix) -> TensorDescriptor | None:
    """What lies beside the pages from a matrix on, as TMA is told of it; None for a plain one."""
    count = first.format.scale_words
    if not count:
        return None
    words, box = constants[first.scale_offset :], beside_box(count)
    return TensorDescriptor.from_tensor(words[: len(words) // count * count].view(-1, box[1]), box, BESIDE_LAYOUT)


def page_descriptor(pages: torch.Tensor, parts: int = 1) -> TensorDescriptor:
    """Pages of weights or of the cache, as TMA is told of them: bf16 [128-byte lines, 64], one of `parts` of a page each."""
    return TensorDescriptor.from_tensor(pages.view(-1, 64), [128 // parts, 64], TMA_LAYOUT)


def upload(*pieces: tuple[torch.Tensor, np.ndarray]) -> None:
    """Enqueue that GPU memory takes words of the host: each tensor, int32, the array beside it.  Waits for nothing: a copy from
    memory that is not pinned would, for all that was enqueued before it."""
    staged = torch.empty(sum(words.size for _, words in pieces), dtype=torch.int32, device="cpu", pin_memory=True)
    held, first = staged.numpy(), 0
    for target, words in pieces:
        end = first + words.size
        held[first:end] = words.reshape(-1)
        target.copy_(staged[first:end].view(words.shape), non_blocking=True)
        first = end


class GpuState:
    """The model, its sequences and their KV cache, in GPU memory; shared by the programs of all context buckets.

    `tokens` begin with those of the first sequence, then those of the others follow, each `stride` behind the one before; as
    many again are drafts that are given, by position.
    """

    def __init__(self, model: PackedModel, cache_pages: int, device: torch.device, sequences: int = 1) -> None:
        self.device, self.capacity, self.config = device, model.capacity, model.config
        self.weights = model.weights.to(device)
        self.constants = model.constants.to(device)
        self.rope = model.rope.to(device)
        self.cache = torch.zeros(cache_pages, PAGE_BYTES // 2, dtype=torch.bfloat16, device=device)
        self.hidden = torch.zeros(model.config.hidden_size, dtype=torch.float32, device=device)  # what prefill leaves
        self.sequences, self.steps = sequences, 0  # steps of programs of several columns that have landed
        self.stride = token_stride(Dimensions(model.config, ITEM_BYTES, model.capacity, model.capacity, slices=1))
        self.tokens = torch.zeros(2 * sequences * self.stride, dtype=torch.int32, device=device)
        self.control = torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # launches on any stream find all this
        self.tape_descriptor, self.cache_descriptor = page_descriptor(self.weights), page_descriptor(self.cache)
        self.halves = page_descriptor(self.weights, 2) if model.tape.halved else None
        self.formats = model.tape.formats
        body, head = (model.tape.matrix(kind) for kind in ("qkv", "head"))
        self.beside = beside_descriptor(self.constants, body)
        self.head_beside = beside_descriptor(self.constants, head) if head.format != body.format else None

    def alone(self, number: int) -> GpuState:
        """The same model with one of the sequences alone: its tokens, its part of the cache, a control block of its own."""
        one, pages = copy(self), len(self.cache) // self.sequences
        one.sequences = 1
        one.cache = self.cache[number * pages :][:pages]
        one.cache_descriptor = page_descriptor(one.cache)
        one.tokens = self.tokens[number * self.stride :][: self.stride]
        one.control, one.hidden = torch.zeros_like(self.control), torch.zeros_like(self.hidden)
        return one

    def start(self, prompt: Sequence[int], sampling: SamplingState, stop_tokens: Collection[int], kept: int = 0) -> None:
        """Begin a new sequence; its first `kept` tokens are there already."""
        words = np.frombuffer(array("I", prompt[kept:]), np.int32)
        upload((self.tokens[kept : len(prompt)], words), (self.control, control_words(len(prompt), sampling, stop_tokens)))
        self.steps = 0


@dataclass(frozen=True, eq=False)
class Flight:
    """A launch under way: `tokens` tokens from `position`; what it leaves lands on the host once `landed` has passed."""

    program: GpuProgram
    position: int
    tokens: int
    control: torch.Tensor  # int32 [words], pinned
    chosen: torch.Tensor  # int32 [tokens], pinned: the tokens at position + 1 and on
    landed: torch.cuda.Event

    def land(self) -> list[int]:
        """Wait for the launch; the tokens at the positions after those decoded, fewer than asked for after a stop token.

        Raises KernelFault if some wait of the kernel expired, NotNumbers where a token's logits are none.
        """
        self.landed.synchronize()
        outcome = Outcome(self.control.numpy())
        outcome.raise_stuck(self.program.program)
        done = max(0, min(outcome.stop_position, self.position + self.tokens) - self.position)
        self.program.epoch += done
        self.program.enqueued -= self.tokens
        outcome.raise_numberless()
        return [int(token) for token in self.chosen[:done]]


class GpuProgram:
    """One program in GPU memory.  `epoch` counts the tokens it has decoded, `enqueued` those under way; `used`: some launch
    may have changed its counters since `resume` or `reset`.

    With `trace_tokens`, the kernel takes time stamps in launches of up to so many tokens: see `stamps`.
    """

    def __init__(
        self,
        program: Program,
        state: GpuState,
        patience: int = PATIENCE,
        trace_tokens: int = 0,
    ) -> None:
        device = state.device
        self.program, self.state, self.patience = program, state, patience
        self.sizes, self.bucket = Sizes(make_geometry(program, trace_tokens > 0)), make_bucket(program)
        self.words, self.starts, self.uses = (
            torch.tensor(array, device=device) for array in (device_words(program), program.starts, program.uses)
        )
        self.most_signals = int(program.targets.max())  # that a counter gets in one token
        self.trace_tokens = trace_tokens
        size = program.sms * len(Clock) + trace_tokens * len(program.words) * len(Point)
        if size > np.iinfo(np.int32).max:
            raise ValueError(f"{size} time stamps: an int32 number cannot count them, trace fewer tokens")
        self.trace = torch.zeros(size, dtype=torch.int64, device=device)
        self.activations = torch.full((program.shape.arena_elements,), VACANT, dtype=torch.int32, device=device)
        self.counters = torch.zeros(program.counters * COUNTER_STRIDE, dtype=torch.int32, device=device)
        self.epoch = self.enqueued = 0
        self.used = False
        torch.cuda.current_stream(device).synchronize()  # launches on any stream find all this

    def arguments(self, position: int, tokens: int, state: GpuState | None = None) -> tuple[Any, ...]:
        """The kernel's arguments, on the program's state or another that has the same model."""
        state = self.state if state is None else state
        return (
            state.tape_descriptor,
            state.halves,
            state.cache_descriptor,
            state.beside,
            state.head_beside,
            state.weights,
            state.cache,
            self.activations.view(torch.float32),
            state.constants,
            state.rope,
            state.hidden,
            self.words,
            self.starts,
            self.uses,
            self.counters,
            state.tokens,
            state.control,
            self.trace,
            position,
            self.epoch + self.enqueued,
            tokens,
            self.patience,
            *self.bucket,
            self.sizes,
        )

    def compile(self) -> None:
        """Compile the kernel, or find it in Triton's cache, without launching it."""
        megakernel.warmup(*self.arguments(0, 1), grid=(self.program.sms,), **LAUNCH_OPTIONS)

    def launch(self, position: int, tokens: int, state: GpuState | None = None) -> Flight:
        """Enqueue up to `tokens` tokens from `position`, of the program's state or of one of its sequences; returns at once.

        Where an earlier launch has met a stop token, the kernel leaves at once.  The launch is cooperative: the driver
        refuses it where not all blocks can be resident together, instead of letting them wait for each other for ever.
        Raises ValueError where the positions do not fit the program, or the program not the state.
        """
        state = self.state if state is None else state
        check_fit(self.program, state)
        self.program.require_positions(position, tokens, state.capacity)
        if self.sizes.geometry.trace:
            if tokens > self.trace_tokens:
                raise ValueError(f"{tokens} tokens do not fit a trace of {self.trace_tokens}")
            self.trace.zero_()
        grid = (self.program.sms,)
        self.used = True
        megakernel[grid](*self.arguments(position, tokens, state), **LAUNCH_OPTIONS)
        self.enqueued += tokens
        control = torch.empty(CONTROL_WORDS, dtype=torch.int32, device="cpu", pin_memory=True)
        chosen = torch.empty(tokens, dtype=torch.int32, device="cpu", pin_memory=True)
        control.copy_(state.control, non_blocking=True)
        chosen.copy_(state.tokens[position + 1 : position + 1 + tokens], non_blocking=True)
        landed = torch.cuda.Event()
        landed.record()
        return Flight(self, position, tokens, control, chosen, landed)

    def logits(self, column: int = 0) -> torch.Tensor:
        """The logits of the last token decoded under this program, of a column, fp32 [vocab], on the host."""
        buffer = self.program.shape.buffers["logits"]
        first = buffer.base + column * buffer.column
        return self.activations[first : first + buffer.rows].view(torch.float32).cpu()

    def stamps(self) -> np.ndarray:
        """The time stamps of the last launch, int64 [trace_tokens, records, points] nanoseconds, see `megakernel.stamps`."""
        words, records = self.trace.cpu().numpy(), len(self.program.words)
        clocks, cycles = np.split(words, [self.program.sms * len(Clock)])
        stamps = cycles.reshape(self.trace_tokens, records, len(Point))
        return nanoseconds(stamps, clocks.reshape(-1, len(Clock)), self.program.sm)

    def resume(self) -> None:
        """Take the epoch from the counters, when no launch is under way: it holds whatever became of the launches."""
        self.epoch = int(self.counters[self.bucket.end_counter * COUNTER_STRIDE])
        self.enqueued = 0
        self.used = False

    @property
    def worn(self) -> bool:
        """Whether counters might overflow int32 within another sequence; they should then begin anew before it does."""
        return (self.epoch + self.state.capacity) * self.most_signals > np.iinfo(np.int32).max

    def reset(self) -> None:
        """Begin all counters anew, when no launch is under way, and forget all activations."""
        self.counters.zero_()
        self.activations.fill_(VACANT)
        self.epoch = self.enqueued = 0
        self.used = False


def check_fit(program: Program, state: GpuState) -> None:
    """Refuse a program that was not made for a state's model and cache, with a ValueError."""
    shape, pages = program.shape, len(state.cache)
    if (
        (shape.config, shape.formats) != (state.config, state.formats)
        or shape.page_elements != state.weights.shape[1]
        or shape.sequence_pages * state.sequences != pages
        or shape.sequences > state.sequences
    ):
        raise ValueError("the program was made for another model, weight type or KV cache than the state's")

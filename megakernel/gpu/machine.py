"""A model and its programs in GPU memory, and the launch of the kernel.

The GPU twin of `megakernel.vm`: it decodes a number of tokens on a state that all programs of a model share, and knows no
engine and no text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from instructions.base import SamplingState
from megakernel.compile import PAGE_LAYOUT
from megakernel.device.context import Sizes
from megakernel.device.kernel import WARPS, megakernel
from megakernel.geometry import COUNTER_STRIDE, make_geometry
from megakernel.gpu.control import NEVER, Outcome, control_words
from models.packed import PackedModel
from models.tape import PAGE_BYTES
from scheduler.program import Program

COPIES = 3  # copies in flight per SM: fewer starve HBM, more delay the page that is needed next
PATIENCE = 1_000_000_000  # clock cycles after which a wait is given up: about half a second


class GpuState:
    """The model, one sequence and its KV cache, in GPU memory; shared by the programs of all context buckets."""

    def __init__(self, model: PackedModel, cache_pages: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.weights = model.weights.to(device)
        self.constants = model.constants.to(device)
        self.rope = model.rope.to(device)
        self.cache = torch.zeros(cache_pages, PAGE_BYTES // 2, dtype=torch.bfloat16, device=device)
        self.tokens = torch.zeros(model.capacity + 1, dtype=torch.int32, device=device)
        self.control = torch.zeros(64, dtype=torch.int32, device=device)
        self.tape_descriptor, self.cache_descriptor = (
            TensorDescriptor.from_tensor(pages.view(-1, 64), [128, 64], PAGE_LAYOUT) for pages in (self.weights, self.cache)
        )
        self.position = 0

    def start(self, prompt: Sequence[int], sampling: SamplingState, stop_tokens: Collection[int]) -> None:
        """Begin a new sequence."""
        words = control_words(len(prompt), sampling, stop_tokens)
        self.tokens[: len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.control.copy_(torch.from_numpy(words))
        self.position = 0


class GpuProgram:
    """One program in GPU memory, ready to be launched."""

    def __init__(self, program: Program, state: GpuState, copies: int = COPIES, patience: int = PATIENCE) -> None:
        device = state.device
        self.program, self.state, self.patience = program, state, patience
        self.sizes = Sizes(make_geometry(program, copies))
        self.words, self.starts, self.targets, self.uses = (
            torch.from_numpy(array).to(device) for array in (program.words, program.starts, program.targets, program.uses)
        )
        self.activations = torch.full((program.shape.activation_elements,), torch.nan, device=device)
        self.counters = torch.zeros(program.counters * COUNTER_STRIDE, dtype=torch.int32, device=device)
        self.epoch = 0

    def enqueue(self, position: int, tokens: int, epoch: int) -> None:
        """Launch the kernel for up to `tokens` tokens; returns at once."""
        state = self.state
        megakernel[(self.program.sms,)](
            state.tape_descriptor,
            state.cache_descriptor,
            state.weights,
            state.cache,
            self.activations,
            state.constants,
            state.rope,
            self.words,
            self.starts,
            self.targets,
            self.uses,
            self.counters,
            state.tokens,
            state.control,
            position,
            epoch,
            tokens,
            self.patience,
            self.sizes,
            num_warps=WARPS,
        )

    def launch(self, tokens: int) -> int:
        """Decode up to `tokens` tokens and wait for them; returns how many, fewer after a stop token."""
        position = self.state.position
        self.enqueue(position, tokens, self.epoch)
        outcome = Outcome(self.state.control.cpu().numpy())
        outcome.raise_fault(self.program)
        done = min(outcome.stop_position, position + tokens) - position
        self.state.position += done
        self.epoch += done
        return done

    def logits(self) -> torch.Tensor:
        """The logits of the last token decoded under this program, fp32 [vocab], on the host."""
        buffer = self.program.shape.buffers["logits"]
        return self.activations[buffer.base : buffer.base + buffer.rows].cpu()

    def reset(self) -> None:
        """Forget the counters, after a fault."""
        self.counters.zero_()
        self.epoch = 0


__all__ = ["COPIES", "NEVER", "PATIENCE", "GpuProgram", "GpuState"]

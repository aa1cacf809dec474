"""A prompt on the GPU, chunk by chunk: one CUDA graph of kernels a class of chunk lengths.

A chunk of tokens goes through all layers but the last, and of the last through its keys and values alone: what the rest of
the last layer makes of the earlier tokens nobody reads.  The last token's residual stream before the last layer is left in
the state's `hidden`, where the tail of the decode program takes it.

A kernel takes the chunk's start and length from memory, so one graph serves all lengths of its class.  Classes differ in how
products are cut, and few tokens after a long past have a chain of their own; which it is depends on a chunk's start and length
alone, so the same tokens from the same position give the same bits.
"""

from __future__ import annotations

from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from copy import copy

import numpy as np
import torch

from megakernel.gpu.machine import GpuState, upload
from megakernel.options import Sizes
from megakernel.prefill.chain import Chain
from megakernel.prefill.launch import Launch
from megakernel.prefill.plan import LONG_PAST, Plan

COMPILERS = 8  # kernels compiled at once: most of it is spent outside the interpreter


class Prefill:
    """Reads prompts into a state's cache; compiled and captured when constructed, see `megakernel.gpu.backend.Prefill`.

    `sizes` are the decode kernel's of the same model, `sms` the multiprocessors to fill.
    """

    def __init__(self, state: GpuState, sizes: Sizes, sms: int) -> None:
        self.state, self.plan = state, Plan(state.config, sms, state.capacity, state.formats)
        self.chain = Chain(state, sizes, self.plan)
        self.compile()
        self.graphs = self.captured()

    def on(self, state: GpuState) -> Prefill:
        """The same for another state of the model: the same kernels and buffers, which both use in turn."""
        other = copy(self)
        other.state, other.chain = state, self.chain.on(state)
        other.graphs = other.captured()
        return other

    def chains(self) -> dict[tuple[int, bool], list[Launch]]:
        """The chain of every class, and of those that have one the chain after a long past."""
        pasts = {size: self.plan.past(size) for size in self.plan.classes}
        usual = {(size, False): list(self.chain.launches(size)) for size in pasts}
        return usual | {(size, True): list(self.chain.launches(size, past)) for size, past in pasts.items() if past is not None}

    def captured(self) -> dict[tuple[int, bool], torch.cuda.CUDAGraph]:
        """All chains, recorded."""
        return {which: self.capture(launches) for which, launches in self.chains().items()}

    def compile(self) -> None:
        """Compile every kernel of every class."""
        launches = {launch.compiled: launch for chain in self.chains().values() for launch in chain}
        with ThreadPoolExecutor(COMPILERS) as pool:
            list(pool.map(lambda launch: launch.compile(), launches.values()))

    def capture(self, launches: list[Launch]) -> torch.cuda.CUDAGraph:
        """Record a chain."""
        for launch in launches:  # of no token yet: the driver loads a kernel when it is launched first
            launch.enqueue()
        torch.cuda.current_stream(self.state.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.state.device)  # torch's own is of the first device that had a graph
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch.enqueue()
        return graph

    @property
    def chunk(self) -> int:
        """Tokens that are read at a time at most."""
        return self.plan.chunk

    def launch(self, start: int, stop: int) -> None:
        """Compute positions [start, stop) of the state's tokens; the last one's residual goes to the state's `hidden`."""
        for first in range(start, stop, self.chunk):
            last = min(first + self.chunk, stop)
            self.read(first, last - first)
        self.state.hidden.copy_(self.chain.residual[last - first - 1])

    def read(self, start: int, count: int) -> None:
        """Enqueue one chunk."""
        upload((self.chain.words, np.array([start, count], dtype=np.int32)))
        self.graphs[self.which(start, count)].replay()

    def which(self, start: int, count: int) -> tuple[int, bool]:
        """The chain of a chunk: its class, and whether it is the one for a long past."""
        size = self.plan.classes[bisect_left(self.plan.classes, count)]
        return size, start >= LONG_PAST and (size, True) in self.graphs

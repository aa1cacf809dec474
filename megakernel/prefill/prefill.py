"""A prompt on the GPU, chunk by chunk: one CUDA graph of kernels a class of chunk lengths.

A chunk of tokens goes through all layers but the last, and of the last through its keys and values alone: what the rest of
the last layer makes of the earlier tokens nobody reads.  The last token's residual stream before the last layer is left in
the state's `hidden`, where the tail of the decode program takes it.

A kernel takes the chunk's start and length from memory, so one graph serves all lengths of its class.  Classes differ in how
products are cut; a chunk's class depends on its length alone, so the same tokens from the same position give the same bits.
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
from megakernel.prefill.plan import Plan

COMPILERS = 8  # kernels compiled at once: most of it is spent outside the interpreter


class Prefill:
    """Reads prompts into a state's cache; compiled and captured when constructed, see `megakernel.gpu.backend.Prefill`.

    `sizes` are the decode kernel's of the same model, `sms` the multiprocessors to fill.
    """

    def __init__(self, state: GpuState, sizes: Sizes, sms: int) -> None:
        self.state, self.plan = state, Plan(state.config, sms, state.capacity, state.formats)
        self.chain = Chain(state, sizes, self.plan)
        self.compile()
        self.graphs = {size: self.capture(size) for size in self.plan.classes}

    def on(self, state: GpuState) -> Prefill:
        """The same for another state of the model: the same kernels and buffers, which both use in turn."""
        other = copy(self)
        other.state, other.chain = state, self.chain.on(state)
        other.graphs = {size: other.capture(size) for size in self.plan.classes}
        return other

    def compile(self) -> None:
        """Compile every kernel of every class."""
        launches = {launch.compiled: launch for size in self.plan.classes for launch in self.chain.launches(size)}
        with ThreadPoolExecutor(COMPILERS) as pool:
            list(pool.map(lambda launch: launch.compile(), launches.values()))

    def capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Record a class's chain."""
        launches = list(self.chain.launches(size))
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
        self.graphs[self.plan.classes[bisect_left(self.plan.classes, count)]].replay()

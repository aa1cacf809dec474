"""What the tests of pictures and timelines share: small programs, and stamps made by hand for them."""

from __future__ import annotations

import functools

import numpy as np

from scheduler.build import make_shape, schedule
from scheduler.program import Program
from scheduler.timeline import Point, Trace, from_stamps, simulated_trace
from scheduler.timeline.trace import CONSUMER
from tests.support.configs import small_config

CAPACITY = 1024
POSITION = 600
MANY_SLICES = 5  # enough for every kind of instruction
ORIGIN = 10_000_000  # nanoseconds: where a clock stands is nobody's business


@functools.cache
def small_program(name: str = "head64_llama3", sms: int = 6, policy: str = "zigzag") -> Program:
    """A program of two layers with all kinds of instructions (the program is not proven, which would take longer)."""
    shape = make_shape(small_config(name, CAPACITY), sms=sms, capacity=CAPACITY, bucket=640, slices=MANY_SLICES)
    return schedule(shape, sms, policy, None)


@functools.cache
def small_trace(name: str = "head64_llama3", sms: int = 6) -> Trace:
    """Its simulation."""
    return simulated_trace(small_program(name, sms), POSITION)


def walked(program: Program, spans: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Stamps of SMs that walk their queues: `gaps` [tokens, records] before each instruction, then its phases `spans`
    [tokens, records, consumer points - 1].  Nobody waits for anybody, so a token need not end before the next begins."""
    tokens = len(spans)
    stamps = np.zeros((tokens, len(program.words), len(Point)), dtype=np.int64)
    for start, stop in zip(program.starts, program.starts[1:], strict=False):
        clock = ORIGIN
        for token in range(tokens):
            for i in range(start, stop):
                clock += int(gaps[token, i])
                for place, point in enumerate(CONSUMER):
                    clock += int(spans[token, i, place - 1]) if place else 0
                    stamps[token, i, point] = clock
    return stamps


def random_stamps(program: Program, seed: int, tokens: int = 2) -> np.ndarray:
    """`walked` with random durations, many of them zero, and random loaders."""
    rng = np.random.default_rng(seed)
    shape = (tokens, len(program.words))
    spans = rng.integers(0, 500, (*shape, len(CONSUMER) - 1)) * rng.integers(0, 2, (*shape, len(CONSUMER) - 1))
    stamps = walked(program, spans, rng.integers(0, 300, shape))
    stamps[:, :, Point.LOAD_BEGUN] = stamps[:, :, Point.FETCHED] - rng.integers(0, 1000, shape)
    stamps[:, :, Point.LOAD_ENDED] = stamps[:, :, Point.LOAD_BEGUN] + rng.integers(0, 1000, shape)
    stamps[:, :, Point.PAGE_WAITED] = rng.integers(0, 800, shape)
    return stamps


def measured(program: Program, stamps: np.ndarray) -> Trace:
    """A trace of hand-made stamps."""
    return from_stamps(program, stamps, past=POSITION, machine="none")

"""The measurements of `bench.decode`: a context length, the engine end to end, many tokens on end.

It knows neither command lines nor records; every function takes a loaded model and returns figures.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from bench.read_floor import Floor, measure_floor
from bench.record import Spread
from bench.rig import Rig, engine_of
from instructions.shape import Shape, ceil_div
from megakernel.gpu.backend import CHUNK
from models.packed import PackedModel
from models.tape import PAGE_BYTES

PROMPT, ANSWER = 32, 256  # tokens, end to end
# Bytes a second of HBM by NVIDIA's data sheets, by what a device calls itself.
DATA_SHEETS = {"H100 80GB HBM3": 3.35e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H200": 4.8e12}


@dataclass(frozen=True)
class ContextRecord:
    """One context length.  `bytes` are what a token must read at the middle of the run: the weights once, and the K and V rows
    of all positions before it.  `floor_ms` is the least time in which this GPU read as many, `times_floor` the step over it."""

    context: int
    tokens: int
    slices: list[int]
    ms_per_token: Spread
    tokens_per_second: float
    one_launch_ms_per_token: Spread
    weight_bytes: int
    kv_bytes: int
    bytes: int
    floor_ms: float
    floor_way: str
    floor_ms_by_way: dict[str, float]
    times_floor: float
    bytes_per_second: float
    data_sheet_share: float | None


def data_sheet_bandwidth(gpu: str | None) -> float | None:
    """Bytes a second by the data sheet, where the device is known."""
    return next((value for name, value in DATA_SHEETS.items() if gpu is not None and name in gpu), None)


def kv_bytes(shape: Shape, positions: int) -> int:
    """Bytes of the K and V rows of so many positions, in all layers."""
    return 2 * shape.config.num_layers * shape.config.num_kv_heads * shape.head_rows * shape.itemsize * positions


def measure_context(rig: Rig, context: int, tokens: int, runs: int, gpu: str | None) -> ContextRecord:
    """Decode from one context length, and read the same bytes."""
    for longest in (CHUNK, tokens):  # compiles, and brings the clocks up
        rig.timed(rig.launches(context, tokens, longest))
    steps, whole = (
        Spread.of([rig.timed(rig.launches(context, tokens, longest)) for _ in range(runs)]) for longest in (CHUNK, tokens)
    )
    used = [program for program, _, _ in rig.launches(context, tokens)]
    shape = used[0].program.shape
    weights = shape.tape.streamed_bytes
    cached = kv_bytes(shape, context + tokens // 2)
    floor = measured_floor(rig, cached)
    total = weights + cached
    best = floor.best * total / floor.bytes  # the floor's last page of the cache may be read in part
    bandwidth = total / steps.median * 1e3
    sheet = data_sheet_bandwidth(gpu)
    return ContextRecord(
        context=context,
        tokens=tokens,
        slices=[program.program.shape.slices for program in used],
        ms_per_token=steps,
        tokens_per_second=1e3 / steps.median,
        one_launch_ms_per_token=whole,
        weight_bytes=weights,
        kv_bytes=cached,
        bytes=total,
        floor_ms=best,
        floor_way=floor.way,
        floor_ms_by_way=floor.milliseconds,
        times_floor=steps.median / best,
        bytes_per_second=bandwidth,
        data_sheet_share=None if sheet is None else bandwidth / sheet,
    )


def measured_floor(rig: Rig, cached: int) -> Floor:
    """Read as many of the streamed weights as a step does, where they lie, and as many pages of the KV cache as hold `cached`
    bytes."""
    tape = rig.programs.shape(rig.programs.capacity).tape
    pages = min(tape.streamed_pages, tape.streamed_bytes // PAGE_BYTES)  # of experts as many as are chosen
    return measure_floor(rig.state.weights[:pages], rig.state.cache[: ceil_div(cached, PAGE_BYTES)])


def measure_engine(model: PackedModel, runs: int) -> dict[str, Any]:
    """End to end, tokens on the host: the time of many tokens less the time of one, and the time of that one."""
    prompt = torch.randint(model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    many = min(ANSWER, model.capacity - PROMPT)
    with engine_of(model) as engine:

        def seconds(tokens: int) -> float:
            begun = time.perf_counter()
            if sum(1 for _ in engine.generate(prompt, tokens, reuse=False)) != tokens:
                raise RuntimeError(f"asked for {tokens} tokens, got fewer")
            return time.perf_counter() - begun

        seconds(many)  # compiles
        first = [seconds(1) for _ in range(runs)]
        steps = [(seconds(many) - median(first)) / (many - 1) * 1e3 for _ in range(runs)]
    return {
        "prompt": PROMPT,
        "tokens": many,
        "ms_per_token": asdict(Spread.of(steps)),
        "first_token_ms": asdict(Spread.of([1e3 * value for value in first])),
    }


def measure_endurance(rig: Rig, context: int, tokens: int, total: int) -> dict[str, Any]:
    """Decode so many tokens without a pause, over and over from one context: does the step time drift, does memory grow?"""
    rig.timed(rig.launches(context, tokens, CHUNK))
    memory = torch.cuda.memory_reserved()
    runs = [rig.timed(rig.launches(context, tokens, CHUNK)) for _ in range(ceil_div(total, tokens))]
    tenth = max(1, len(runs) // 10)
    return {
        "tokens": len(runs) * tokens,
        "first_tenth_ms_per_token": median(runs[:tenth]),
        "last_tenth_ms_per_token": median(runs[-tenth:]),
        "most_ms_per_token": max(runs),
        "memory_growth_bytes": torch.cuda.memory_reserved() - memory,
    }

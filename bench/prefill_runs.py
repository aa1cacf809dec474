"""What `bench.prefill` measures: first tokens through the engine, and prefill's kernels beside cuBLAS and SDPA."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.record import Spread
from bench.rig import Rig
from megakernel.engine import Engine
from megakernel.prefill.chain import Launch
from megakernel.prefill.plan import KINDS, Plan

REPEATS = 7  # of a graph of kernels
HEAD_START = 300_000  # clock cycles: the GPU is kept busy until the graph is enqueued
COPIES = 4  # of a matrix that cuBLAS multiplies with in turn, so that it finds none in L2
WARM = 3  # first tokens before those that count


@dataclass(frozen=True)
class Kernels:
    """A chunk of `tokens` tokens from position `start` on: microseconds a layer and TFLOP/s, by kernel; "widening" of all of a
    layer's matrices, where weights are quantised, is in no rate.

    `projections` and `attention` are the rates of ours, `cublas` and `sdpa` those of the same multiplications by PyTorch's
    libraries in the same run.  A multiplication and an addition are two operations; attention counts the pairs of tokens that
    causality leaves.
    """

    start: int
    tokens: int
    microseconds: dict[str, float]
    library_microseconds: dict[str, float]
    projections: float
    cublas: float
    attention: float
    sdpa: float


def random_prompt(vocabulary: int, tokens: int, seed: int) -> list[int]:
    """Token ids."""
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def first_tokens(engine: Engine, length: int, runs: int, kept: int = 0) -> Spread:
    """Milliseconds from a prompt to its first token on the host; `kept` positions of it are the prompt before."""
    times = []
    for run in range(WARM + runs):
        prompt = random_prompt(engine.config.vocab_size, length, seed=run)
        if kept:
            list(engine.generate(prompt[:kept], 1, reuse=False))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        generation = engine.generate(prompt, 1, reuse=kept > 0)
        if len(list(generation)) != 1 or generation.kept != kept:
            raise RuntimeError(f"asked for one token after {length} tokens of which {kept} are kept, got something else")
        times.append(1e3 * (time.perf_counter() - begun))
    return Spread.of(times[WARM:])


def measure_kernels(rig: Rig, start: int, tokens: int) -> Kernels:
    """A chunk's kernels apart, each through all layers in one CUDA graph."""
    prefill = rig.prefill
    chain, plan = prefill.chain, prefill.plan
    size = next(size for size in plan.classes if tokens <= size)
    layers = range(plan.config.num_layers)
    rig.state.tokens.random_(0, plan.config.vocab_size)
    prefill.launch(start, start + tokens)  # so that the buffers hold what they would
    chain.words.copy_(torch.tensor([start, tokens], dtype=torch.int32))
    norm = plan.tape.norm_offset(plan.tape.norm_before("gate_up"))
    ways: dict[str, Iterable[Launch]] = {kind: [chain.product(size, kind, layer, norm) for layer in layers] for kind in KINDS}
    ways["attention"] = [chain.attention(layer) for layer in layers]
    ours = {name: per_layer([launch.enqueue for launch in launches]) for name, launches in ways.items()}
    if plan.widened:
        widening = [[chain.widening(kind, layer).enqueue for layer in layers] for kind in KINDS]
        ours["widening"] = sum(map(per_layer, widening))
    theirs = {kind: library_product(plan, kind, tokens) for kind in KINDS}
    theirs["attention"] = library_attention(plan, start, tokens)
    work = {kind: 2.0 * tokens * plan.tape.matrix(kind).rows * plan.tape.matrix(kind).columns for kind in KINDS}
    config = plan.config
    pairs = tokens * start + tokens * (tokens + 1) / 2
    attention = 4.0 * pairs * config.num_heads * config.head_dim

    def rate(times: dict[str, float]) -> float:
        return sum(work.values()) / sum(times[kind] for kind in KINDS) / 1e6

    return Kernels(
        start,
        tokens,
        ours,
        theirs,
        projections=rate(ours),
        cublas=rate(theirs),
        attention=attention / ours["attention"] / 1e6,
        sdpa=attention / theirs["attention"] / 1e6,
    )


def per_layer(ways: Sequence[Callable[[], object]]) -> float:
    """Microseconds of each of some pieces of work, back to back in a CUDA graph: the median of repeats."""
    for way in ways:
        way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for way in ways:
            way()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(ways))
    return median(times)


def library_product(plan: Plan, kind: str, tokens: int) -> float:
    """Microseconds of cuBLAS for one matrix of a kind."""
    matrix = plan.tape.matrix(kind)
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(tokens, matrix.columns, **half)
    weights = [0.02 * torch.randn(matrix.rows, matrix.columns, **half) for _ in range(COPIES)]
    out = torch.empty(tokens, matrix.rows, **half)
    return per_layer([lambda weight=weight: torch.mm(x, weight.T, out=out) for weight in weights])  # type: ignore[misc]


def library_attention(plan: Plan, start: int, tokens: int) -> float:
    """Microseconds of PyTorch's own attention, the causal kind where nothing comes before the tokens."""
    config = plan.config
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    query = torch.randn(1, config.num_heads, tokens, config.head_dim, **half)
    keys, values = (torch.randn(1, config.num_heads, start + tokens, config.head_dim, **half) for _ in range(2))
    if start == 0:
        return per_layer([lambda: scaled_dot_product_attention(query, keys, values, is_causal=True)] * 2)
    position = torch.arange(tokens, device="cuda")[:, None] + start
    mask = torch.arange(start + tokens, device="cuda")[None] <= position
    return per_layer([lambda: scaled_dot_product_attention(query, keys, values, attn_mask=mask)] * 2)


def as_json(kernels: Sequence[Kernels]) -> list[dict[str, Any]]:
    """For a record, rounded to what was measured."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        return round(value, 2) if isinstance(value, float) else value

    return [rounded(asdict(each)) for each in kernels]

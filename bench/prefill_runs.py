"""What `bench.prefill` measures: first tokens through the engine, and prefill's kernels beside cuBLAS and SDPA."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.record import Spread
from bench.rig import Rig
from megakernel.engine import Engine
from megakernel.prefill.chain import Chain
from megakernel.prefill.launch import Launch
from megakernel.prefill.plan import EXPERT_KINDS, Plan

REPEATS = 7  # of a graph of kernels
HEAD_START = 300_000  # clock cycles: the GPU is kept busy until the graph is enqueued
COPIES = 4  # of a matrix that cuBLAS multiplies with in turn, so that it finds none in L2
WARM = 3  # first tokens before those that count


@dataclass(frozen=True)
class Kernels:
    """A chunk of `tokens` tokens from position `start` on: microseconds a layer and TFLOP/s, by kernel; "widening" of all of a
    layer's matrices, where weights are quantised, is in no rate, and neither is "routing" to experts and back.

    `projections` and `attention` are the rates of ours, `cublas` and `sdpa` those of the same multiplications by PyTorch's
    libraries in the same run; of experts those of one matrix for all rows.  A multiplication and an addition are two
    operations; attention counts the pairs of tokens that causality leaves.  `experts`: how many of the experts of the last
    layer whose experts prefill needs have rows, and the most that one of them has.
    """

    start: int
    tokens: int
    microseconds: dict[str, float]
    library_microseconds: dict[str, float]
    projections: float
    cublas: float
    attention: float
    sdpa: float
    experts: tuple[int, int] | None = None


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
    experts = None if chain.mixture is None else experts_with_rows(chain.tensors["ends"])
    chain.words.copy_(torch.tensor([start, tokens], dtype=torch.int32))
    pieces = [pieces_of(chain, size, layer) for layer in layers]

    def timed(name: str) -> float:
        return per_layer([together(piece[name]) for piece in pieces])

    # Attention first: products leave a GPU at its limit of power with a lower clock.
    ours, theirs = {"attention": timed("attention")}, {"attention": library_attention(plan, start, tokens)}
    ours |= {name: timed(name) for name in pieces[0] if name != "attention"}
    if plan.widened:
        widening = [[chain.widening(kind, layer).enqueue for layer in layers] for kind in plan.buffers]
        if chain.mixture is not None:
            widening += [[chain.mixture.widening(kind, layer).enqueue for layer in layers] for kind in EXPERT_KINDS]
        ours["widening"] = sum(map(per_layer, widening))
    rows = rows_of(plan, tokens)
    theirs |= {kind: library_product(plan, kind, count) for kind, count in rows.items()}
    matrices = {kind: plan.tape.matrix(kind) for kind in rows}
    work = {kind: 2.0 * rows[kind] * matrix.rows * matrix.columns for kind, matrix in matrices.items()}
    config = plan.config
    pairs = tokens * start + tokens * (tokens + 1) / 2
    attention = 4.0 * pairs * config.num_heads * config.head_dim

    def rate(times: dict[str, float]) -> float:
        return sum(work.values()) / sum(times[kind] for kind in work) / 1e6

    return Kernels(
        start,
        tokens,
        ours,
        theirs,
        projections=rate(ours),
        cublas=rate(theirs),
        attention=attention / ours["attention"] / 1e6,
        sdpa=attention / theirs["attention"] / 1e6,
        experts=experts,
    )


def experts_with_rows(ends: torch.Tensor) -> tuple[int, int]:
    """How many experts have rows, and the most that one has; `ends` is where each one's rows end."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return int((counts > 0).sum()), int(counts.max())


def pieces_of(chain: Chain, size: int, layer: int) -> dict[str, list[Launch]]:
    """A layer's launches, by what they do: products by kind, attention, and a mixture's "routing": all but its products."""
    tape, mixture = chain.plan.tape, chain.mixture
    norm = tape.norm_offset(tape.norm_before(chain.plan.after_attention))
    pieces = {"qkv": list(chain.heads(size, layer)), "o": [chain.product(size, "o", layer, norm)]}
    if mixture is None:
        pieces |= {kind: [chain.product(size, kind, layer, norm)] for kind in ("gate_up", "down")}
    else:
        pieces["router"] = [chain.single(size, "router", layer, chain.tensors["scores"])]
        pieces |= {kind: [mixture.product(kind, layer)] for kind in EXPERT_KINDS}
        pieces["routing"] = [mixture.choice(size), mixture.places(size), mixture.rows(size, layer), mixture.sum(size, norm)]
    return pieces | {"attention": [chain.attention(layer)]}


def rows_of(plan: Plan, tokens: int) -> dict[str, int]:
    """How many rows the matrices of each kind are multiplied with: of experts one for each of a token's slots."""
    slots = tokens * plan.config.experts_per_token
    return dict.fromkeys(plan.kinds, tokens) | (dict.fromkeys(EXPERT_KINDS, slots) if slots else {})


def together(launches: Sequence[Launch]) -> Callable[[], None]:
    """Several launches as one piece of work."""

    def enqueue() -> None:
        for launch in launches:
            launch.enqueue()

    return enqueue


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
    """Microseconds of cuBLAS for one matrix of a kind, of experts too: one for all rows."""
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

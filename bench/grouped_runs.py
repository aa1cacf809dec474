"""What `bench.grouped` measures: one grouped product by several ways, in CUDA graphs, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from bench.record import Spread
from megakernel.grouped.product import grouped_product, multiprocessors
from megakernel.grouped.reference import Scales, grouped_reference
from megakernel.grouped.tiling import Plan
from models.errors import MachineError

HEAD_START = 300_000  # clock cycles: the GPU is kept busy until the graph is enqueued
ROUNDS = 15  # in each of which every way is timed once, in an order of its own: clocks depend on what ran before
ENOUGH = 2e12  # operations of a graph, where so many calls do not take too long
MOST_CALLS = 8  # of a graph
# Of the largest element: bf16 is rounded once by both, and summed in another order; e4m3 is summed in about 13 bits
TOLERANCE = {"bf16": 2.0**-7, "e4m3": 2.0**-5}
FORMATS = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}

Ways = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Experts:
    """A model's experts: how many, how many a token has, and the sizes of their two products."""

    name: str
    experts: int
    top: int
    hidden: int
    intermediate: int

    def sizes(self, matrix: str) -> tuple[int, int]:
        """N and K of "gate_up" (both, one below the other) or "down"."""
        return (2 * self.intermediate, self.hidden) if matrix == "gate_up" else (self.hidden, self.intermediate)


MODELS = (
    Experts("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Experts("OLMoE-1B-7B", 64, 8, 2048, 1024),
    Experts("Mixtral-8x7B", 8, 2, 4096, 14336),
    Experts("DeepSeek-V3", 256, 8, 7168, 2048),
)
LOADS = ("balanced", "zipf", "one")


@dataclass(frozen=True)
class Case:
    """A product: whose, which matrix, how many tokens, how these are spread over the experts, and of which elements."""

    experts: Experts
    matrix: str
    load: str
    tokens: int
    format: str = "bf16"

    @property
    def rows(self) -> int:
        """Of x: every token once for each of its experts."""
        return self.tokens * self.experts.top

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        n, k = self.experts.sizes(self.matrix)
        return 2.0 * self.rows * n * k

    def counts(self) -> list[int]:
        """Rows of every expert.  balanced: each token draws its experts evenly, without putting back.  zipf: it draws them with
        weights 1 / rank.  one: a single expert has all rows."""
        if self.load == "one":
            return [self.rows, *[0] * (self.experts.experts - 1)]
        generator = torch.Generator().manual_seed(self.tokens)
        ranks = torch.arange(1, self.experts.experts + 1, dtype=torch.float64)
        weights = 1 / ranks if self.load == "zipf" else torch.ones_like(ranks)
        weights = weights[torch.randperm(len(weights), generator=generator)]
        drawn = torch.multinomial(weights.expand(self.tokens, -1), self.experts.top, generator=generator)
        return torch.bincount(drawn.flatten(), minlength=self.experts.experts).tolist()


@dataclass(frozen=True)
class Result:
    """A case: rows of its experts (least, mean, most); by way microseconds, how they were timed, and TFLOP/s at the median.

    ways: "ours"; "unbanded", ours with each tile of tokens going through the whole matrix by itself; "torch", PyTorch's grouped
    product; "loop" (of bf16 alone), a product an expert by cuBLAS; "dense", cuBLAS with one matrix for all rows: the ceiling.
    """

    case: Case
    rows: tuple[int, float, int]
    microseconds: dict[str, Spread]
    timed: dict[str, str]
    rates: dict[str, float]


def measure(case: Case, w: Tensor) -> Result:
    """Time a case with weights [experts, N, K], after comparing what the ways give."""
    counts = case.counts()
    n, k = case.experts.sizes(case.matrix)
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.empty(case.rows, k, dtype=torch.bfloat16, device="cuda").normal_(generator=generator).to(w.dtype)
    y, other = (torch.empty(case.rows, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
    ways = ways_of_bf16(x, w, offsets, counts, y, other) if case.format == "bf16" else ways_of_e4m3(x, w, offsets, y)
    wanted = other
    if "loop" in ways:
        ways["loop"]()
    else:
        wanted = grouped_reference(x, w, offsets, ones(x, w))
    for way in ("ours", "unbanded"):
        y.fill_(float("nan"))
        ways[way]()
        compare(way, y, wanted, TOLERANCE[case.format])
    del wanted
    calls = max(1, min(MOST_CALLS, int(ENOUGH / case.operations)))
    made = {name: repeated(way, calls) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    orders = Random(0)
    for _ in range(ROUNDS):
        for name in orders.sample(list(made), len(made)):
            times[name].append(timed(made[name][0]) / calls)
    spreads = {name: Spread.of(found) for name, found in times.items()}
    rates = {name: case.operations / spread.median / 1e6 for name, spread in spreads.items()}
    spread_of_rows = (min(counts), case.rows / len(counts), max(counts))
    return Result(case, spread_of_rows, spreads, {name: how for name, (_, how) in made.items()}, rates)


def ways_of_bf16(x: Tensor, w: Tensor, offsets: Tensor, counts: Sequence[int], y: Tensor, other: Tensor) -> Ways:
    """Ours write into y, the loop and the ceiling into `other`."""
    plan = Plan(multiprocessors(x.device))
    return {
        "ours": lambda: grouped_product(x, w, offsets, y, plan),
        "unbanded": lambda: grouped_product(x, w, offsets, y, replace(plan, band=1)),
        "torch": lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=offsets),
        "loop": lambda: loop(x, w, counts, other),
        "dense": lambda: torch.mm(x, w[0].T, out=other),
    }


def ways_of_e4m3(x: Tensor, w: Tensor, offsets: Tensor, y: Tensor) -> Ways:
    """All with a scale a row, which is one; PyTorch's with the sums that the tensor cores do, as ours."""
    plan, scales = Plan(multiprocessors(x.device)), ones(x, w)
    rows, columns = scales
    fast: dict[str, Any] = {"out_dtype": y.dtype, "use_fast_accum": True}
    return {
        "ours": lambda: grouped_product(x, w, offsets, y, plan, scales),
        "unbanded": lambda: grouped_product(x, w, offsets, y, replace(plan, band=1), scales),
        "torch": lambda: torch._scaled_grouped_mm(x, w.transpose(1, 2), rows, columns, offs=offsets, **fast),
        "dense": lambda: torch._scaled_mm(x, w[0].T, scale_a=rows[:, None], scale_b=columns[:1], **fast),
    }


def ones(x: Tensor, w: Tensor) -> Scales:
    """Scales of the rows of x and of all matrices."""
    return torch.ones(x.shape[0], device=x.device), torch.ones(w.shape[:2], device=x.device)


def loop(x: Tensor, w: Tensor, counts: Sequence[int], y: Tensor) -> None:
    """One product an expert, of sizes that the host knows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(x[start : start + count], w[expert].T, out=y[start : start + count])
        start += count


def compare(way: str, y: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Raises MachineError where two products differ by more than rounding; a part at a time, for memory."""
    for part, other in zip(y.split(8192), wanted.split(8192), strict=True):
        apart, largest = float((part.float() - other.float()).abs().max()), float(other.float().abs().max())
        if not apart <= tolerance * largest:
            raise MachineError(f"{way} differs by {apart} from what it should be, where the largest element is {largest}")


def repeated(way: Callable[[], object], calls: int) -> tuple[Callable[[], object], str]:
    """So many calls in one graph, or where that cannot be captured, one after another; and which of the two."""

    def eagerly() -> None:
        for _ in range(calls):
            way()

    way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eagerly()
    except RuntimeError:
        torch.cuda.synchronize()
        return eagerly, "launches"
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, "graph"


def timed(replay: Callable[[], object]) -> float:
    """Microseconds on the GPU, by its own events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def weights(experts: Experts, matrix: str, format: str) -> Tensor:
    """[experts, N, K] of a trained model's scale; of e4m3 as quantised rows are, of the order of one."""
    n, k = experts.sizes(matrix)
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.empty(experts.experts, n, k, dtype=FORMATS[format], device="cuda")
    one = torch.empty(n, k, dtype=torch.bfloat16, device="cuda")
    for matrix_of_expert in w:
        matrix_of_expert.copy_(one.normal_(std=k**-0.5 if format == "bf16" else 1.0, generator=generator))
    return w


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For a record, rounded to what was measured."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [rounded(part) for part in value]
        return round(value, 2) if isinstance(value, float) else value

    return [rounded(asdict(result)) for result in results]

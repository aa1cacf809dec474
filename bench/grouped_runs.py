"""What `bench.grouped` measures: one grouped product by several ways, in CUDA graphs, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.record import Spread
from megakernel.grouped.product import grouped_product, multiprocessors
from megakernel.grouped.tiling import Plan
from models.errors import MachineError

HEAD_START = 300_000  # clock cycles: the GPU is kept busy until the graph is enqueued
ROUNDS = 9  # in each of which every way is timed once
ENOUGH = 2e12  # operations of a graph, where so many calls do not take too long
MOST_CALLS = 8  # of a graph
TOLERANCE = 2.0**-7  # of the largest element: both round to bf16 once, and sum in another order


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
    """A product: whose, which matrix, how many tokens, and how these are spread over the experts."""

    experts: Experts
    matrix: str
    load: str
    tokens: int

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
    product; "loop", a product an expert by cuBLAS; "dense", as many rows times one matrix by cuBLAS, the ceiling.
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
    x = torch.empty(case.rows, k, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    y, other = (torch.empty(case.rows, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
    plan = Plan(multiprocessors(x.device))
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: grouped_product(x, w, offsets, y, plan),
        "unbanded": lambda: grouped_product(x, w, offsets, y, replace(plan, band=1)),
        "torch": lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=offsets),
        "loop": lambda: loop(x, w, counts, other),
        "dense": lambda: torch.mm(x, w[0].T, out=other),
    }
    ways["loop"]()
    for way in ("ours", "unbanded"):
        y.fill_(float("nan"))
        ways[way]()
        compare(way, y, other)
    calls = max(1, min(MOST_CALLS, int(ENOUGH / case.operations)))
    made = {name: repeated(way, calls) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (replay, _) in made.items():
            times[name].append(timed(replay) / calls)
    spreads = {name: Spread.of(found) for name, found in times.items()}
    rates = {name: case.operations / spread.median / 1e6 for name, spread in spreads.items()}
    spread_of_rows = (min(counts), case.rows / len(counts), max(counts))
    return Result(case, spread_of_rows, spreads, {name: how for name, (_, how) in made.items()}, rates)


def loop(x: Tensor, w: Tensor, counts: Sequence[int], y: Tensor) -> None:
    """One product an expert, of sizes that the host knows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(x[start : start + count], w[expert].T, out=y[start : start + count])
        start += count


def compare(way: str, y: Tensor, wanted: Tensor) -> None:
    """Raises MachineError where two products differ by more than rounding; a part at a time, for memory."""
    for part, other in zip(y.split(8192), wanted.split(8192), strict=True):
        apart, largest = float((part.float() - other.float()).abs().max()), float(other.float().abs().max())
        if not apart <= TOLERANCE * largest:
            raise MachineError(f"{way} differs by {apart} from the loop, where the largest element is {largest}")


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


def weights(experts: Experts, matrix: str) -> Tensor:
    """bf16 [experts, N, K] of a trained model's scale."""
    n, k = experts.sizes(matrix)
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.empty(experts.experts, n, k, dtype=torch.bfloat16, device="cuda")
    for matrix_of_expert in w:
        matrix_of_expert.normal_(std=k**-0.5, generator=generator)
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

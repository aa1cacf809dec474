"""How a skinny product is cut: tiles of W's rows, steps along K, slots of shared memory, and who computes what.

Numbers alone, no GPU.  Where tiles do not divide evenly among the multiprocessors, they are cut along K (split-K), at any
step: every thread block gets the same number of steps, or one more ("Stream-K", Osama et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.dimensions import ceil_div
from models.errors import UserError

BOX = 128  # columns of a box of W, bytes of its lines
CONSUMER_ROWS = 64  # rows of the matrix instruction
MOST_TOKENS = 64
TOKENS = (8, 16, 32, 64)  # columns of the matrix instruction
CONSUMERS = (1, 2, 4)
SHARED_BYTES = 222 * 1024  # of a multiprocessor's rings; barriers and the like take the rest of Hopper's 227 KB
REGISTERS = 64 * 1024  # of a multiprocessor
CONSUMER_REGISTERS = {1: 232, 2: 208, 4: 112}  # a thread, by consumers
WHOLE = 0.95  # of the multiprocessors: so many are enough to read W as fast as all
MOST_ELEMENTS = 1 << 36  # of W


@dataclass(frozen=True)
class Problem:
    """y[tokens, rows] = x[tokens, columns] W[rows, columns]ᵀ; `wide` where x is bf16, else it is FP8 as W.

    Raises UserError for what the kernel does not take.
    """

    tokens: int
    rows: int
    columns: int
    wide: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise UserError(f"{self.tokens} tokens: a skinny product takes 1 to {MOST_TOKENS}; split x, or use torch.matmul")
        if self.rows < 1:
            raise UserError(f"W has {self.rows} rows: it must have at least one")
        if self.columns < 16 or self.columns % 16:
            raise UserError(f"{self.columns} columns: TMA takes a multiple of 16; pad x and W with zeros")
        if self.rows * self.columns > MOST_ELEMENTS:
            raise UserError(f"W is {self.rows} by {self.columns}: at most {MOST_ELEMENTS} elements are taken; split its rows")

    @property
    def padded_tokens(self) -> int:
        """Columns of the matrix instruction."""
        return next(tokens for tokens in TOKENS if self.tokens <= tokens)


@dataclass(frozen=True)
class Cut:
    """The choice: `consumers` times 64 rows a tile, `boxes` times 128 columns a step, `slots` steps on their way, and the
    thread blocks that share the work.

    With two `residents` a multiprocessor has room for a second block, so that a launch may fill its slots while the one
    before it adds its parts.
    """

    consumers: int
    boxes: int
    slots: int
    blocks: int
    residents: int = 1


@dataclass(frozen=True)
class Tiling:
    """What a compiled kernel depends on; `registers` are those of a consumer's thread."""

    tokens: int
    consumers: int
    boxes: int
    slots: int
    wide: bool
    registers: int


@dataclass(frozen=True)
class Run:
    """What a block has of a tile: steps `first` to `last` along K, the last left out."""

    tile: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """A problem and its cut; raises UserError where they do not go together."""

    problem: Problem
    cut: Cut

    def __post_init__(self) -> None:
        cut = self.cut
        if cut.consumers not in CONSUMERS:
            raise UserError(f"{cut.consumers} consumers: use one of {', '.join(map(str, CONSUMERS))}")
        if cut.boxes < 1 or cut.slots < 2:
            raise UserError(f"{cut.boxes} boxes a step in {cut.slots} slots: use at least one box and two slots")
        if not 1 <= cut.residents <= (1 if cut.consumers == 4 else 2):
            raise UserError(f"{cut.residents} residents of {cut.consumers} consumers: use 1, or 2 of at most two consumers")
        most = SHARED_BYTES // cut.residents // self.step_bytes
        if cut.slots > most:
            raise UserError(f"{cut.slots} slots of {self.step_bytes} bytes do not fit shared memory: use at most {most}")
        if not 1 <= cut.blocks <= self.units:
            raise UserError(f"{cut.blocks} thread blocks for {self.units} units of work: use 1 to {self.units}")

    @property
    def tiling(self) -> Tiling:
        """What is compiled."""
        cut, problem = self.cut, self.problem
        registers = min(CONSUMER_REGISTERS[cut.consumers], self.registers + 16)
        return Tiling(problem.padded_tokens, cut.consumers, cut.boxes, cut.slots, problem.wide, registers)

    @property
    def registers(self) -> int:
        """A thread may have on average: of all, what divides by eight."""
        threads = self.cut.residents * 128 * (self.cut.consumers + 1)  # the loader's warp counts as four
        return min(REGISTERS // threads // 8 * 8, 255)

    @property
    def step_bytes(self) -> int:
        """Of shared memory, for one step of W and x."""
        return step_bytes(self.problem, self.cut.consumers, self.cut.boxes)

    @property
    def tiles(self) -> int:
        """Of W's rows."""
        return ceil_div(self.problem.rows, self.cut.consumers * CONSUMER_ROWS)

    @property
    def steps(self) -> int:
        """Along K, of every tile."""
        return ceil_div(self.problem.columns, self.cut.boxes * BOX)

    @property
    def units(self) -> int:
        """Tiles times steps."""
        return self.tiles * self.steps

    @property
    def least(self) -> int:
        """Units that every block has."""
        return self.units // self.cut.blocks

    @property
    def more(self) -> int:
        """Blocks, the first ones, that have one more."""
        return self.units % self.cut.blocks

    def first_unit(self, block: int) -> int:
        """Where a block's units begin, and those of the block before end."""
        return block * self.least + min(block, self.more)

    def runs(self, block: int) -> list[Run]:
        """What a block computes, in its order."""
        first, end, steps = self.first_unit(block), self.first_unit(block + 1), self.steps
        return [
            Run(tile, max(first - tile * steps, 0), min(end - tile * steps, steps))
            for tile in range(first // steps, ceil_div(end, steps))
        ]

    @property
    def parts(self) -> int:
        """Sums, fp32, that blocks may leave for others: of two tiles each."""
        return 2 * self.cut.blocks * self.cut.consumers * CONSUMER_ROWS * self.problem.padded_tokens

    @property
    def arrivals(self) -> int:
        """Counters of parts that are there."""
        return self.tiles * self.cut.consumers


def step_bytes(problem: Problem, consumers: int, boxes: int) -> int:
    """Of shared memory, for a step of W and x."""
    return boxes * BOX * (consumers * CONSUMER_ROWS + problem.padded_tokens * (2 if problem.wide else 1))


def make_plan(problem: Problem, consumers: int, boxes: int, blocks: int, residents: int = 1) -> Plan:
    """The plan with as many slots as fit, and no more blocks than there is work for."""
    slots = SHARED_BYTES // residents // step_bytes(problem, consumers, boxes)
    units = ceil_div(problem.rows, consumers * CONSUMER_ROWS) * ceil_div(problem.columns, boxes * BOX)
    return Plan(problem, Cut(consumers, boxes, slots, min(blocks, units), residents))


def choose_plan(problem: Problem, sms: int, early: bool = False) -> Plan:
    """The plan for a GPU of `sms` multiprocessors; the bits of its result do not depend on `early`.

    The more tokens, the higher the tile, so that the tokens, which every tile reads from L2, weigh little beside W.  Where
    whole tiles occupy nearly all multiprocessors once, none is split.
    """
    tokens = problem.padded_tokens * (2 if problem.wide else 1)  # bytes of a column of x
    consumers = 1 if tokens <= 16 else 2 if tokens <= 64 else 4
    tiles = ceil_div(problem.rows, consumers * CONSUMER_ROWS)
    whole = WHOLE * sms <= tiles <= sms
    residents = 2 if early and consumers * problem.padded_tokens <= 64 else 1
    return make_plan(problem, consumers, 2 if consumers == 1 else 1, tiles if whole else sms, residents)

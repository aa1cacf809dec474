"""The page plan: which page of shared memory every page use gets, and in which generation.

A page use is one passage of a page through the ring.  Uses are numbered per SM in queue order, starting again each token:
use k of token t is the SM's use number n = t * uses_per_token + k, in slot n % ring, generation n // ring (its parity is
the mbarrier phase).  The loader may fill use n when use n - ring has been released; consumers use and release in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from instructions.base import Instruction
from instructions.codec import Wait
from instructions.matvec import RowBlocks
from instructions.registry import INSTRUCTIONS
from instructions.shape import HELD_PAGES, Shape, ceil_div, next_power_of_two
from models.tape import PAGE_BYTES, TILE_BYTES
from scheduler.dependencies import Dependencies
from scheduler.errors import ScheduleError
from scheduler.limits import RESERVED, RESERVED_QUANTISED, SHARED_MEMORY
from scheduler.place import Queues


@dataclass(frozen=True)
class PagePlan:
    """`first[i]` is instruction i's first use within the token, `uses[sm]` the SM's uses per token."""

    ring: int
    first: list[int]
    uses: list[int]
    load_waits: list[Wait | None]


def staging_bytes(shape: Shape) -> int:
    """Shared memory for staged activations in the weight type, whole pages of K columns of one row: the widest input of a
    projection in whole parts, the normalised hidden state at a power of two of pages, or the queries of an attention group.

    With several columns the hidden state is staged for a power of two of columns, and other inputs are not.  The
    sums that formats need follow at a multiple of their own size, and what lies beside pages at a multiple of its size.
    """
    kinds = [kind for kind in INSTRUCTIONS if issubclass(kind, RowBlocks) and kind.MATRIX in (*shape.tape.kinds, "head")]
    widest = max(kind.staged_columns(shape) for kind in kinds)
    normed = [shape.matrix(kind) for kind in ("qkv", "head", *(["router"] if shape.config.num_experts else []))]
    hidden = max(next_power_of_two(matrix.pages_per_block) * matrix.format.columns for matrix in normed)
    queries = ceil_div(shape.staged_queries, shape.page_columns) * shape.page_columns
    staged = max(widest, hidden) if shape.columns == 1 else next_power_of_two(shape.columns) * hidden
    sums = sums_bytes(shape)
    return rounded_up(rounded_up(max(staged, queries) * shape.itemsize, sums) + sums, beside_bytes(shape))


def rounded_up(count: int, unit: int) -> int:
    """To a multiple of a unit, where there is one."""
    return ceil_div(count, unit) * unit if unit else count


def sums_bytes(shape: Shape) -> int:
    """Shared memory for the sums of a staged activation, or of several columns of it, that formats need, a power of two of
    KiB."""
    most, staged = 0, next_power_of_two(shape.columns)
    for matrix in shape.tape.matrices:
        if matrix.format.summed and (staged == 1 or matrix.columns == shape.config.hidden_size):
            slots = shape.config.experts_per_token if matrix.kind == "expert_down" else 1
            columns = next_power_of_two(slots * matrix.pages_per_block) * matrix.format.columns
            most = max(most, staged * columns // matrix.format.summed)
    return ceil_div(4 * most, 1024) * 1024


def beside_bytes(shape: Shape) -> int:
    """Shared memory beside each page of the ring, for the scales of quantised weights: whole 128-byte lines, for TMA."""
    most = max(shape.matrix(kind).format.scale_words for kind in ("qkv", "head"))
    return ceil_div(4 * most, TILE_BYTES) * TILE_BYTES


def reserved_bytes(shape: Shape) -> int:
    """Shared memory that the kernel needs for itself."""
    return RESERVED if all(matrix.format.plain for matrix in shape.tape.matrices) else RESERVED_QUANTISED


def ring_depth(shape: Shape) -> int:
    """Pages that fit beside the staged activations; raises ScheduleError where too few do."""
    depth = (SHARED_MEMORY - reserved_bytes(shape) - staging_bytes(shape)) // (PAGE_BYTES + beside_bytes(shape))
    if depth < HELD_PAGES:
        raise ScheduleError(
            f"an activation vector of {staging_bytes(shape)} bytes leaves {max(depth, 0)} pages of shared memory, "
            f"{HELD_PAGES} are needed: the model's hidden or intermediate size is too large for this machine"
        )
    return depth


def plan_pages(program: Sequence[Instruction], shape: Shape, deps: Dependencies, queues: Queues, ring: int) -> PagePlan:
    """Number the page uses, and drop load waits that the ring implies.

    The loader fills use k only after use k - ring was released, and the instruction that released it had itself waited for
    everything in its `before_previous`.  Where that covers what a load needs, the load has nothing left to wait for.
    """
    first, uses = [0] * len(program), []
    load_waits = list(deps.load_waits)
    for queue in queues:
        owners: list[int] = []
        for i in queue:
            first[i] = len(owners)
            wait = load_waits[i]
            if wait is not None and first[i] >= ring:
                released_by = owners[first[i] - ring]
                if not deps.counters[wait.counter] & ~deps.before_previous[released_by]:
                    load_waits[i] = None
            owners.extend([i] * program[i].page_uses(shape))
        uses.append(len(owners))
    return PagePlan(ring, first, uses, load_waits)

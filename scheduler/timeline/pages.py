"""Which bytes come from HBM, and when: pages of every instruction, and bandwidth over the time of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.tape import PAGE_BYTES
from scheduler.timeline.trace import Point, Trace

BINS = 200


@dataclass(frozen=True, eq=False)
class Bandwidth:
    """`rate[b]` bytes a second between `edges[b]` and `edges[b + 1]` nanoseconds; `how` says what it was drawn from."""

    edges: np.ndarray
    rate: np.ndarray
    how: str

    @property
    def bytes(self) -> float:
        """Everything that came within the edges."""
        return float((self.rate * np.diff(self.edges)).sum() * 1e-9)


def filled_pages(trace: Trace, past: int) -> np.ndarray:
    """Pages that each instruction streams with `past` positions cached, int64 [records]; empty page uses do not count."""
    shape, counts = trace.program.shape, []
    for item in trace.items:
        sources = (item.instruction.page_source(shape, item.tape, use, past) for use in range(item.pages))
        counts.append(sum(source is not None for source in sources))
    return np.array(counts, dtype=np.int64)


def streamed_bytes(trace: Trace, token: int) -> int:
    """Bytes that a token takes from HBM: pages, and what instructions without pages gather."""
    past, shape = trace.position(token), trace.program.shape
    gathered = sum(item.instruction.cost(shape, past).bytes for item in trace.items if not item.pages)
    return int(filled_pages(trace, past).sum()) * PAGE_BYTES + gathered


def spread_evenly(edges: np.ndarray, start: np.ndarray, stop: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Amounts [n], each spread evenly from its start to its stop, summed into the bins between the edges."""
    length = np.maximum(stop - start, 1)
    total = np.zeros(len(edges))
    for place, edge in enumerate(edges):
        total[place] = (amount * np.clip((edge - start) / length, 0.0, 1.0)).sum()
    return np.diff(total)


def load_spans(trace: Trace, token: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What the loaders streamed in one token, as (start, stop, bytes) [records] each, where only records are stamped.

    A record of more pages than the ring is streamed in two parts: as many as fit, at the mean pace, when the loader turns to
    it, and the rest as its consumer releases pages, so from the first landing on.
    """
    program = trace.program
    pages = filled_pages(trace, trace.position(token))
    begun, ended = trace.at(Point.LOAD_BEGUN)[token], trace.at(Point.LOAD_ENDED)[token]
    ahead = np.minimum(pages, program.ring)
    pace = trace.step(token) / max(float(program.uses.mean()), 1.0)
    long = pages > program.ring
    stop = np.where(long, np.minimum(begun + np.rint(ahead * pace).astype(np.int64), ended), ended)
    later = np.clip(trace.at(Point.LANDED)[token], stop, ended)
    return [(begun, stop, ahead * PAGE_BYTES), (later, ended, (pages - ahead) * PAGE_BYTES)]


def bandwidth(trace: Trace, token: int, bins: int = BINS) -> Bandwidth:
    """HBM bandwidth over one step, from the landings, else from the loaders, else from what the consumers took in.

    Pages of this token that landed before the step, ahead of it, are not in it; pages of the next token that landed within
    it are, where the trace holds that token.
    """
    edges = np.linspace(trace.begin(token), trace.end(token), bins + 1)
    seconds = np.diff(edges) * 1e-9
    if trace.landings is not None:
        landed = trace.landings[trace.landings > 0]
        count, _ = np.histogram(landed, bins=edges)
        return Bandwidth(edges, count * PAGE_BYTES / seconds, "landings")
    loaders = Point.LOAD_ENDED in trace.given
    total = np.zeros(bins)
    for other in range(max(token - 1, 0), min(token + 2, trace.tokens)):
        if loaders:
            parts = load_spans(trace, other)
        else:
            amount = filled_pages(trace, trace.position(other)) * PAGE_BYTES
            parts = [(trace.at(Point.LANDED)[other], trace.at(Point.COMPUTED)[other], amount)]
        for start, stop, amount in parts:
            total += spread_evenly(edges, start, stop, amount)
    return Bandwidth(edges, total / seconds, "loaders" if loaders else "consumers")

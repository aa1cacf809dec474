"""Races: a read that some write it needs does not precede, and a token that may begin before the last one is over.

Three questions, for which `docs/proof.md` shows that they are all there is to ask once deadlock is excluded:
  - within a token, has every write of the rows that an instruction reads ended before it starts, and is it visible, where
    the values do not announce themselves?
  - does the end of the token follow every instruction, and can it see what they stored?  Then nothing of one token meets
    anything of the next, and every counter counts whole tokens;
  - has the token before stored the cache rows that a loader, running ahead, streams for this token, for it to see?
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from instructions.base import Region
from instructions.codec import Wait
from instructions.shape import ANNOUNCED
from scheduler.check.findings import Finding
from scheduler.check.listing import Listing
from scheduler.check.order import Order
from scheduler.check.rows import ROOT, Span, spans_by_buffer

CARRIED = {ROOT.buffer}  # buffers whose reader takes the previous token's value


class Writers:
    """Who writes which rows; a region's writers as the clock that a reader of it must have reached."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.spans = spans_by_buffer(listing.writes)
        self.needs: dict[Region, tuple[np.ndarray, list[Span]]] = {}

    def of(self, region: Region) -> tuple[np.ndarray, list[Span]]:
        """Needed clock int32 [sms], and the writes (disjoint, ascending) that meet the region."""
        if region not in self.needs:
            spans = self.spans.get((region.buffer, region.layer), [])
            first = max(bisect_left(spans, (region.start, 0, 0)) - 1, 0)
            last = bisect_left(spans, (region.stop, 0, 0))
            found = [span for span in spans[first:last] if span[1] > region.start]
            records = [i for _, _, i in found]
            need = np.zeros(self.listing.sms, dtype=np.int32)
            np.maximum.at(need, self.listing.sm[records], self.listing.index[records] + 1)
            self.needs[region] = need, found
        return self.needs[region]

    def missing(self, region: Region, clock: np.ndarray) -> Span | None:
        """The first write of the region that a clock does not include, or None."""
        need, spans = self.of(region)
        if not (need > clock).any():
            return None
        sm, index = self.listing.sm, self.listing.index
        return next(span for span in spans if clock[sm[span[2]]] <= index[span[2]])


def signals_and_waits(listing: Listing, writer: int, reader: int) -> str:
    """What the two records signal and wait for, for the reader of a message."""
    item = listing.items[writer]
    signals = ", ".join(f"c{counter}{', releasing' * item.release}" for counter in item.signals) or "nothing"
    waits = ", ".join(f"c{wait.counter}{' of the token before' * wait.lag}" for wait in listing.items[reader].waits)
    return f"the writer signals {signals}, the reader waits for {waits or 'nothing'}"


def read_findings(listing: Listing, order: Order, writers: Writers) -> Iterator[Finding]:
    """Reads of this token's rows that their writes do not precede."""
    for i, regions in enumerate(listing.reads):
        for region in regions:
            if region.buffer in CARRIED:
                continue
            span, path = writers.missing(region, order.clocks[i]), "path"
            if span is None and region.buffer not in ANNOUNCED:
                span, path = writers.missing(region, order.visible[i]), "path of signals that release"
            if span:
                start, stop, writer = span
                written = Region(region.buffer, region.layer, start, stop)
                message = (
                    f"reads {region}, but no {path} leads to it from the write of {written} by {listing.place(writer)}: "
                    f"{signals_and_waits(listing, writer, i)}"
                )
                yield listing.finding("race", i, message)


def token_end(writers: Writers) -> int:
    """The record that ends the token: the one that writes it."""
    return writers.of(ROOT)[1][0][2]


def end_findings(listing: Listing, order: Order, writers: Writers) -> Iterator[Finding]:
    """Instructions that may still run when the token ends, or whose stores it cannot see, the first of each SM."""
    end = token_end(writers)
    ended, visible = order.clocks[end].copy(), order.visible[end].copy()
    for after in (ended, visible):
        if after[listing.sm[end]] == listing.index[end]:
            after[listing.sm[end]] += 1
    lengths = np.diff(listing.starts)
    for sm in np.flatnonzero(visible < lengths):
        running = ended[sm] < lengths[sm]
        first = int(listing.starts[sm] + (ended if running else visible)[sm])
        if running:
            message = (
                f"may still run when the next token begins: no path leads from it to the end of the token, "
                f"{listing.place(end)}; the next token may overwrite what it reads, and its signals may be taken for another's"
            )
        else:
            message = (
                "may store what the next token cannot see yet: no path of signals that release leads from it to the end of the "
                f"token, {listing.place(end)}"
            )
        yield listing.finding("race", first, message)


def end_counter_findings(listing: Listing, writers: Writers) -> Iterator[Finding]:
    """Every SM opens a token by the counter of the last one's end: the only signal of the record that ends it, and of no
    other; whoever takes the last token's value waits for that counter and no other.

    No question here about waits for it within the token: whatever precedes the end (see `end_findings`) deadlocks by one.
    """
    end = token_end(writers)
    signals = listing.items[end].signals
    if not signals:
        yield listing.finding("counter", end, "ends the token but signals no counter: no SM would begin the next one")
        return
    if len(signals) > 1:
        told = " and ".join(f"c{counter}" for counter in signals)
        yield listing.finding("counter", end, f"ends the token and signals {told}: one alone may tell that it has ended")
    if not listing.items[end].release:
        message = f"ends the token, but its signal c{signals[0]} releases nothing: the next token may not see what it stored"
        yield listing.finding("race", end, message)
    if len(listing.producers[signals[0]]) > 1:
        others = [listing.place(i) for i in listing.producers[signals[0]] if i != end]
        yield listing.finding("counter", end, f"c{signals[0]} tells that the token has ended, but {others[0]} signals it too")
    for i, regions in enumerate(listing.reads):
        if CARRIED & {region.buffer for region in regions} and listing.items[i].waits != (Wait(signals[0], 1, 1),):
            message = f"takes the last token's value: it must wait for c{signals[0]} of the token before and for nothing else"
            yield listing.finding("counter", i, message)


def load_findings(listing: Listing, order: Order, writers: Writers) -> Iterator[Finding]:
    """Cache rows that a loader may stream before the token before has stored them, and choices that it may take for this
    token's before the token before has made the place vacant."""
    for sm in range(listing.sms):
        start, stop = int(listing.starts[sm]), int(listing.starts[sm + 1])
        reached = np.zeros(listing.sms, dtype=np.int32)  # of the token before, visible when the loader is at record i
        for i in range(start, stop):
            item = listing.items[i]
            if item.load_wait is not None:
                np.maximum(reached, order.counter_visible[item.load_wait.counter], out=reached)
            early = (*listing.loads[i], *listing.selects[i])
            if not early or item.page >= listing.ring:
                continue  # from use `ring` on, each fill follows a release of this token, so all of the token before
            owner = released_by(listing, sm, item.page)
            clock = reached if owner is None else np.maximum(reached, order.visible[owner])
            for region in early:
                span = writers.missing(region, clock)
                if span:
                    does, has = ("stream", "stored it") if region in listing.loads[i] else ("look at", "made it vacant")
                    message = (
                        f"its loader may {does} {region} before {listing.place(span[2])} of the token before has {has} for "
                        f"all to see: let it wait for the token's end, or begin at page use {listing.ring} or later"
                    )
                    yield listing.finding("race", i, message)


def released_by(listing: Listing, sm: int, page: int) -> int | None:
    """The record whose release, in the token before, page use `page` of a token must follow; None: an earlier token's."""
    use = page - listing.ring + int(listing.uses[sm])
    if use < 0:
        return None
    records = range(int(listing.starts[sm]), int(listing.starts[sm + 1]))
    return next(i for i in records if listing.items[i].page <= use < listing.items[i].page + listing.items[i].pages)

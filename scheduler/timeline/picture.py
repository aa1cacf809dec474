"""The still picture: SMs one above the other, time to the right, every instruction in its colour, bubbles white.

Full colour is work, pale is waiting for a page, white is waiting for a counter (or nothing left to do), grey is storing and
signalling.  Below: HBM bandwidth over the same time.  Needs Matplotlib (the extra `plots`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.output import write_file
from scheduler.draw.palette import COLOURS
from scheduler.timeline.account import page_waits
from scheduler.timeline.pages import bandwidth
from scheduler.timeline.path import critical_hops
from scheduler.timeline.trace import Point, Trace

PALE = 0.78  # how far towards white an instruction goes that only waits for pages
SIGNAL = "#6e7781"
BUBBLE = "#ffffff"
DPI = 100
BINS_SHOWN, MOST_BINS = 160, 2000  # of bandwidth: finer than about a microsecond there is nothing to see


@dataclass(frozen=True)
class Window:
    """What part of a step is shown: microseconds from its begin; `stop` None is its end."""

    start: float = 0.0
    stop: float | None = None

    def bounds(self, trace: Trace, token: int) -> tuple[float, float]:
        """Microseconds from the token's begin; UserError for a window that shows nothing."""
        whole = trace.step(token) / 1e3
        stop = whole if self.stop is None else min(self.stop, whole)
        if not 0.0 <= self.start < stop:
            raise UserError(f"a window from {self.start} to {stop:.0f} us of a step of {whole:.0f} us shows nothing")
        return self.start, stop


def mixed(colour: str, white: np.ndarray) -> np.ndarray:
    """A colour "#rrggbb" mixed with so much white [n], RGB float [n, 3]."""
    rgb = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return rgb + (1.0 - rgb) * white[:, None]


def bars(trace: Trace, token: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """What is drawn, as (SM, start, stop, colour) arrays: times in nanoseconds, colours RGB."""
    at = {point: trace.at(point)[token] for point in Point}
    computing = np.maximum(at[Point.COMPUTED] - at[Point.LANDED], 1)
    starved = PALE * page_waits(trace)[token] / computing
    for mnemonic, colour in COLOURS.items():
        rows = np.flatnonzero(trace.mnemonics == mnemonic)
        full = np.zeros(len(rows))
        for start, stop, white in (
            (at[Point.READY], at[Point.STAGED], full),
            (at[Point.STAGED], at[Point.LANDED], full + PALE),
            (at[Point.LANDED], at[Point.COMPUTED], starved[rows]),
        ):
            yield trace.sm[rows], start[rows], stop[rows], mixed(colour, white)
    yield trace.sm, at[Point.COMPUTED], at[Point.SIGNALLED], mixed(SIGNAL, np.zeros(len(trace.sm)))


def draw_bars(axes: Any, trace: Trace, token: int, bounds: tuple[float, float]) -> None:
    """All bars of one step."""
    from matplotlib.collections import PolyCollection

    begin = trace.begin(token)
    for sm, start, stop, colour in bars(trace, token):
        left, right = (start - begin) / 1e3, (stop - begin) / 1e3
        seen = (stop > start) & (right > bounds[0]) & (left < bounds[1])
        low, high = sm - 0.5, sm + 0.5
        corners = np.stack([(left, low), (left, high), (right, high), (right, low)]).transpose(2, 0, 1)  # [n, 4, 2]
        axes.add_collection(PolyCollection(list(corners[seen]), facecolors=colour[seen], linewidths=0, antialiased=False))


def draw_path(axes: Any, trace: Trace, token: int) -> None:
    """The critical path, as a line from signal to signal."""
    begin = trace.begin(token)
    hops = critical_hops(trace, token)
    points = [(x, int(trace.sm[hop.record])) for hop in hops for x in path_times(trace, token, hop.record)]
    axes.plot([(x - begin) / 1e3 for x, _ in points], [y for _, y in points], color="#000000", linewidth=0.9, alpha=0.8)


def path_times(trace: Trace, token: int, record: int) -> tuple[int, int]:
    """Where the line enters and leaves an instruction."""
    return int(trace.stamps[token, record, Point.READY]), int(trace.stamps[token, record, Point.SIGNALLED])


def legend(axes: Any, kinds: Sequence[str]) -> None:
    """Above the picture, in one row."""
    from matplotlib.patches import Patch

    entries = [Patch(color=COLOURS[kind], label=kind) for kind in kinds]
    entries.append(Patch(color=SIGNAL, label="storing, signalling"))
    entries.append(Patch(facecolor="#d5d9de", label="pale: waiting for HBM"))
    entries.append(Patch(facecolor=BUBBLE, edgecolor="#8c959f", label="white: waiting for a counter"))
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": len(entries), "frameon": False}
    axes.legend(handles=entries, fontsize=8, handlelength=1.1, columnspacing=1.1, **place)


def figure(title: str, trace: Trace, token: int, window: Window, path: bool) -> Any:
    """A Matplotlib figure; raises UserError where Matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError('pictures need Matplotlib: pip install "llama-megakernel[plots]"') from None
    bounds = window.bounds(trace, token)
    drawn = Figure(figsize=(14, 7.5), dpi=DPI, layout="constrained")
    top, bottom = drawn.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (6, 1)})
    drawn.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    draw_bars(top, trace, token, bounds)
    if path:
        draw_path(top, trace, token)
    top.set(ylabel="SM", ylim=(trace.program.sms - 0.5, -0.5), xlim=bounds, facecolor=BUBBLE)
    legend(top, [kind for kind in COLOURS if (trace.mnemonics == kind).any()])
    share = (bounds[1] - bounds[0]) * 1e3 / trace.step(token)
    band = bandwidth(trace, token, min(round(BINS_SHOWN / share), MOST_BINS))
    bottom.stairs(band.rate / 1e12, (band.edges - trace.begin(token)) / 1e3, fill=True, color="#54aeff")
    bottom.set(ylabel="HBM, TB/s", xlabel="microseconds since the token began", ylim=(0, None))
    bottom.grid(axis="y", linewidth=0.5)
    return drawn


def write_picture(
    path: Path, title: str, trace: Trace, token: int, window: Window | None = None, critical: bool = False
) -> None:
    """Write one step as a PNG (or whatever the suffix says); `critical` adds the critical path."""
    content = BytesIO()
    figure(title, trace, token, window or Window(), critical).savefig(content, format=path.suffix.removeprefix(".") or "png")
    write_file(path, content.getvalue())

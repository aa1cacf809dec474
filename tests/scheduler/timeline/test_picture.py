"""The still picture shows at each time and SM what the stamps say: its pixels are looked at."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UserError
from scheduler.draw.palette import COLOURS
from scheduler.timeline import Point, Trace
from scheduler.timeline.picture import SIGNAL, Window, figure, write_picture
from scheduler.timeline.trace import CONSUMER
from tests.support.timeline_cases import measured, small_program, small_trace, walked

WHITE = (255, 255, 255)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


class Pixels:
    """A drawn figure, to be asked what colour an SM has at a time (nanoseconds since the token began)."""

    def __init__(self, trace: Trace, window: Window) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.figure = figure("a title", trace, 0, window, False)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        self.image = np.asarray(canvas.buffer_rgba())

    def at(self, sm: int, nanoseconds: float) -> tuple[int, ...]:
        x, y = self.figure.axes[0].transData.transform((nanoseconds / 1e3, sm))
        return tuple(self.image[len(self.image) - 1 - int(y), int(x), :3].tolist())


def slow_steps() -> Trace:
    """Every phase takes 1 us, and 1 us passes between instructions; pages are waited for in the third phase alone."""
    program = small_program()
    spans = np.full((1, len(program.words), len(CONSUMER) - 1), 1000)
    stamps = walked(program, spans, np.full((1, len(program.words)), 1000))
    stamps[:, :, Point.PAGE_WAITED] = 1000
    return measured(program, stamps)


def test_pixels_are_what_the_stamps_say() -> None:
    trace = slow_steps()
    pixels = Pixels(trace, Window(0, 60))
    seen = set()
    for i in np.flatnonzero(trace.index < 8).tolist():
        sm, mnemonic, at = int(trace.sm[i]), trace.mnemonics[i], trace.stamps[0, i]
        seen.add(mnemonic)
        middle = {point: (at[point] + at[following]) / 2 for point, following in zip(CONSUMER, CONSUMER[1:], strict=False)}
        assert pixels.at(sm, middle[Point.FETCHED]) == WHITE, "waiting for a counter is a bubble"
        assert pixels.at(sm, at[Point.SIGNALLED] + 500) == WHITE
        assert pixels.at(sm, middle[Point.READY]) == rgb(COLOURS[mnemonic])
        assert pixels.at(sm, middle[Point.LANDED]) == rgb(COLOURS[mnemonic])
        assert pixels.at(sm, middle[Point.COMPUTED]) == pixels.at(sm, middle[Point.STORED]) == rgb(SIGNAL)
        pale = pixels.at(sm, middle[Point.STAGED])
        assert pale != WHITE and sum(pale) > sum(rgb(COLOURS[mnemonic])), "waiting for a page is pale"
    assert {"qkv", "attention", "o_proj", "gate_up", "down"} <= seen


def test_computing_that_waits_for_pages_is_paler() -> None:
    trace = slow_steps()
    starved = trace.stamps.copy()
    starved[0, 3, Point.PAGE_WAITED] = 1900  # 1000 for the first page, 900 of the 1000 ns of computing for later ones
    sm, middle = int(trace.sm[3]), float(trace.stamps[0, 3, [Point.LANDED, Point.COMPUTED]].mean())
    paler = Pixels(measured(trace.program, starved + 10**6), Window(0, 60)).at(sm, middle)
    assert sum(paler) > sum(Pixels(trace, Window(0, 60)).at(sm, middle)) + 100


@pytest.mark.parametrize("window", [Window(50, 40), Window(-1, 5), Window(10**6, None)])
def test_a_window_that_shows_nothing(window: Window) -> None:
    with pytest.raises(UserError, match="of a step of .* shows nothing"):
        figure("a title", small_trace(), 1, window, False)


def test_the_file_is_small(tmp_path: Path) -> None:
    write_picture(tmp_path / "picture.png", "a title", small_trace(), 1, critical=True)
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 300_000


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "llama-megakernel\[plots\]"'):
        figure("a title", small_trace(), 1, Window(), False)

"""The page in a real browser: hover, click, fold, find, with ten thousand instructions, offline.

Chromium is driven with a real mouse; what is asserted is what a user would see: the text of the boxes, the pixels of the
picture.  Where there is no Chromium these tests are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instructions.codec import disassemble
from scheduler.draw.content import Drawing, page_data
from scheduler.draw.page import page
from tests.support.chromium import NAMES, Page, browser, find_chromium
from tests.support.drawings import large_drawing, small_drawing

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason=f"needs a Chromium ({', '.join(NAMES)}) to open the page in: apt-get install chromium"
)

SECONDS = 2.0  # for an answer to the mouse; a few milliseconds on an idle machine
RED = (207, 34, 46)  # of the critical path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


class Opened:
    """A drawing open in the browser."""

    def __init__(self, chromium: Page, drawing: Drawing, folder: Path) -> None:
        self.chromium, self.drawing, self.data = chromium, drawing, page_data(drawing)
        chromium.log.clear()
        chromium.requests.clear()
        path = folder / "page.html"
        path.write_text(page(drawing), encoding="utf-8")
        chromium.open(path)

    def js(self, expression: str) -> Any:
        return self.chromium.evaluate(expression)

    def screen(self, node: int) -> tuple[float, float]:
        """Where a node is."""
        x, y = self.js(f"schedule.screen({node})")
        return x, y

    def text(self, selector: str) -> str:
        """What an element shows; nothing where it is hidden."""
        shown: str = self.js(f"(e => e.hidden ? '' : e.innerText)(document.querySelector('{selector}'))")
        return shown

    def press(self, selector: str) -> None:
        """Click on an element of the panel."""
        x, y = self.js(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('{selector}').getBoundingClientRect())"
        )
        self.chromium.click(x, y)
        self.settle()

    def settle(self) -> None:
        """Wait for the next frame to be drawn."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def pixels(self, colour: tuple[int, int, int]) -> int:
        """How many pixels of the picture have nearly this colour."""
        near = " && ".join(f"Math.abs(d[i + {place}] - {value}) < 12" for place, value in enumerate(colour))
        picture = "pen.getImageData(0, 0, canvas.width, canvas.height).data"
        count: int = self.js(
            f"(d => {{ let n = 0; for (let i = 0; i < d.length; i += 4) if ({near}) n++; return n; }})({picture})"
        )
        return count

    def number(self, mnemonic: str, layer: int = 0) -> int:
        """The page's number of the first instruction of a kind."""
        listing = self.drawing.listing
        for place, i in enumerate(self.drawing.shown):
            instruction = listing.items[i].instruction
            if (instruction.MNEMONIC, instruction.layer) == (mnemonic, layer):
                return place
        raise LookupError(mnemonic)


@pytest.fixture
def small(chromium: Page, tmp_path: Path) -> Opened:
    return Opened(chromium, small_drawing(), tmp_path)


@pytest.fixture
def large(chromium: Page, tmp_path: Path) -> Opened:
    return Opened(chromium, large_drawing(), tmp_path)


def test_it_opens_offline_and_without_complaint(small: Opened) -> None:
    assert small.chromium.log == []
    assert len(small.chromium.requests) == 1 and small.chromium.requests[0].startswith("file://")
    assert small.js("document.title") == "head64_llama3 <& more>" == small.text("h1")
    assert "SMs 6" in small.text("#facts") and "gate_up" in small.text("#legend")


@pytest.mark.parametrize("mnemonic", ["qkv", "attention", "combine", "o_proj", "gate_up", "down"])
def test_hovering_tells_all_about_an_instruction(small: Opened, mnemonic: str) -> None:
    number = small.number(mnemonic)
    assert small.text("#hover") == ""
    small.chromium.hover(*small.screen(number))
    shown = small.text("#hover")
    i = small.drawing.shown[number]
    listing = small.drawing.listing
    item = listing.items[i]
    assert f"{mnemonic}, layer 0, sm {listing.sm[i]} #{listing.index[i]}" in shown
    for wait in item.waits:
        assert f"c{wait.counter} ≥ {wait.target}" in shown
    assert all(f"c{counter}: " in shown for counter in item.signals)
    for name in item.instruction.payload_names():
        assert f"{name} {getattr(item.instruction, name)}" in shown, disassemble(item)
    assert all(str(region) in shown for region in (*listing.reads[i], *listing.writes[i]))
    words = " · ".join(
        f"{name} {value}" for name, value in zip(small.data["wordNames"], small.drawing.program.words[i], strict=False)
    )
    assert words in shown
    assert "µs" in shown and "from HBM" in shown
    small.chromium.hover(1300, 890)
    assert small.text("#hover") == "", "the box goes with the mouse"


def test_all_of_an_instruction_answers_the_mouse(chromium: Page, tmp_path: Path) -> None:
    """Its ends too, where the centre of something else is nearer."""
    opened = Opened(chromium, small_drawing("gqa4_llama3_tied", 2), tmp_path)
    wide = opened.js("cellWidth * schedule.state.transform.k")
    assert wide > 300
    for mnemonic in ("qkv", "o_proj", "down"):
        x, y = opened.screen(opened.number(mnemonic))
        for shift in (-0.48, -0.25, 0.25, 0.48):
            opened.chromium.hover(x + shift * wide, y)
            assert f"{mnemonic}, layer 0" in opened.text("#hover")
        opened.chromium.hover(x + 0.25 * wide, y - 20)
        assert opened.text("#hover") == ""


def test_hovering_over_a_counter(small: Opened) -> None:
    number = small.number("down")
    counter = small.drawing.listing.items[small.drawing.shown[number]].waits[0].counter
    small.chromium.hover(*small.screen(-1 - counter))
    shown = small.text("#hover")
    assert f"counter {counter}" in shown and "gate_up (layer 0)" in shown and "down (layer 0)" in shown


def test_a_click_lights_up_the_queue(small: Opened) -> None:
    """The column of the SM turns blue from top to bottom, and the panel lists its queue in order."""
    number = small.number("gate_up")
    i = small.drawing.shown[number]
    sm = int(small.drawing.listing.sm[i])
    x, y = small.screen(number)
    beside = f"[...pen.getImageData({x}, {y + 14}, 1, 1).data]"  # within the column, below the instruction
    before = small.js(beside)
    small.chromium.click(x, y)
    small.settle()
    after = small.js(beside)
    assert after != before and after[2] > after[0], "bluish"
    queue = small.drawing.program.decoded[sm]
    lines = small.js("[...document.querySelectorAll('#details li')].map(e => e.innerText)")
    assert len(lines) == len(queue)
    for index, (line, item) in enumerate(zip(lines, queue, strict=True)):
        assert line.startswith(f"#{index} {item.instruction.MNEMONIC} {item.instruction.layer} ")
    assert small.js("document.querySelector('#details li.here').innerText").startswith(f"#{small.drawing.listing.index[i]} ")
    small.press("#details li:nth-child(2)")
    assert small.js("records.index[schedule.state.node]") == 1, "a click in the list goes there"
    small.chromium.send("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert small.js("schedule.state.sm") is None and "Critical path" in small.text("#details")


def test_the_critical_path_is_marked(small: Opened) -> None:
    with_path = small.pixels(RED)
    assert with_path > 200
    small.press("#critical")
    assert small.pixels(RED) == 0
    small.press("#critical")
    assert small.pixels(RED) == with_path
    assert f"{small.drawing.seconds * 1e6:.2f} µs over {small.data['pathHops']} instructions" in small.text("#details")


def test_layers_fold(small: Opened) -> None:
    """By a click on the name; the nodes then stand on the layer's bar, and everything below moves up."""
    inside, below = small.number("down", 0), small.number("qkv", 1)
    assert small.js("[...schedule.state.folded]") == [2, 3], "a model opens with its embedding and first layer unfolded"
    small.press("#unfold")
    y = small.screen(below)[1]
    small.chromium.click(*small.js("schedule.groupBar(1)"))
    small.settle()
    assert small.js("[...schedule.state.folded]") == [1]
    assert small.screen(below)[1] < y
    assert small.screen(inside) == small.screen(small.number("qkv", 0)), "both stand on the bar"
    small.chromium.hover(*small.screen(inside))
    shown = small.text("#hover")
    assert "layer 0" in shown and "gate_up\t6 instructions" in shown
    small.chromium.click(*small.screen(inside))
    assert small.js("schedule.state.folded.size") == 0
    small.press("#fold")
    assert small.js("schedule.state.folded.size") == len(small.drawing.layout.groups)
    small.press("#unfold")
    assert small.js("schedule.state.folded.size") == 0


def test_the_wheel_zooms_and_a_drag_moves(small: Opened) -> None:
    number = small.number("gate_up")
    x, y = small.screen(number)
    small.chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    small.settle()
    assert small.js("schedule.state.transform.k") > 1.2
    assert small.screen(number) == pytest.approx((x, y), abs=1), "what is under the mouse stays there"
    small.chromium.mouse("mousePressed", x, y, button="left", clickCount=1)
    small.chromium.mouse("mouseMoved", x + 40, y + 20, button="left", buttons=1)
    small.chromium.mouse("mouseReleased", x + 40, y + 20, button="left", clickCount=1)
    assert small.screen(number) == pytest.approx((x + 40, y + 20), abs=1)
    small.press("#fit")
    assert small.screen(number) == pytest.approx((x, y), abs=1)


@pytest.mark.parametrize(("query", "sm", "index"), [("sm 2 #3", 2, 3), ("sm 4", 4, None), ("down 1", None, None)])
def test_find(small: Opened, query: str, sm: int | None, index: int | None) -> None:
    assert small.js(f"schedule.find({query!r})") is True
    if sm is not None:
        assert small.js("schedule.state.sm") == sm
    if index is not None:
        assert small.js("records.index[schedule.state.node]") == index
    if query.startswith("down"):
        assert small.js("kind(schedule.state.node).name + word(schedule.state.node, 'LAYER')") == "down1"
    assert small.js("schedule.find('sm 99')") is False and small.js("schedule.find('nothing')") is False


def test_ten_thousand_instructions(large: Opened) -> None:
    """All of them unfolded: every frame and every answer to the mouse comes soon."""
    assert large.js("count") > 10_000
    large.press("#unfold")
    begin = time.monotonic()
    large.js("draw(); pen.getImageData(0, 0, 1, 1); 1")
    assert time.monotonic() - begin < SECONDS
    number = large.number("gate_up", 9)
    assert large.js(f"goTo({number}); 1") == 1
    large.settle()
    begin = time.monotonic()
    large.chromium.hover(*large.screen(number))
    assert "gate_up, layer 9" in large.text("#hover")
    assert time.monotonic() - begin < SECONDS
    begin = time.monotonic()
    large.chromium.click(*large.screen(number))
    large.settle()
    assert time.monotonic() - begin < 2 * SECONDS
    assert len(large.js("[...document.querySelectorAll('#details li')].map(e => 1)")) > 60
    assert large.chromium.log == []


def test_one_layer_alone(chromium: Page, tmp_path: Path) -> None:
    opened = Opened(chromium, small_drawing("head64_llama3", 6, 1), tmp_path)
    opened.chromium.hover(*opened.screen(0))
    assert "qkv, layer 1" in opened.text("#hover") and "down (layer 0)" in opened.text("#hover"), "who stands outside is named"
    assert opened.chromium.log == []

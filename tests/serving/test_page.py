"""The page in a real browser: a user types, reads, stops, edits, regenerates, sets things, with keys alone and on a phone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.page import page
from tests.support.chromium import NAMES, Page, browser, find_chromium
from tests.support.scripted import SLOW
from tests.support.served import Served

needs_browser = pytest.mark.skipif(
    find_chromium() is None, reason=f"needs a Chromium ({', '.join(NAMES)}) to open the page in: apt-get install chromium"
)
SECONDS = 15.0
ESCAPE, ENTER, TAB = ("Escape", 27), ("Enter", 13, "\r"), ("Tab", 9)


def test_the_page_is_one_file_that_asks_nothing_of_any_network() -> None:
    text = page()
    assert "{{" not in text and not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert not re.findall(r"https?://|@import|url\(", text)


class Tab:
    """The page, open in the browser, with an empty memory."""

    def __init__(self, chromium: Page, server: Served) -> None:
        self.chromium, self.server = chromium, server
        chromium.visit(server.url)
        self.js("localStorage.clear(), sessionStorage.clear()")
        chromium.log.clear()
        chromium.requests.clear()
        chromium.visit(server.url)

    def js(self, expression: str) -> Any:
        return self.chromium.evaluate(expression)

    def until(self, expression: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.js(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def say(self, text: str) -> None:
        """Type and send it with keys alone."""
        self.js("document.getElementById('input').focus()")
        self.chromium.type(text)
        self.chromium.key(*ENTER)

    def press(self, selector: str) -> None:
        x, y = self.js(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('{selector}').getBoundingClientRect())"
        )
        self.chromium.click(x, y)

    def texts(self, role: str) -> list[str]:
        found: list[str] = self.js(f"[...document.querySelectorAll('.turn.{role} .text')].map(e => e.textContent)")
        return found

    def settled(self, turns: int) -> None:
        self.until(f"busy === null && document.querySelectorAll('.turn').length === {turns}")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile"), 1000, 800) as tab:
        yield tab


@pytest.fixture
def tab(chromium: Page, scripted_server: Served) -> Tab:
    return Tab(chromium, scripted_server)


@needs_browser
def test_a_conversation_by_keys_alone(tab: Tab) -> None:
    tab.until("document.getElementById('health').textContent === 'ready'")
    assert tab.js("document.activeElement.id") == "input" and tab.js("document.title") == "bundled"
    tab.js("store.settings.max_tokens = '40'")
    tab.say("What is <b>a</b> list?")
    tab.settled(2)
    assert tab.texts("user") == ["What is <b>a</b> list?"]
    asked = {"model": "bundled", "messages": [{"role": "user", "content": "What is <b>a</b> list?"}], "max_tokens": 40}
    answer = tab.server.http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert tab.texts("assistant") == [answer]
    note = tab.js("document.querySelector('.note').textContent")
    assert re.match(r"40 tokens, [\d.]+ tokens/s, first after \d+ ms", note)
    tab.say("And two?")
    tab.settled(4)
    tab.chromium.visit(tab.server.url)
    tab.settled(4)  # it is remembered
    tab.chromium.key("KeyN", 78, modifiers=1)
    assert tab.texts("user") == []
    assert tab.chromium.log == []
    assert all(url.startswith((tab.server.url, "data:")) for url in tab.chromium.requests)


@needs_browser
def test_an_answer_is_stopped_and_generated_anew(tab: Tab) -> None:
    tab.say(SLOW)
    tab.until("store.turns.at(-1)?.content.length > 20")
    tab.chromium.key(*ESCAPE)
    tab.settled(2)
    [begun] = tab.texts("assistant")
    assert begun and tab.js("document.querySelector('.assistant .note').textContent") == "stopped"
    tab.js("store.settings.max_tokens = '4'")
    tab.press(".again")
    tab.settled(2)
    assert begun.startswith(tab.texts("assistant")[0])
    assert tab.js("document.activeElement.id") == "input"


@needs_browser
def test_a_message_is_edited_and_what_followed_goes(tab: Tab) -> None:
    tab.js("store.settings.max_tokens = '4'")
    for text in ("one", "two"):
        tab.say(text)
        tab.settled(2 if text == "one" else 4)
    tab.press(".edit-turn")
    tab.js("document.activeElement.select()")
    tab.chromium.type("three")
    tab.chromium.key(*ENTER)
    tab.settled(2)
    assert tab.texts("user") == ["three"]


@needs_browser
def test_settings_are_sent_and_a_refusal_is_shown(tab: Tab) -> None:
    tab.chromium.key("KeyS", 83, modifiers=1)
    assert tab.js("document.getElementById('settings').open")
    for name, value in (("system", "Be brief."), ("temperature", "0.5"), ("seed", "7"), ("max_tokens", "4")):
        tab.js(f"document.getElementById('{name}').focus()")
        tab.chromium.type(value)
    tab.chromium.key(*ESCAPE)
    tab.until("store.settings.seed === '7'")
    assert tab.js("requestBody('m')") == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "seed": 7,
        "max_tokens": 4, "messages": [{"role": "system", "content": "Be brief."}],
    }  # fmt: skip
    tab.js("store.settings.max_tokens = '99999'")
    tab.say("hello")
    tab.settled(2)
    assert "max_tokens" in tab.js("document.querySelector('.turn.error .text').textContent")
    tab.js("store.settings.max_tokens = '4'")
    tab.press(".again")
    tab.settled(2)
    assert tab.js("document.querySelector('.turn.error')") is None


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1000, 800), (360, 640)])
def test_it_is_read_on_any_screen(tab: Tab, tmp_path: Path, scheme: str, width: int, height: int) -> None:
    """Nothing is wider than the screen, the words stand out from their ground, and buttons have names."""
    send = tab.chromium.send
    send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.js(
        "store.turns.push({role: 'user', content: 'What is a list? ' + 'long'.repeat(60)}, {role: 'assistant',"
        "note: '4 tokens', content: 'This:\\n```python\\nnumbers = [1, 2]  # ' + 'x'.repeat(200) + '\\n```\\nis one.'}), draw()"
    )
    tab.chromium.screenshot(tmp_path / "page.png")
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert tab.js("[...document.querySelectorAll('button')].every(b => b.textContent.trim())")
    ground, words = tab.js("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, words)]
    assert (lightness[0] > lightness[1]) == (scheme == "light") and abs(lightness[0] - lightness[1]) > 400
    assert tab.js("document.querySelector('.text pre').textContent").startswith("numbers")
    send("Emulation.setDeviceMetricsOverride", width=1000, height=800, deviceScaleFactor=1, mobile=False)

"""A page in headless Chromium, driven over the DevTools protocol through a pair of pipes: no driver, no port, no library.

Messages are JSON objects that end with a zero byte; Chromium reads them from file descriptor 3 and answers on 4
(`--remote-debugging-pipe`).  Knows nothing of the pages that it is used on.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.  `log` collects what the console and uncaught errors say, `requests` every address asked for."""

    def __init__(self, write: int, read: int, patience: float) -> None:
        self.write, self.read, self.patience = write, read, patience
        self.buffer = b""
        self.number = 0
        self.session: str | None = None
        self.log: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def receive(self) -> dict[str, Any]:
        """The next message."""
        end = time.monotonic() + self.patience
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(end - time.monotonic(), 0))
            chunk = os.read(self.read, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError(f"Chromium said nothing for {self.patience} seconds, or has ended")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def note(self, message: dict[str, Any]) -> None:
        """Keep what an event tells."""
        method, details = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.log.append(" ".join(str(argument.get("value")) for argument in details["args"]))
        elif method == "Runtime.exceptionThrown":
            self.log.append(str(details["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def attach(self, width: int, height: int) -> None:
        """Take hold of a new, empty tab."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, path: Path) -> None:
        """Load a file and wait until it has loaded."""
        self.visit(path.absolute().as_uri())

    def visit(self, url: str) -> None:
        """Load an address and wait until it has loaded."""
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self.note(self.receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited, an exception raised."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", {}).get("description")))
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """One event of a real mouse: mouseMoved, mousePressed, mouseReleased, mouseWheel."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse there, in two steps, as a hand would."""
        self.mouse("mouseMoved", x - 3, y - 3)
        self.mouse("mouseMoved", x, y)

    def click(self, x: float, y: float, count: int = 1) -> None:
        """Click there."""
        self.hover(x, y)
        for number in range(1, count + 1):
            self.mouse("mousePressed", x, y, button="left", clickCount=number)
            self.mouse("mouseReleased", x, y, button="left", clickCount=number)

    def key(self, name: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Press and release a key; modifiers: 1 alt, 2 control, 8 shift."""
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Put text where the focus is."""
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Write the visible part as a PNG file."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path, width: int = 1400, height: int = 900, patience: float = 60.0) -> Iterator[Page]:
    """Chromium with a fresh profile in `profile`, offline but for files; ends with the block."""
    executable = find_chromium()
    if executable is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    to_child, write = os.pipe()
    read, from_child = os.pipe()
    command = [executable, *FLAGS, f"--user-data-dir={profile}"]
    wiring = f'exec "$@" 3<&{to_child} 4>&{from_child}'
    process = subprocess.Popen(
        ["bash", "-c", wiring, "bash", *command],
        pass_fds=(to_child, from_child),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child)
    os.close(from_child)
    try:
        page = Page(write, read, patience)
        page.attach(width, height)
        yield page
    finally:
        os.close(write)
        os.close(read)
        process.terminate()
        process.wait(timeout=20)

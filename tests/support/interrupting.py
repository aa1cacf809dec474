"""An interrupt at a chosen line of some modules' code, so that a test may try all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


class Interrupting:
    """Raises KeyboardInterrupt when line number `number` of the modules' own code is about to run, and counts the lines."""

    def __init__(self, number: int, *modules: ModuleType) -> None:
        self.number, self.lines = number, 0
        self.files = {module.__file__ for module in modules}

    def __enter__(self) -> Interrupting:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.number:
                raise KeyboardInterrupt
        return self.trace

"""A process of its own that makes programs and proves them, so that whoever loads a model goes on meanwhile.

Run by `scheduler.ahead` as a file, with an interpreter that looks nowhere for modules: reads one line of JSON from stdin and
writes each program to stdout as `scheduler.ahead.send` does.  Computes with integers alone, so PyTorch is not imported.  Ends
with whoever started it: then its stdin ends.
"""

from __future__ import annotations

import json
import os
import sys
from threading import Thread
from types import ModuleType


class NotImported(ModuleType):
    """A module in name only: modules that are imported here mention what is in it, and nothing that runs here uses it."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{self.__name__}.{name}"


def end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    Thread(target=end_with_parent, daemon=True).start()
    sys.path[:] = request["path"]
    sys.modules["torch"] = NotImported("torch")
    from models.config import ModelConfig
    from models.formats import Formats
    from scheduler.ahead import send
    from scheduler.buckets import BucketPrograms
    from scheduler.errors import ScheduleError

    numbers = request["numbers"] | {"formats": Formats(*request["numbers"]["formats"])}
    programs = BucketPrograms(ModelConfig.from_dict(request["config"]), **numbers)
    try:
        for place, tail in request["wanted"]:
            send(sys.stdout.buffer, (place, tail), programs.program(place, tail))
    except ScheduleError:  # refused once more when it is asked for
        pass
    os._exit(0)


if __name__ == "__main__":
    main()

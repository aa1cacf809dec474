"""The real chat on a scripted engine: `python -m tests.support.scripted_chat`."""

from __future__ import annotations

from chat.command import main
from models.command import start
from tests.support.scripted import load

if __name__ == "__main__":
    start(lambda: main(None, load))

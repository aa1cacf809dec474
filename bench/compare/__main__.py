"""`python -m bench.compare`."""

from __future__ import annotations

from bench.compare.cli import main
from models.command import start

if __name__ == "__main__":
    start(main)

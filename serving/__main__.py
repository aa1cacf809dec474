"""`python -m serving`: what `llama-megakernel serve` is, from a checkout."""

from models.command import start
from serving.command import main

if __name__ == "__main__":
    start(main)

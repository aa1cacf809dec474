"""`python -m chat`: what `llama-megakernel chat` is, from a checkout."""

from chat.command import main
from models.command import start

if __name__ == "__main__":
    start(main)

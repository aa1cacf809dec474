"""What can go wrong while a model runs, on any backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import MachineError


class NotNumbers(MachineError):
    """The logits of a token are no numbers, or not finite: there is nothing to choose from."""

    def __init__(self, position: int) -> None:
        super().__init__(
            f"the logits at position {position} are no finite numbers: the weights hold NaN or infinity, or overflow in bf16; "
            "use an undamaged checkpoint, or one made for bf16"
        )


@contextmanager
def one_line(doing: str, *others: type[Exception]) -> Iterator[None]:
    """What PyTorch, a driver or `others` raise within it becomes a `MachineError` of one line: what was being done, and
    the first line of theirs that says anything."""
    kinds: tuple[type[Exception], ...] = (RuntimeError, OSError, *others)
    try:
        yield
    except MachineError:
        raise
    except kinds as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "nothing was said of it")
        raise MachineError(f"{doing} failed: {type(error).__name__}: {said}; free memory or try again") from error

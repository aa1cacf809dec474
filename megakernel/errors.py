"""What can go wrong while a model runs, on any backend: a `MachineError`, whose message is one line."""

from __future__ import annotations


class MachineError(RuntimeError):
    """The machine, or the model's own numbers, failed in the middle of a request; nothing is wrong with how it was asked."""


class NotNumbers(MachineError):
    """The logits of a token are no numbers, or not finite: there is nothing to choose from."""

    def __init__(self, position: int) -> None:
        super().__init__(
            f"the logits at position {position} are no finite numbers: the weights hold NaN or infinity, or overflow in bf16; "
            "use an undamaged checkpoint, or one made for bf16"
        )

"""What can go wrong while a model runs, on any backend."""

from __future__ import annotations

from models.errors import MachineError


class NotNumbers(MachineError):
    """The logits of a token are no numbers, or not finite: there is nothing to choose from."""

    def __init__(self, position: int) -> None:
        super().__init__(
            f"the logits at position {position} are no finite numbers: the weights hold NaN or infinity, or overflow in bf16; "
            "use an undamaged checkpoint, or one made for bf16"
        )

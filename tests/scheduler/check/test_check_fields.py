"""An instruction that says too little, or too much, of itself: what nobody thought of is a finding."""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Instruction, Region
from instructions.dimensions import Dimensions
from instructions.o_proj import OProj
from instructions.shape import Shape
from models.config import ModelConfig
from scheduler.build import make_shape
from scheduler.check.fields import payload_problem

SMS = 4
CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=100
)  # fmt: skip
SHAPE: Shape = make_shape(CONFIG, sms=SMS, capacity=512, bucket=512)


@dataclass(frozen=True)
class Silent(Instruction):
    """Says nothing of itself."""

    MNEMONIC = "silent"

    part: int


class Layered(Silent):
    """Says where it belongs, but not what its field may hold."""

    LAYERED = True


class Ranged(Layered):
    """Says both."""

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        return {"part": (1, sms)}


class Lavish(OProj):
    """Says that its rows may lie anywhere."""

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        return {"block": (0, 2**31 - 1), "blocks": (1, 2**31 - 1)}


class Loading(Ranged):
    """Streams as many pages of the cache as its field says."""

    def loads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("kv", self.layer, 0, 1),)

    def page_uses(self, shape: Dimensions) -> int:
        return self.part

    def tape_page(self, shape: Dimensions) -> int:
        return shape.cache_pages - 2


def test_an_instruction_that_does_not_say_where_it_belongs() -> None:
    assert payload_problem(Silent(0, 1), SHAPE, SMS) == "silent does not say whether it belongs to a layer"


def test_a_field_without_a_range() -> None:
    for value in (0, 1, 2**31 - 1):
        assert payload_problem(Layered(1, value), SHAPE, SMS) == "silent states no range for part"


def test_layer_and_range_are_those_that_the_class_states() -> None:
    assert payload_problem(Ranged(1, 1), SHAPE, SMS) is None
    assert payload_problem(Ranged(2, 1), SHAPE, SMS) == "layer 2, it must be 0 to 1"
    for value in (0, SMS + 1):
        assert payload_problem(Ranged(1, value), SHAPE, SMS) == f"part={value}, it must be 1 to {SMS}"


def test_pages_outside_the_tape_or_the_cache_whatever_range_is_stated() -> None:
    blocks = SHAPE.tape.pages - SHAPE.matrix("o", 1).first_page  # of one page each, to the end of the tape
    assert SHAPE.matrix("o", 1).pages_per_block == 1
    assert payload_problem(Lavish(1, 0, blocks), SHAPE, SMS) is None
    assert "of a weight tape of" in str(payload_problem(Lavish(1, 0, blocks + 1), SHAPE, SMS))
    assert "of a weight tape of" in str(payload_problem(Lavish(1, blocks, 1), SHAPE, SMS))
    assert payload_problem(Loading(0, 2), SHAPE, SMS) is None
    assert "of a KV cache of" in str(payload_problem(Loading(0, 3), SHAPE, SMS))

"""What instruction classes say of themselves: the buffers they bring, what their fields may hold, which matrix is theirs."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import chain

import pytest

from instructions.base import Instruction, Region
from instructions.expert_gate_up import ExpertGateUp
from instructions.experts import ExpertRows
from instructions.matvec import RowBlocks
from instructions.registry import INSTRUCTIONS
from instructions.shape import ANNOUNCED, BROUGHT, Shape
from scheduler.lower import lower
from tests.support.fake_machine import small_shape

SMS = 5
SHAPES = [small_shape(name, slices=slices) for name in ("mha", "all_biases_linear_head24") for slices in (1, 3)]
SHAPES += [small_shape("mha", slices=slices, tail=True) for slices in (1, 3)]
MIXTURE = small_shape("qwen3_moe")
SHAPES += [MIXTURE]
MULTIPLYING = [kind for kind in INSTRUCTIONS if issubclass(kind, RowBlocks)]
ANY_KIND = pytest.mark.parametrize("kind", INSTRUCTIONS, ids=lambda kind: kind.MNEMONIC)


def exists(region: Region, shape: Shape) -> bool:
    """Whether a region is rows of its buffer."""
    buffer = shape.buffers[region.buffer]
    return 0 <= region.layer < buffer.layers and 0 <= region.start < region.stop <= buffer.rows


def sound(instruction: Instruction, shape: Shape) -> bool:
    """Whether an instruction writes rows, all rows that it touches exist, and its pages are of the cache or its own matrix."""
    regions = chain(instruction.reads(shape), instruction.writes(shape), instruction.loads(shape))
    first, start, pages = instruction.tape_page(shape), 0, shape.cache_pages
    if isinstance(instruction, RowBlocks):
        start, pages = instruction.matrix(shape).first_page, instruction.matrix(shape).pages
        if isinstance(instruction, ExpertRows):
            return (
                instruction.writes(shape) != ()
                and all(exists(region, shape) for region in chain(instruction.reads(shape), instruction.writes(shape)))
                and instruction.blocks <= instruction.matrix(shape).blocks
            )
    if not instruction.writes(shape) or not all(exists(region, shape) for region in regions):
        return False
    return start <= first <= first + instruction.page_uses(shape) <= start + pages


def test_every_buffer_is_brought_once_and_written_by_who_brings_it() -> None:
    names = [buffer.name for buffer in BROUGHT]
    assert len(set(names)) == len(names) and not {"token", "kv"} & set(names)
    for kind in INSTRUCTIONS:
        for shape in SHAPES[:2]:  # with one slice and with several: each has its own writer of "attn"
            own = [item for item in lower(shape, SMS) if isinstance(item, kind)]
            written = {region.buffer for item in own for region in item.writes(shape)}
            brought = {buffer.name for buffer in kind.BRINGS if shape.buffers[buffer.name].rows}
            assert brought <= written | ({"attn"} if shape.slices > 1 else set())


def test_what_depends_on_the_slices_lies_last() -> None:
    """Everything else has its place in every program of a model, and both places of a value that announces itself exist."""
    assert [buffer.name for buffer in BROUGHT if buffer.sliced] == [BROUGHT[-1].name] == ["partial"]
    for shape in SHAPES:
        other = replace(shape, slices=shape.slices + 3)
        for name, buffer in shape.buffers.items():
            assert (buffer.second > 0) == (name in ANNOUNCED and buffer.rows > 0)
            assert buffer.base + buffer.second + buffer.layers * buffer.stride <= shape.arena_elements
            if name not in ("partial", "token", "kv"):
                assert buffer == other.buffers[name]
        assert shape.buffers["partial"].base == other.buffers["partial"].base


@ANY_KIND
def test_it_says_where_it_belongs_and_what_every_field_may_hold(kind: type[Instruction]) -> None:
    assert isinstance(kind.LAYERED, bool)
    for shape in SHAPES:
        for item in (item for item in lower(shape, SMS) if isinstance(item, kind)):
            ranges = item.field_ranges(shape, SMS)
            assert list(ranges) == list(kind.payload_names())
            assert all(low <= getattr(item, name) <= high for name, (low, high) in ranges.items())
            assert item.misfit(shape) is None
            assert 0 <= item.layer < (shape.config.num_layers if kind.LAYERED else 1)


@ANY_KIND
def test_the_ends_of_a_range_exist_and_what_lies_beyond_does_not(kind: type[Instruction]) -> None:
    """Two are narrower than the rows that exist: a slot is one for each SM, and the slices of a head lie before the next's."""
    for shape in SHAPES:
        for item in [item for item in lower(shape, SMS) if isinstance(item, kind)][:1]:
            for name, (low, high) in item.field_ranges(shape, SMS).items():
                least = {"blocks": 1} if name == "block" else {}
                inside, outside = (
                    [sound(replace(item, **{**least, name: value}), shape) for value in values]
                    for values in ((low, high), (low - 1, high + 1))
                )
                assert all(inside), name
                assert name in ("slot", "slots", "slice") or not any(outside), name


def test_row_blocks_are_all_that_streams_the_tape() -> None:
    """Each has a matrix of its own, and together they multiply every matrix that is streamed."""
    for shape in (SHAPES[0], MIXTURE):
        streaming = {type(item) for item in lower(shape, SMS) if item.page_uses(shape) and not item.loads(shape)}
        own = {kind for kind in MULTIPLYING if kind.foreign(shape) is None}
        assert streaming == own
        streamed = {matrix.kind for matrix in shape.tape.matrices if matrix.first_page < shape.tape.streamed_pages}
        assert sorted(kind.MATRIX for kind in own) == sorted(streamed)


@pytest.mark.parametrize("kind", MULTIPLYING, ids=lambda kind: kind.MNEMONIC)
def test_parts_are_the_whole_matrix(kind: type[RowBlocks]) -> None:
    for shape in (shape for shape in SHAPES if kind.foreign(shape) is None):
        slots = shape.config.experts_per_token if kind is ExpertGateUp else 1
        assert sum(kind.parts(shape, 0)) == shape.matrix(kind.MATRIX).blocks * slots
    assert [field.name for field in fields(kind)][:3] == ["layer", "block", "blocks"]

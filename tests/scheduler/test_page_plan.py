"""The page plan: uses are numbered without gaps in queue order, and rings are as deep as shared memory allows."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings

from instructions.shape import HELD_PAGES
from models.families import PRESETS
from models.tape import PAGE_BYTES
from scheduler.build import build_program, make_shape
from scheduler.errors import ScheduleError
from scheduler.pages import ring_depth, staging_bytes
from scheduler.program import Program
from tests.support.configs import small_config
from tests.support.program_cases import programs


@settings(max_examples=40, deadline=None)
@given(programs())
def test_uses_are_numbered_in_queue_order_without_gaps(program: Program) -> None:
    for sm, queue in enumerate(program.decoded):
        counts = [item.instruction.page_uses(program.shape) for item in queue]
        assert [item.pages for item in queue] == counts
        assert [item.page for item in queue] == list(accumulate([0, *counts]))[:-1]
        assert program.uses[sm] == sum(counts)


@settings(max_examples=40, deadline=None)
@given(programs())
def test_streams_start_where_the_instruction_says(program: Program) -> None:
    for item in (item for queue in program.decoded for item in queue):
        assert item.tape == (item.instruction.tape_page(program.shape) if item.pages else 0)


@pytest.mark.parametrize(
    ("preset", "itemsize", "ring"),
    [
        ("llama-3.2-1b", 2, 13),  # the widest activation is the MLP: 8192 bf16 values are one page, of 14 that fit
        ("llama-3.2-3b", 2, 13),
        ("llama-3-8b", 2, 12),  # 14336 values: 28 KiB
        ("llama-3.2-1b", 4, 12),
    ],
)
def test_ring_depth_of_the_presets(preset: str, itemsize: int, ring: int) -> None:
    shape = make_shape(PRESETS[preset], sms=132, capacity=4096, bucket=128, itemsize=itemsize)
    assert ring_depth(shape) == ring
    assert staging_bytes(shape) + ring * PAGE_BYTES <= 227 * 1024


def test_a_model_too_wide_for_shared_memory_is_refused() -> None:
    shape = make_shape(replace(small_config("mha"), intermediate_size=100_000), sms=2, capacity=128, bucket=128)
    with pytest.raises(ScheduleError, match=f"{HELD_PAGES} are needed: the model's hidden or intermediate size is too large"):
        build_program(shape, 2)


def test_a_ring_may_be_asked_for() -> None:
    shape = make_shape(small_config("mha"), sms=2, capacity=128, bucket=128)
    assert build_program(shape, 2, ring=HELD_PAGES).ring == HELD_PAGES
    with pytest.raises(ScheduleError):
        build_program(shape, 2, ring=HELD_PAGES - 1)

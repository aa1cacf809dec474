"""Which program decodes which position: every position has one, by its number alone."""

from __future__ import annotations

import time
from typing import cast

import pytest

from instructions.shape import Shape
from models.families import PRESETS
from scheduler import buckets
from scheduler.buckets import FIRST_PAGES, BucketPrograms, bucket_of, bucket_sizes
from scheduler.errors import ScheduleError
from scheduler.program import Program


@pytest.mark.parametrize("capacity", [1, 15, 16, 17, 512, 513, 4096, 131072])
def test_every_position_has_the_smallest_bucket_that_holds_it(capacity: int) -> None:
    sizes = bucket_sizes(capacity, 16)
    assert sizes[-1] == capacity and list(sizes) == sorted(set(sizes))
    assert all(size % 16 == 0 for size in sizes[:-1])
    edges = {0, 1, capacity, *(size + step for size in sizes for step in (-1, 0, 1) if 0 <= size + step <= capacity)}
    for past in edges:
        place = bucket_of(past, sizes)
        assert past <= sizes[place] and (place == 0 or sizes[place - 1] < past)


def test_positions_outside_the_capacity_have_none() -> None:
    for past in (-1, 101):
        with pytest.raises(ValueError, match=f"no bucket holds {past} past positions; the largest is 100"):
            bucket_of(past, bucket_sizes(100, 16))


def test_programs_are_built_once_and_serve_their_bucket() -> None:
    page = 128  # positions, in bf16 with heads of 64
    first = FIRST_PAGES * page
    programs = BucketPrograms(PRESETS["llama-3.2-1b"], sms=2, capacity=first + 72, itemsize=2)
    assert programs.sizes == (first, first + 72)
    program = programs.program(programs.place(first))
    assert program is programs.program(programs.place(0)) is not programs.program(programs.place(first + 1))
    assert (program.shape.bucket, program.shape.capacity) == (first, first + page), "capacities are whole KV pages"
    assert programs.program(1).shape.cache_pages == program.shape.cache_pages, "all programs share one cache"


def test_programs_made_ahead_are_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, however many ask for it meanwhile; one that cannot be made says so to who asks."""
    made: list[int] = []

    def build(shape: Shape, sms: int, policy: str) -> Program:
        made.append(shape.bucket)
        time.sleep(0.01)
        if shape.bucket == FIRST_PAGES * shape.page_positions and len(made) > 3:
            raise ScheduleError("cannot be made")
        return cast("Program", shape)

    monkeypatch.setattr(buckets, "build_program", build)
    programs = BucketPrograms(PRESETS["llama-3.2-1b"], sms=2, capacity=5120, itemsize=2)
    places = range(len(programs.sizes))
    thread = programs.build_ahead(places)
    found = [programs.program(place) for place in places]
    thread.join()
    assert made == list(programs.sizes)
    assert [programs.program(place) for place in places] == found
    assert made == list(programs.sizes)

    refusing = BucketPrograms(PRESETS["llama-3.2-1b"], sms=2, capacity=5120, itemsize=2)
    refusing.build_ahead([0, 1]).join()
    with pytest.raises(ScheduleError, match="cannot be made"):
        refusing.program(0)


def test_launches_are_cut_where_another_program_goes_on() -> None:
    programs = BucketPrograms(PRESETS["llama-3.2-1b"], sms=2, capacity=5120, itemsize=2)
    first, second, last = programs.sizes
    assert programs.cut(0, 10) == (0, 10)
    assert programs.cut(first - 3, first + 1) == (0, first + 1), "the last position of a bucket is its own"
    assert programs.cut(first - 3, second) == (0, first + 1)
    assert programs.cut(first + 1, second) == (1, second)
    assert programs.cut(second + 1, last) == (2, last)

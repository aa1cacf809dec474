"""Which program decodes which position: every position has one, by its number alone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
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


def test_each_is_made_once_and_what_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask for it meanwhile; one that cannot be made says so to who asks."""
    made: list[tuple[int, bool]] = []

    def build(shape: Shape, sms: int, policy: str) -> Program:
        made.append((shape.bucket, shape.tail))
        time.sleep(0.01)
        if len(made) == 1:
            raise ScheduleError("cannot be made")
        return cast("Program", shape)

    monkeypatch.setattr(buckets, "build_program", build)
    programs = BucketPrograms(PRESETS["llama-3.2-1b"], sms=2, capacity=5120, itemsize=2)
    with pytest.raises(ScheduleError, match="cannot be made"):
        programs.program(0)
    places = range(len(programs.sizes))
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(programs.program, [*places] * 8, [tail for tail in (True, False) for _ in range(4 * len(places))])
        )
    assert sorted(made[1:]) == sorted((size, tail) for size in programs.sizes for tail in (True, False))
    assert len({id(program) for program in found}) == 2 * len(places)


def test_launches_are_cut_where_another_program_goes_on() -> None:
    programs = BucketPrograms(PRESETS["llama-3.2-1b"], sms=2, capacity=5120, itemsize=2)
    first, second, last = programs.sizes
    assert programs.cut(0, 10) == (0, 10)
    assert programs.cut(first - 3, first + 1) == (0, first + 1), "the last position of a bucket is its own"
    assert programs.cut(first - 3, second) == (0, first + 1)
    assert programs.cut(first + 1, second) == (1, second)
    assert programs.cut(second + 1, last) == (2, last)

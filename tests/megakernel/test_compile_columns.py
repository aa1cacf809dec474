"""Kernels of several columns compile for Hopper and fit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megakernel.geometry import make_geometry, pages_bytes
from models.formats import PLAIN, Formats
from scheduler.build import build_program, make_shape
from scheduler.limits import RESERVED, RESERVED_QUANTISED, SHARED_MEMORY
from tests.support.compile_cases import CAPACITY, MODELS, OLDEST, SMS, compiled

Site = Callable[[str], Path]
MOST_STACK = 320  # bytes of a thread: what is put aside around an instruction, not within its loops (docs/columns.md)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "version", "sequences", "depth", "formats"),
    [("bundled", OLDEST, 1, 8, PLAIN), ("bundled", OLDEST, 4, 1, Formats("int4", "fp8"))],
    ids=["8 of one", "4 sequences in int4"],
)
def test_columns_compile(name: str, version: str, sequences: int, depth: int, formats: Formats, triton_site: Site) -> None:
    """Two of them: each takes as long as the largest kernel of one column.  `python -m megakernel.compile` tells of the
    others."""
    config = MODELS[name]
    capacity = min(CAPACITY, config.max_position)
    shape = make_shape(config, sms=SMS, capacity=capacity, bucket=capacity, formats=formats, sequences=sequences, depth=depth)
    geometry = make_geometry(build_program(shape, SMS))
    assert (geometry.sequences, geometry.depth, geometry.columns) == (sequences, depth, sequences * depth)
    found = compiled(triton_site(version), geometry)
    print(found)
    assert found["triton"] == version
    assert found["stack"] <= MOST_STACK and found["local"] == 0
    assert pages_bytes(geometry) <= found["shared"] <= SHARED_MEMORY
    assert found["shared"] <= pages_bytes(geometry) + (RESERVED if formats == PLAIN else RESERVED_QUANTISED)

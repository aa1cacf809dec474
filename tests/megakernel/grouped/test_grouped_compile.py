"""The grouped product's kernel compiles for sm_90a with no GPU, under the oldest and the newest Triton, and spills nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest

from megakernel.grouped.tiling import WIDTHS, Plan
from tests.support.compile_cases import NEWEST, OLDEST, asked

SHARED = 227 * 1024  # bytes of shared memory that a block may have on Hopper
CHILD = """
import json, re, sys
from dataclasses import asdict
from megakernel.compile import resources
from megakernel.grouped.compile import compile_for_hopper
from megakernel.grouped.tiling import Tiling
kernel = compile_for_hopper(Tiling(*json.load(sys.stdin)))
ptx = kernel.asm["ptx"]
print(json.dumps({
    **asdict(resources(kernel)),
    "products": sorted(set(re.findall(r"wgmma[.]mma_async[.]sync[.]aligned[.]m64n(\\d+)k(?:16|32)[.]f32[.]", ptx)), key=int),
    "vectors": sorted(set(re.findall(r"st[.]global[.]\\S+", ptx))),
}))
"""


@pytest.mark.parametrize(("itemsize", "version"), [(2, OLDEST), (1, NEWEST)])
def test_the_kernel(itemsize: int, version: str, triton_site: Callable[[str], Path]) -> None:
    """Of bf16 and of e4m3; one each, for a compilation takes long."""
    found = asked(triton_site(version), CHILD, list(astuple(Plan(132).tiling(128, itemsize))))
    assert found["stack"] <= 16 and found["local"] == 0, "nothing of a product is spilled"
    assert found["shared"] <= SHARED
    assert set(map(int, found["products"])) == {size for width in WIDTHS for size in width if size}
    assert found["vectors"] == ["st.global.v4.b32"], "rows are stored 16 bytes a thread"

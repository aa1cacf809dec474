"""The grouped product's kernel compiles for sm_90a with no GPU, under the oldest and the newest Triton, and spills nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from megakernel.grouped.tiling import WIDTHS, Plan, Tiling
from tests.support.compile_cases import NEWEST, OLDEST, asked

SHARED = 227 * 1024  # bytes of shared memory that a block may have on Hopper
CHILD = """
import json, re, sys
from dataclasses import asdict
from megakernel.compile import resources
from megakernel.device.prefill.experts import read_experts
from megakernel.grouped.compile import compile_for_hopper
from megakernel.grouped.tiling import Tiling
from megakernel.prefill.compile import compile_for_hopper as compile_of_prefill
tiling = Tiling(*json.load(sys.stdin))
kernel = compile_of_prefill(read_experts, None, tiling) if tiling.paged else compile_for_hopper(tiling)
ptx = kernel.asm["ptx"]
print(json.dumps({
    **asdict(resources(kernel)),
    "products": sorted(set(re.findall(r"wgmma[.]mma_async[.]sync[.]aligned[.]m64n(\\d+)k(?:16|32)[.]f32[.]", ptx)), key=int),
    "vectors": sorted(set(re.findall(r"st[.]global[.]\\S+", ptx))),
}))
"""


PLAIN, SCALED = Plan(132).tiling(128), Plan(132).tiling(128, 1)
PAGED, UNITS = replace(PLAIN, paged=True), replace(PLAIN, paged=True, units=True)
LATER = pytest.mark.full


@pytest.mark.parametrize(
    ("tiling", "version"),
    [
        pytest.param(PLAIN, OLDEST, id=f"bf16-{OLDEST}"),
        pytest.param(SCALED, NEWEST, id=f"e4m3-{NEWEST}"),
        pytest.param(UNITS, OLDEST, id=f"units-{OLDEST}"),
        pytest.param(UNITS, NEWEST, id=f"units-{NEWEST}", marks=LATER),
        pytest.param(PAGED, OLDEST, id=f"paged-{OLDEST}", marks=LATER),
        pytest.param(PAGED, NEWEST, id=f"paged-{NEWEST}", marks=LATER),
    ],
)
def test_the_kernel(tiling: Tiling, version: str, triton_site: Callable[[str], Path]) -> None:
    """Of bf16 and of e4m3, and as prefill has it of weights on the tape; one each, for a compilation takes long."""
    found = asked(triton_site(version), CHILD, list(astuple(tiling)))
    assert found["stack"] <= 16 and found["local"] == 0, "nothing of a product is spilled"
    assert found["shared"] <= SHARED
    assert set(map(int, found["products"])) == {size for width in WIDTHS for size in width if size}
    assert found["vectors"] == ["st.global.v4.b32"], "rows are stored 16 bytes a thread"

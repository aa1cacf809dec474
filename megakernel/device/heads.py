"""What attention of one column and of several have in common: layouts, slices, pages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megakernel.device.formats.plain import TILE

FLAT_HEADS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.constexpr_function
def score_layout():
    """Accumulators [tiles, rows, heads], rows spread over the warps."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 4, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def query_layout():
    """Queries [heads, dims]."""
    return gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])


@gluon.jit
def head_factor(S: gl.constexpr, squares):
    """What a head whose squares sum to `squares` is multiplied by to be normed."""
    return gl.rsqrt(squares / S.head_dim + S.epsilon)


@gluon.jit
def slice_pages(S: gl.constexpr, slices, index, position):
    """First page and page count of slice `index`: `Shape.slice_range`."""
    pages = (position + S.page_positions - 1) // S.page_positions
    share = (pages + slices - 1) // slices
    first = gl.minimum(index * share, pages)
    return first, gl.minimum(first + share, pages) - first


@gluon.jit
def wait_page(S: gl.constexpr, ring, use):
    """Wait for a page use to land; returns its slot."""
    slot = use % S.ring
    mbarrier.wait(ring.full.index(slot), (use // S.ring) & 1)
    return slot


@gluon.jit
def output_dims(S: gl.constexpr):
    """Dimension of a head at each element of the accumulators, [tiles, 64, 1]."""
    MMA: gl.constexpr = score_layout()
    tiles = gl.arange(0, S.head_tiles, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))
    inner = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))
    return gl.expand_dims(tiles[:, None] * TILE + inner[None, :], 2)


@gluon.jit
def rounded(values):
    """fp32 values, rounded to the weight type as in the cache."""
    return values.to(gl.bfloat16).to(gl.float32)

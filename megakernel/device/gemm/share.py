"""Which part of a product a thread block computes: an unbroken run of units, as many as any other's or one more.

A unit is one tile of W's rows by one step along K; the units of a tile follow each other.  So a block's run begins and ends
anywhere in a tile, and no tile's parts lie with other blocks than neighbours.  The twin on the host is
`megakernel.gemm.plan.Plan`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import aggregate


@aggregate
class Share:
    """`steps` along K of each tile; every block has `least` units, and the first `more` blocks one more."""

    steps: gl.tensor
    least: gl.tensor
    more: gl.tensor


@gluon.jit
def first_unit(share, block):
    """The unit where a block's run begins; that of the next block is where it ends."""
    return block * share.least + gl.minimum(block, share.more)


@gluon.jit
def block_of(share, unit):
    """The block that has a unit."""
    longer = share.more * (share.least + 1)  # units of the blocks that have one more
    return gl.where(unit < longer, unit // (share.least + 1), share.more + (unit - longer) // share.least)

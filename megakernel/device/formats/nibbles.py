"""Device side of `models.formats.nibbles`: a word becomes eight bf16, 16 + code each, with seven operations."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.packed import operand

CODES = gl.constexpr(8)  # of a word
LANE = gl.constexpr(2 * CODES.value)
OFFSET = gl.constexpr(16)  # what code 0 is widened to

WIDEN = gl.constexpr("""{
    .reg .b32 turned;
    lop3.b32 $0, $8, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $8, 4;
    lop3.b32 $1, turned, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $8, 8;
    lop3.b32 $2, turned, 0x00780078, 0x41804180, 0xea;
    shf.r.wrap.b32 turned, $8, $8, 12;
    lop3.b32 $3, turned, 0x00780078, 0x41804180, 0xea;
    lop3.b32 $4, $9, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $9, 4;
    lop3.b32 $5, turned, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $9, 8;
    lop3.b32 $6, turned, 0x00780078, 0x41804180, 0xea;
    shf.r.wrap.b32 turned, $9, $9, 12;
    lop3.b32 $7, turned, 0x00780078, 0x41804180, 0xea;
}""")


@gluon.jit
def values_of(words):
    """Words as bf16, their columns in order, 16 + code; two words at a time, into registers of two columns."""
    r0, r1, r2, r3, r4, r5, r6, r7 = gl.inline_asm_elementwise(
        WIDEN,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    even = gl.join(gl.join(r0, r4), gl.join(r2, r6))
    odd = gl.join(gl.join(r1, r5), gl.join(r3, r7))
    registers = gl.reshape(gl.join(even, odd), [words.numel // 2, 2, 2, 2, 2])
    return gl.permute(registers, [0, 2, 3, 4, 1])


@gluon.jit
def operand_of(words, TILES: gl.constexpr, TILE: gl.constexpr):
    """Words [tiles, 16 rows, words] as bf16 [tiles, 16 rows, columns], 16 + code: the A operand."""
    return operand(values_of(words), TILES, TILE, LANE)

"""Every packed format of the registry: codes to words and back, rounding, and every bit of a page in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from models.command import WEIGHTS
from models.errors import UserError
from models.formats import FORMATS, NAMES, PLAIN, Formats, Packed, check_formats, chosen_formats
from models.formats.base import PAGE_ROWS, Codes, page_pieces
from models.formats.fp8 import FP8
from models.formats.int4 import INT4, ZERO_BITS
from models.formats.q4_0 import Q4_0
from models.formats.q4_1 import Q4_1
from models.formats.q8_0 import Q8_0
from models.tape import BLOCK_ROWS, PAGE_BYTES

PACKED = [format for format in FORMATS.values() if isinstance(format, Packed)]
packed = pytest.mark.parametrize("format", PACKED, ids=lambda format: format.name)


def rows_of(format: Packed, count: int = 16, pages: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.01, 3, count)[:, None]
    return torch.randn(count, pages * format.columns, generator=generator) * spread


def bits_of(format: Packed) -> int:
    """Of a code."""
    return 8 if format.name in ("fp8", "q8_0") else 4


def test_the_registry() -> None:
    assert list(FORMATS) == ["bf16", "fp32", "fp8", "int4", "q8_0", "q4_0", "q4_1"]
    assert NAMES == WEIGHTS
    assert NAMES == ("bf16", "fp8", "int4", "q8_0", "q4_0", "q4_1")
    assert all(format.name == name for name, format in FORMATS.items())
    assert PAGE_ROWS == BLOCK_ROWS


@packed
def test_a_page_is_full(format: Packed) -> None:
    assert format.columns * BLOCK_ROWS * bits_of(format) == 8 * PAGE_BYTES
    assert format.columns % format.group == 0


@packed
def test_every_code_comes_back(format: Packed) -> None:
    generator = torch.Generator().manual_seed(2)
    most = 1 << bits_of(format)
    values = torch.randint(0, most, (3, 2 * format.columns), generator=generator, dtype=torch.uint8)
    words = format.encode(values)
    assert words.dtype == torch.int32 and words.shape == (3, 2 * 256)
    assert torch.equal(format.decode(words), values)
    for code in range(most):  # each alone, in each place of a word
        one = torch.full((1, format.columns), code, dtype=torch.uint8)
        assert torch.equal(format.decode(format.encode(one)), one)


@packed
def test_places_of_a_word_share_no_bit(format: Packed) -> None:
    count = format.columns // 256
    full = (1 << bits_of(format)) - 1
    taken = []
    for place in range(count):
        values = torch.zeros(1, format.columns, dtype=torch.uint8)
        values[0, place] = full
        taken.append(int(format.encode(values)[0, 0]) & 0xFFFFFFFF)
    assert sum(taken) == 0xFFFFFFFF
    assert sum(word.bit_count() for word in taken) == 32


@packed
def test_quantised_numbers_are_kept(format: Packed) -> None:
    """What a format holds exactly it holds again; and every row is within its error of what it was."""
    rows = rows_of(format)
    once = format.widen(format.quantise(rows))
    most = {"fp8": 0.03, "int4": 0.11, "q8_0": 0.006, "q4_0": 0.09, "q4_1": 0.08}[format.name]
    assert ((once - rows).norm(dim=1) < most * rows.norm(dim=1)).all()
    codes = format.quantise(torch.zeros(2, format.columns))
    assert not format.widen(codes).any()


def test_scales_are_chosen_for_the_least_error() -> None:
    """No worse than the scale by which the largest just fits, and better where one weight stands out."""
    rows = rows_of(INT4, 4, 1)
    rows[:, ::128] *= 4
    groups = rows.view(4, -1, 128)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    plain = ((groups / scale).round() + zero).clamp(0, 15).sub(zero) * scale
    ours = (INT4.widen(INT4.quantise(rows)) - rows).norm()
    assert ours < 0.97 * (plain.flatten(1) - rows).norm()
    rows = rows_of(FP8, 4, 1)
    scale = rows.abs().amax(1, keepdim=True) / 448
    plain = (rows / scale).to(torch.float8_e4m3fn).float() * scale
    assert (FP8.widen(FP8.quantise(rows)) - rows).norm() <= (plain - rows).norm()


@packed
def test_scales_and_pages_come_back(format: Packed) -> None:
    rows = rows_of(format)
    codes = format.quantise(rows)
    words = format.encode(codes.values)
    pages = torch.zeros(1, 2, PAGE_BYTES, dtype=torch.uint8)
    row = torch.arange(16)
    page_pieces(pages)[torch.zeros(16, dtype=torch.long), row // 8, row % 8] = words.view(torch.int64).view(16, 64, 4)
    words = format.encode_scales(codes)  # [16, pages, words of a row]
    places = format.scale_places
    assert torch.equal(places.flatten().sort().values, torch.arange(format.scale_words)), "every place once"
    beside = torch.zeros(1, 2, format.scale_words, dtype=torch.int32)
    beside[0][:, places] = words.transpose(0, 1)
    found = format.rows(pages, beside.view(torch.float32))
    assert torch.equal(found[0], format.widen(codes))


@packed
def test_a_lane_s_sixteen_bytes(format: Packed) -> None:
    """Number by number: chunk, row, lane, half block and word of every place in a page, as the kernel's layout has them."""
    words = torch.arange(16 * 256, dtype=torch.int32).view(16, 256)  # row * 256 + word along K
    pages = torch.zeros(1, 1, PAGE_BYTES, dtype=torch.uint8)
    row = torch.arange(16)
    page_pieces(pages)[torch.zeros(16, dtype=torch.long), row // 8, row % 8] = words.view(torch.int64).view(16, 32, 4)
    places = pages.view(torch.int32).flatten()
    for chunk in (0, 1, 31):
        for lane in (0, 5, 31):
            first = chunk * 128 + lane * 4
            g, t = lane // 4, lane % 4
            k = chunk * 8 + t * 2
            assert places[first : first + 4].tolist() == [
                g * 256 + k,
                g * 256 + k + 1,
                (g + 8) * 256 + k,
                (g + 8) * 256 + k + 1,
            ]


def test_every_number_of_e4m3() -> None:
    """By its definition: sign, 4 bits of exponent, 3 of mantissa, subnormal numbers, no infinity."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    numbers = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    numbers = np.where(codes & 128, -numbers, numbers)
    numbers[(codes & 127) == 127] = np.nan
    values = torch.arange(256, dtype=torch.uint8).repeat(4)[None]
    scales = torch.ones(1, 1)
    found = FP8.widen(Codes(values, scales))[0, :256].numpy()
    assert np.array_equal(found, numbers, equal_nan=True)


def test_zero_points_and_scales_share_a_word() -> None:
    codes = INT4.quantise(rows_of(INT4, 4, 1))
    assert codes.zeros is not None
    assert not (codes.scales.view(torch.int32) & ZERO_BITS).any()
    words = INT4.encode_scales(codes)
    back = INT4.decode_scales(codes.values, words)
    assert back.zeros is not None
    assert torch.equal(back.scales, codes.scales) and torch.equal(back.zeros, codes.zeros)


def test_where_scales_lie_beside_a_page() -> None:
    """By the accumulators of the matrix instruction: lane 4 g + t has rows g and g + 8 of columns 2 t and 2 t + 1; of 8 tiles
    the first four sum their groups in columns 0 to 3, the others in 4 to 7."""
    for format, each in ((Q8_0, 1), (Q4_0, 1), (Q4_1, 2)):
        found = format.scale_places.view(16, -1, each)
        for row in range(16):
            for pair in range(format.columns // 64):
                tile, column = pair // 2, 2 * (pair % 2)
                eight, half, warp = tile // 8, tile // 4 % 2, tile % 4
                lane, column = row % 8 * 4 + (column + 4 * half) // 2, column + 4 * half
                place = (((eight * 4 + warp) * 32 + lane) * 2 + row // 8) * each
                assert found[row, pair].tolist() == [place + i for i in range(each)]


def test_numbers_of_blocks() -> None:
    """Every code, by the formulas of ggml; offsets that are no multiple of the scale."""
    codes = torch.arange(1024).to(torch.uint8)[None]
    scales = torch.full((1, 32), 0.25)
    assert Q8_0.widen(Codes(codes, scales))[0, :256].tolist() == [0.25 * (code - 128) for code in range(256)]
    codes, scales = torch.arange(2048).to(torch.uint8)[None] % 16, torch.full((1, 64), 0.25)
    assert Q4_0.widen(Codes(codes, scales))[0, :16].tolist() == [0.25 * (code - 8) for code in range(16)]
    offsets = torch.full((1, 64), -1.0625)
    assert Q4_1.widen(Codes(codes, scales, offsets=offsets))[0, :16].tolist() == [0.25 * code - 1.0625 for code in range(16)]


@pytest.mark.parametrize("format", [Q8_0, Q4_0, Q4_1], ids=lambda format: format.name)
def test_scales_in_fp16_at_its_ends(format: Packed) -> None:
    """Weights too small for a scale become zeros or next to that, weights too large the largest; all stay numbers."""
    for size in (1e-30, 1e-8, 1e-5, 1e4, 1e9):
        rows = rows_of(format, 2, 1) * size
        codes = format.quantise(rows)
        assert codes.finite and torch.equal(codes.scales.half().float(), codes.scales)
        found = format.widen(codes)
        assert found.isfinite().all() and (found.abs() <= 1.1 * rows.abs().max() + 1e-7).all()


@pytest.mark.parametrize(("format", "kind"), [(Q8_0, "Q8_0"), (Q4_0, "Q4_0"), (Q4_1, "Q4_1")], ids=lambda v: str(v)[:4])
def test_no_worse_than_the_library_s_quantiser(format: Packed, kind: str) -> None:
    rows = rows_of(format, 8, 1)
    theirs = dequantize(quantize(rows.numpy(), GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    assert (format.widen(format.quantise(rows)) - rows).norm() < (torch.from_numpy(theirs) - rows).norm()


def test_what_options_choose() -> None:
    assert chosen_formats("bf16") == PLAIN == chosen_formats(None)
    assert chosen_formats("fp8") == Formats("fp8", "fp8")
    assert chosen_formats("int4", "bf16") == Formats("int4", "plain")
    assert chosen_formats(None, "fp8") == Formats("plain", "fp8")
    stored = Formats("int4", "plain")
    assert chosen_formats(None, None, stored) == stored
    assert chosen_formats("bf16", None, stored) == PLAIN


def test_formats_that_cannot_be() -> None:
    with pytest.raises(UserError, match="kept as 'int3': choose one of fp8, int4, q8_0, q4_0, q4_1, or bf16"):
        check_formats(Formats("int3", "plain"), 2)
    with pytest.raises(UserError, match="fp8 weights are widened to bf16: choose bfloat16 activations, or say --weights bf16"):
        check_formats(Formats("fp8", "plain"), 4)

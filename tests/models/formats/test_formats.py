"""Every packed format of the registry: codes to words and back, rounding, and every bit of a page in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.command import WEIGHTS
from models.errors import UserError
from models.formats import FORMATS, NAMES, PLAIN, Formats, Packed, check_formats, chosen_formats
from models.formats.base import PAGE_ROWS, Codes, page_pieces
from models.formats.fp8 import FP8
from models.formats.int4 import INT4, ZERO_BITS
from models.tape import BLOCK_ROWS, PAGE_BYTES

PACKED = [format for format in FORMATS.values() if isinstance(format, Packed)]
packed = pytest.mark.parametrize("format", PACKED, ids=lambda format: format.name)


def rows_of(format: Packed, count: int = 16, pages: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.01, 3, count)[:, None]
    return torch.randn(count, pages * format.columns, generator=generator) * spread


def test_the_registry() -> None:
    assert list(FORMATS) == ["bf16", "fp32", "fp8", "int4"]
    assert NAMES == WEIGHTS == ("bf16", "fp8", "int4")
    assert all(format.name == name for name, format in FORMATS.items())
    assert PAGE_ROWS == BLOCK_ROWS


@packed
def test_a_page_is_full(format: Packed) -> None:
    bits = {"fp8": 8, "int4": 4}[format.name]
    assert format.columns * BLOCK_ROWS * bits == 8 * PAGE_BYTES
    assert format.columns % format.group == 0


@packed
def test_every_code_comes_back(format: Packed) -> None:
    generator = torch.Generator().manual_seed(2)
    most = 256 if format.name == "fp8" else 16
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
    full = 255 if format.name == "fp8" else 15
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
    most = {"fp8": 0.03, "int4": 0.11}[format.name]
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
    beside = format.encode_scales(codes).permute(1, 2, 0).contiguous()  # [pages, words of a row, 16]
    found = format.rows(pages, beside.view(1, 2, -1).view(torch.float32))
    assert torch.equal(found[0], format.widen(codes))
    assert beside[0].numel() == format.scale_words


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


def test_what_options_choose() -> None:
    assert chosen_formats("bf16") == PLAIN == chosen_formats(None)
    assert chosen_formats("fp8") == Formats("fp8", "fp8")
    assert chosen_formats("int4", "bf16") == Formats("int4", "plain")
    assert chosen_formats(None, "fp8") == Formats("plain", "fp8")
    stored = Formats("int4", "plain")
    assert chosen_formats(None, None, stored) == stored
    assert chosen_formats("bf16", None, stored) == PLAIN


def test_formats_that_cannot_be() -> None:
    with pytest.raises(UserError, match="kept as 'int3': choose one of fp8, int4, or bf16"):
        check_formats(Formats("int3", "plain"), 2)
    with pytest.raises(UserError, match="fp8 weights are widened to bf16"):
        check_formats(Formats("fp8", "plain"), 4)

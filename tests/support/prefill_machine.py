"""The launches of a layer's mixture of experts on a CPU, in their order, by the arguments that the GPU would be given.

Kernels of vectors run by their own source (`gluon_numpy`), and so does what stores a tile of experts' products.  Products take
their operands box by box, at the coordinates that the loaders' source asks for, and their tiles from the walk's mirror.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megakernel.geometry import make_geometry
from megakernel.grouped.tiling import CONSUMER_ROWS, CONSUMERS, TILE_ROWS, tiles, width
from megakernel.options import Sizes
from megakernel.prefill.chain import Chain
from megakernel.prefill.launch import Launch
from megakernel.prefill.plan import Plan
from megakernel.prefill.tiling import ROUTED, STEP
from models.config import MOST_EXPERTS, ModelConfig
from models.formats import PLAIN, Formats
from models.packed import PackedModel, pack
from models.tape import BLOCK_ROWS, PAGE_BYTES
from models.weights import Weights
from scheduler.build import build_program, make_shape
from tests.support import ROOT
from tests.support.gluon_numpy import Pointer, Room, define, functions, kernel_of, language, values

CAPACITY = 128  # of the cache
ORDERED = ("choose", "ordered")
KNOWN: dict[str, Any] = {"ROUTED": ROUTED, "MOST_EXPERTS": MOST_EXPERTS, "BLOCK": BLOCK_ROWS, "HALF": BLOCK_ROWS // 2}
KNOWN |= {"power_of_two": lambda number: 1 << (number - 1).bit_length(), "ROW": None}
PLACES = ("cache", "cache_address"), ("cache", "finite"), ("qkv", "rotate"), ("matvec", "layer_constants")
MODULES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "read_choice": ("prefill/routing", (ORDERED,)),
    "read_places": ("prefill/routing", ()),
    "read_rows": ("prefill/gathering", ()),
    "read_sum": ("prefill/gathering", (("prefill/embedding", "keep_row"),)),
    "read_heads": ("prefill/heads", PLACES),
}


def packed(config: ModelConfig, tensors: dict[str, torch.Tensor], formats: Formats = PLAIN) -> PackedModel:
    """A model with a cache of `CAPACITY` positions."""
    return pack(Weights(tensors), config, torch.bfloat16, CAPACITY, formats)


def chain_of(model: PackedModel) -> Chain:
    """A model's chain, whose tensors lie on the CPU."""
    config, formats = model.config, model.tape.formats
    shape = make_shape(config, sms=7, capacity=CAPACITY, bucket=CAPACITY, formats=formats)
    sizes = Sizes(make_geometry(build_program(shape, 7)))
    tokens = torch.zeros(1, dtype=torch.int32)
    state: Any = SimpleNamespace(config=config, device=torch.device("cpu"), capacity=CAPACITY, tokens=tokens)
    state.weights, state.constants, state.rope = model.weights, model.constants, model.rope
    state.cache = torch.zeros(shape.cache_pages, PAGE_BYTES // 2, dtype=torch.bfloat16)
    return Chain(state, sizes, Plan(config, 7, CAPACITY, formats))


def plain(sizes: Any) -> Any:
    """Sizes as numbers."""
    if isinstance(sizes, Sizes):
        return SimpleNamespace(**{name: plain(value) for name, value in vars(sizes).items() if name != "geometry"})
    return plain(sizes.value) if isinstance(sizes, gl.constexpr) else sizes


def run(launch: Launch) -> None:
    """What a launch leaves in its tensors."""
    name = launch.kernel.fn.__name__
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    if name == "read_experts":
        run_experts(**given)
    elif name == "read_single":
        run_single(**given)
    elif name in ("widen_matrix", "widen_experts"):
        run_widening(**given)
    else:
        run_vectors(name, launch)


def run_vectors(name: str, launch: Launch) -> None:
    """A kernel by its source; fp32 stands for bf16."""
    module, also = MODULES[name]
    tensors = [each for each in launch.arguments if isinstance(each, torch.Tensor)]
    arrays = {id(each): each.float().numpy() if each.dtype == torch.bfloat16 else each.numpy() for each in tensors}
    known = {**KNOWN, "Model": lambda *fields: SimpleNamespace(**dict(zip(MODEL, fields, strict=True)))}
    known |= {"TILE": STEP, "LARGEST": float(torch.finfo(torch.bfloat16).max), "PAGE_ELEMENTS": PAGE_BYTES // 2}
    kernel_of(module, name, known, also)(launch.grid, *(arrays.get(id(each), plain(each)) for each in launch.arguments))
    for each in tensors:
        if each.dtype == torch.bfloat16:
            each.copy_(torch.from_numpy(arrays[id(each)]))


MODEL = ("constants", "rope", "cache", "head_pages")


def box(descriptor: TensorDescriptor, first: list[int]) -> torch.Tensor:
    """What TMA lays into shared memory, fp32: zeros where the box leaves the tensor."""
    assert (descriptor.base.data_ptr() % 16, *(stride * 2 % 16 for stride in descriptor.strides[:-1])) == (0,) * len(first)
    whole = torch.as_strided(descriptor.base, descriptor.shape, descriptor.strides)
    found = torch.zeros(descriptor.block_shape)
    stops = [min(start + size, end) for start, size, end in zip(first, descriptor.block_shape, descriptor.shape, strict=True)]
    part = whole[tuple(slice(start, stop) for start, stop in zip(first, stops, strict=True))]
    found[tuple(slice(0, size) for size in part.shape)] = part.float()
    return found


@cache
def load_weights() -> tuple[Any, list[list[int]]]:
    """The function of the experts' loader that asks for a step's weights, by its source, and where it notes what it asks."""
    asked: list[list[int]] = []
    names: dict[str, Any] = {"TILE_ROWS": TILE_ROWS, "BLOCK": BLOCK_ROWS, "BLOCKS": None}
    names |= {"copy_page": lambda w, at, *rest: asked.append(at), "reinterpret": lambda *parts: None}
    define(functions(ROOT / "megakernel" / "device" / "grouped" / "product.py")["load_weights"], names)
    return names["load_weights"], asked


@cache
def keep() -> Any:
    """What stores a tile of the experts' product, by its source."""
    sizes = {"ROWS": CONSUMER_ROWS, "PIECE": 64, "TILE_ROWS": TILE_ROWS, "STORED": None}
    sizes |= {"HALF": BLOCK_ROWS // 2, "UNITS": CONSUMER_ROWS // 2, "TILE_UNITS": TILE_ROWS // 2}
    names: dict[str, Any] = {**sizes, "gl": language(0, 1), "nothing": lambda: values(np.int32(0))}
    device = ROOT / "megakernel" / "device"
    found = (
        ("gate_up", "swiglu"),
        ("grouped/units", "row_pairs"),
        ("grouped/units", "keep_units"),
        ("grouped/product", "keep"),
    )
    for module, name in found:
        define(functions(device / f"{module}.py")[name], names)
    return names["keep"]


def weight_coordinates(n: int, group: int, column: int, step: int) -> list[int]:
    """Where the loader of the experts' product asks for a step's weights."""
    load, asked = load_weights()
    tiling, item = SimpleNamespace(paged=True, step=STEP), SimpleNamespace(group=group, column=column)
    load(tiling, SimpleNamespace(dtype=None), SimpleNamespace(n=n), item, step * STEP, None, None)
    return asked.pop()


def run_experts(
    x: TensorDescriptor, few: TensorDescriptor, w: TensorDescriptor, offsets: torch.Tensor, shares: torch.Tensor,
    y: torch.Tensor, groups: int, rows: int, n: int, k: int, stride: int, band: int, T: Sizes,
) -> None:  # fmt: skip
    """`megakernel.device.prefill.experts.read_experts`: tile by tile, step by step."""
    assert (n % 16, k % 16, stride % 16) == (0, 0, 0) and few.base is x.base and x.shape[0] == rows == len(y)
    assert len(offsets) == groups and y.stride(0) == stride
    stored = y.float().numpy()
    work = SimpleNamespace(n=n)
    out = SimpleNamespace(y=Pointer(stored), stride=stride, x_scale=Pointer(shares.numpy()), w_scale=None)
    for tile in reversed(list(tiles(offsets.tolist(), rows, n, 7, band))):  # what one writes beyond its rows stays there
        first, second = width(tile.count)
        product = torch.zeros(TILE_ROWS, tile.count)
        for step in range(-(-k // STEP)):
            weights = box(w, weight_coordinates(n, tile.group, tile.column, step)).view(TILE_ROWS, STEP)
            tokens = torch.cat([box(x, [tile.first + start, step * STEP]) for start in range(0, tile.count, 64)])
            product += weights @ tokens[: tile.count].T
        beyond = torch.full((TILE_ROWS, first + second - tile.count), torch.nan)  # of the next group, or none
        acc = values(torch.cat((product, beyond), dim=1).numpy())
        numbers = {"group": tile.group, "start": tile.first, "count": tile.count, "column": tile.column}
        item = SimpleNamespace(**{name: values(np.int32(number)) for name, number in numbers.items()})
        for who in range(CONSUMERS):
            mine = acc[who * CONSUMER_ROWS : (who + 1) * CONSUMER_ROWS]
            for part, start in ((mine[:, :first], 0), (mine[:, first:], first)):
                if part.shape[1]:
                    keep()(plain(T), out, work, Room(), item, part, start, who)
    y.copy_(torch.from_numpy(stored))


def run_widening(
    tape: torch.Tensor, constants: torch.Tensor, widened: torch.Tensor, first_page: int, scales: int, pages: int, W: Sizes,
    ends: torch.Tensor | None = None, groups: int = 1,
) -> None:  # fmt: skip
    """`megakernel.device.prefill.widening`: by the format's meaning on the host; of experts those that have rows."""
    sizes = W.geometry
    stops = [1] if ends is None else ends.tolist()
    assert len(stops) == groups and pages == sizes.blocks * sizes.pages
    size = sizes.blocks * sizes.tiles * BLOCK_ROWS * STEP
    for expert, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)):
        if end > begin:
            words = pages * sizes.format.scale_words
            found = tape[first_page + expert * pages :][:pages].view(sizes.blocks, sizes.pages, -1)
            beside = constants[scales + expert * words :][:words].view(sizes.blocks, sizes.pages, -1)
            rows = sizes.format.rows(found.view(torch.bfloat16), beside).bfloat16()[..., : sizes.tiles * STEP]
            lines = rows.unflatten(2, (sizes.tiles, STEP)).transpose(1, 2)
            widened.view(-1)[expert * size : (expert + 1) * size] = lines.reshape(-1)


def run_single(
    x: TensorDescriptor, w: TensorDescriptor, chunk: torch.Tensor, tiles: torch.Tensor, parts: Any, arrivals: Any,
    squares: torch.Tensor, out: torch.Tensor, layer: int, columns: int, steps: int, split: int, S: Sizes, T: Sizes,
) -> None:  # fmt: skip
    """`megakernel.device.prefill.single.read_single`, without the parts that its sums come in."""
    sizes, tiling = plain(S), plain(T)
    assert len(tiles) == columns and 1 <= split <= steps and tiling.blocks * BLOCK_ROWS == out.shape[1]
    count = int(chunk[1])
    scale = torch.rsqrt(squares.sum(1) / sizes.hidden + sizes.epsilon)
    for row in range(0, count, tiling.tokens):
        for column in tiles.tolist():
            product = torch.zeros(tiling.tokens, tiling.tile)
            for step in range(steps):
                at = [layer, column * (tiling.tile // BLOCK_ROWS), step * BLOCK_ROWS, 0]
                product += box(x, [row, step * STEP]) @ box(w, at).view(tiling.tile, STEP).T
            last, end = min(row + tiling.tokens, count), min((column + 1) * tiling.tile, out.shape[1])
            found = product[: last - row, : end - column * tiling.tile] * scale[row:last, None]
            out[row:last, column * tiling.tile : end] = found

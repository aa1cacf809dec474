"""What the projections compute on the CPU, against the formulas in their docstrings written out in plain torch, fp64.

Tolerances.  A dot product of K terms in fp32, in any order, is off by at most K * 2^-24 * sum |w||x| (Higham, 2002, 3.1); we
allow twice that for the operations around it.  In bf16 the input is rounded once; our fp32 input and the fp64 one may lie on
either side of a tie, which moves one product by 2^-8 of itself: we allow the two largest of a row.
"""

from __future__ import annotations

import math

import pytest
import torch

from instructions.base import Instruction
from instructions.down import Down
from instructions.embed import Embed
from instructions.gate_up import GateUp
from instructions.hand_over import HandOver
from instructions.matvec import DTYPES
from instructions.o_proj import OProj
from instructions.qkv import Qkv
from instructions.shape import Shape
from models.tape import paired_head_rows
from tests.support.fake_machine import FakeMachine, made_up_tensors, small_shape

NAMES = [
    "gqa4_llama3_tied",
    "head24_odd_blocks",
    "head8_many",
    "all_biases_linear_head24",
    "attention_bias",
    "mlp_bias",
    "ragged_sizes",
    "wide_mlp_long_k",
    "qwen2_gqa7",
    "qwen3_head24_bias",
    "granite_biases",
]
CASES = [(name, itemsize) for name in NAMES for itemsize in (2, 4)]
EPS32 = 2.0**-24


def machine_for(name: str, itemsize: int, past: int = 0) -> FakeMachine:
    shape = small_shape(name, itemsize)
    return FakeMachine(shape, past, made_up_tensors(shape))


def fill(machine: FakeMachine, buffer: str, layer: int, seed: int) -> torch.Tensor:
    """Random rows; returned as fp64."""
    rows = machine.rows[buffer, layer]
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)))
    return rows.double()


def rounded(values: torch.Tensor, shape: Shape) -> torch.Tensor:
    return values.float().to(DTYPES[shape.itemsize]).double()


def normed(x: torch.Tensor, machine: FakeMachine, name: str) -> torch.Tensor:
    """round(rms_norm(x, w))"""
    mean = x.square().mean() + machine.shape.config.rms_eps
    return rounded(x / mean.sqrt() * machine.tensors[name].double(), machine.shape)


def linear(x: torch.Tensor, machine: FakeMachine, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """W x + b in fp64, and how far an fp32 sum of it may be off."""
    weight = machine.tensors[f"{module}.weight"].double()
    bias = machine.tensors.get(f"{module}.bias")
    y = weight @ x + (0.0 if bias is None else bias.double())
    terms = (weight * x).abs()
    allowed = 2 * x.numel() * EPS32 * (terms.sum(1) + y.abs() + 1.0)
    if machine.shape.itemsize == 2:
        allowed = allowed + 2**-8 * terms.topk(2, dim=1).values.sum(1)
    return y, allowed


def assert_close(ours: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor) -> None:
    assert ours.shape == wanted.shape
    assert (ours.double() - wanted).abs().sub(allowed).max() <= 0, (ours.double() - wanted).abs().max()


def assert_added(
    ours: torch.Tensor, residual: torch.Tensor, y: torch.Tensor, allowed: torch.Tensor, machine: FakeMachine
) -> None:
    """`ours` is the residual and y, multiplied as the model wants it."""
    multiplier = machine.shape.config.residual_multiplier
    wanted = residual + multiplier * y
    assert_close(ours, wanted, multiplier * (allowed + EPS32 * y.abs()) + EPS32 * residual.abs())


def whole(kind: type[Instruction], machine: FakeMachine, matrix: str, layer: int) -> Instruction:
    """One instruction for all row blocks."""
    return kind(layer, 0, machine.shape.matrix(matrix, layer).blocks)  # type: ignore[call-arg]


def turned(heads: torch.Tensor, past: int, machine: FakeMachine) -> torch.Tensor:
    """RoPE as Hugging Face writes it: x cos + rotate_half(x) sin, for heads [n, head_dim]."""
    half = heads.shape[1] // 2
    cos, sin = machine.model.rope[past, :half].double().unbind(1)  # the table is checked in tests/models/test_rope.py
    low, high = heads[:, :half], heads[:, half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1)


def unpacked(packed: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Heads [n, dp] in packed order as heads [n, head_dim]; the padding must be zero."""
    assert (packed[:, order < 0] == 0).all()
    heads = torch.empty(packed.shape[0], int((order >= 0).sum()))
    heads[:, order[order >= 0]] = packed[:, order >= 0]
    return heads


@pytest.mark.parametrize(("name", "itemsize"), CASES)
@pytest.mark.parametrize("past", [0, 1, 200])
def test_qkv_projects_rotates_and_appends(name: str, itemsize: int, past: int) -> None:
    machine = machine_for(name, itemsize, past)
    shape, config = machine.shape, machine.shape.config
    layer = config.num_layers - 1
    prefix = f"model.layers.{layer}"
    h = normed(fill(machine, "x", layer, 1), machine, f"{prefix}.input_layernorm.weight")
    machine.run(whole(Qkv, machine, "qkv", layer))

    paired = torch.from_numpy(paired_head_rows(config.head_dim)).long()
    plain = torch.arange(shape.head_rows)
    plain[plain >= config.head_dim] = -1
    new = machine.rows["new_kv", layer].view(config.num_kv_heads, 2, shape.head_rows)
    cache = machine.rows["kv", layer].view(config.num_kv_heads, 2, shape.head_rows)
    if shape.head_norms:
        assert cache[:, 0].isnan().all(), "attention writes the cache rows of keys that are normed"
    assert torch.equal(cache[:, int(shape.head_norms) :], new[:, int(shape.head_norms) :])
    ours = {"q": machine.rows["q", layer].view(-1, shape.head_rows), "k": new[:, 0], "v": new[:, 1]}
    for part, packed in ours.items():
        y, allowed = linear(h, machine, f"{prefix}.self_attn.{part}_proj")
        heads, bounds = y.view(-1, config.head_dim), allowed.view(-1, config.head_dim)
        if part != "v" and shape.head_norms:
            check_squares(machine, layer, part, heads, bounds)
            weight = machine.tensors[f"{prefix}.self_attn.{part}_norm.weight"].double()
            heads, bounds = heads * weight, bounds * weight.abs() + EPS32 * (heads * weight).abs()
        if part != "v":
            heads = turned(heads, past, machine)
            bounds = bounds + bounds.roll(config.head_dim // 2, 1) + 4 * EPS32 * heads.abs()  # |cos|, |sin| <= 1
        assert_close(unpacked(packed, plain if part == "v" else paired), heads, bounds)


def check_squares(machine: FakeMachine, layer: int, part: str, heads: torch.Tensor, bounds: torch.Tensor) -> None:
    """The sums of y^2 of the row blocks of heads [n, head_dim] that are queries or keys."""
    config = machine.shape.config
    squares = machine.rows["squares", layer].view(config.num_kv_heads, config.group + 1, -1)
    ours = (squares[:, :-1] if part == "q" else squares[:, -1]).reshape(len(heads), -1).sum(1)
    allowed = ((2 * heads.abs() + bounds) * bounds).sum(1) + config.head_dim * EPS32 * heads.square().sum(1)
    assert_close(ours, heads.square().sum(1), allowed)


@pytest.mark.parametrize(("name", "itemsize"), CASES)
def test_o_proj_adds_to_the_residual(name: str, itemsize: int) -> None:
    machine = machine_for(name, itemsize)
    config = machine.shape.config
    residual, attention = fill(machine, "x", 0, 1), fill(machine, "attn", 0, 2)
    machine.run(whole(OProj, machine, "o", 0))
    heads = rounded(attention, machine.shape).view(config.num_heads, -1)[:, : config.head_dim]  # padding is not multiplied
    y, allowed = linear(heads.flatten(), machine, "model.layers.0.self_attn.o_proj")
    assert_added(machine.rows["x_mid", 0], residual, y, allowed, machine)


@pytest.mark.parametrize(("name", "itemsize"), CASES)
def test_gate_up_makes_swiglu(name: str, itemsize: int) -> None:
    machine = machine_for(name, itemsize)
    h = normed(fill(machine, "x_mid", 0, 3), machine, "model.layers.0.post_attention_layernorm.weight")
    machine.run(whole(GateUp, machine, "gate_up", 0))
    gate, gate_off = linear(h, machine, "model.layers.0.mlp.gate_proj")
    up, up_off = linear(h, machine, "model.layers.0.mlp.up_proj")
    silu = gate * torch.sigmoid(gate)
    # d silu / d gate lies within [-0.1, 1.1]
    allowed = 1.1 * gate_off * (up.abs() + up_off) + silu.abs() * up_off + 16 * EPS32 * (1 + (silu * up).abs())
    assert_close(machine.rows["mlp", 0], silu * up, allowed)


@pytest.mark.parametrize(("name", "itemsize"), CASES)
def test_down_writes_the_next_layers_residual(name: str, itemsize: int) -> None:
    machine = machine_for(name, itemsize)
    layer = machine.shape.config.num_layers - 1
    residual, mlp = fill(machine, "x_mid", layer, 4), fill(machine, "mlp", layer, 5)
    machine.run(whole(Down, machine, "down", layer))
    y, allowed = linear(rounded(mlp, machine.shape), machine, f"model.layers.{layer}.mlp.down_proj")
    assert_added(machine.rows["x", layer + 1], residual, y, allowed, machine)


@pytest.mark.parametrize(("name", "itemsize"), CASES)
def test_embed_copies_the_row(name: str, itemsize: int) -> None:
    machine = machine_for(name, itemsize)
    machine.current = machine.shape.config.vocab_size - 1
    machine.run(Embed(0))
    row = machine.tensors["model.embed_tokens.weight"][machine.current]
    assert torch.equal(machine.rows["x", 0], row.float() * machine.shape.config.embedding_multiplier)


@pytest.mark.parametrize(("name", "itemsize"), CASES)
def test_hand_over_copies_what_was_left(name: str, itemsize: int) -> None:
    shape = small_shape(name, itemsize, tail=True)
    machine = FakeMachine(shape, left=torch.randn(shape.config.hidden_size, generator=torch.Generator().manual_seed(6)))
    machine.run(HandOver(shape.config.num_layers - 1))
    assert torch.equal(machine.rows["x", shape.first_layer], machine.left)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("kind", "matrix", "source", "target"),
    [(Qkv, "qkv", "x", "q"), (OProj, "o", "attn", "x_mid"), (GateUp, "gate_up", "x_mid", "mlp"), (Down, "down", "mlp", "x")],
)
def test_how_rows_are_split_changes_no_bit(
    kind: type[Instruction], matrix: str, source: str, target: str, itemsize: int
) -> None:
    """The same prompt gives the same bits on any number of SMs, so a row must not depend on the run it belongs to."""
    results = []
    for run in (1, 3, 1000):
        machine = machine_for("wide_mlp_long_k", itemsize, past=7)
        for buffer, layer in {(source, 0), ("x", 0), ("x_mid", 0)}:
            fill(machine, buffer, layer, 6)
        blocks = machine.shape.matrix(matrix, 0).blocks
        for first in range(0, blocks, run):
            machine.run(kind(0, first, min(run, blocks - first)))  # type: ignore[call-arg]
        results.append(machine.rows[target, 1 if kind is Down else 0])
    assert not results[0].isnan().any()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_fp32_residual_keeps_what_bf16_would_lose() -> None:
    """Only matrix inputs are rounded: a residual of 256 and an update below bf16's spacing there (2) both survive."""
    machine = machine_for("mha", 2)
    machine.rows["x", 0].fill_(256.0)
    fill(machine, "attn", 0, 8)
    machine.rows["attn", 0].mul_(0.1)
    machine.run(whole(OProj, machine, "o", 0))
    update = machine.rows["x_mid", 0] - 256.0
    assert 0.0 < update.abs().max() < 2.0 and math.isclose(float(update.std()), 0.1, rel_tol=0.5)

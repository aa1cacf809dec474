"""A layer's mixture of experts, launch by launch on a CPU, by the kernels' own source: the model's own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megakernel.prefill.chain import Chain
from megakernel.prefill.compile import POINTERS
from megakernel.prefill.launch import Launch
from megakernel.prefill.plan import EXPERT_KINDS
from megakernel.prefill.reference import permute, route
from models.config import ModelConfig
from models.formats import PLAIN, Formats
from models.packed import numbers
from models.reference import Reference, _rotate
from models.tape import BLOCK_ROWS
from tests.support.configs import MIXTURES, random_tensors, small_config
from tests.support.gluon.kernel import run
from tests.support.prefill_chains import chain_of, packed

LENGTHS = (1, 2, 31, 32, 33, 70)


def begin(chain: Chain, residual: torch.Tensor, kind: str, layer: int, start: int = 0) -> None:
    """What the kernel before would have left."""
    norm = chain.plan.tape.norm_offset(chain.plan.tape.norm_before(kind), layer)
    count, hidden = residual.shape
    weights = chain.state.constants[norm : norm + hidden]
    chain.words.copy_(torch.tensor([start, count]))
    chain.residual[:count] = residual
    chain.squares[:count].zero_()
    chain.squares[:count, 0] = residual.square().sum(1)
    chain.normed[:count, :hidden] = (residual * weights).bfloat16()


def both(config: ModelConfig, seed: int, formats: Formats = PLAIN) -> tuple[Chain, Reference]:
    """A chain, and the model with what its weights stand for in bf16."""
    model = packed(config, random_tensors(config, seed), formats)
    untied, tensors = numbers(model)
    return chain_of(model), Reference(untied, {key: found.bfloat16().float() for key, found in tensors.items()})


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        *(pytest.param(name, PLAIN, marks=[pytest.mark.full] if name == "olmoe" else []) for name in MIXTURES),
        pytest.param("mixtral", Formats("fp8"), marks=pytest.mark.full),
        ("granitemoe", Formats("int4", "int4")),
    ],
    ids=lambda value: getattr(value, "body", value),
)
def test_a_layer_is_the_model_s(name: str, formats: Formats) -> None:
    """From the residual stream after attention to the next layer's input; rows beyond the chunk are not looked at."""
    config = small_config(name)
    chain, reference = both(config, 3, formats)
    generator, elsewhere = torch.Generator().manual_seed(1), 0
    for length in LENGTHS:
        for values in chain.tensors.values():
            if values.dtype != torch.int32 and values.dim() > 1:
                values[(length if values.shape[0] == chain.plan.chunk else 0) :] = torch.nan
        for what, width in (("normed", config.hidden_size), ("rows", config.hidden_size), ("units", config.intermediate_size)):
            chain.tensors[what][:, width:] = 0  # padding is zero from the beginning and never written
        residual = torch.randn(length, config.hidden_size, generator=generator)
        begin(chain, residual, "router", 1)
        following = chain.plan.tape.norm_offset("final")
        for launch in chain.mlp(64, 1, following):
            run(launch)
        for what, kind, part in (("units", "expert_gate_up", 2), ("outputs", "expert_down", 1)):
            slots, columns = length * config.experts_per_token, chain.plan.tape.matrix(kind).rows // part
            written = torch.isfinite(chain.tensors[what])
            assert written[:slots, :columns].all() and not written[slots:, : config.intermediate_size].any()
            assert not chain.tensors[what][:slots, columns:].nan_to_num().any(), "padding stays"
        scores = chain.tensors["scores"][:length, : config.num_experts]
        experts, shares = route(scores, config.experts_per_token, config.renormalised)
        places, ends = permute(experts, config.num_experts)
        assert torch.equal(chain.tensors["places"][:length].long(), places)
        assert torch.equal(chain.tensors["ends"].long(), ends)
        torch.testing.assert_close(chain.tensors["shares"][:length], shares)
        wanted = residual + reference._mixture(1, residual) * config.residual_multiplier
        found = chain.residual[:length]
        same = (experts == route(reference._products(1, "router", residual)[0], config.experts_per_token, True)[0]).all(1)
        elsewhere += int((~same).sum())
        torch.testing.assert_close(found[same], wanted[same], rtol=0.02, atol=0.02 * float(wanted.square().mean().sqrt()))
        weights = chain.state.constants[following : following + config.hidden_size]
        assert torch.equal(chain.normed[:length, : config.hidden_size], (found * weights).bfloat16())
        torch.testing.assert_close(chain.squares[:length].sum(1), found.square().sum(1))
    assert elsewhere <= 0.05 * sum(LENGTHS), "rounding sends few tokens to other experts, or in another order"


@pytest.mark.parametrize(("biased", "body"), [(False, "plain"), (True, "plain"), (False, "fp8")])
def test_queries_and_keys_normed_together_are_the_model_s(biased: bool, body: str) -> None:
    """OLMoE's: rotated queries, and keys and values in the cache, from a position that is not the first."""
    config, start, length = replace(small_config("olmoe"), qkv_bias=biased), 20, 40
    chain, reference = both(config, 4, Formats(body))
    residual = torch.randn(start + length, config.hidden_size, generator=torch.Generator().manual_seed(2))
    reference._attention(1, residual, reference._angles(start + length))
    begin(chain, residual[start:], "qkv", 1, start)
    chain.tensors["products"].fill_(torch.nan)
    for launch in chain.heads(64, 1):
        run(launch)
    dimensions, row_map = chain.plan.dimensions, torch.from_numpy(chain.plan.tape.matrix("qkv").row_map)
    held = (row_map[: dimensions.head_rows] >= 0).nonzero().flatten()  # rows of a head that turns; a value's are in their order
    order = row_map[held].long()
    query = reference._norm(reference._products(1, "qkv", residual)[0], "model.layers.1.self_attn.q_norm")
    cosine, sine = reference._angles(start + length)
    queries = _rotate(query[start:].view(length, -1, config.head_dim).transpose(0, 1), (cosine[start:], sine[start:]))
    for head in range(config.num_heads):
        found = chain.queries[:length].view(length, config.num_heads, -1)[:, head, held].float()
        torch.testing.assert_close(found, queries[head][:, order], rtol=0.02, atol=0.02)
    for value, wanted in enumerate((reference._keys[1], reference._values[1])):
        for head in range(config.num_kv_heads):
            page = chain.state.cache[dimensions.cache_page(1, head, value)]
            lines = page.view(dimensions.head_tiles, dimensions.page_positions, 64)[:, start : start + length]
            rows = lines.transpose(0, 1).flatten(1).float()
            found, of_head = (rows[:, held], wanted[head, start:, order]) if value == 0 else (rows, wanted[head, start:])
            torch.testing.assert_close(found[:, : config.head_dim], of_head, rtol=0.02, atol=0.02)


def test_every_expert_of_every_layer_is_where_its_box_begins() -> None:
    """Rows of gates, ups and downs as the boxes have them, one after another."""
    config = small_config("mixtral")
    chain = chain_of(packed(config, random_tensors(config, seed=5)))
    tape, mixture = chain.plan.tape, chain.mixture
    assert mixture is not None
    for layer in range(config.num_layers):
        for kind in ("expert_gate_up", "expert_down"):
            box = mixture.weight_box(kind, layer)
            whole = torch.as_strided(box.base, box.shape, box.strides)[0]
            for expert in range(config.num_experts):
                matrix = tape.matrix(kind, layer, expert)
                mine = whole[expert * matrix.blocks : (expert + 1) * matrix.blocks]
                assert torch.equal(mine.flatten(), chain.state.weights[matrix.first_page :][: matrix.pages].flatten())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_chunk_s_launches(name: str) -> None:
    """Of each layer but the last all kernels in their order, of that its keys and values; tensors are what kernels are compiled
    for, and every kernel but the first may begin early."""
    config = small_config(name)
    chain = chain_of(packed(config, random_tensors(config, seed=6)))
    launches = list(chain.launches(64))
    heads = ["read_single", "read_heads"] if name == "olmoe" else ["read_product"]
    routing = ["read_single", "read_choice", "read_places", "read_rows", "read_experts", "read_experts", "read_sum"]
    wanted = ["read_embedding", *[*heads, "read_attention", "read_product", *routing] * (config.num_layers - 1), *heads]
    assert [launch.kernel.fn.__name__ for launch in launches] == wanted
    assert [launch.early for launch in launches] == [False, *[True] * (len(launches) - 1)]
    types = {torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    own = {"read_single": {"out": "*fp32"}}
    for launch in launches:
        known = POINTERS | own.get(launch.kernel.fn.__name__, {})
        assert len(launch.arguments) == len(launch.kernel.arg_names)
        for what, value in zip(launch.kernel.arg_names, launch.arguments, strict=True):
            if isinstance(value, torch.Tensor):
                assert known[what] == types[value.dtype] and value.data_ptr() % 16 == 0 and value.is_contiguous(), what


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_quantised_matrices_are_widened_before_they_are_read(name: str) -> None:
    """Of experts right before their product, to the one buffer; QKV whose heads are normed later right before its own, to one
    of two buffers in turn, and not before all that came earlier has ended."""
    config = replace(small_config(name), num_layers=4)
    chain = chain_of(packed(config, random_tensors(config, seed=7), Formats("fp8")))
    launches = list(chain.launches(64))
    names = [launch.kernel.fn.__name__ for launch in launches]
    experts = [at for at, kernel in enumerate(names) if kernel == "read_experts"]
    assert len(experts) == 2 * (config.num_layers - 1) and [names[at - 1] for at in experts] == ["widen_experts"] * len(experts)
    for number, at in enumerate(experts):
        layer, kind = divmod(number, 2)
        matrix, widening, product = chain.plan.tape.matrix(EXPERT_KINDS[kind], layer), *map(given, launches[at - 1 : at + 1])
        assert (widening["first_page"], widening["scales"]) == (matrix.first_page, matrix.scale_offset)
        assert (widening["pages"], widening["groups"]) == (matrix.pages, config.num_experts)
        assert widening["widened"] is chain.tensors["widened"] is product["w"].base
        assert product["w"].shape[1:3] == [config.num_experts * matrix.blocks, -(-matrix.columns // 64) * BLOCK_ROWS]
    products = [at for at, kernel in enumerate(names) if kernel == "read_single" and given(launches[at])["out"].shape[1] > 32]
    assert len(products) == (config.num_layers if name == "olmoe" else 0)
    for layer, at in enumerate(products):
        before = at - 1 if layer else names.index("widen_matrix")
        widening, matrix = given(launches[before]), chain.plan.tape.matrix("qkv", layer)
        assert (widening["first_page"], widening["pages"]) == (matrix.first_page, matrix.pages)
        assert launches[before].early == (layer == 0) and given(launches[at])["layer"] == layer % 2
        assert widening["widened"].data_ptr() == chain.widened["qkv"][layer % 2].data_ptr()


def given(launch: Launch) -> dict[str, Any]:
    """A launch's arguments by their names."""
    return dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))

"""What the kernel takes from a program and its shape: true of every layer, within what is proven, and all of it listed."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import fields
from random import Random
from typing import Any

import pytest

from instructions.codec import MAX_SIGNALS, NONE, Word
from instructions.lm_head import BEST_FIELDS
from instructions.sample import Sample
from instructions.shape import ANNOUNCED
from megakernel.device.kernel import megakernel
from megakernel.geometry import (
    STAGING_BYTES,
    Experts,
    Geometry,
    Matrix,
    Places,
    Rows,
    make_bucket,
    make_geometry,
    pages_bytes,
)
from models.config import ModelConfig
from models.formats import Formats
from scheduler.build import build_program, make_shape
from scheduler.check.machine import shared_bytes
from scheduler.limits import RESERVED, RESERVED_QUANTISED
from scheduler.program import Program
from tests.mutations.kinds import plant
from tests.support.compile_cases import MODELS, ROOT

BIASED = ModelConfig(
    hidden_size=600, intermediate_size=1100, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=24, vocab_size=333,
    qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
NORMED = dataclasses.replace(BIASED, family="qwen3")  # heads are normed
CONFIGS = {
    "biased": BIASED,
    "normed": NORMED,
    "experts": dataclasses.replace(NORMED, family="olmoe", intermediate_size=520, num_experts=5, experts_per_token=2),
    "one layer": dataclasses.replace(BIASED, num_layers=1),
    "llama-3.2-1b": MODELS["llama-3.2-1b"],
    "bundled": MODELS["bundled"],
}


def make(config: ModelConfig, sms: int = 12, **options: Any) -> Program:
    return build_program(make_shape(config, sms=sms, capacity=512, bucket=512, **options), sms)


def at(places: Places, layer: int) -> int:
    """Where the kernel looks; NONE where there is nothing in any layer."""
    return places.first + layer * places.stride if places.first >= 0 else NONE


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_lies_where_the_strides_say(name: str) -> None:
    program = make(CONFIGS[name])
    shape, geometry = program.shape, make_geometry(program)
    tape = shape.tape
    for layer in range(shape.config.num_layers):
        assert tape.norm_offset("attention", layer) == at(geometry.qkv.norm, layer)
        of_hidden = "router" if shape.config.num_experts else "gate_up"
        assert tape.norm_offset("mlp", layer) == at(getattr(geometry, of_hidden).norm, layer)
        for kind in tape.kinds:
            matrix, here = getattr(geometry, kind), tape.matrix(kind, layer)
            slots = shape.config.experts_per_token if kind == "expert_down" else 1
            assert here.bias_offset == at(matrix.bias, layer)
            assert (here.columns, here.pages_per_block * slots) == (matrix.columns, matrix.pages)
        for kind in [kind for kind in tape.kinds if kind.startswith("expert_")]:
            apart = getattr(geometry.experts, f"{kind.removeprefix('expert_')}_apart")
            firsts = [tape.matrix(kind, layer, expert).first_page for expert in range(shape.config.num_experts)]
            assert firsts == [firsts[0] + expert * apart for expert in range(len(firsts))]
        assert tape.matrix("qkv", layer).head_norm_offset == at(geometry.head_norm, layer)
    head, embedding = tape.matrix("head"), tape.matrix("embedding")
    assert (geometry.head.columns, geometry.head.pages) == (head.columns, head.pages_per_block)
    assert geometry.head.norm.first == tape.norm_offset(tape.norm_before("head"))
    assert geometry.head.bias.first == head.bias_offset
    assert geometry.embedding == (embedding.first_page, embedding.pages_per_block)
    for buffer in set(ANNOUNCED) - {"partial"}:
        place = (*getattr(geometry, buffer), geometry.second)
        assert place == shape.buffers[buffer][2:] or not shape.buffers[buffer].rows
    bucket = make_bucket(program)
    partial = shape.buffers["partial"]
    assert (geometry.partial, bucket.partial_stride, bucket.partial_second) == (partial.base, partial.stride, partial.second)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_kernel_serves_every_bucket_its_tail_and_every_length_of_cache(name: str) -> None:
    """What is compiled is the same; what is not, is told at run time."""
    config, slices = CONFIGS[name], (1, 2, 5)
    shapes = [
        make_shape(config, sms=12, capacity=capacity, bucket=capacity // 2, slices=count, tail=tail)
        for capacity in (128, 384, 512)
        for count in slices
        for tail in (False, True)
    ]
    programs = [build_program(shape, 12) for shape in shapes]
    assert len({make_geometry(program) for program in programs}) == 1
    assert {make_bucket(program).slices for program in programs} == set(slices)
    assert len({make_bucket(program).head_pages for program in programs}) == 3


@pytest.mark.parametrize("body", ["int4", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("name", ["biased", "experts", "llama-3.2-1b"])
def test_the_memory_of_quantised_weights_is_that_which_is_proven(name: str, body: str) -> None:
    """And sums and words beside pages lie at multiples of their sizes, as the kernel counts them."""
    program = make(CONFIGS[name], formats=Formats(body, "q8_0"))
    geometry = make_geometry(program)
    assert pages_bytes(geometry) + RESERVED_QUANTISED == shared_bytes(program.shape, program.ring)
    assert geometry.staging_pages * STAGING_BYTES % geometry.beside_bytes == 0
    assert (geometry.staging_pages - geometry.sums_pages) % max(1, geometry.sums_pages) == 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sms", [1, 12, 132])
def test_memory_and_slots_are_those_that_are_proven(name: str, sms: int) -> None:
    program = make(CONFIGS[name], sms)
    geometry = make_geometry(program)
    assert pages_bytes(geometry) + RESERVED == shared_bytes(program.shape, program.ring)
    assert geometry.best_slots >= sms, "slots are proven to be fewer than SMs"
    assert max(geometry.copies_now, geometry.copies_ahead) <= geometry.ring
    assert BEST_FIELDS == 2, "the kernel stores a score and its row"


def test_the_end_is_what_sample_signals_whatever_embed_waits_for() -> None:
    program = make(MODELS["bundled"])
    random = Random(1)
    for kind in ("end_not_awaited", "end_awaited_second", "other_end_awaited"):
        mutant = plant(kind, program, random)
        assert mutant is not None
        assert make_bucket(mutant).end_counter == make_bucket(program).end_counter
    renamed = plant("renamed_end", program, random)
    assert renamed is not None
    assert make_bucket(renamed).end_counter != make_bucket(program).end_counter
    words = program.words.copy()
    words[words[:, Word.OPCODE] == Sample.OPCODE, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS] = NONE
    with pytest.raises(ValueError, match="signals no counter at a token's end"):
        make_bucket(dataclasses.replace(program, words=words))


def test_a_program_for_other_weights_has_no_geometry() -> None:
    with pytest.raises(ValueError, match="weights of 4 bytes: the kernel runs bf16"):
        make_geometry(make(MODELS["bundled"], itemsize=4))


def test_every_number_is_listed_with_its_proof() -> None:
    """All fields of the geometry, all arguments of the kernel, all words of a record, in the tables of docs/proof.md."""
    text = (ROOT / "docs" / "proof.md").read_text(encoding="utf-8")
    section = text.split("## Every number that the kernel takes")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    wanted = (
        {field.name for field in fields(Geometry)}
        | {*Matrix._fields, *Places._fields, *Rows._fields, *Experts._fields}
        | set(megakernel.arg_names) - {"S"}
        | set(Word.__members__)
    )
    assert set(listed) >= wanted, f"not listed: {sorted(wanted - set(listed))}"
    assert len(listed) == len(set(listed)), "listed twice"

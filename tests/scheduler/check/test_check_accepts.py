"""Soundness the other way: whatever the scheduler makes is accepted, and runs to its end in any order of steps.

Programs of real models; of random models, machines and policies; and of random DAGs, where rows are cut at random, and
instructions placed on random SMs in a random order that the dependencies allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from instructions.attention import Attention
from instructions.base import Instruction
from instructions.combine import Combine
from instructions.down import Down
from instructions.embed import Embed
from instructions.gate_up import GateUp
from instructions.hand_over import HandOver
from instructions.lm_head import LmHead
from instructions.matvec import DTYPES
from instructions.o_proj import OProj
from instructions.qkv import Qkv
from instructions.sample import Sample
from instructions.shape import HELD_PAGES, Shape
from models.config import ModelConfig
from models.families import PRESETS
from models.packed import pack
from models.random_weights import RandomWeights
from scheduler.build import make_shape, schedule
from scheduler.check import check
from scheduler.dependencies import Dependencies, members
from scheduler.errors import ScheduleError
from scheduler.limits import MAX_SMS
from scheduler.place import POLICIES, Queues
from scheduler.program import Program
from tests.mutations.programs import CAPACITY, Base
from tests.mutations.trial import Trial

RUNS = 5
RUN_INSTRUCTIONS = 60  # larger programs are checked, but not run
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """A small network of any proportions."""
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return ModelConfig(
        hidden_size=draw(st.integers(1, 80)),
        intermediate_size=draw(st.integers(1, 300)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(1, 300)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        family=draw(st.sampled_from(["llama", "qwen3"])),  # qwen3 norms heads
        max_position=CAPACITY,
    )


@st.composite
def shapes(draw: st.DrawFn, sms: int) -> Shape:
    """A shape for a number of SMs."""
    return make_shape(
        draw(configs()),
        sms=sms,
        capacity=CAPACITY,
        bucket=draw(st.integers(1, CAPACITY)),
        itemsize=draw(st.sampled_from((2, 4))),
        slices=draw(st.one_of(st.none(), st.integers(1, 6))),
        tail=draw(st.booleans()),
    )


rings = st.one_of(st.none(), st.integers(HELD_PAGES, 13))


def scheduled(shape: Shape, sms: int, policy: str, ring: int | None) -> Program:
    """The unproven program; skips what the scheduler itself refuses, which is a matter of its record format."""
    try:
        return schedule(shape, sms, policy, ring)
    except ScheduleError as error:
        assert "groups of readers" in str(error) or "waits; a record holds" in str(error), error
        assume(False)
        raise


def assert_sound(program: Program, seed: int) -> None:
    """Accepted, and where it is small, the same bits under every kind of interleaving."""
    report = check(program)
    assert report.valid, "\n".join(line for finding in report.findings for line in finding.lines())
    if len(program.words) <= RUN_INSTRUCTIONS:
        config, dtype = program.shape.config, DTYPES[program.shape.itemsize]
        base = Base(program, pack(RandomWeights(config, seed), config, dtype, CAPACITY))
        assert Trial(base, Random(seed)).fault(program, RUNS) is None


@settings(SLOW, max_examples=30)
@given(data=st.data(), sms=st.integers(1, MAX_SMS), policy=st.sampled_from(sorted(POLICIES)), ring=rings)
def test_programs_of_random_models_are_accepted(data: st.DataObject, sms: int, policy: str, ring: int | None) -> None:
    program = scheduled(data.draw(shapes(sms)), sms, policy, ring)
    report = check(program)
    assert report.valid, "\n".join(line for finding in report.findings for line in finding.lines())


@settings(SLOW, max_examples=15)
@given(
    data=st.data(),
    sms=st.one_of(st.integers(1, 12), st.integers(1, MAX_SMS)),
    policy=st.sampled_from(sorted(POLICIES)),
    ring=rings,
)
def test_programs_of_random_models_run_to_the_end(data: st.DataObject, sms: int, policy: str, ring: int | None) -> None:
    program = scheduled(data.draw(shapes(sms)), sms, policy, ring)
    assert_sound(program, data.draw(st.integers(0, 2**16)))


def random_runs(random: Random, parts: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Row blocks cut at random into at most about `most` runs, none across a part's edge."""
    total, first = sum(parts), 0
    for part in parts:
        cuts = sorted(random.sample(range(1, part), random.randrange(min(part, max(1, most * part // total)))))
        edges = [0, *cuts, part]
        yield from ((first + start, stop - start) for start, stop in zip(edges, edges[1:], strict=False))
        first += part


def random_lowering(random: Random, shape: Shape, sms: int) -> list[Instruction]:
    """The same token as `scheduler.lower` makes, cut otherwise, in an order shuffled within each operation."""
    config, program = shape.config, list[Instruction]()
    heads = range(config.num_kv_heads)
    for layer in range(shape.first_layer, config.num_layers):
        parts = [config.group * shape.head_blocks, 2 * shape.head_blocks] * config.num_kv_heads
        program += [Qkv(layer, *run) for run in random_runs(random, parts, 2 * sms)]
        program += [Attention(layer, head, index) for head in heads for index in range(shape.slices)]
        program += [Combine(layer, head) for head in heads if shape.slices > 1]
        for kind, name in ((OProj, "o"), (GateUp, "gate_up"), (Down, "down")):
            program += [kind(layer, *run) for run in random_runs(random, [shape.matrix(name, layer).blocks], 2 * sms)]
    runs = list(random_runs(random, [shape.matrix("head").blocks], sms))
    lm_heads = [LmHead(0, *run, slot) for slot, run in enumerate(runs)]
    grouped = [list(run) for _, run in groupby(program, key=lambda item: (item.OPCODE, item.layer))]
    for run in grouped:
        random.shuffle(run)
    opening = HandOver(shape.first_layer) if shape.tail else Embed(0)
    return [opening, *(item for run in grouped for item in run), *lm_heads, Sample(0, len(lm_heads))]


def random_placement(random: Random, deps: Dependencies, sms: int) -> Queues:
    """Random SMs, and a random order in which nothing stands before what it waits for."""
    producers = [{j for wait in waits if not wait.lag for j in members(deps.counters[wait.counter])} for waits in deps.waits]
    queues: Queues = [[] for _ in range(sms)]
    open_, done = set(range(len(producers))), set[int]()
    while open_:
        i = random.choice([i for i in sorted(open_) if producers[i] <= done])
        open_.remove(i)
        done.add(i)
        queues[random.randrange(sms)].append(i)
    return queues


@settings(SLOW, max_examples=15)
@given(data=st.data(), sms=st.integers(1, 10), seed=st.integers(0, 2**16), ring=rings)
def test_random_dags_are_accepted_and_run(data: st.DataObject, sms: int, seed: int, ring: int | None) -> None:
    random = Random(seed)
    lowering = patch("scheduler.build.lower", lambda shape, sms: random_lowering(random, shape, sms))
    placement = patch.dict(POLICIES, random=lambda program, shape, deps, sms: random_placement(random, deps, sms))
    with lowering, placement:
        program = scheduled(data.draw(shapes(sms)), sms, "random", ring)
    assert_sound(program, seed)


@pytest.mark.parametrize(
    ("sms", "policy"),
    [*((132, policy) for policy in sorted(POLICIES)), (1, "zigzag"), (78, "critical_path"), (MAX_SMS, "balanced")],
)
def test_the_1b_programs_are_accepted(sms: int, policy: str) -> None:
    config = PRESETS["llama-3.2-1b"]
    for tail in (False, True):
        program = schedule(make_shape(config, sms=sms, capacity=4096, bucket=2048, tail=tail), sms, policy, None)
        assert check(program).valid


@pytest.mark.parametrize("preset", ["llama-3.2-3b", "llama-3-8b"])
def test_other_real_models_are_accepted(preset: str) -> None:
    program = schedule(make_shape(PRESETS[preset], sms=132, capacity=1024, bucket=1024), 132, "zigzag", None)
    assert check(program).valid

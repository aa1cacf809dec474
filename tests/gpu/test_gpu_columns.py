"""Several columns on the GPU: every token as one column alone has it, bit for bit, and the same text with drafts and without.

What one column decodes, launch by launch, is the truth: its tokens, the logits of every position, the rows of the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch

from bench.column_rig import ColumnRig
from bench.draft_tasks import prompts_of, read_tasks
from bench.rig import Rig, device_sms
from bench.rig import programs_of as engine_programs_of
from instructions.base import GREEDY, SamplingState
from instructions.drafts import look_up
from megakernel.control_block import SEQUENCES, Progress
from megakernel.engine import Engine
from megakernel.gpu.backend import CHUNK, GpuBackend
from megakernel.gpu.columns import spoilt
from megakernel.gpu.drafting import DraftingBackend
from megakernel.loading import load_engine
from megakernel.prefill.prefill import Prefill
from megakernel.request import SamplingParams
from models.checkpoint import open_checkpoint
from models.formats import Formats
from models.packed import PackedModel, pack
from models.smollm2 import fetched
from scheduler.buckets import BucketPrograms
from tests.megakernel.drafted import PROMPTS, Request, compare, draw_requests
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import CASES, ITEMSIZE, PRESET_CASES, Case, CasePrograms, programs_of

pytestmark = pytest.mark.gpu
SAMPLED = SamplingState(temperature=1.0, top_k=0, top_p=1.0, seed=5)
CUT = SamplingState(temperature=0.9, top_k=40, top_p=0.9, seed=6)
# Pages of 128 and of 64 positions, heads that are normed, biases and padded heads, a hidden state that is normed in two passes.
NAMES = ["bundled", "head128", "qwen3", "all_biases_linear_head24", "llama-3-8b"]
QUANTISED = {
    f"{name} in {weights}": (name, Formats(weights, weights)) for name, weights in (
        ("bundled", "fp8"), ("llama-3-8b", "fp8"), ("bundled", "int4"), ("head128", "int4"), ("llama-3-8b", "int4"))
}  # fmt: skip
DRAWN = [*((name, GREEDY) for name in (*NAMES, *QUANTISED)), ("bundled", SAMPLED), ("bundled", CUT)]


def case_of(name: str) -> Case:
    if name in QUANTISED:
        plain, formats = QUANTISED[name]
        return replace(case_of(plain), formats=formats)
    return CASES[name] if name in CASES else PRESET_CASES[name]


@functools.cache
def model_of(name: str) -> PackedModel:
    case = case_of(name)
    return pack(weights_of(case.name), config_of(case.name), torch.bfloat16, case.capacity, case.formats)


def columns_of(name: str, sequences: int = 1, depth: int = 1) -> BucketPrograms:
    """A case's programs with so many columns."""
    case = case_of(name)
    sizes = (config_of(case.name), device_sms(), case.capacity, ITEMSIZE)
    return CasePrograms(*sizes, formats=case.formats, sequences=sequences, depth=depth, buckets=case.buckets)


class Truth:
    """What one column makes of a prompt: all tokens, the logits that each was chosen from, the cache."""

    def __init__(self, name: str, prompt: Sequence[int], positions: int, sampling: SamplingState = GREEDY) -> None:
        rig = Rig(model_of(name), programs_of(case_of(name), device_sms()))
        rig.start(prompt, sampling)
        self.prompt, self.logits = list(prompt), []
        self.tokens = list(prompt)
        for position in range(positions):
            chosen = rig.decode(position, 1)
            self.logits.append(rig.program(position).logits())
            self.tokens += chosen if position + 1 >= len(prompt) else []
        self.rows = rig.cache_rows(positions)


@functools.cache
def truth_of(name: str, sampling: SamplingState = GREEDY) -> Truth:
    case = case_of(name)
    return Truth(name, random_tokens(case.name, 40), min(case.positions, 150), sampling)


@pytest.mark.parametrize(("name", "sampling"), DRAWN, ids=[*NAMES, *QUANTISED, "sampled", "cut"])
def test_drafts_of_which_some_are_right(name: str, sampling: SamplingState) -> None:
    """Steps of 8 columns one by one, around the edges of pages, slices and buckets: tokens, logits and cache bit for bit."""
    true, positions = truth_of(name, sampling), len(truth_of(name, sampling).logits)
    rig = ColumnRig(model_of(name), columns_of(name, depth=8), programs_of(case_of(name), device_sms()))
    rig.join(0, true.prompt, positions, sampling)
    rig.give(len(true.prompt), spoilt(true.tokens[len(true.prompt) :], 0.7, rig.programs.config.vocab_size, seed=1))
    steps, found = 0, list[int]()
    while rig.positions[0] < positions:
        before = rig.positions[0]
        made, [landed] = rig.run(1)
        assert made == 1 and landed.position > before
        steps += made
        logits = rig.program(before).logits
        for place in range(landed.position - before):
            assert torch.equal(logits(place), true.logits[before + place]), f"position {before + place}, column {place}"
        found += landed.tokens
    assert [true.tokens[0], *found] == true.tokens
    assert steps < 0.7 * positions, f"{steps} steps for {positions} positions"
    cache = rig.state.cache.view(torch.int16).view(-1, rig.programs.shape(rig.state.capacity).head_pages, *page_shape(rig))
    rows = cache.transpose(1, 2).flatten(2, 3)[:, :, :positions].cpu()
    assert torch.equal(rows, true.rows)


def page_shape(rig: ColumnRig) -> tuple[int, int, int]:
    shape = rig.programs.shape(rig.state.capacity)
    return shape.head_tiles, shape.page_positions, 64


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_drafts_that_are_looked_up_are_those_of_the_specification(depth: int) -> None:
    """Step by step: what stands behind the last token, and in how many columns."""
    case, true = CASES["bundled"], truth_of("bundled")
    prompt = true.tokens[:60] * 2  # so that something repeats
    alone = Rig(model_of("bundled"), programs_of(case, device_sms()))
    alone.start(prompt)
    wanted = alone.decode(0, 200)[len(prompt) - 1 :]
    rig = ColumnRig(model_of("bundled"), columns_of("bundled", depth=depth), programs_of(case, device_sms()))
    rig.join(0, prompt, 200)
    tokens, drafted = prompt[:1], 0
    while rig.positions[0] < 200:
        _, [landed] = rig.run(1)
        tokens += landed.tokens
        position = landed.position
        used = int(rig.state.control[SEQUENCES + Progress.USED])
        end = min(200, rig.programs.cut(position - 1, 200)[1])
        shape = rig.programs.shape(rig.programs.sizes[rig.programs.place(min(position, 199) - 1)])
        most = shape.usable(position, end)
        if position + 1 < len(prompt):
            assert used == min(most, len(prompt) - position)
        elif most > 1:
            drafts = look_up(tokens, most - 1)
            assert used == 1 + len(drafts)
            behind = rig.state.tokens[position + 1 : position + used].tolist()
            assert behind == drafts
            drafted += len(drafts)
    assert tokens[len(prompt) :] == wanted
    assert drafted > 0


def test_a_stop_token_ends_a_step() -> None:
    true = truth_of("bundled")
    stop = true.tokens[len(true.prompt) + 5]
    rig = ColumnRig(model_of("bundled"), columns_of("bundled", depth=8), programs_of(CASES["bundled"], device_sms()))
    rig.join(0, true.prompt, 130, stop_tokens=[stop])
    rig.give(len(true.prompt), true.tokens[len(true.prompt) :])
    [found] = rig.finish()
    first = true.tokens.index(stop, len(true.prompt))
    assert found[-1] == stop and len(found) == first
    assert rig.run(4) == (0, rig.run(4)[1]), "nothing is decoded after it"


@pytest.mark.parametrize(
    ("sequences", "name"),
    [
        *((count, "bundled") for count in (2, 4, 8)),
        (2, "bundled in fp8"),
        (4, "bundled in int4"),
        (8, "bundled in int4"),
        (2, "llama-3-8b"),
        (4, "llama-3-8b in fp8"),
    ],
)
def test_sequences_share_steps_and_nothing_else(sequences: int, name: str) -> None:
    """Of different lengths and samplings, joining and leaving at random: each its own tokens, as alone."""
    random, case = Random(sequences), case_of(name)
    alone = Rig(model_of(name), programs_of(case, device_sms()))
    rig = ColumnRig(model_of(name), columns_of(name, sequences), programs_of(case, device_sms()))
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    begun = 0
    for _ in range(4 * sequences + 20):
        free = [number for number in range(sequences) if rig.positions[number] >= rig.ends[number]]
        if free and begun < 3 * sequences and (random.random() < 0.7 or len(free) == sequences):
            number, begun = random.choice(free), begun + 1
            prompt = random_tokens(case.name, random.randrange(1, 100), seed=begun)
            sampling = [GREEDY, SAMPLED, CUT][begun % 3]._replace(seed=begun)
            end = len(prompt) + random.randrange(1, 90)
            alone.start(prompt, sampling)
            wanted[number] = alone.decode(0, end)[len(prompt) - 1 :]
            found[number] = []
            rig.join(number, prompt, end, sampling)
            first = len(prompt)
            found[number] = [-first]
        _, landed = rig.run(random.randrange(1, 40))
        for number, each in enumerate(landed):
            if number in found:
                found[number] += each.tokens
                if rig.positions[number] >= rig.ends[number]:
                    prompt_length = -found[number][0]
                    assert found.pop(number)[1:][prompt_length - 1 :] == wanted.pop(number)
    assert begun > sequences


def test_texts_are_the_same_with_drafts_and_without() -> None:
    """The product's engine on 200 requests: prompts read by prefill, greedy and sampled, text that repeats among it."""
    capacity = config_of("bundled").max_position
    model = pack(weights_of("bundled"), config_of("bundled"), torch.bfloat16, capacity)
    device, programs = torch.device("cuda", 0), engine_programs_of(model)
    drafted = BucketPrograms(model.config, programs.sms, capacity, ITEMSIZE, depth=8)
    plain = Engine(GpuBackend(model, programs, device, Prefill), chunk=CHUNK)
    drafting = Engine(DraftingBackend(model, engine_programs_of(model), drafted, device, Prefill), chunk=CHUNK)
    with plain, drafting:
        found = compare((plain, drafting), draw_requests(4, PROMPTS, model.config.vocab_size, 180, 120))
    print(f"{found.tokens} tokens in {found.steps} steps, {found.stopped} ended at a stop token")
    assert found.wrong == []
    assert found.requests == PROMPTS == 2 * found.sampled
    assert found.steps < found.tokens, "some drafts were right"


@pytest.mark.smollm2
def test_answers_of_a_real_model_are_the_same_with_drafts_and_without() -> None:
    """Every task of the bench in its chat form, greedy and sampled, 200 in all."""
    model = str(fetched())
    prompts = prompts_of(open_checkpoint(model), read_tasks())
    requests = []
    for number in range(PROMPTS):
        sampling = SamplingParams(temperature=[0.0, 0.7][number % 2], top_p=[1.0, 0.9][number % 4 == 3], seed=number)
        requests.append(Request(prompts[number // 2 % len(prompts)], 160, sampling))
    with (
        load_engine(model, "gpu", capacity=2048) as plain,
        load_engine(model, "gpu", capacity=2048, speculate=7) as drafting,
    ):
        found = compare((plain, drafting), requests)
    print(f"{found.tokens} tokens in {found.steps} steps")
    assert found.wrong == []
    assert found.requests == PROMPTS and found.steps < 0.9 * found.tokens

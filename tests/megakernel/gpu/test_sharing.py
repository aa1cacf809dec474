"""Several sequences on the GPU backend with a fake device: joins, leaves, stops, faults, kept prefixes, and an interrupt at any
line of its code.  The fake's tokens hang on every row of a sequence's cache, so one row of another's would tell."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megakernel.control_block import SEQUENCES, Control, Progress
from megakernel.engine import Engine, Generation
from megakernel.errors import NotNumbers
from megakernel.gpu import machine, sharing, slot
from megakernel.gpu.backend import CHUNK
from megakernel.gpu.columns import ColumnFlight, ColumnProgram
from megakernel.gpu.errors import KernelFault
from megakernel.gpu.sharing import SharingBackend
from megakernel.request import SamplingParams
from scheduler.buckets import BucketPrograms
from tests.megakernel.gpu.test_backend import CAPACITY, SMS, expected, made_up_model, programs
from tests.support.compile_cases import MODELS
from tests.support.fake_device import FakePrefill, fake_device
from tests.support.interrupting import Interrupting

LINES = int(os.environ.get("MEGAKERNEL_INTERRUPT_LINES", "29"))  # from one line that is interrupted to the next; 1: all


@functools.cache
def shared(count: int) -> BucketPrograms:
    return BucketPrograms(MODELS["bundled"], SMS, CAPACITY, itemsize=2, sequences=count)


def make(device: torch.device, prefill: Any, columns: tuple[int, ...] = (2, 4)) -> SharingBackend:
    return SharingBackend(made_up_model(), programs(), tuple(shared(count) for count in columns), device, prefill)


@pytest.fixture(scope="module", params=[None, FakePrefill], ids=["decoded prompts", "prefill"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with fake_device() as device, Engine(make(device, request.param), chunk=CHUNK) as made:
        yield made


def backend_of(engine: Engine) -> Any:
    return engine._backend


def prompt_of(number: int, length: int) -> list[int]:
    return [random.Random(f"{number} {place}").randrange(20, MODELS["bundled"].vocab_size) for place in range(length)]


def finished(*generations: Generation) -> list[list[int]]:
    return [list(generation) for generation in generations]


def test_sequences_of_all_lengths_share_steps(engine: Engine) -> None:
    """Across buckets, more than there are columns."""
    requests = [(prompt_of(number, 1 + 37 * number), 130 - 13 * number) for number in range(9)]
    generations = [engine.generate(prompt, length) for prompt, length in requests]
    assert sum(generation.waiting for generation in generations) == 5
    assert finished(*generations) == [expected(length, prompt) for prompt, length in requests]
    assert {generation.finish_reason for generation in generations} == {"length"}


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_leaves_and_stops(engine: Engine, seed: int) -> None:
    """Each gets the tokens that it gets alone, whatever the others do; prompts begin alike, so prefixes are kept and copied."""
    draw, running, begun = random.Random(seed), dict[Generation, tuple[list[int], list[int], int]](), 0
    while begun < 60 or running:
        if begun < 60 and len(running) < 7 and draw.random() < 0.5:
            begun += 1
            prompt = prompt_of(draw.randrange(3), draw.randrange(1, 120))
            prompt += [draw.randrange(20, 100) for _ in range(draw.randrange(3))]
            length = draw.randrange(1, 60)
            wanted = expected(length, prompt)
            stops = (draw.choice(wanted),) if draw.random() < 0.4 else ()
            if stops:
                wanted = wanted[: wanted.index(stops[0]) + 1]
            generation = engine.generate(prompt, length, SamplingParams(stop_token_ids=stops), draw.random() < 0.8)
            running[generation] = (wanted, [], draw.randrange(5, 200))
        engine.step()
        for generation, (wanted, found, leaves) in tuple(running.items()):
            found += generation.taken()
            if generation.ended or len(found) >= leaves:
                assert found == wanted[: len(found)]
                assert len(found) == len(wanted) or not generation.ended
                generation.stop()
                del running[generation]


def test_one_alone_has_the_program_of_one_column(engine: Engine) -> None:
    backend, kinds = backend_of(engine), list[type]()
    first = engine.generate(prompt_of(1, 20), 60)
    second = engine.generate(prompt_of(2, 20), 200)
    while not (first.ended and second.ended):
        engine.step()
        kinds += [type(each.flight) for each in backend.flights]
    alone = kinds[max(place for place, kind in enumerate(kinds) if kind is ColumnFlight) + 1 :]
    assert ColumnFlight in kinds and alone and set(alone) == {machine.Flight}
    assert finished(first, second) == [expected(60, prompt_of(1, 20)), expected(200, prompt_of(2, 20))]


def test_the_smallest_program_that_reaches_all_is_taken(engine: Engine) -> None:
    backend, counts = backend_of(engine), list[set[int]]()
    for sequences in (2, 3, 4):
        generations = [engine.generate(prompt_of(number, 5), 90) for number in range(sequences)]
        seen = set[int]()
        while not all(generation.ended for generation in generations):
            engine.step()
            flights = (each.flight for each in backend.flights)
            seen |= {flight.program.program.shape.sequences for flight in flights if isinstance(flight, ColumnFlight)}
        counts.append(seen)
    assert [max(seen) for seen in counts] == [2, 4, 4]


def test_answers_to_one_prompt_read_it_once(engine: Engine) -> None:
    prompt = prompt_of(77, 100)
    generations = [engine.generate(prompt, 20, SamplingParams(seed=number)) for number in range(4)]
    assert finished(*generations) == [expected(20, prompt)] * 4
    if backend_of(engine).prefills:
        assert [generation.kept for generation in generations] == [0, 99, 99, 99]


def test_conversations_keep_their_beginnings(engine: Engine) -> None:
    """Of as many as there are slots, in any order; and one that is not wanted for longest gives way."""
    turns = {number: prompt_of(100 + number, 50) for number in range(4)}
    for number, prompt in turns.items():
        answer = list(engine.generate(prompt, 10))
        turns[number] = prompt + answer + [9, 9]
    for number in (2, 0, 3, 1, 0):
        generation = engine.generate(turns[number], 10)
        assert list(generation) == expected(10, turns[number])
        assert generation.kept >= 59, f"of conversation {number}"
        turns[number] = turns[number] + expected(10, turns[number]) + [8]
    assert list(engine.generate(prompt_of(200, 50), 5)) == expected(5, prompt_of(200, 50))
    kept = {}
    for number in (0, 1, 3, 2):
        generation = engine.generate(turns[number], 1)
        kept[number] = generation.kept > 50
        list(generation)
    assert kept == {0: True, 1: True, 3: True, 2: False}


def test_conversations_that_begin_alike_keep_their_own_turns(engine: Engine) -> None:
    """What they have in common is copied from whoever holds it; nobody's rows are written over while others lie idle."""
    system, turns = prompt_of(300, 40), dict[int, list[int]]()
    for number in range(3):
        prompt = system + prompt_of(310 + number, 20)
        generation = engine.generate(prompt, 10)
        assert list(generation) == expected(10, prompt)
        assert generation.kept >= 40 * (number > 0)
        turns[number] = prompt + expected(10, prompt) + [9, 9]
    for number in (1, 0, 2):
        generation = engine.generate(turns[number], 10)
        assert list(generation) == expected(10, turns[number])
        assert generation.kept >= 69, f"of conversation {number}"


@pytest.mark.parametrize("others", [0, 1])
def test_prompts_that_come_together_are_read_before_anybody_goes_on(engine: Engine, others: int) -> None:
    """A wait for each piece and one for each first token, beside those for what was under way."""
    if not backend_of(engine).prefills:
        pytest.skip("prompts are decoded")
    first = [engine.generate(prompt_of(90 + place, 10), 200) for place in range(others)]
    for generation in first:
        next(generation)
    generations = [engine.generate(prompt_of(place, 10), 60) for place in range(4 - others)]
    waits = 0
    while not all(generation.count for generation in generations):
        engine.step()
        waits += 1
    assert waits <= 2 * (len(generations) + others)
    assert [generation.count for generation in generations] == [1] * len(generations), "nobody went on before"
    assert all(generation.count <= 1 + 2 * sharing.ROOM for generation in first)
    found = finished(*first, *generations)
    assert found[others:] == [expected(60, prompt_of(place, 10)) for place in range(4 - others)]


def test_those_that_decode_wait_for_so_many_prompts_and_no_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(engine)
    if not backend.prefills:
        pytest.skip("prompts are decoded")
    monkeypatch.setattr(sharing, "PIECES", 2 * sharing.LAUNCHES)
    first = engine.generate(prompt_of(90, 10), 200)
    next(first)
    generations = [engine.generate(prompt_of(place, 10), 60) for place in range(3)]
    counts = []
    for generation in generations:
        while not generation.count:
            engine.step()
        counts.append(first.count)
    assert counts[0] == counts[1] < counts[2] <= counts[1] + sharing.HURRY, "two were read, then the others went on"
    assert finished(*generations) == [expected(60, prompt_of(place, 10)) for place in range(3)]
    first.stop()


@pytest.mark.parametrize("sequences", range(1, 5))
def test_launches_are_short_while_a_slot_is_free(engine: Engine, sequences: int) -> None:
    """So are those behind the last of one that ends."""
    generations = [engine.generate(prompt_of(place, 5), 180 if place else 70) for place in range(sequences)]
    brought: dict[bool, list[int]] = {False: [], True: []}  # tokens of the newest, a launch; by whether the oldest has ended
    while not generations[-1].ended:
        ended = generations[0].ended
        engine.step()
        brought[ended].append(len(generations[-1].taken()))
    assert max(brought[False]) == (CHUNK if sequences == 4 else sharing.ROOM)
    assert sequences == 1 or max(brought[True]) == sharing.ROOM


def test_two_that_decode_do_not_wait_for_a_long_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces of it both are given tokens."""
    monkeypatch.setattr(sharing, "PIECES", sharing.LAUNCHES)
    backend = backend_of(engine)
    if not backend.prefills:
        pytest.skip("prompts are decoded")
    first, second = engine.generate(prompt_of(1, 5), 150), engine.generate(prompt_of(2, 5), 150)
    for generation in (first, second):
        next(generation)
    third = engine.generate(prompt_of(333, 300), 5)
    asked, before = backend.prefills[2].asked, (first.count, second.count)
    begun, most = len(asked), 0
    while not third.count:
        pieces = len(asked)
        engine.step()
        most = max(most, len(asked) - pieces)
    assert len(asked) - begun == 300 // FakePrefill.chunk + 1 and most <= 1
    assert first.count - before[0] > 30 and second.count - before[1] > 30
    assert finished(first, second, third)[2] == expected(5, prompt_of(333, 300))


@pytest.mark.parametrize("company", [0, 1, 3])
def test_an_interrupt_at_any_line(engine: Engine, company: int) -> None:
    """Of a request that joins others, one of them abandoned; those after it are right.  Every twenty-ninth line, or all."""
    number, prompt = 0, prompt_of(5, 40)
    wanted = expected(40, prompt)
    while True:
        number += LINES
        others = [engine.generate(prompt_of(6 + place, 30), 60) for place in range(company)]
        for other in others:
            next(other)
        for other in others[:1]:
            other.stop()
        try:
            with Interrupting(number, sharing, slot, machine) as interrupting:
                list(engine.generate(prompt, 40))
        except KeyboardInterrupt:
            following = [engine.generate(each, 25) for each in (prompt, prompt[:30], prompt_of(6, 30) + [1])]
            assert finished(*following)[0] == wanted[:25], f"after an interrupt at line {number}"
            assert finished(*following)[1:] == [[], []]
            continue
        for other in others:
            other.stop()
        break
    assert interrupting.lines > 200


def test_what_follows_an_interrupt_is_right_for_all(engine: Engine) -> None:
    for number in range(5, 400, 23):
        others = [engine.generate(prompt_of(place, 30), 60) for place in range(3)]
        try:
            with Interrupting(number, sharing):
                finished(*others)
        except KeyboardInterrupt:
            pass
        again = [(prompt_of(place, 30) + expected(5, prompt_of(place, 30)), 30) for place in range(4)]
        assert finished(*[engine.generate(*each) for each in again]) == [expected(length, prompt) for prompt, length in again]


def test_a_fault_ends_all_that_decode_and_no_other(engine: Engine) -> None:
    backend = backend_of(engine)
    generations = [engine.generate(prompt_of(place, 10), 50) for place in range(6)]
    for generation in generations[:4]:
        next(generation)
    backend.column_program(4, 0).result().counters[0] += 1
    for generation in generations[:4]:
        with pytest.raises(KernelFault):
            list(generation)
    assert finished(*generations[4:]) == [expected(50, prompt_of(place, 10)) for place in (4, 5)]
    assert list(engine.generate(prompt_of(0, 10), 50)) == expected(50, prompt_of(0, 10))


def test_numbers_that_are_none_end_one_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(engine)
    generations = [engine.generate(prompt_of(place, 10), 60) for place in range(3)]
    for generation in generations:
        next(generation)
    real = ColumnFlight.of_sequence

    def spoilt(flight: ColumnFlight, outcome: Any, number: int) -> Any:
        if backend.slots[number].sequence.tokens[:10] == prompt_of(1, 10):
            outcome.request(number)[Control.NO_NUMBERS] = 1
        return real(flight, outcome, number)

    monkeypatch.setattr(ColumnFlight, "of_sequence", spoilt)
    with pytest.raises(NotNumbers):
        list(generations[1])
    monkeypatch.undo()
    assert list(generations[0]) == expected(60, prompt_of(0, 10))[1:]
    assert list(generations[2]) == expected(60, prompt_of(2, 10))[1:]


def test_counters_begin_anew_before_they_overflow(engine: Engine) -> None:
    backend = backend_of(engine)
    program = backend.column_program(2, 0).result()
    finished(*[engine.generate(prompt_of(place, 10), 30) for place in range(2)])
    epoch = np.iinfo(np.int32).max // int(program.program.targets.max()) - CAPACITY // 2
    targets = program.counters[:: machine.COUNTER_STRIDE] // max(program.epoch, 1)
    program.epoch, program.counters[:: machine.COUNTER_STRIDE] = epoch, targets * epoch
    program.activations.fill_(machine.VACANT)
    prompts = [prompt_of(place, 10) for place in range(2)]
    assert finished(*[engine.generate(prompt, 60) for prompt in prompts]) == [expected(60, prompt) for prompt in prompts]
    assert program.epoch < 1000


def test_logits_are_there_for_one_that_was_alone_last(engine: Engine) -> None:
    alone = engine.generate(prompt_of(1, 10), 5)
    list(alone)
    assert alone.logits().shape == (engine.config.vocab_size,)
    pair = [engine.generate(prompt_of(place, 10), 60, reuse=False) for place in range(2)]
    finished(*pair)
    with pytest.raises(RuntimeError, match="others have been decoded with it"):
        pair[0].logits()


def test_a_sequence_that_takes_no_part_keeps_its_cache(engine: Engine) -> None:
    """Slot 0 is read by prefill, or holds what has ended, while slots 1 and 2 decode."""
    backend = backend_of(engine)
    generations = [engine.generate(prompt_of(place, 60), 80 if place else 5) for place in range(3)]
    finished(*generations)
    ends = backend.state.control[SEQUENCES + Progress.END]
    assert int(ends) == 0, "the last steps of two were those of a program of four"
    generation = engine.generate(prompt_of(0, 60) + expected(5, prompt_of(0, 60)), 30)
    assert list(generation) == expected(35, prompt_of(0, 60))[5:] and generation.kept >= 63


def test_two_columns_are_enough_for_an_engine() -> None:
    with fake_device() as device, Engine(make(device, FakePrefill, (2,)), chunk=CHUNK) as engine:
        assert engine.columns == 2
        prompts = [prompt_of(place, 20) for place in range(5)]
        assert finished(*[engine.generate(prompt, 30) for prompt in prompts]) == [expected(30, prompt) for prompt in prompts]
        assert isinstance(backend_of(engine).column_program(2, 0).result(), ColumnProgram)

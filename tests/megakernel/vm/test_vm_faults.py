"""Programs that are wrong in one place: each raises VmError that names the instruction and its SM, under an order of steps
that brings the fault out.  Errors that no order can hide are met with the first seed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.base import Machine, PageRequest, Pages, Region
from instructions.codec import NONE, WORDS, Word
from instructions.o_proj import OProj
from megakernel.vm import Vm, VmError
from megakernel.vm.interleaving import ActorView, Interleaving, adversaries, loaders_first
from scheduler.check import check
from scheduler.program import Program
from tests.support.vm_models import PROMPT, find, mutated, packed, program, text_at, vm_of, without

SMS = 3
TOKENS = 3


@functools.cache
def good() -> Program:
    return program(sms=SMS)


def caught(made: Program, interleaving: Interleaving | None = None, tokens: int = TOKENS) -> VmError:
    with pytest.raises(VmError) as caught:
        vm_of(made, interleaving=interleaving).launch(tokens)
    return caught.value


def caught_by_adversaries(made: Program, tokens: int = TOKENS) -> list[VmError]:
    """The errors under every adversary that raises one; those under which nothing goes wrong must give the right tokens."""
    errors, right = [], vm_of(good())
    right.launch(tokens)
    for order in adversaries(made.sms):
        vm = vm_of(made, interleaving=order)
        try:
            vm.launch(tokens)
        except VmError as error:
            errors.append(error)
        else:
            assert vm.state.generated == right.state.generated
    return errors


def sm_of(made: Program, place: int) -> int:
    return int(np.searchsorted(made.starts, place, side="right")) - 1


def assert_names(error: VmError, made: Program, place: int) -> None:
    sm = sm_of(made, place)
    assert (error.sm, error.index, error.instruction) == (sm, place - made.starts[sm], text_at(made, place))
    assert str(error).startswith(f"sm {sm} #{error.index} [{error.instruction}]: ")


# -- waits and signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mnemonic", ["attention", "combine", "o_proj", "gate_up", "down", "lm_head"])
def test_a_missing_wait_is_a_read_of_what_nobody_wrote(mnemonic: str) -> None:
    place = find(good(), mnemonic, nth=1)
    broken = mutated(good(), place, WAITS=0)
    errors = caught_by_adversaries(broken)
    named = [error for error in errors if error.instruction == text_at(broken, place)]
    assert named, f"no adversary met the missing wait: {errors}"
    assert_names(named[0], broken, place)
    assert named[0].problem.startswith("reads ") and "was never written" in named[0].problem


def test_a_stale_value_of_the_token_before_is_no_better() -> None:
    """Activations are there from the token before; their epoch gives them away."""
    broken = mutated(good(), find(good(), "gate_up", nth=1), WAITS=0)
    problems = []
    for order in adversaries(SMS):
        vm = vm_of(good(), interleaving=order)
        vm.launch(2)
        vm.program, vm.decoded = broken, None  # the words change, the memory stays
        try:
            vm.launch(2)
        except VmError as error:
            problems.append(error.problem)
    assert any("in epoch 2, but row" in problem and "was last written in epoch 1" in problem for problem in problems), problems


def test_a_target_out_of_reach_is_told_with_the_numbers() -> None:
    place = find(good(), "o_proj")
    counter, target = good().words[place, Word.WAIT], good().words[place, Word.TARGET]
    broken = mutated(good(), place, TARGET=target + 1)
    error = caught(broken)
    assert_names(error, broken, place)
    wait = f"waits for counter {counter} >= {target + 1}, seen {target}, signalled once a token by each of sm "
    assert error.problem.startswith(f"no SM can go on: consumer, token 0, {wait}")
    assert "\n  also sm " in error.problem, "the others that are stuck are told as well"


def test_a_missing_signal_is_told_at_the_wait() -> None:
    place = find(good(), "down", layer=1)
    assert good().words[place, Word.SIGNAL + 1] == NONE
    error = caught(mutated(good(), place, SIGNAL=NONE))
    counter, target = good().words[place, Word.SIGNAL], good().targets[good().words[place, Word.SIGNAL]]
    assert f"waits for counter {counter} >= {target}, seen {target - 1}" in error.problem
    assert error.instruction.startswith("lm_head")


def test_a_missing_instruction_is_told_at_the_wait() -> None:
    error = caught(without(good(), find(good(), "combine", layer=1)))
    assert error.instruction.startswith("o_proj    layer=1") and "waits for counter" in error.problem


def test_no_sample_is_told_as_a_token_without_end() -> None:
    broken = without(good(), find(good(), "sample"))
    error = caught(broken)
    assert "waits for tokens finished >= 1, seen 0" in error.problem or "waits for counter" in error.problem
    assert "no instruction chose the last of 1 tokens" in caught(broken, tokens=1).problem


def test_instructions_before_those_they_wait_for_are_stuck() -> None:
    made = program(sms=1)
    assert find(made, "embed") == 0 and find(made, "qkv") == 1
    words = made.words.copy()
    words[[0, 1], :] = words[[1, 0], :]
    error = caught(dataclasses.replace(made, words=words))
    assert error.instruction.startswith("qkv") and "waits for counter" in error.problem


def test_a_second_signal_lets_a_reader_in_too_early() -> None:
    """One producer counted twice stands for another that has not finished."""
    place = find(good(), "down", nth=0)
    counter = good().words[place, Word.SIGNAL]
    errors = caught_by_adversaries(mutated(good(), place, SIGNAL__1=counter))
    assert any("reads x[1]" in error.problem for error in errors)


# -- pages --------------------------------------------------------------------------------------------------------------


def test_a_page_overwritten_too_early_is_told_with_its_owner() -> None:
    place = find(good(), "o_proj", layer=1, nth=0)
    page = good().words[place, Word.PAGE]
    broken = mutated(good(), place, PAGE=page - 1)
    error = caught(broken, loaders_first())
    assert_names(error, broken, place)
    assert f"its page word makes this use {page - 1} of the SM, but {page} is next: the page of use" in error.problem
    assert "would be overwritten before it is read" in error.problem


def test_a_page_number_that_skips_is_refused() -> None:
    place = find(good(), "gate_up")
    error = caught(mutated(good(), place, PAGE=good().words[place, Word.PAGE] + 1))
    assert "but" in error.problem and "is next" in error.problem


def test_wrong_uses_a_token_are_met_in_the_second_token() -> None:
    uses = good().uses.copy()
    uses[1] += 1
    broken = dataclasses.replace(good(), uses=uses)
    assert vm_of(broken).launch(1) == 1
    assert caught(broken).sm == 1


@pytest.mark.parametrize("word", ["PAGES", "TAPE"])
def test_pages_other_than_the_instructions_own_are_refused(word: str) -> None:
    place = find(good(), "down")
    broken = mutated(good(), place, **{word: good().words[place, Word[word]] + 1})
    error = caught(broken)
    assert_names(error, broken, place)
    assert "the instruction needs" in error.problem


def test_a_ring_too_shallow_for_a_request_is_stuck() -> None:
    error = caught(dataclasses.replace(good(), ring=3))
    assert "waits for pages loaded by sm" in error.problem
    assert "a ring of 0 pages" in caught(dataclasses.replace(good(), ring=0)).problem


def test_a_missing_load_wait_reads_the_cache_too_early() -> None:
    """A loader one token ahead streams the K/V of a position that another SM has not written yet."""
    made = program(sms=132, bucket=32, slices=1)  # so few pages a token that a whole token fits the ring
    places = [place for place, words in enumerate(made.words) if words[Word.LOAD_WAIT] != NONE]
    assert places
    found = []
    for place in places:
        broken = mutated(made, place, LOAD_WAIT=NONE)
        try:
            vm_of(broken, interleaving=loaders_first()).launch(TOKENS)
        except VmError as error:
            assert_names(error, broken, place)
            assert error.problem.startswith("loads KV page") and "is written (loader" in error.problem
            found.append(place)
    assert found
    assert vm_of(made, interleaving=loaders_first()).launch(TOKENS) == TOKENS, "the words as they were"


# -- sight --------------------------------------------------------------------------------------------------------------


def test_logits_that_are_not_released_may_not_be_read() -> None:
    """Whatever the order: that a store has been done says nothing of who sees it."""
    made = good()
    sampler = sm_of(made, find(made, "sample"))
    heads = [place for place in range(len(made.words)) if text_at(made, place).startswith("lm_head")]
    place = next(place for place in heads if sm_of(made, place) != sampler)
    broken = mutated(made, place, RELEASE=0)
    errors = caught_by_adversaries(broken)
    assert len(errors) == len(list(adversaries(SMS)))
    for error in errors:
        assert_names(error, broken, find(made, "sample"))
        assert re.search(rf"^reads .*, stored by sm {sm_of(made, place)}, is not visible yet", error.problem)


def test_a_token_needs_sight_of_all_of_the_one_before() -> None:
    broken = mutated(good(), find(good(), "sample"), RELEASE=0)
    errors = caught_by_adversaries(broken)
    assert len(errors) == len(list(adversaries(SMS)))
    assert all(re.match(r"begins token 1, but of sm \d it sees only", error.problem) for error in errors)
    assert vm_of(broken).launch(1) == 1, "one token alone meets none before it"


def test_a_cache_page_needs_sight_of_its_newest_row() -> None:
    """A loader that waits for those who stored the row, and not for a release, may copy what was there before."""
    made = program(sms=132, bucket=32, slices=1)  # so few pages a token that a whole token fits the ring
    places = [place for place, words in enumerate(made.words) if words[Word.LOAD_WAIT] != NONE]
    found = []
    for place in places:
        waited = int(made.words[place, Word.WAIT])  # the counter of its queries, keys and values
        broken = mutated(made, place, LOAD_WAIT=waited, LOAD_TARGET=int(made.targets[waited]))
        if check(broken).valid:
            continue  # whoever stores that head's row is the last of its queue, and releases
        error = caught(broken, loaders_first())
        assert_names(error, broken, place)
        assert error.problem.startswith("loads KV page") and "is not visible yet" in error.problem
        found.append(place)
    assert found


# -- words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"OPCODE": 99}, "unknown opcode 99"),
        ({"WAITS": 5}, "5 waits in a record that holds at most 2"),
        ({"WAIT": 10_000}, "names counter 10000"),
        ({"SIGNAL": 10_000}, "names counter 10000"),
        ({"LAYER": 2}, "not an instruction of this model"),
        ({"PAYLOAD": 100_000}, "the instruction needs"),
    ],
)
def test_words_that_are_no_instruction(words: dict[str, int], problem: str) -> None:
    place = find(good(), "qkv", layer=1)
    error = caught(mutated(good(), place, **words))
    assert (error.sm, error.index) == (sm_of(good(), place), place - good().starts[sm_of(good(), place)])
    assert problem in error.problem


def test_two_writers_of_one_row_are_refused() -> None:
    places = [find(good(), "lm_head", nth=nth) for nth in range(2)]
    slot = good().words[places[0], Word.PAYLOAD + 2]
    error = caught(mutated(good(), places[1], PAYLOAD__2=slot))
    assert error.problem.startswith(f"writes best[0][{2 * slot}:{2 * slot + 2}]") and "already" in error.problem


def test_two_samples_in_a_token_are_refused() -> None:
    made = program(sms=1)
    words = np.concatenate([made.words, made.words[-1:]])
    broken = dataclasses.replace(made, words=words, starts=np.array([0, len(words)], dtype=np.int32))
    assert "chooses the token after position 0, but 1 positions are decoded" in caught(broken).problem


WORD_VALUES = st.one_of(st.integers(-2, 200), st.sampled_from([2**31 - 1, -(2**31)]))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(place=st.integers(0, 10**6), word=st.integers(0, WORDS - 1), value=WORD_VALUES, seed=st.integers(0, 3))
def test_any_word_may_be_wrong(place: int, word: int, value: int, seed: int) -> None:
    """Whatever one word holds, the machine ends: with its tokens or with a VmError, never with another exception."""
    changed = good().words.copy()
    changed[place % len(changed), word] = value
    try:
        assert vm_of(dataclasses.replace(good(), words=changed), seed=seed).launch(TOKENS) == TOKENS
    except VmError as error:
        assert error.problem and 0 <= error.sm < SMS


# -- instructions that break their word -----------------------------------------------------------------------------------


def undeclared_read(self: OProj, machine: Machine) -> Pages:
    machine.read(Region("mlp", 0, 0, 4))
    yield PageRequest(0, 1)


def undeclared_write(self: OProj, machine: Machine) -> Pages:
    yield PageRequest(0, 1)
    machine.write(Region("x", 0, 0, 1), torch.zeros(1))


def writes_nothing(self: OProj, machine: Machine) -> Pages:
    for use in range(self.page_uses(machine.shape)):
        yield PageRequest(use, 1)


def takes_too_little(self: OProj, machine: Machine) -> Pages:
    yield PageRequest(0, 1)


def takes_out_of_order(self: OProj, machine: Machine) -> Pages:
    yield PageRequest(1, 1)


def holds_too_many(self: OProj, machine: Machine) -> Pages:
    yield PageRequest(0, 5)


def writes_nan(self: OProj, machine: Machine) -> Pages:
    yield PageRequest(0, 1)
    region = self.writes(machine.shape)[0]
    machine.write(region, torch.full((region.stop - region.start,), torch.nan))


def crashes(self: OProj, machine: Machine) -> Pages:
    yield PageRequest(0, 1)
    raise ZeroDivisionError("of nothing")


@pytest.mark.parametrize(
    ("execute", "problem"),
    [
        (undeclared_read, "reads mlp[0][0:4], which it does not declare"),
        (undeclared_write, "writes x[0][0:1], which it does not declare"),
        (writes_nothing, "of its declared rows unwritten"),
        (takes_too_little, "took 1 of its"),
        (takes_out_of_order, "asks for page uses 1+1 after 0"),
        (holds_too_many, "asks for page uses 0+5 after 0"),
        (writes_nan, "writes NaN to x_mid[0]"),
        (crashes, "cannot be executed: ZeroDivisionError('of nothing')"),
    ],
)
def test_an_instruction_is_held_to_what_it_declares(monkeypatch: pytest.MonkeyPatch, execute: object, problem: str) -> None:
    monkeypatch.setattr(OProj, "execute", execute)
    error = caught(good())
    assert error.instruction.startswith("o_proj")
    assert problem in error.problem


def test_values_outside_the_cache_written_so_far_are_nan() -> None:
    """A page is copied with the rows of later positions poisoned, so an instruction that used them would spread NaN."""
    vm = vm_of(good())
    vm.launch(4)
    page = vm.state.cache.load(0, past=3).view(vm.program.shape.head_tiles, vm.program.shape.page_positions, -1)
    assert torch.isfinite(page[:, :3]).all() and torch.isnan(page[:, 3:]).all()
    assert torch.isfinite(vm.state.cache.pages[0][:, 3]).all(), "position 3 itself is written by now"


def test_buffers_are_poisoned_before_each_token() -> None:
    vm, seen = vm_of(good()), []
    poison = vm.memory.poison

    def spy() -> None:
        poison()
        seen.append(bool(torch.isnan(vm.memory.values).all()))

    vm.memory.poison = spy  # type: ignore[method-assign]
    vm.launch(TOKENS)
    assert seen == [True] * TOKENS


def test_a_machine_is_as_new_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    vm, fresh = vm_of(good()), vm_of(good())
    vm.launch(1)
    with monkeypatch.context() as patch, pytest.raises(VmError):
        patch.setattr(OProj, "execute", crashes)
        vm.launch(1)
    vm.state.start(PROMPT)
    vm.launch(8)
    fresh.launch(8)
    assert vm.state.generated == fresh.state.generated
    assert torch.equal(vm.logits(), fresh.logits())


def test_an_interrupted_launch_leaves_the_machine_as_new() -> None:
    class Interrupting:
        """Ctrl-C after some steps."""

        def __init__(self) -> None:
            self.steps = iter(range(40))

        def choose(self, ready: Sequence[ActorView]) -> tuple[int, int]:
            if next(self.steps, None) is None:
                raise KeyboardInterrupt
            return 0, 1

    vm, fresh = vm_of(good()), vm_of(good())
    ordinary, vm.interleaving = vm.interleaving, Interrupting()
    with pytest.raises(KeyboardInterrupt):
        vm.launch(2)
    vm.interleaving = ordinary
    vm.state.start(PROMPT)
    vm.launch(6)
    fresh.launch(6)
    assert vm.state.generated == fresh.state.generated


def orders(vm: Vm, tokens: int) -> Iterator[tuple[int, bool, int, int]]:
    """Whose steps were taken, in order."""
    choose, seen = vm.interleaving.choose, []

    class Recording:
        def choose(self, ready: Sequence[ActorView]) -> tuple[int, int]:
            place, steps = choose(ready)
            seen.append((ready[place].sm, ready[place].loads, ready[place].token, ready[place].index))
            return place, steps

    vm.interleaving = Recording()
    vm.launch(tokens)
    yield from seen


def test_a_seed_is_an_order_and_can_be_repeated() -> None:
    runs = [list(orders(vm_of(good(), seed=seed), TOKENS)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    actors = {(sm, loads) for sm, loads, _, _ in runs[0]}
    assert actors == {(sm, loads) for sm in range(SMS) for loads in (False, True)}


def test_loaders_run_ahead_into_the_next_token_but_no_further() -> None:
    """The loader of an SM may be one token ahead of its consumer, which is what hides the end of a token."""
    leads = set()
    for interleaving in (loaders_first(), None):
        vm = vm_of(good(), interleaving=interleaving)
        consumer: dict[int, int] = {}
        for sm, loads, token, _ in orders(vm, 4):
            if not loads:
                consumer[sm] = token
            else:
                leads.add(token - consumer.get(sm, 0))
    assert max(leads) == 1


def test_packed_models_are_left_alone() -> None:
    """Slots are views of the tape: nothing the machine does may write there."""
    before = copy.deepcopy(packed().weights)
    vm_of(good()).launch(2)
    assert torch.equal(before, packed().weights)

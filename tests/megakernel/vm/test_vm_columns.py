"""Programs of several columns on the CPU machine: every token as one column alone would have it, bit for bit.

A step of several columns of one sequence decodes what is drafted; the tokens are those of the program of one column, and so are
the bits of the logits.  Columns of several sequences do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch

from instructions.base import GREEDY, SamplingState
from instructions.drafts import LEAST, look_up
from megakernel.vm import DecodeState, Vm
from megakernel.vm.interleaving import Interleaving, adversaries
from models.config import ModelConfig
from scheduler.build import build_program, make_shape
from scheduler.errors import ScheduleError
from scheduler.program import Program
from tests.support.vm_models import CAPACITY, TINY, packed

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
SAMPLED = SamplingState(temperature=0.9, top_k=20, top_p=0.95, seed=11)
TOKENS = 14


def program(
    sequences: int = 1, depth: int = 1, slices: int = 2, config: ModelConfig = TINY, bucket: int = CAPACITY, sms: int = 3
) -> Program:
    shape = make_shape(
        config, sms=sms, capacity=CAPACITY, bucket=bucket, itemsize=4, slices=slices, sequences=sequences, depth=depth
    )
    return build_program(shape, sms)


def alone(
    prompt: Sequence[int], tokens: int, sampling: SamplingState = GREEDY, slices: int = 2
) -> tuple[list[int], list[bytes]]:
    """What one column decodes: the tokens after the prompt, and the bits of the logits of each."""
    vm = Vm(program(slices=slices), packed())
    vm.state.start(prompt, sampling)
    vm.launch(len(prompt) - 1)
    logits = []
    for _ in range(tokens):
        vm.launch(1)
        logits.append(vm.logits().numpy().tobytes())
    return vm.state.generated, logits


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("depth", [2, 8])
def test_columns_of_one_sequence_decode_what_one_column_does(depth: int, sampling: SamplingState) -> None:
    """Drafts of which some are right: the true tokens, each spoilt with a chance of a third."""
    expected, logits = alone(PROMPT, TOKENS, sampling)
    true, random = [*PROMPT, *expected], Random(depth)

    def source(tokens: Sequence[int], most: int) -> list[int]:
        drafts = true[len(tokens) : len(tokens) + most]
        return [token if random.random() < 0.67 else (token + 1) % TINY.vocab_size for token in drafts]

    vm = Vm(program(depth=depth), packed())
    vm.state.start(PROMPT, sampling)
    vm.state.source, vm.state.end = source, len(true) - 1
    steps = 0
    while vm.state.position < vm.state.end:
        before = vm.state.position
        steps += vm.launch(1)
        for place in range(vm.state.position - before):
            if before + place >= len(PROMPT) - 1:
                assert vm.logits(place).numpy().tobytes() == logits[before + place - len(PROMPT) + 1]
    assert vm.state.generated == expected
    assert steps < vm.state.end, "some drafts were right, and the prompt's own tokens are"


@pytest.mark.parametrize("slices", [1, 3])
def test_around_the_edges_of_pages_and_at_the_bucket_s_end(slices: int) -> None:
    """A step's own positions lie on both sides of an edge, and what is sliced otherwise waits for the next step."""
    prompt = [(7 * i) % TINY.vocab_size for i in range(55)]
    expected, logits = alone(prompt, 11, slices=slices)
    vm = Vm(program(depth=8, slices=slices, bucket=64), packed(), seed=3)
    vm.state.start(prompt)
    vm.launch(CAPACITY)
    assert vm.state.position == 65, "the last position of the bucket, of which 64 are past"
    assert vm.state.generated == expected
    assert logits[-1] in [vm.logits(column).numpy().tobytes() for column in range(8)]


def test_a_stop_token_among_the_drafts_is_the_last() -> None:
    expected, _ = alone(PROMPT, TOKENS)
    stop = expected[9]
    vm = Vm(program(depth=8), packed())
    vm.state.start(PROMPT, stop_tokens={stop})
    vm.state.source = lambda tokens, most: [*PROMPT, *expected][len(tokens) : len(tokens) + most]
    vm.launch(TOKENS)
    assert vm.state.stopped
    assert vm.state.generated == expected[: expected.index(stop) + 1]


def orders() -> list[Interleaving | None]:
    return [None, *adversaries(3)]


@pytest.mark.parametrize("sequences", [2, 4])
def test_sequences_share_steps_and_nothing_else(sequences: int) -> None:
    """Of different lengths, samplings and ends, one joining late: each as it is alone, where attention has fewer slices."""
    random = Random(sequences)
    prompts = [[random.randrange(TINY.vocab_size) for _ in range(2 + 4 * number)] for number in range(sequences)]
    samplings = [GREEDY if number % 2 else SAMPLED._replace(seed=number) for number in range(sequences)]
    wanted = [alone(prompt, 4, sampling)[0] for prompt, sampling in zip(prompts, samplings, strict=True)]
    for interleaving in orders()[: 3 if sequences == 2 else 1]:
        vm = Vm(program(sequences, slices=3), packed(), interleaving=interleaving, early=interleaving is not None)
        vm.state.join(0, [1])
        for number in range(1, sequences):
            vm.state.join(number, prompts[number], samplings[number])
        for sequence in vm.state.sequences:
            sequence.slices = 2
        vm.launch(3)
        vm.state.join(0, prompts[0], samplings[0])
        for sequence, prompt in zip(vm.state.sequences, prompts, strict=True):
            sequence.end = len(prompt) - 1 + 4
        vm.launch(max(map(len, prompts)) + 6)
        assert [sequence.generated for sequence in vm.state.sequences] == wanted


def test_a_sequence_at_the_bucket_s_end_waits_while_another_goes_on() -> None:
    """It repeats its last position: there are no page uses for the one behind it."""
    prompts = [[(5 * i) % TINY.vocab_size for i in range(28)], [2, 7]]
    vm = Vm(program(2, slices=2, bucket=32), packed())
    vm.state.join(0, prompts[0])
    vm.launch(6)
    vm.state.join(1, prompts[1])
    vm.launch(CAPACITY)
    assert [sequence.position for sequence in vm.state.sequences] == [33, 33]
    for sequence, prompt in zip(vm.state.sequences, prompts, strict=True):
        assert sequence.generated[:6] == alone(prompt, 6)[0]


def test_a_sequence_that_takes_no_part_keeps_what_the_cache_holds() -> None:
    """While it waits, others decode beside it; then it goes on from where it stood."""
    prompts = [[(5 * i) % TINY.vocab_size for i in range(11)], [2, 7]]
    vm = Vm(program(2, slices=2), packed())
    for number, prompt in enumerate(prompts):
        vm.state.join(number, prompt)
    first, second = vm.state.sequences
    second.end = 0
    vm.launch(13)
    rows = vm.state.cache.pages.clone()
    first.end, second.end = 0, CAPACITY
    vm.launch(9)
    assert (first.position, second.position) == (13, 9)
    own = slice(0, vm.state.cache.sequence_pages)
    assert vm.state.cache.pages[own].view(torch.int32).equal(rows[own].view(torch.int32))
    first.end = CAPACITY
    vm.launch(4)
    for sequence, prompt in zip(vm.state.sequences, prompts, strict=True):
        expected = alone(prompt, len(sequence.generated))[0]
        assert sequence.generated == expected and len(expected) >= 6


def test_a_state_of_one_sequence_does_not_serve_two() -> None:
    with pytest.raises(ValueError, match="made for another KV cache"):
        Vm(program(2), packed(), DecodeState(program().shape))


@pytest.mark.parametrize(
    ("sequences", "depth", "message"),
    [(9, 1, "a step has 1 to 8 columns"), (0, 1, "a step has 1 to 8"), (2, 2, "use several of one, or several sequences")],
)
def test_columns_that_no_step_has(sequences: int, depth: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        program(sequences, depth)


def test_drafts_are_what_followed_the_same_tokens_before() -> None:
    assert look_up([1, 2, 3, 4, 9, 1, 2, 3], 3) == [4, 9, 1]
    assert look_up([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], 2) == [4, 7], "three tokens that agree count more than two that are later"
    assert look_up([2, 3, 4, 7, 2, 3, 5, 1, 2, 3], 1) == [5], "of equals the latest"
    assert look_up([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5], "what repeats goes on"
    assert look_up([4, 4, 4], 3) == [4, 4, 4]
    assert look_up([1, 2, 3], 7) == [] and look_up([1], 7) == []
    assert LEAST == 2 and look_up([1, 3, 2, 3], 7) == [], "one token that agrees says little"

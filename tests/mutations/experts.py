"""Planted faults of chosen experts: who chooses, what is looked at and when, whose pages are streamed."""

from __future__ import annotations

from random import Random

from instructions.choose import Choose
from instructions.codec import Scheduled, Wait, Word
from instructions.expert_gate_up import ExpertGateUp
from instructions.experts import ExpertRows
from tests.mutations.draft import Draft, mutation


def selects(item: Scheduled) -> bool:
    return isinstance(item.instruction, ExpertRows)


def of_slot(item: Scheduled) -> bool:
    return isinstance(item.instruction, ExpertGateUp)


def chooses(item: Scheduled) -> bool:
    return isinstance(item.instruction, Choose)


@mutation
def choice_looked_at_early(draft: Draft, random: Random) -> bool:
    """A loader does not wait for the token's end before it looks for a choice."""
    return draft.change_one(random, lambda item: selects(item) and item.load_wait, load_wait=None)


@mutation
def choice_looked_at_by_another_counter(draft: Draft, random: Random) -> bool:
    """It waits for something else of the token before."""
    counter = random.randrange(len(draft.targets))
    wait = Wait(counter, draft.targets[counter], 1)
    return draft.change_one(random, lambda item: selects(item) and item.load_wait, load_wait=wait)


@mutation
def choice_behind_its_experts(draft: Draft, random: Random) -> bool:
    """A layer's experts are chosen by an SM that has to stream some of them first."""
    site = draft.pick(random, chooses)
    if site is None:
        return False
    sm, index = site
    item = draft.queues[sm].pop(index)
    places = [(s, i) for s, i in draft.sites(selects) if draft.at((s, i)).instruction.layer == item.instruction.layer]
    sm, index = random.choice(places)
    draft.queues[sm].insert(index + 1, item)
    draft.renumber()
    return True


@mutation
def choice_moved(draft: Draft, random: Random) -> bool:
    """A layer's experts are chosen on another SM, or at another time."""
    site = draft.pick(random, chooses)
    if site is None:
        return False
    item = draft.queues[site[0]].pop(site[1])
    queue = random.choice(draft.queues)
    queue.insert(random.randrange(len(queue) + 1), item)
    draft.renumber()
    return True


@mutation
def no_choice(draft: Draft, random: Random) -> bool:
    """A layer's experts are not chosen."""
    site = draft.pick(random, chooses)
    if site is None:
        return False
    draft.queues[site[0]].pop(site[1])
    draft.renumber()
    return True


@mutation
def another_slot(draft: Draft, random: Random) -> bool:
    """A run of one slot's expert is taken of another's: one expert is streamed twice, another not."""
    site = draft.pick(random, of_slot)
    if site is None:
        return False
    instruction = draft.at(site).instruction
    assert isinstance(instruction, ExpertGateUp)
    step = instruction.matrix(draft.shape).blocks * random.choice((-1, 1))
    return instruction.block + step >= 0 and draft.work(site, block=instruction.block + step)


@mutation
def experts_of_another_layer(draft: Draft, random: Random) -> bool:
    """A run of chosen experts, or a choice, of the layer before or after."""
    site = draft.pick(random, lambda item: selects(item) or chooses(item))
    if site is None:
        return False
    layer = draft.at(site).instruction.layer + random.choice((-1, 1))
    return 0 <= layer < draft.shape.config.num_layers and draft.work(site, layer=layer)


@mutation
def counted_from_another_expert(draft: Draft, random: Random) -> bool:
    """The pages that a loader counts experts from are not the first one's."""
    site = draft.pick(random, selects)
    if site is None:
        return False
    item = draft.at(site)
    assert isinstance(item.instruction, ExpertRows)
    draft.poke(site, Word.TAPE, item.tape + item.instruction.matrix(draft.shape).pages)
    return True

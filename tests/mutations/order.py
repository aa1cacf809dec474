"""Planted faults of order and place: queues swapped, moved, cut."""

from __future__ import annotations

from random import Random

from instructions.codec import Word
from tests.mutations.draft import Draft, mutation


@mutation
def swapped_order(draft: Draft, random: Random) -> bool:
    """Two instructions of a queue change places, page numbers counted anew."""
    long = [queue for queue in draft.queues if len(queue) > 1]
    if not long:
        return False
    queue = random.choice(long)
    i, j = random.sample(range(len(queue)), 2)
    queue[i], queue[j] = queue[j], queue[i]
    draft.renumber()
    return True


@mutation
def swapped_neighbours(draft: Draft, random: Random) -> bool:
    """An instruction overtakes the one before it."""
    long = [queue for queue in draft.queues if len(queue) > 1]
    if not long:
        return False
    queue = random.choice(long)
    i = random.randrange(len(queue) - 1)
    queue[i], queue[i + 1] = queue[i + 1], queue[i]
    draft.renumber()
    return True


@mutation
def swapped_records(draft: Draft, random: Random) -> bool:
    """Two records of a queue change places and keep their page numbers."""
    numbers = {draft.at(site).instruction: draft.at(site).page for site in draft.sites()}
    if not swapped_neighbours(draft, random):
        return False
    for site in draft.sites():
        draft.poke(site, Word.PAGE, numbers[draft.at(site).instruction])
    return True


@mutation
def moved_instruction(draft: Draft, random: Random) -> bool:
    """An instruction runs on another SM, somewhere in its queue."""
    site = draft.pick(random)
    if site is None or len(draft.queues) < 2:
        return False
    item = draft.queues[site[0]].pop(site[1])
    queue = draft.queues[random.choice([sm for sm in range(len(draft.queues)) if sm != site[0]])]
    queue.insert(random.randrange(len(queue) + 1), item)
    draft.renumber()
    return True


@mutation
def reversed_queue(draft: Draft, random: Random) -> bool:
    """A queue is run from its end."""
    long = [queue for queue in draft.queues if len(queue) > 1]
    if not long:
        return False
    random.choice(long).reverse()
    draft.renumber()
    return True


@mutation
def shifted_start(draft: Draft, random: Random) -> bool:
    """A queue begins one record too early or too late."""
    sizes = [len(queue) for queue in draft.queues]
    if len(sizes) < 2:
        return False
    sm, step = random.randrange(len(sizes) - 1), random.choice((-1, 1))
    sizes[sm], sizes[sm + 1] = sizes[sm] + step, sizes[sm + 1] - step
    draft.sizes = sizes
    return min(sizes) >= 0


@mutation
def exchanged_queues(draft: Draft, random: Random) -> bool:
    """Two SMs exchange their whole queues: no fault at all."""
    if len(draft.queues) < 2:
        return False
    a, b = random.sample(range(len(draft.queues)), 2)
    draft.queues[a], draft.queues[b] = draft.queues[b], draft.queues[a]
    draft.uses[a], draft.uses[b] = draft.uses[b], draft.uses[a]
    return True


@mutation
def lost_instruction(draft: Draft, random: Random) -> bool:
    """An instruction is left out, and nobody counts on it."""
    site = draft.pick(random)
    if site is None:
        return False
    draft.queues[site[0]].pop(site[1])
    draft.renumber()
    draft.retarget()
    return True


@mutation
def owned_twice(draft: Draft, random: Random) -> bool:
    """An instruction runs twice, on two SMs or one."""
    site = draft.pick(random)
    if site is None:
        return False
    queue = random.choice(draft.queues)
    queue.insert(random.randrange(len(queue) + 1), draft.at(site))
    draft.renumber()
    draft.retarget()
    return True

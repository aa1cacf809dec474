"""Planted faults of the token's end: of the counter by which every SM opens the next token."""

from __future__ import annotations

from random import Random

from instructions.codec import MAX_SIGNALS, MAX_WAITS, Scheduled, Wait
from instructions.embed import Embed
from instructions.hand_over import HandOver
from instructions.sample import Sample
from tests.mutations.draft import Draft, Site, mutation

OPENING = (Embed, HandOver)  # a program begins with one of them


def site_of(draft: Draft, kind: type | tuple[type, ...]) -> Site:
    """Where the one instruction of a kind, or of several, stands."""
    [site] = draft.sites(lambda item: isinstance(item.instruction, kind))
    return site


def end_of(draft: Draft) -> int:
    """The counter of the token's end."""
    [counter] = draft.at(site_of(draft, Sample)).signals
    return counter


def another(draft: Draft, random: Random) -> int:
    """Any other counter; there always is one, as the end has something to wait for."""
    return random.choice([counter for counter in range(len(draft.targets)) if counter != end_of(draft)])


def opening_waits(draft: Draft, *counters: int) -> bool:
    """Let the opening instruction wait for these counters, of the token before."""
    draft.change(site_of(draft, OPENING), waits=tuple(Wait(counter, draft.targets[counter], 1) for counter in counters))
    return True


@mutation
def end_not_awaited(draft: Draft, random: Random) -> bool:
    """The opening instruction waits for nothing."""
    return opening_waits(draft)


@mutation
def end_awaited_second(draft: Draft, random: Random) -> bool:
    """The opening instruction waits for another counter of the token before, and then for the token's end."""
    return opening_waits(draft, another(draft, random), end_of(draft))


@mutation
def end_awaited_first(draft: Draft, random: Random) -> bool:
    """The opening instruction waits for the token's end, and then for another counter of the token before."""
    return opening_waits(draft, end_of(draft), another(draft, random))


@mutation
def other_end_awaited(draft: Draft, random: Random) -> bool:
    """The opening instruction waits for another counter of the token before."""
    return opening_waits(draft, another(draft, random))


def awaits_end(draft: Draft, random: Random, lag: int) -> bool:
    """An instruction also waits for the token's end."""
    end = end_of(draft)

    def has_room(item: Scheduled) -> bool:
        return len(item.waits) < MAX_WAITS and all(wait.counter != end for wait in item.waits)

    site = draft.pick(random, has_room)
    if site is None:
        return False
    found = [*draft.at(site).waits, Wait(end, 1, lag)]
    random.shuffle(found)
    draft.change(site, waits=tuple(found))
    return True


@mutation
def own_end_awaited(draft: Draft, random: Random) -> bool:
    """An instruction waits for the end of its own token, a wait that the kernel passes."""
    return awaits_end(draft, random, 0)


@mutation
def last_end_awaited(draft: Draft, random: Random) -> bool:
    """An instruction waits for the end of the last token, which its SM has seen already: no fault at all."""
    return awaits_end(draft, random, 1)


@mutation
def only_end_awaited(draft: Draft, random: Random) -> bool:
    """An instruction waits for the token's end in place of what it needs, of its own token or of the last."""
    end, lag = end_of(draft), random.randrange(2)
    return draft.change_one(random, lambda item: any(not wait.lag for wait in item.waits), waits=(Wait(end, 1, lag),))


@mutation
def two_ends(draft: Draft, random: Random) -> bool:
    """`Sample` signals a second counter, a new one or one of those that are there, and this before its own or after."""
    site, end = site_of(draft, Sample), end_of(draft)
    other = another(draft, random)
    if random.random() < 0.5:
        other = len(draft.targets)
        draft.targets.append(1)
    draft.change(site, signals=(end, other) if random.random() < 0.5 else (other, end))
    draft.retarget()
    return True


@mutation
def end_signalled_twice(draft: Draft, random: Random) -> bool:
    """Another instruction signals the token's end as well, and all who wait count on it."""
    end = end_of(draft)
    site = draft.pick(random, lambda item: len(item.signals) < MAX_SIGNALS and end not in item.signals)
    if site is None:
        return False
    draft.change(site, signals=(*draft.at(site).signals, end))
    draft.retarget()
    return True


@mutation
def end_handed_over(draft: Draft, random: Random) -> bool:
    """Another instruction tells that the token has ended."""
    own = site_of(draft, Sample)
    if not end_signalled_twice(draft, random):
        return False
    draft.change(own, signals=())
    draft.retarget()
    return True


@mutation
def other_end(draft: Draft, random: Random) -> bool:
    """`Sample` signals another counter in place of the one that is waited for."""
    draft.change(site_of(draft, Sample), signals=(another(draft, random),))
    draft.retarget()
    return True


@mutation
def renamed_end(draft: Draft, random: Random) -> bool:
    """The token's end and another counter exchange their numbers everywhere: no fault at all."""
    end, other = end_of(draft), another(draft, random)
    names = {end: other, other: end}

    def renamed(wait: Wait) -> Wait:
        return Wait(names.get(wait.counter, wait.counter), wait.target, wait.lag)

    for site in draft.sites():
        item = draft.at(site)
        signals = tuple(names.get(counter, counter) for counter in item.signals)
        load = renamed(item.load_wait) if item.load_wait else None
        draft.change(site, signals=signals, waits=tuple(map(renamed, item.waits)), load_wait=load)
    draft.retarget()
    return True

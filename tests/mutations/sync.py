"""Planted faults of synchronisation: signals, targets, waits, epochs.

Each takes a draft and a source of randomness, and says whether it found a place.
"""

from __future__ import annotations

from random import Random

from instructions.codec import MAX_SIGNALS, MAX_WAITS, Scheduled, Wait, Word
from tests.mutations.draft import Draft, Site, mutation


def signals(item: Scheduled) -> bool:
    return bool(item.signals)


def waits(item: Scheduled) -> bool:
    return bool(item.waits)


def current_waits(item: Scheduled) -> list[int]:
    """Places of the waits for the same token."""
    return [j for j, wait in enumerate(item.waits) if not wait.lag]


def set_wait(draft: Draft, site: Site, j: int, wait: Wait) -> None:
    found = draft.at(site).waits
    draft.change(site, waits=(*found[:j], wait, *found[j + 1 :]))


@mutation
def dropped_signal(draft: Draft, random: Random) -> bool:
    """A signal is not given."""
    site = draft.pick(random, signals)
    if site is None:
        return False
    found = list(draft.at(site).signals)
    found.pop(random.randrange(len(found)))
    draft.change(site, signals=tuple(found))
    return True


@mutation
def dropped_signal_retargeted(draft: Draft, random: Random) -> bool:
    """A signal is not given, and nobody counts on it."""
    done = dropped_signal(draft, random)
    draft.retarget()
    return done


@mutation
def extra_signal(draft: Draft, random: Random) -> bool:
    """A counter gets a signal too many."""
    site = draft.pick(random, lambda item: len(item.signals) < MAX_SIGNALS)
    if site is None:
        return False
    draft.change(site, signals=(*draft.at(site).signals, random.randrange(len(draft.targets))))
    return True


@mutation
def extra_signal_retargeted(draft: Draft, random: Random) -> bool:
    """A counter waits for one instruction more: slower, or a cycle."""
    done = extra_signal(draft, random)
    draft.retarget()
    return done


@mutation
def wrong_signal(draft: Draft, random: Random) -> bool:
    """A signal goes to another counter."""
    site = draft.pick(random, signals)
    if site is None:
        return False
    found = list(draft.at(site).signals)
    found[random.randrange(len(found))] = random.randrange(len(draft.targets))
    draft.change(site, signals=tuple(found))
    return True


@mutation
def moved_signal(draft: Draft, random: Random) -> bool:
    """The right number of signals, one of them from an instruction that has nothing to do with it."""
    site = draft.pick(random, signals)
    if site is None:
        return False
    counter = random.choice(draft.at(site).signals)
    other = draft.pick(random, lambda item: len(item.signals) < MAX_SIGNALS and counter not in item.signals)
    if other is None:
        return False
    draft.change(site, signals=tuple(c for c in draft.at(site).signals if c != counter))
    draft.change(other, signals=(*draft.at(other).signals, counter))
    return True


def target(draft: Draft, random: Random, step: int) -> bool:
    site = draft.pick(random, waits)
    if site is None:
        return False
    j = random.randrange(len(draft.at(site).waits))
    wait = draft.at(site).waits[j]
    set_wait(draft, site, j, Wait(wait.counter, wait.target + step, wait.lag))
    return True


@mutation
def target_high(draft: Draft, random: Random) -> bool:
    """A target one too high."""
    return target(draft, random, 1)


@mutation
def target_low(draft: Draft, random: Random) -> bool:
    """A target one too low."""
    return target(draft, random, -1)


@mutation
def load_target(draft: Draft, random: Random) -> bool:
    """A loader's target one too high or too low."""
    site = draft.pick(random, lambda item: item.load_wait)
    if site is None:
        return False
    wait = draft.at(site).load_wait
    assert wait is not None
    draft.change(site, load_wait=Wait(wait.counter, wait.target + random.choice((-1, 1)), 1))
    return True


@mutation
def stated_target(draft: Draft, random: Random) -> bool:
    """The program states another number of signals than its counter gets."""
    draft.targets[random.randrange(len(draft.targets))] += random.choice((-1, 1))
    return True


@mutation
def dropped_wait(draft: Draft, random: Random) -> bool:
    """An instruction does not wait."""
    site = draft.pick(random, waits)
    if site is None:
        return False
    found = list(draft.at(site).waits)
    found.pop(random.randrange(len(found)))
    draft.change(site, waits=tuple(found))
    return True


@mutation
def wrong_counter(draft: Draft, random: Random) -> bool:
    """A wait for another counter, with the old target."""
    site = draft.pick(random, waits)
    if site is None:
        return False
    j = random.randrange(len(draft.at(site).waits))
    wait = draft.at(site).waits[j]
    set_wait(draft, site, j, Wait(random.randrange(len(draft.targets)), wait.target, wait.lag))
    return True


@mutation
def wrong_counter_retargeted(draft: Draft, random: Random) -> bool:
    """A wait for another counter, with that counter's target."""
    done = wrong_counter(draft, random)
    draft.retarget()
    return done


@mutation
def stale_epoch(draft: Draft, random: Random) -> bool:
    """A wait is content with the previous token."""
    site = draft.pick(random, current_waits)
    if site is None:
        return False
    j = random.choice(current_waits(draft.at(site)))
    wait = draft.at(site).waits[j]
    set_wait(draft, site, j, Wait(wait.counter, wait.target, 1))
    return True


@mutation
def early_epoch(draft: Draft, random: Random) -> bool:
    """A wait for the previous token becomes one for this token."""
    site = draft.pick(random, lambda item: any(wait.lag for wait in item.waits))
    if site is None:
        return False
    draft.change(site, waits=tuple(Wait(wait.counter, wait.target) for wait in draft.at(site).waits))
    return True


@mutation
def mixed_tokens(draft: Draft, random: Random) -> bool:
    """Nobody waits for a counter within its token, so its signals of two tokens may be counted together."""
    counter = random.randrange(len(draft.targets))
    readers = draft.sites(lambda item: any(wait.counter == counter and not wait.lag for wait in item.waits))
    for site in readers:
        found = draft.at(site).waits
        draft.change(site, waits=tuple(Wait(w.counter, w.target, 1) if w.counter == counter else w for w in found))
    return bool(readers)


@mutation
def partial_counter(draft: Draft, random: Random) -> bool:
    """A reader waits for some of the producers only, counted by a counter of their own."""
    site = draft.pick(random, current_waits)
    if site is None:
        return False
    j = random.choice(current_waits(draft.at(site)))
    members = draft.producers(draft.at(site).waits[j].counter)
    chosen = random.sample(members, random.randrange(len(members)))
    if not chosen or any(len(draft.at(member).signals) == MAX_SIGNALS for member in chosen):
        return False
    counter = len(draft.targets)
    draft.targets.append(len(chosen))
    for member in chosen:
        draft.change(member, signals=(*draft.at(member).signals, counter))
    set_wait(draft, site, j, Wait(counter, len(chosen)))
    return True


@mutation
def merged_counters(draft: Draft, random: Random) -> bool:
    """Two counters become one: waits for either wait for both."""
    if len(draft.targets) < 2:
        return False
    kept, gone = random.sample(range(len(draft.targets)), 2)
    for site in draft.producers(gone):
        others = [counter for counter in draft.at(site).signals if counter != gone]
        draft.change(site, signals=tuple(dict.fromkeys([*others, kept])))
    for site in draft.sites(waits):
        found = (Wait(kept if wait.counter == gone else wait.counter, wait.target, wait.lag) for wait in draft.at(site).waits)
        draft.change(site, waits=tuple(found))
    for site in draft.sites(lambda item: item.load_wait and item.load_wait.counter == gone):
        draft.change(site, load_wait=Wait(kept, 1, 1))
    draft.retarget()
    return True


@mutation
def crossed_waits(draft: Draft, random: Random) -> bool:
    """A cycle between two SMs: an instruction also waits for one that waits for it."""
    site = draft.pick(random, signals)
    if site is None:
        return False
    counter = random.choice(draft.at(site).signals)
    reader = draft.pick(random, lambda item: item.signals and any(w.counter == counter and not w.lag for w in item.waits))
    if reader is None or len(draft.at(site).waits) == MAX_WAITS:
        return False
    back = random.choice(draft.at(reader).signals)
    draft.change(site, waits=(*draft.at(site).waits, Wait(back, draft.targets[back])))
    return True


@mutation
def dropped_load_wait(draft: Draft, random: Random) -> bool:
    """A loader does not wait for the previous token's cache rows."""
    return draft.change_one(random, lambda item: item.load_wait, load_wait=None)


@mutation
def wrong_load_counter(draft: Draft, random: Random) -> bool:
    """A loader waits for another counter."""
    site = draft.pick(random, lambda item: item.load_wait)
    if site is None:
        return False
    counter = random.randrange(len(draft.targets))
    draft.change(site, load_wait=Wait(counter, draft.targets[counter], 1))
    return True


@mutation
def unknown_counter(draft: Draft, random: Random) -> bool:
    """A counter that the program does not have."""
    site = draft.pick(random, waits)
    if site is None:
        return False
    draft.poke(site, random.choice((Word.WAIT, Word.SIGNAL)), len(draft.targets) + random.randrange(3))
    return True


@mutation
def dropped_release(draft: Draft, random: Random) -> bool:
    """Signals that should release what an SM has stored only say that it has been done."""
    return draft.change_one(random, lambda item: item.release, release=False)


@mutation
def moved_release(draft: Draft, random: Random) -> bool:
    """Another instruction of the queue releases, too early for what is stored after it."""
    site = draft.pick(random, lambda item: item.release)
    others = [other for other in draft.sites(signals) if site is not None and other[0] == site[0] and other != site]
    if site is None or not others:
        return False
    draft.change(site, release=False)
    draft.change(random.choice(others), release=True)
    return True

"""Planted faults of the work itself: rows, heads, layers, pages, the ring, memory."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from instructions.codec import WORDS, Scheduled, Word
from instructions.embed import Embed
from instructions.hand_over import HandOver
from instructions.registry import INSTRUCTIONS
from instructions.shape import HELD_PAGES
from tests.mutations.draft import Draft, mutation
from tests.mutations.end import OPENING, site_of


def has(name: str, item: Scheduled) -> bool:
    return name in item.instruction.payload_names()


def field_step(draft: Draft, random: Random, name: str, steps: tuple[int, ...]) -> bool:
    """Change one field of one instruction, its pages with it."""
    site = draft.pick(random, lambda item: has(name, item))
    if site is None:
        return False
    return draft.work(site, **{name: getattr(draft.at(site).instruction, name) + random.choice(steps)})


@mutation
def overlapping_rows(draft: Draft, random: Random) -> bool:
    """A run of row blocks is one too long."""
    return field_step(draft, random, "blocks", (1,))


@mutation
def missing_row(draft: Draft, random: Random) -> bool:
    """A run of row blocks is one too short."""
    return field_step(draft, random, "blocks", (-1,))


@mutation
def shifted_rows(draft: Draft, random: Random) -> bool:
    """A run of row blocks begins elsewhere."""
    return field_step(draft, random, "block", (-1, 1))


@mutation
def wrong_head(draft: Draft, random: Random) -> bool:
    """Attention of another head."""
    return field_step(draft, random, "head", (-1, 1))


@mutation
def wrong_slice(draft: Draft, random: Random) -> bool:
    """Another slice of the context."""
    return field_step(draft, random, "slice", (-1, 1))


@mutation
def wrong_slot(draft: Draft, random: Random) -> bool:
    """Another place among the best logits."""
    return field_step(draft, random, "slot", (-1, 1, 2))


@mutation
def wrong_slots(draft: Draft, random: Random) -> bool:
    """Sampling looks at too many or too few places."""
    return field_step(draft, random, "slots", (-1, 1))


@mutation
def wrong_layer(draft: Draft, random: Random) -> bool:
    """The same work in another layer: two layers then share a buffer."""
    site = draft.pick(random)
    return site is not None and draft.work(site, layer=draft.at(site).instruction.layer + random.choice((-1, 1)))


@mutation
def other_opcode(draft: Draft, random: Random) -> bool:
    """The same fields for another instruction."""
    site = draft.pick(random)
    if site is None:
        return False
    draft.poke(site, Word.OPCODE, random.choice([*(kind.OPCODE for kind in INSTRUCTIONS), 0, len(INSTRUCTIONS) + 1]))
    return True


@mutation
def exchanged_work(draft: Draft, random: Random) -> bool:
    """Two records exchange what they do, but not their waits and signals."""
    a, b = draft.pick(random), draft.pick(random)
    if a is None or b is None:
        return False
    first, second = draft.at(a).instruction, draft.at(b).instruction
    return draft.set_work(a, second) and draft.set_work(b, first)


@mutation
def exchanged_rows(draft: Draft, random: Random) -> bool:
    """Two records of a kind exchange what they do, but not their waits and signals."""
    a = draft.pick(random)
    if a is None:
        return False
    kind, layer = type(draft.at(a).instruction), draft.at(a).instruction.layer
    b = draft.pick(random, lambda item: type(item.instruction) is kind and item.instruction.layer == layer)
    assert b is not None
    first, second = draft.at(a).instruction, draft.at(b).instruction
    return draft.set_work(a, second) and draft.set_work(b, first)


def word_step(draft: Draft, random: Random, word: Word) -> bool:
    site = draft.pick(random, lambda item: item.pages)
    if site is None:
        return False
    value = getattr(draft.at(site), word.name.lower())
    draft.poke(site, word, value + random.choice((-1, 1)))
    return True


@mutation
def wrong_page_count(draft: Draft, random: Random) -> bool:
    """Pages released early, or never."""
    return word_step(draft, random, Word.PAGES)


@mutation
def wrong_generation(draft: Draft, random: Random) -> bool:
    """A page use in another slot, and at times another generation."""
    return word_step(draft, random, Word.PAGE)


@mutation
def wrong_tape(draft: Draft, random: Random) -> bool:
    """Other weights than the rows need."""
    return word_step(draft, random, Word.TAPE)


@mutation
def wrong_uses(draft: Draft, random: Random) -> bool:
    """The next token's page uses begin elsewhere than this one's end."""
    draft.uses[random.randrange(len(draft.uses))] += random.choice((-1, 1))
    return True


@mutation
def shallow_ring(draft: Draft, random: Random) -> bool:
    """A ring that cannot hold what one instruction holds."""
    draft.ring = random.randrange(HELD_PAGES)
    return True


@mutation
def ring_less_one(draft: Draft, random: Random) -> bool:
    """A ring one page shallower than planned for."""
    draft.ring -= 1
    return True


@mutation
def deeper_ring(draft: Draft, random: Random) -> bool:
    """A ring deeper than planned for: loaders run further ahead, perhaps out of shared memory."""
    draft.ring += random.choice((1, 2, 3, 100))
    return True


@mutation
def shared_layers(draft: Draft, random: Random) -> bool:
    """Two layers of a buffer in the same memory."""
    name = random.choice([name for name, buffer in draft.shape.buffers.items() if buffer.layers > 1 and buffer.stride])
    draft.alter_buffers(**{name: draft.shape.buffers[name]._replace(stride=0)})
    return True


@mutation
def shared_buffers(draft: Draft, random: Random) -> bool:
    """Two buffers in the same memory."""
    names = [name for name, buffer in draft.shape.buffers.items() if buffer.stride]
    a, b = random.sample(names, 2)
    draft.alter_buffers(**{a: draft.shape.buffers[a]._replace(base=draft.shape.buffers[b].base)})
    return True


@mutation
def other_slices(draft: Draft, random: Random) -> bool:
    """The header says another number of attention slices."""
    draft.shape = replace(draft.shape, slices=draft.shape.slices + random.choice((-1, 1)))
    return True


@mutation
def other_opening(draft: Draft, random: Random) -> bool:
    """A token that begins with the embedding in place of a hidden state, or the other way round."""
    site = site_of(draft, OPENING)
    layers = range(draft.shape.config.num_layers)
    return draft.set_work(site, Embed(0) if draft.shape.tail else HandOver(random.choice(layers)))


@mutation
def other_span(draft: Draft, random: Random) -> bool:
    """The header says that the program is all of a token, where it is the tail, or the other way round."""
    draft.shape = replace(draft.shape, tail=not draft.shape.tail)
    return True


@mutation
def other_bucket(draft: Draft, random: Random) -> bool:
    """The header says another context bucket."""
    bucket = draft.shape.bucket + random.choice((-1, 1)) * draft.shape.page_positions
    draft.shape = replace(draft.shape, bucket=bucket)
    return True


@mutation
def stray_word(draft: Draft, random: Random) -> bool:
    """Any word becomes any small number."""
    site = draft.pick(random)
    if site is None:
        return False
    draft.poke(site, random.randrange(WORDS), random.choice((-1, 0, 1, 2, 3, random.randrange(100))))
    return True

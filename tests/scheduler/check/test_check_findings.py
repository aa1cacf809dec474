"""What the checker says about one planted fault: its kind, its place, and words that a person can act on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from instructions.attention import Attention
from instructions.base import Instruction
from instructions.codec import CodecError, Scheduled, Wait, Word, decode, disassemble, encode
from instructions.down import Down
from instructions.embed import Embed
from instructions.hand_over import HandOver
from instructions.lm_head import LmHead
from instructions.o_proj import OProj
from instructions.qkv import Qkv
from instructions.sample import Sample
from models.config import ModelConfig
from models.tape import Matrix, TapeLayout
from scheduler.build import build_program, make_shape
from scheduler.check import KINDS, Finding, check, launch_tokens, lifetime_tokens, require_valid
from scheduler.check.listing import neutral, read_listing
from scheduler.check.machine import machine_findings
from scheduler.errors import ScheduleError
from scheduler.limits import INT32_MAX, MAX_SMS
from scheduler.program import Program
from tests.mutations.draft import Draft

SMS = 4
CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=100
)  # fmt: skip


def make_program(**options: Any) -> Program:
    """A program that is valid: 44 instructions on 4 SMs."""
    return build_program(make_shape(CONFIG, sms=SMS, capacity=512, bucket=512, **options), SMS)


PROGRAM = make_program()
PROGRAMS = {"whole": PROGRAM, "tail": make_program(tail=True)}


def findings_of(edit: Callable[[Draft], None], program: Program = PROGRAM) -> tuple[Finding, ...]:
    """What is found after an edit."""
    draft = Draft.of(program)
    edit(draft)
    mutant = draft.program()
    assert mutant is not None
    return check(mutant).findings


def site_of(kind: type, draft: Draft, turn: int = 0) -> tuple[int, int]:
    """Where an instruction of a kind stands."""
    return draft.sites(lambda item: isinstance(item.instruction, kind))[turn]


def test_a_sound_program_is_accepted_with_its_numbers() -> None:
    report = check(PROGRAM)
    assert report.valid and report.findings == ()
    summary = report.summary
    assert summary is not None
    assert (summary.sms, summary.instructions, summary.counters) == (SMS, len(PROGRAM.words), PROGRAM.counters)
    assert summary.page_uses == PROGRAM.uses.sum()
    assert str(summary.lifetime_tokens) in str(summary)


def change_waits(kind: type, change: Callable[[Wait], Wait]) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        site = site_of(kind, draft)
        draft.change(site, waits=tuple(change(wait) for wait in draft.at(site).waits))

    return edit


def drop_waits(kind: type) -> Callable[[Draft], None]:
    return lambda draft: draft.change(site_of(kind, draft), waits=())


def poke(kind: type, word: int, value: int) -> Callable[[Draft], None]:
    return lambda draft: draft.poke(site_of(kind, draft), word, value)


def set_ring(ring: int) -> Callable[[Draft], None]:
    return lambda draft: setattr(draft, "ring", ring)


def set_use(draft: Draft) -> None:
    draft.uses[2] += 1


def set_target(draft: Draft) -> None:
    draft.targets[1] += 1


def load_wait_on_weights(draft: Draft) -> None:
    draft.change(site_of(OProj, draft), load_wait=Wait(1, draft.targets[1], 1))


def silence_the_end(draft: Draft) -> None:
    """No signal from Sample, and no wait for one."""
    draft.change(site_of(Sample, draft), signals=())
    for site in draft.sites(lambda item: any(wait.lag for wait in item.waits)):
        draft.change(site, waits=())
    for site in draft.sites(lambda item: item.load_wait):
        draft.change(site, load_wait=None)
    draft.targets[0] = 0


def opening_waits_for(*places: int) -> Callable[[Draft], None]:
    """Waits of the opening instruction, of the token before: for the token's end (0), for the counter of the LM heads (1)."""

    def edit(draft: Draft) -> None:
        [sample] = draft.sites(lambda item: isinstance(item.instruction, Sample))
        counters = (draft.at(sample).signals[0], draft.at(sample).waits[0].counter)
        waits = tuple(Wait(counters[place], draft.targets[counters[place]], 1) for place in places)
        draft.change(draft.sites(lambda item: isinstance(item.instruction, Embed | HandOver))[0], waits=waits)

    return edit


def second_end(draft: Draft) -> None:
    """A second counter that `Sample` signals, and nobody waits for."""
    site = site_of(Sample, draft)
    draft.change(site, signals=(*draft.at(site).signals, len(draft.targets)))
    draft.targets.append(1)


def keep_back(draft: Draft) -> None:
    """The LM head of an SM other than Sample's signals, but releases nothing."""
    draft.change(site_of(LmHead, draft, 1), release=False)


def no_work(draft: Draft) -> None:
    draft.queues = [[] for _ in draft.queues]
    draft.targets = []
    draft.renumber()


EDITS: list[tuple[Callable[[Draft], None], str, str]] = [
    (poke(Qkv, Word.OPCODE, 99), "record", "unknown opcode 99"),
    (poke(Qkv, Word.WAITS, 5), "record", "5 waits"),
    (poke(Qkv, Word.WAIT + 1, 0), "record", "word 10 (WAIT) is 0; there it means nothing, so it must be -1"),
    (poke(Qkv, Word.PAYLOAD + 2, 7), "record", "word 18 (PAYLOAD) is 7"),
    (poke(Qkv, Word.LAGS, 8), "record", "(LAGS)"),
    (poke(Qkv, Word.RELEASE, 2), "record", "its signals release 2, it must be 0 or 1"),
    (keep_back, "race", "may store what the next token cannot see yet"),
    (keep_back, "race", "but no path of signals that release leads to it from the write of logits[0]"),
    (poke(Sample, Word.RELEASE, 0), "race", "ends the token, but its signal c0 releases nothing"),
    (poke(Qkv, Word.LAYER, 2), "field", "layer 2, it must be 0 to 1"),
    (poke(Sample, Word.LAYER, 1), "field", "layer 1, it must be 0 to 0"),
    (poke(Attention, Word.PAYLOAD, 2), "field", "head=2, it must be 0 to 1"),
    (poke(Attention, Word.PAYLOAD + 1, -1), "field", "slice=-1"),
    (poke(OProj, Word.PAYLOAD + 1, 0), "field", "blocks=0, it must be 1 to"),
    (poke(LmHead, Word.PAYLOAD + 2, SMS), "field", "slot=4, it must be 0 to 3"),
    (poke(OProj, Word.WAIT, 1000), "counter", "there is no counter c1000"),
    (poke(OProj, Word.SIGNAL, 1000), "counter", "there is no counter c1000"),
    (change_waits(OProj, lambda w: Wait(w.counter, w.target + 1)), "counter", "never met"),
    (change_waits(OProj, lambda w: Wait(w.counter, w.target - 1)), "counter", "met too early"),
    (set_target, "counter", "c1 is stated to get 2 signals a token, it gets 1"),
    (silence_the_end, "counter", "no SM would begin the next one"),
    (second_end, "counter", "ends the token and signals c0 and c"),
    (opening_waits_for(), "counter", "it must wait for c0 of the token before and for nothing else"),
    (opening_waits_for(1), "counter", "it must wait for c0 of the token before and for nothing else"),
    (opening_waits_for(1, 0), "counter", "it must wait for c0 of the token before and for nothing else"),
    (opening_waits_for(0, 1), "counter", "it must wait for c0 of the token before and for nothing else"),
    (poke(Sample, Word.PAYLOAD, SMS - 1), "rows", "which nobody reads"),
    (no_work, "rows", "token[0][0:1] is read, but nobody writes it"),
    (poke(OProj, Word.PAGES, 2), "pages", "takes 2 pages through the ring, it needs 1"),
    (poke(OProj, Word.PAGE, 77), "pages", "begin at 77, but the queue has used"),
    (poke(OProj, Word.TAPE, 0), "pages", "streams from page 0, its rows begin at page"),
    (set_use, "pages", "sm 2 counts"),
    (load_wait_on_weights, "pages", "its loader waits, but it streams no cache rows"),
    (set_ring(3), "pages", "a ring of 3 pages; an instruction may hold 4 at once"),
    (set_ring(14), "limits", "bytes of shared memory for a ring of 14 pages; a block has 232448"),
    (drop_waits(OProj), "race", "no path leads to it from the write of"),
    (change_waits(OProj, lambda w: Wait(w.counter, w.target, 1)), "race", "of the token before"),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("edit", "kind", "words"), EDITS)
def test_one_planted_fault(edit: Callable[[Draft], None], kind: str, words: str, program: str) -> None:
    findings = findings_of(edit, PROGRAMS[program])
    assert any(finding.kind == kind and words in str(finding) for finding in findings), "\n".join(map(str, findings))


@pytest.mark.parametrize(
    ("program", "opening", "words"),
    [
        ("whole", HandOver(0), "takes a hidden state in a program that begins with the embedding"),
        ("tail", HandOver(0), "hands over to layer 0 of a program that begins with layer 1"),
        ("tail", Embed(0), "embeds a token in a program that begins with a hidden state"),
    ],
)
def test_a_program_begins_as_its_header_says(program: str, opening: Instruction, words: str) -> None:
    def edit(draft: Draft) -> None:
        [site] = draft.sites(lambda item: isinstance(item.instruction, Embed | HandOver))
        assert draft.set_work(site, opening)

    [finding] = findings_of(edit, PROGRAMS[program])
    assert finding.kind == "field" and words in str(finding)


def test_a_tail_is_no_whole_token_nor_the_other_way_round() -> None:
    """What a program has to hold follows from its header: all layers, or the last one."""
    for name, program in PROGRAMS.items():
        assert check(program).valid
        other = replace(program, shape=replace(program.shape, tail=name == "whole"))
        assert {finding.kind for finding in check(other).findings} == {"field"}
    layers = findings_of(lambda draft: draft.queues[0].append(Scheduled(Down(0, 0, 1))), PROGRAMS["tail"])
    assert any("writes x[1][0:16]" in str(finding) or "row 0 of x[1]" in str(finding) for finding in layers)


def test_a_run_of_rows_moved_by_one_block_shows_everywhere() -> None:
    """Two owners, rows nobody writes, weights streamed twice and never: each is its own finding."""

    def edit(draft: Draft) -> None:
        site = site_of(OProj, draft)
        block = draft.at(site).instruction.block  # type: ignore[attr-defined]
        assert draft.work(site, block=block + 1 if block == 0 else block - 1)

    said = "\n".join(map(str, findings_of(edit)))
    for words in (
        "is also written by",
        "is read, but nobody writes it",
        "is also streamed by",
        "are streamed by no instruction",
    ):
        assert words in said


def test_a_race_names_both_accesses_and_their_counters() -> None:
    """Row, reader with its text, writer with its text, what one signals and the other waits for."""
    draft = Draft.of(PROGRAM)
    reader = site_of(OProj, draft)
    region = draft.at(reader).instruction.reads(PROGRAM.shape)[0]
    draft.change(reader, waits=())
    mutant = draft.program()
    assert mutant is not None
    finding = check(mutant).findings[0]
    assert (finding.kind, finding.sm, finding.index) == ("race", *reader)
    assert finding.instruction == " ".join(disassemble(draft.at(reader)).split())
    writer = next(
        site
        for site in draft.sites()
        if any(
            (w.buffer, w.layer) == (region.buffer, region.layer) and w.start == region.start
            for w in draft.at(site).instruction.writes(PROGRAM.shape)
        )
    )
    assert f"sm {writer[0]} #{writer[1]} [" in finding.message
    assert str(region) in finding.message
    assert f"the writer signals c{draft.at(writer).signals[0]}, the reader waits for nothing" in finding.message


def test_a_deadlock_is_a_cycle_that_closes() -> None:
    """Every hop begins where the one before ended, and is true of the words."""

    def edit(draft: Draft) -> None:
        site = site_of(Qkv, draft)
        back = draft.at(site_of(Sample, draft)).signals[0]
        draft.change(site, waits=(*draft.at(site).waits, Wait(back, 1)))

    findings = findings_of(edit)
    assert [finding.kind for finding in findings] == ["deadlock"]
    hops = findings[0].details
    names = [[part.split("]")[0] for part in hop.split("sm ")[1:]] for hop in hops]
    assert all(len(pair) == 2 for pair in names)
    assert [first for first, _ in names[1:]] + [names[0][0]] == [second for _, second in names]
    assert any("waits for c" in hop for hop in hops)
    assert len(findings[0].lines()) == len(hops) + 1


def test_the_end_of_the_token_must_follow_everything() -> None:
    """`Sample` waits for all LM heads but one: that one's rows are read too early, and it may run on into the next token."""

    def partial(draft: Draft) -> None:
        sample, head = site_of(Sample, draft), site_of(LmHead, draft, 1)
        wait = draft.at(sample).waits[0]
        draft.change(head, signals=())
        draft.targets[wait.counter] -= 1
        draft.change(sample, waits=(Wait(wait.counter, wait.target - 1),))

    findings = findings_of(partial)
    heads = [finding for finding in findings if "may still run when the next token begins" in finding.message]
    assert [finding.instruction.split()[0] for finding in heads] == ["lm_head"]
    assert all(finding.kind == "race" for finding in findings)


def test_two_signals_on_the_end_counter_are_refused() -> None:
    """Every SM begins a token on the word of that one counter."""

    def edit(draft: Draft) -> None:
        counter = draft.at(site_of(Sample, draft)).signals[0]
        draft.change(site_of(LmHead, draft), signals=(*draft.at(site_of(LmHead, draft)).signals, counter))
        draft.retarget()

    assert any("tells that the token has ended" in finding.message for finding in findings_of(edit))


def test_nobody_may_wait_for_the_end_of_its_own_token() -> None:
    """The kernel passes every wait for that counter, and so would never know."""
    for site in Draft.of(PROGRAM).sites():
        draft = Draft.of(PROGRAM)
        draft.change(site, waits=(*draft.at(site).waits[:1], Wait(draft.at(site_of(Sample, draft)).signals[0], 1)))
        mutant = draft.program()
        assert mutant is not None
        assert not check(mutant).valid, draft.at(site)


def test_a_loader_that_outruns_the_cache() -> None:
    """A whole token passes through the ring at once, so nothing but its wait keeps a loader behind the token before."""
    shape = make_shape(replace(CONFIG, num_layers=1), sms=13, capacity=512, bucket=512, slices=1)
    program = build_program(shape, 13)
    assert program.uses.max() <= program.ring

    def edit(draft: Draft) -> None:
        for site in draft.sites(lambda item: item.load_wait):
            draft.change(site, load_wait=None)

    findings = findings_of(edit, program)
    assert [finding.kind for finding in findings] == ["race"] * CONFIG.num_kv_heads
    assert "its loader may stream kv[0][0:32] before sm" in findings[0].message
    assert f"or begin at page use {program.ring} or later" in findings[0].message


@pytest.mark.parametrize("name", ["x", "attn", "mlp"])
def test_a_buffer_shared_by_two_layers(name: str) -> None:
    def edit(draft: Draft) -> None:
        draft.alter_buffers(**{name: draft.shape.buffers[name]._replace(stride=0)})

    assert f"{name}[0] and {name}[1] share memory" in str(findings_of(edit)[0])


def test_a_buffer_outside_the_arena() -> None:
    def edit(draft: Draft) -> None:
        draft.alter_buffers(best=draft.shape.buffers["best"]._replace(base=draft.shape.arena_elements))

    assert "best[0] lies outside" in str(findings_of(edit)[0])


@pytest.mark.parametrize(
    ("sms", "words"), [(0, "a grid of 0 thread blocks"), (MAX_SMS + 1, f"a grid of {MAX_SMS + 1} thread blocks")]
)
def test_a_grid_that_cannot_be_resident(sms: int, words: str) -> None:
    program = replace(PROGRAM, starts=np.zeros(sms + 1, np.int32), uses=np.zeros(sms, np.int32), words=PROGRAM.words[:0])
    assert words in str(check(program).findings[0])


@pytest.mark.parametrize(
    "arrays",
    [
        {"words": PROGRAM.words.astype(np.int64)},
        {"words": PROGRAM.words[:, :-1]},
        {"starts": PROGRAM.starts[::-1].copy()},
        {"starts": PROGRAM.starts + 1},
        {"uses": PROGRAM.uses[:-1]},
        {"targets": PROGRAM.targets[None]},
        {"targets": PROGRAM.targets[0]},
    ],
)
def test_arrays_that_do_not_belong_together(arrays: dict[str, Any]) -> None:
    findings = check(replace(PROGRAM, **arrays)).findings
    assert [finding.kind for finding in findings] == ["record"]


def test_memory_in_another_order_than_the_indices() -> None:
    """What the checker reads by index is not what the kernel would read."""
    for name, array in (("words", np.asfortranarray(PROGRAM.words)), ("uses", np.repeat(PROGRAM.uses, 2)[::2])):
        program = replace(PROGRAM)
        object.__setattr__(program, name, array)
        [finding] = check(program).findings
        assert finding.kind == "record" and "in memory in the order of their indices" in finding.message


def test_more_counters_than_can_be_signalled() -> None:
    most = 2 * len(PROGRAM.words)
    for count, kinds in ((most, []), (most + 1, ["counter"])):
        targets = np.zeros(count, np.int32)
        targets[: PROGRAM.counters] = PROGRAM.targets
        assert [finding.kind for finding in check(replace(PROGRAM, targets=targets)).findings] == kinds


def with_tape(change: Callable[[Matrix], Matrix] = lambda matrix: matrix, **sizes: Any) -> Program:
    """The program of a model with biases, its matrices laid otherwise on the tape."""
    config = replace(CONFIG, num_layers=3, qkv_bias=True, o_bias=True, mlp_bias=True)
    program = build_program(make_shape(config, sms=SMS, capacity=512, bucket=512), SMS)
    assert check(program).valid
    shape, tape = replace(program.shape), program.shape.tape
    shape.__dict__["tape"] = replace(tape, matrices=tuple(map(change, tape.matrices)), **sizes)
    return replace(program, shape=shape)


def change_one(kind: str, layer: int, **changes: int) -> Callable[[Matrix], Matrix]:
    return lambda matrix: replace(matrix, **changes) if (matrix.kind, matrix.layer) == (kind, layer) else matrix  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_one("o", 1, bias_offset=4096), "biases and norms of heads lie"),
        (change_one("gate_up", 2, bias_offset=-1), "the matrices gate_up of the layers differ in size, bias or norm"),
        (change_one("down", 1, pages_per_block=2), "the matrices down of the layers differ in size, bias or norm"),
        (change_one("embedding", 0, pages_per_block=2), "rows of embedding take 2 pages; the hidden state needs 1"),
    ],
)
def test_layers_that_differ(change: Callable[[Matrix], Matrix], words: str) -> None:
    """The kernel takes from the first what it uses for all."""
    assert any(words in str(finding) for finding in check(with_tape(change)).findings)


def test_norms_that_do_not_lie_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    program = with_tape()
    offset = TapeLayout.norm_offset
    monkeypatch.setattr(TapeLayout, "norm_offset", lambda tape, kind, layer=0: offset(tape, kind, layer) + layer**2)
    assert any("norms lie" in str(finding) for finding in check(program).findings)


@pytest.mark.parametrize(
    ("sizes", "words"), [({"pages": 2**24}, "lines of the weight tape"), ({"constant_count": 2**31}, "constants")]
)
def test_a_model_whose_parts_int32_cannot_count(sizes: dict[str, Any], words: str) -> None:
    least = {name: number - 1 for name, number in sizes.items()}
    for changed, found in ((sizes, True), (least, False)):
        assert any(f"{words}; an int32" in str(finding) for finding in check(with_tape(**changed)).findings) == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"items": range(2**26)}, "words of the records"),
        ({"targets": np.broadcast_to(np.int32(1), 2**26)}, "words of the counters"),
        ({"starts": np.array([0, 2**23], np.int32), "uses": PROGRAM.uses[:1]}, "record numbers overflow int32 after 255"),
        ({"shape": replace(PROGRAM.shape, capacity=2**28)}, "lines of the KV cache"),
        ({"shape": replace(PROGRAM.shape, capacity=2**28)}, "numbers of the RoPE table"),
    ],
)
def test_a_program_whose_parts_int32_cannot_count(changes: dict[str, Any], words: str) -> None:
    listing, _ = read_listing(PROGRAM)
    assert listing is not None
    assert not list(machine_findings(listing))
    assert any(words in str(finding) for finding in machine_findings(replace(listing, **changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"itemsize": 3}, "weights of 3 bytes"), ({"slices": 0}, "0 attention slices"), ({"bucket": 640}, "bucket of 640")],
)
def test_a_shape_that_describes_no_machine(changes: dict[str, Any], words: str) -> None:
    program = replace(PROGRAM, shape=replace(PROGRAM.shape, **changes))
    assert words in str(check(program).findings[0])


def test_lifetimes_are_exactly_what_int32_holds() -> None:
    """A counter holds target * tokens; the last page use of a launch has number tokens * uses - 1."""
    tokens, launch = lifetime_tokens(PROGRAM), launch_tokens(PROGRAM)
    most, uses = int(PROGRAM.targets.max()), int(PROGRAM.uses.max())
    assert tokens * most <= INT32_MAX < (tokens + 1) * most
    assert launch * uses <= INT32_MAX < (launch + 1) * uses


def test_a_cache_longer_than_the_numbers_last_is_refused() -> None:
    """2^29 positions of 5 page uses or more: the numbers of page uses would overflow within one context."""
    shape = make_shape(CONFIG, sms=SMS, capacity=2**29, bucket=512)
    with pytest.raises(ScheduleError, match="page use numbers overflow int32 after .*: use more SMs, or a shorter cache"):
        build_program(shape, SMS)


def test_require_valid_says_why() -> None:
    require_valid(PROGRAM)
    draft = Draft.of(PROGRAM)
    for site in draft.sites(lambda item: isinstance(item.instruction, OProj)):
        draft.change(site, waits=())
    mutant = draft.program()
    assert mutant is not None
    with pytest.raises(ScheduleError, match=r"not safe to run: race: sm \d+ #\d+ \[o_proj .*\(and \d+ more\)"):
        require_valid(mutant)


def test_every_kind_of_finding_is_listed() -> None:
    seen = {finding.kind for edit, _, _ in EDITS for finding in findings_of(edit)}
    assert seen <= set(KINDS)
    assert set(KINDS) - seen <= {"deadlock", "weights"}, "those have tests of their own above"


def test_neutral_words_are_those_that_encode_writes() -> None:
    """The checker's own idea of unused words, against the encoder: for any record that decodes, in both directions."""
    random = Random(1)
    compared = 0
    for _ in range(3000):
        record = PROGRAM.words[random.randrange(len(PROGRAM.words))].copy()
        for _ in range(random.randrange(1, 4)):
            record[random.randrange(len(record))] = random.choice((-1, 0, 1, 2, 3, 5, 9))
        try:
            item: Scheduled = decode(record)
            encoded = encode(item)
        except CodecError:
            continue
        assert np.array_equal(neutral(record[None])[0], encoded), record
        compared += 1
    assert compared > 1000


def test_garbage_is_told_not_raised() -> None:
    """A damaged file may hold any numbers: the checker answers with findings, never with an exception."""
    random, told = Random(2), 0
    numbers = (-(2**31), -1, 0, 1, 2, 3, 8, 100, 10**6, 2**31 - 1)
    for _ in range(400):
        arrays = {name: getattr(PROGRAM, name).copy() for name in ("words", "starts", "targets", "uses")}
        for _ in range(random.randrange(1, 5)):
            array = arrays[random.choice(("words", "words", "words", "starts", "targets", "uses"))]
            array.flat[random.randrange(array.size)] = random.choice(numbers)
        sizes = {random.choice(("itemsize", "capacity", "bucket", "slices")): random.choice(numbers)}
        shape = replace(PROGRAM.shape, **sizes) if random.random() < 0.1 else PROGRAM.shape  # type: ignore[arg-type]
        findings = check(replace(PROGRAM, shape=shape, ring=random.choice((13, 13, *numbers)), **arrays)).findings
        told += bool(findings) and all(finding.lines() for finding in findings)
    assert told > 350

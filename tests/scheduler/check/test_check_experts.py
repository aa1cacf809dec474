"""Programs with experts: what the checker finds, and that its verdicts are the truth of every interleaving of tiny ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from instructions.choose import Choose
from instructions.expert_down import ExpertDown
from instructions.expert_gate_up import ExpertGateUp
from models.config import ModelConfig
from scheduler.build import build_program, make_shape
from scheduler.check import Finding, check
from scheduler.program import Program
from tests.mutations.draft import MUTATIONS, Draft
from tests.scheduler.check.test_check_exhaustive import check_verdicts
from tests.support.exhaustive import explore

CONFIG = ModelConfig(
    hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, vocab_size=20,
    family="qwen3_moe", num_experts=3, experts_per_token=2,
)  # fmt: skip


def make(sms: int, policy: str, slices: int = 1, ring: int | None = None, config: ModelConfig = CONFIG) -> Program:
    return build_program(make_shape(config, sms=sms, capacity=512, bucket=512, slices=slices), sms, policy, ring)


PROGRAMS = [make(2, "zigzag"), make(3, "round_robin", 1, 4), make(2, "critical_path", 2, 5), make(3, "balanced", 1, 4)]
KINDS = [kind for kind, plant in MUTATIONS.items() if plant.__module__.endswith((".sync", ".order", ".end"))]
OWN = [kind for kind, plant in MUTATIONS.items() if plant.__module__.endswith(".experts")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_sound_programs_have_no_fault(program: Program) -> None:
    assert explore(program) is None


@pytest.mark.parametrize("seed", range(3))
def test_verdicts_are_the_truth(seed: int) -> None:
    check_verdicts(seed, 120, [*KINDS, *OWN * 4], PROGRAMS, 5)


def findings_of(draft: Draft) -> tuple[Finding, ...]:
    program = draft.program()
    assert program is not None
    return check(program).findings


def site_of(draft: Draft, kind: type, number: int = 0) -> tuple[int, int]:
    return draft.sites(lambda item: isinstance(item.instruction, kind))[number]


def test_a_choice_behind_what_selects_by_it_is_a_deadlock() -> None:
    """Told hop by hop, the one by way of the loader as well."""
    draft = Draft.of(make(1, "zigzag"))
    choose, experts = (site_of(draft, kind)[1] for kind in (Choose, ExpertGateUp))
    queue = draft.queues[0]
    queue.insert(experts, queue.pop(choose))
    queue[experts] = replace(queue[experts])
    draft.queues[0] = [replace(item, waits=()) if isinstance(item.instruction, ExpertGateUp) else item for item in queue]
    draft.renumber()
    [finding] = findings_of(draft)
    assert finding.kind == "deadlock"
    assert any("has its pages only after" in line and "choose" in line for line in finding.details)


def test_a_loader_that_may_take_an_older_choice_is_a_race() -> None:
    draft = Draft.of(make(2, "zigzag"))
    sites = [site for site in draft.sites(lambda item: item.load_wait) if draft.at(site).instruction.selects(draft.shape)]
    for site in sites:
        draft.change(site, load_wait=None)
    findings = findings_of(draft)
    assert sites and {finding.kind for finding in findings} == {"race"}
    assert any("its loader may look at choice[0]" in finding.message for finding in findings)


def test_of_n_experts_k_are_streamed_each_once() -> None:
    """A slot streamed twice, and one that is not streamed at all."""
    draft = Draft.of(make(2, "zigzag"))
    site = site_of(draft, ExpertGateUp)
    instruction = draft.at(site).instruction
    assert isinstance(instruction, ExpertGateUp)
    blocks = instruction.matrix(draft.shape).blocks
    draft.work(site, block=(instruction.block + blocks) % (2 * blocks))
    messages = [finding.message for finding in findings_of(draft) if finding.kind == "weights"]
    assert any("is also streamed by" in message for message in messages)
    assert any("streamed by no instruction" in message for message in messages)


def test_down_projections_of_all_slots_are_streamed() -> None:
    draft = Draft.of(make(2, "zigzag"))
    sm, index = site_of(draft, ExpertDown)
    draft.queues[sm].pop(index)
    draft.renumber()
    [finding] = [finding for finding in findings_of(draft) if finding.kind == "weights"]
    first, last = (draft.shape.matrix("expert_down", 0, expert).first_page for expert in (0, CONFIG.experts_per_token - 1))
    assert f"pages {first} to {last} of the tape" in finding.message


def test_experts_belong_to_models_that_have_some() -> None:
    dense = replace(CONFIG, family="qwen3", num_experts=0, experts_per_token=0)
    draft = Draft.of(make(2, "zigzag", config=dense))
    site = draft.sites(lambda item: item.instruction.MNEMONIC == "o_proj")[0]
    draft.change(site, instruction=Choose(0), pages=0, tape=0)
    draft.renumber()
    assert "chooses experts in a model without any" in findings_of(draft)[0].message

"""Which models have programs of several columns, and what is said of those that have none."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from instructions.attention import Attention
from megakernel.loading import LoadRequest, check_sequences, columns_of
from models.checkpoint import Checkpoint
from models.errors import UserError
from models.families import PRESETS
from models.formats import PLAIN, Formats
from scheduler.buckets import BucketPrograms
from scheduler.build import DEFAULT_POLICY, build_program, make_shape, most_depth
from scheduler.check.machine import shape_findings
from scheduler.errors import ScheduleError
from scheduler.lower import lower_attention
from tests.support.configs import small_config

EXPERTS = "experts, which each token chooses for itself"
GROUPS = "weights in {}, whose groups are multiplied for one column at a time"


@pytest.mark.parametrize(
    ("name", "formats", "why"),
    [
        ("qwen3_moe", PLAIN, EXPERTS),
        ("olmoe", PLAIN, EXPERTS),
        ("gqa2", Formats("q4_1", "fp8"), GROUPS.format("q4_1")),
        ("gqa2", Formats("plain", "q8_0"), GROUPS.format("q8_0")),
    ],
)
@pytest.mark.parametrize(("sequences", "depth"), [(1, 2), (1, 8), (8, 1)])
def test_some_models_have_one_column(name: str, formats: Formats, why: str, sequences: int, depth: int) -> None:
    """More are refused in one line; drafts asked for are left out."""
    config = small_config(name)
    assert make_shape(config, sms=4, capacity=64, bucket=64, formats=formats).columns == 1
    with pytest.raises(ScheduleError) as caught:
        make_shape(config, sms=4, capacity=64, bucket=64, formats=formats, sequences=sequences, depth=depth)
    assert str(caught.value) == (
        f"{sequences} sequences of {depth} columns for a model with {why}; it has programs of one column only"
    )
    assert most_depth(config, formats) == 1
    assert columns_of(7, "gpu", config, formats) == columns_of(7, "vm", config, formats) == 1


@pytest.mark.parametrize("formats", [PLAIN, Formats("fp8", "fp8"), Formats("int4", "int4"), Formats("plain", "int4")])
def test_others_have_as_many_as_drafts_are_asked_for(formats: Formats) -> None:
    config = small_config("gqa2")
    assert [columns_of(drafts, "gpu", config, formats) for drafts in (0, 1, 2, 3, 4, 7)] == [1, 2, 4, 4, 8, 8]
    assert make_shape(config, sms=4, capacity=64, bucket=64, depth=8, formats=formats).columns == 8
    assert build_program(make_shape(config, sms=4, capacity=64, bucket=64, sequences=8, formats=formats), 4).sms == 4


@pytest.mark.parametrize(
    ("preset", "sequences", "depth", "firsts"),
    [
        ("llama-3.2-1b", 1, 8, [0, 2, 4, 6]),  # 4 queries a KV head
        ("smollm2-135m", 1, 8, [0, 2, 4, 6]),  # 3, which take the room of 4
        ("llama-3.2-1b", 1, 2, [0]),
        ("granite-8b-code", 1, 4, [0, 2]),
        ("llama-3.2-1b", 4, 1, [0, 1, 2, 3]),
        ("llama-3.2-1b", 1, 1, [0]),
        ("qwen3-0.6b", 1, 8, [0]),  # heads are normed: one instruction writes the keys of all
    ],
)
def test_attention_takes_columns_whose_queries_share_a_matrix_instruction(
    preset: str, sequences: int, depth: int, firsts: list[int]
) -> None:
    """Each column is one instruction's, and each instruction's columns one sequence's."""
    shape = make_shape(PRESETS[preset], sms=132, capacity=256, bucket=256, sequences=sequences, depth=depth)
    found = [each for each in lower_attention(shape, 0) if isinstance(each, Attention) and each.head == each.slice == 0]
    assert [each.column for each in found] == firsts
    assert [column for each in found for column in each.columns(shape)] == list(range(shape.columns))
    assert all(set(each.columns(shape)) <= set(shape.columns_of(each.sequence(shape))) for each in found)


@pytest.mark.parametrize(
    ("asked", "counts"), [(None, []), (1, []), (2, [2]), (3, [2, 4]), (4, [2, 4]), (5, [2, 4, 8]), (8, [2, 4, 8])]
)
def test_programs_that_sequences_share(asked: int | None, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sizes up to what was asked for; none for a model that has one column."""
    monkeypatch.setattr(BucketPrograms, "program", lambda *_: None)
    for name, wanted in (("gqa2", counts), ("olmoe", [])):
        checkpoint = cast("Checkpoint", SimpleNamespace(config=small_config(name)))
        request = LoadRequest(name, checkpoint, torch.bfloat16, 64, None, DEFAULT_POLICY, None, None, sequences=asked)
        assert [programs.sequences for programs in request.shared(4)] == wanted


@pytest.mark.parametrize(
    ("sequences", "speculate", "backend", "why"),
    [
        (0, 0, "gpu", "0 sequences at once: use 1 to 8"),
        (9, 0, "torch", "9 sequences at once: use 1 to 8"),
        (2, 0, "vm", "the CPU machine decodes one sequence at a time"),
        (2, 3, "gpu", "use --speculate or --sequences, not both"),
    ],
)
def test_numbers_of_sequences_that_cannot_be(sequences: int, speculate: int, backend: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        check_sequences(sequences, speculate, backend)
    check_sequences(1, speculate, backend)


def test_the_checker_refuses_columns_of_a_model_that_has_one() -> None:
    """Also in a program that was not made here."""
    program = build_program(make_shape(small_config("qwen3_moe"), sms=4, capacity=64, bucket=64), 4)
    shape = dataclasses.replace(program.shape, depth=2)
    assert "2 columns; a model with experts, common norms or weights in groups has one" in {
        finding.message for finding in shape_findings(shape)
    }
    assert not list(shape_findings(program.shape))

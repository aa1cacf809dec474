"""Which models have programs of several columns, and what is said of those that have none."""

from __future__ import annotations

import dataclasses

import pytest

from megakernel.loading import columns_of
from models.formats import PLAIN, Formats
from scheduler.build import build_program, make_shape, most_depth
from scheduler.check.machine import shape_findings
from scheduler.errors import ScheduleError
from tests.support.configs import small_config

EXPERTS = "experts, which each token chooses for itself"
QUANTISED = "quantised weights, whose row blocks are summed in another order"


@pytest.mark.parametrize(
    ("name", "formats", "why"),
    [
        ("qwen3_moe", PLAIN, EXPERTS),
        ("olmoe", PLAIN, EXPERTS),
        ("gqa2", Formats("fp8", "fp8"), QUANTISED),
        ("gqa2", Formats("plain", "int4"), QUANTISED),
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


def test_others_have_as_many_as_drafts_are_asked_for() -> None:
    config = small_config("gqa2")
    assert [columns_of(drafts, "gpu", config, PLAIN) for drafts in (0, 1, 2, 3, 4, 7)] == [1, 2, 4, 4, 8, 8]
    assert make_shape(config, sms=4, capacity=64, bucket=64, depth=8).columns == 8


def test_the_checker_refuses_columns_of_a_model_that_has_one() -> None:
    """Also in a program that was not made here."""
    program = build_program(make_shape(small_config("qwen3_moe"), sms=4, capacity=64, bucket=64), 4)
    shape = dataclasses.replace(program.shape, depth=2)
    assert "2 columns; a model with experts, common norms or quantised weights has one" in {
        finding.message for finding in shape_findings(shape)
    }
    assert not list(shape_findings(program.shape))

"""The same bits whichever way a sequence is cut into launches: logits, tokens and the KV cache."""

from __future__ import annotations

from hashlib import sha256

import pytest
import torch

from bench.rig import Rig
from tests.support.gpu_models import random_tokens

pytestmark = pytest.mark.gpu
PROMPT, POSITIONS = 120, 180  # across the edge of a KV page and of a context bucket
Outcome = tuple[list[int], str, str]


def digest(values: torch.Tensor) -> str:
    return sha256(values.contiguous().numpy().tobytes()).hexdigest()


def outcome(rig: Rig, longest: int) -> Outcome:
    """The tokens chosen, and the bits of the last logits and of the cache, of a run in launches of at most `longest`."""
    rig.state.cache.zero_()
    rig.start(random_tokens("bundled", PROMPT))
    chosen = rig.decode(0, POSITIONS, longest)
    return chosen, digest(rig.program(POSITIONS - 1).logits()), digest(rig.cache_rows(POSITIONS))


@pytest.fixture(scope="module")
def whole(bundled_rig: Rig) -> Outcome:
    """As few launches as the buckets allow."""
    return outcome(bundled_rig, POSITIONS)


def test_the_expected_run_is_worth_comparing_with(bundled_rig: Rig, whole: Outcome) -> None:
    assert outcome(bundled_rig, POSITIONS) == whole
    assert len(whole[0]) == POSITIONS
    assert len(set(whole[0][PROMPT - 1 :])) > 5
    assert bundled_rig.program(POSITIONS - 1).logits().isfinite().all()
    rows = bundled_rig.cache_rows(POSITIONS).view(torch.bfloat16)
    assert rows.isfinite().all()
    assert (rows != 0).any(3).any(1).all(), "every head of every layer has a row for every position"


@pytest.mark.parametrize("longest", [1, 2, 7, 16, 64, 128])
def test_every_cut(bundled_rig: Rig, whole: Outcome, longest: int) -> None:
    assert outcome(bundled_rig, longest) == whole


def test_again(bundled_rig: Rig, whole: Outcome) -> None:
    """Ten times more, with nothing changed."""
    for _ in range(10):
        assert outcome(bundled_rig, POSITIONS) == whole


def test_what_an_earlier_sequence_left_is_never_attended_to(bundled_rig: Rig, whole: Outcome) -> None:
    bundled_rig.state.cache.fill_(3.0)
    bundled_rig.start(random_tokens("bundled", PROMPT))
    chosen = bundled_rig.decode(0, POSITIONS)
    assert (chosen, digest(bundled_rig.program(POSITIONS - 1).logits())) == whole[:2]


def test_positions_beyond_the_bucket_are_refused_before_the_launch(bundled_rig: Rig) -> None:
    program = bundled_rig.program(0)
    last = program.program.shape.bucket
    with pytest.raises(ValueError, match=f"2 tokens from position {last}: this program decodes positions up to {last}"):
        program.launch(last, 2)

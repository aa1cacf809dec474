"""Sampling: Philox against its published vectors, cuts against a sort, draws against the softmax they claim to sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import instructions.sampling as sampling
from instructions.base import GREEDY, SamplingState
from instructions.lm_head import BEST_FIELDS, LmHead
from instructions.sample import Sample
from instructions.sampling import draw, gumbel, highest_threshold, kept_rows, ordered, philox, sampling_scores
from tests.support.fake_machine import FakeMachine, made_up_tensors, small_shape

SEEDS = st.integers(0, 2**64 - 1)
LOGITS = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-30, 30, width=32))


def philox_ref(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as in Salmon et al. (2011), in plain integers, all four outputs."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [  # kat_vectors of Random123 (philox4x32 10)
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_reference_gives_the_known_answers(counter: list[int], key: list[int], output: str) -> None:
    assert " ".join(f"{word:08x}" for word in philox_ref(counter, key)) == output


def test_ours_gives_the_known_answer_with_two_counter_words_zero() -> None:
    assert int(philox(np.array([0]), 0, 0)[0]) == 0x6627E8D5


@given(st.lists(st.integers(0, 2**24), min_size=1, max_size=5), st.integers(0, 2**31 - 1), SEEDS)
def test_ours_is_the_reference(rows: list[int], position: int, seed: int) -> None:
    key = [seed % 2**32, seed // 2**32]
    wanted = [philox_ref([row, position, 0, 0], key)[0] for row in rows]
    assert philox(np.array(rows), position, seed).tolist() == wanted


@given(st.integers(-(2**70), 2**70))
def test_seeds_count_modulo_2_to_the_64(seed: int) -> None:
    assert philox(np.arange(3), 5, seed).tolist() == philox(np.arange(3), 5, seed % 2**64).tolist()


def test_gumbel_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "philox", lambda *_: np.array([0, 2**32 - 1], dtype=np.uint32))
    low, high = gumbel(np.arange(2), 0, 0)
    assert low == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)  # u = 2^-24
    assert high == pytest.approx(24 * math.log(2), rel=1e-4)  # u = 1 - 2^-24, and -log u = 2^-24 to the first order


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov distance to exp(-exp(-x)); 20000 true samples exceed 1.95 / sqrt(n) once in a thousand seeds, and
    this seed is fixed."""
    noise = np.sort(gumbel(np.arange(20000), 3, 1234)).astype(np.float64)
    distribution = np.exp(-np.exp(-noise))
    steps = np.arange(len(noise)) / len(noise)
    assert (
        max(np.abs(distribution - steps).max(), np.abs(distribution - steps - 1 / len(noise)).max()) < 1.95 / len(noise) ** 0.5
    )


@given(hnp.arrays(np.float32, 2, elements=st.floats(width=32, allow_nan=False)))
def test_ordered_numbers_order_as_the_values(pair: np.ndarray) -> None:
    a, b = ordered(pair)
    assert (a < b) == (pair[0] < pair[1]) and (a == b) == (pair[0] == pair[1])


@given(st.integers(-(2**31), 2**31 - 1))
def test_the_bisection_finds_the_last_that_is_enough(threshold: int) -> None:
    assert highest_threshold(lambda key: key <= threshold) == threshold


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_the_bisection_goes_no_higher_than_asked(threshold: int, high: int) -> None:
    assert highest_threshold(lambda key: key <= threshold, high) == min(threshold, high)


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-46, 1e-45, 1.2e-38, 1e-9])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_top_p_that_fp32_does_not_hold_keeps_the_likeliest(top_p: float, top_k: int) -> None:
    z = np.array([-1.0, 0.5, 3.0, -40.0], np.float32)
    assert kept_rows(z, SamplingState(1.0, top_k, top_p, 0)).tolist() == [False, False, True, False]
    assert draw(torch.from_numpy(z), SamplingState(1.0, top_k, top_p, 7), 3) == 2


def top_k_ref(z: np.ndarray, k: int) -> np.ndarray:
    """Rows not below the k-th largest, by sorting."""
    return z >= np.sort(z)[::-1][min(k, z.size) - 1]


def top_p_ref(z: np.ndarray, kept: np.ndarray, p: float) -> tuple[np.ndarray, float]:
    """The fewest of the largest rows whose probabilities, among those kept, sum to p: by sorting.  Also by how much the sum at
    the edge misses p, the rounding that decides in close cases."""
    weights = np.where(kept, np.exp(z.astype(np.float64) - float(z.max())), 0.0)
    weights /= weights.sum()
    order = np.argsort(-z, kind="stable")
    sums = np.cumsum(weights[order])
    edge = int(np.searchsorted(sums, p))
    margin = float(np.abs(sums - p).min())
    return kept & (z >= z[order[min(edge, z.size - 1)]]), margin


@settings(max_examples=200)
@given(LOGITS, st.integers(1, 70))
def test_top_k_keeps_the_k_largest(z: np.ndarray, k: int) -> None:
    assert kept_rows(z, SamplingState(1.0, k, 1.0, 0)).tolist() == top_k_ref(z, k).tolist()


@settings(max_examples=300)
@given(LOGITS, st.integers(0, 70), st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_suffice(z: np.ndarray, k: int, p: float) -> None:
    p = float(np.float32(p))
    wanted, margin = top_p_ref(z, top_k_ref(z, k) if k else np.ones(z.shape, dtype=bool), p)
    assume(margin > 1e-9)  # closer than that, the order of summation decides
    assert kept_rows(z, SamplingState(1.0, k, p, 0)).tolist() == wanted.tolist()


def test_off_means_off() -> None:
    z = np.random.default_rng(0).normal(size=100).astype(np.float32)
    assert kept_rows(z, SamplingState(1.0, 0, 1.0, 0)).all()
    assert kept_rows(z, SamplingState(1.0, 100, 1.0, 0)).all()
    assert kept_rows(z, SamplingState(1.0, 1, 1.0, 0)).sum() == 1


@given(LOGITS, st.sampled_from((0.1, 0.7, 1.0, 3.0)), SEEDS, st.integers(0, 5000))
def test_top_k_of_one_is_greedy(logits: np.ndarray, temperature: float, seed: int, position: int) -> None:
    token = draw(torch.from_numpy(logits), SamplingState(temperature, 1, 1.0, seed), position)
    scaled = logits * (np.float32(1) / np.float32(temperature))
    assert scaled[token] == scaled.max()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, rows expected fewer than 5 times taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    assert observed[~used].sum() == 0, "a row was drawn that has no probability"
    return float(((observed - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 8, 0.9)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """2500 positions of one seed.  The statistic of true draws has mean d and variance 2 d: within 4 standard deviations, and
    the seed is fixed."""
    logits = np.random.default_rng(1).normal(scale=2.0, size=20).astype(np.float32)
    state = SamplingState(temperature, top_k, top_p, seed=987654321)
    tokens = [draw(torch.from_numpy(logits), state, position) for position in range(2500)]
    z = (logits / np.float32(temperature)).astype(np.float64)
    kept = top_k_ref(logits, top_k) if top_k else np.ones(20, dtype=bool)
    if top_p < 1:
        kept, _ = top_p_ref(z.astype(np.float32), kept, top_p)
    probabilities = np.where(kept, np.exp(z - z.max()), 0.0)
    statistic, freedom = chi_square(np.bincount(tokens, minlength=20), probabilities / probabilities.sum())
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_seeds_and_positions_draw_independently() -> None:
    """The same seed repeats itself; another seed or position agrees about as often as chance has it."""
    logits = torch.zeros(64)

    def tokens(seed: int, first: int) -> list[int]:
        return [draw(logits, SamplingState(1.0, 0, 1.0, seed), first + i) for i in range(500)]

    base = tokens(1, 0)
    assert tokens(1, 0) == base
    for other in (tokens(2, 0), tokens(1 << 32, 0), tokens(1, 500)):
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 25  # chance: 8 of 500


def head_machine(state: SamplingState, past: int = 3, name: str = "ragged_sizes") -> FakeMachine:
    """A machine whose LM head has run, split into runs of two blocks."""
    shape = small_shape(name)
    machine = FakeMachine(shape, past, made_up_tensors(shape), state)
    generator = torch.Generator().manual_seed(2)
    machine.rows["x", shape.config.num_layers].copy_(torch.randn(shape.config.hidden_size, generator=generator))
    blocks = shape.matrix("head").blocks
    for slot, first in enumerate(range(0, blocks, 2)):
        machine.run(LmHead(0, first, min(2, blocks - first), slot))
    return machine


def slots(machine: FakeMachine) -> int:
    return -(-machine.shape.matrix("head").blocks // 2)


@pytest.mark.parametrize("name", ["ragged_sizes", "granite_biases"])
def test_the_head_makes_logits(name: str) -> None:
    """Tolerances as in test_projections.py."""
    machine = head_machine(GREEDY, name=name)
    config = machine.shape.config
    x = machine.rows["x", config.num_layers].double()
    h = x / (x.square().mean() + config.rms_eps).sqrt() * machine.tensors["model.norm.weight"].double()
    weight = machine.tensors["lm_head.weight"].double()
    h = h.float().bfloat16().double()
    terms = (weight * h).abs()
    allowed = 2 * config.hidden_size * 2**-24 * (terms.sum(1) + 1) + 2**-8 * terms.topk(2, dim=1).values.sum(1)
    scale = 1 / config.logits_scaling
    assert ((machine.rows["logits", 0] - scale * (weight @ h)).abs() <= scale * (allowed + 2**-23)).all()


def test_greedy_takes_the_largest_logit() -> None:
    machine = head_machine(GREEDY)
    machine.run(Sample(0, slots(machine)))
    assert machine.emitted == [int(machine.rows["logits", 0].argmax())]


@pytest.mark.parametrize(
    "state", [SamplingState(0.8, 0, 1.0, 77), SamplingState(0.8, 10, 1.0, 77), SamplingState(1.0, 0, 0.5, 5)]
)
def test_sampling_in_the_program_is_draw(state: SamplingState) -> None:
    """Without a cut `Sample` takes the best of the head's best scores; that is the row which `draw` finds among all."""
    for past in range(12):
        machine = head_machine(state, past)
        machine.run(Sample(0, slots(machine)))
        assert machine.emitted == [draw(machine.rows["logits", 0], state, past)]


def test_ties_go_to_the_lowest_row() -> None:
    shape = small_shape("ragged_sizes")
    tensors = made_up_tensors(shape)
    tensors["lm_head.weight"][:] = 1.0  # every row the same logit
    machine = FakeMachine(shape, 0, tensors)
    machine.rows["x", shape.config.num_layers].fill_(1.0)
    for slot, block in enumerate((40, 0, 20)):
        machine.run(LmHead(0, block, 2, slot))
    best = machine.rows["best", 0][: 3 * BEST_FIELDS].view(3, BEST_FIELDS)
    assert best[:, 1].tolist() == [640.0, 0.0, 320.0]
    machine.run(Sample(0, 3))
    assert machine.emitted == [0]
    flat = SamplingState(1.0, 3, 1.0, 0)
    assert sampling_scores(torch.zeros(3), 0, GREEDY, 0).tolist() == [0.0, 0.0, 0.0]
    assert kept_rows(np.zeros(9, dtype=np.float32), flat).all(), "rows equal to the k-th largest are all kept"


def test_the_last_block_of_the_head_has_no_rows_beyond_the_vocabulary() -> None:
    """A vocabulary of 1009 leaves 15 zero rows in the last block; they must not win over negative logits."""
    shape = small_shape("ragged_sizes")
    tensors = made_up_tensors(shape)
    tensors["lm_head.weight"].abs_().neg_()
    machine = FakeMachine(shape, 0, tensors)
    machine.rows["x", shape.config.num_layers].fill_(1.0)
    machine.run(LmHead(0, 62, 2, 0))
    machine.run(Sample(0, 1))
    assert machine.rows["logits", 0][992:].max() < 0
    assert 992 <= machine.emitted[0] < 1009

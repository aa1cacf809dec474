"""Mixtures of experts on the kernel: the CPU machine's numbers, the same bits in every cut, true shapes, planted faults.

Rounding may send a token to another expert where two scores are nearly equal, on the kernel, the CPU machine or the plain model
alike.  Then that token's logits differ by far more than rounding does.  That is seldom: so what is asked here of errors is
asked of most positions, and of the typical one.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench.rig import Rig, device_sms
from megakernel.engine import Engine
from megakernel.gpu.errors import KernelFault
from models.packed import pack
from models.reference import Reference
from tests.gpu.test_gpu_cuts import digest
from tests.gpu.test_gpu_faults import check_report, fault_of, place_of, running, silenced
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import (
    EXPERT_CASES,
    EXPERT_PRESETS,
    QUANTISED_EXPERTS,
    Case,
    Expected,
    Preparation,
    programs_of,
)

pytestmark = pytest.mark.gpu
MOST = 0.9  # of the positions
CASE = EXPERT_CASES["qwen3_moe"]


def largest(error: torch.Tensor) -> torch.Tensor:
    """The largest error of each position, [positions]."""
    return error.abs().amax(1)


def check_logits(rig: Rig, case: Case, expected: Expected) -> torch.Tensor:
    """Against the CPU machine, by what rounding does to that."""
    logits = rig.logits_of(expected.tokens[: case.positions])
    assert torch.isfinite(logits).all()
    error, rounding = largest(logits - expected.logits), largest(expected.logits - expected.reference)
    allowed = 2 * rounding.quantile(MOST)
    print(f"median {error.median():.2e} of {rounding.median():.2e}, {(error > allowed).sum()} positions above {allowed:.2e}")
    assert error.median() <= rounding.median()
    assert (error <= allowed).float().mean() >= MOST
    best = expected.logits.topk(2).values
    clear = (best[:, 0] - best[:, 1] > 2 * allowed) & (error <= allowed)
    assert clear.float().mean() > 0.1, "some positions have a clear best token"
    assert (logits.argmax(1) == expected.logits.argmax(1))[clear].all()
    return logits


def rig_of(case: Case, sms: int | None = None) -> Rig:
    model = pack(weights_of(case.name), config_of(case.name), torch.bfloat16, case.capacity, case.formats)
    return Rig(model, programs_of(case, device_sms() if sms is None else sms))


@pytest.mark.parametrize("name", EXPERT_CASES)
def test_logits_are_those_of_the_cpu_machine(name: str, preparation: Preparation) -> None:
    case, expected = EXPERT_CASES[name], preparation.expected[name].result()
    preparation.compiled[name].result()
    rig = rig_of(case)
    page = rig.page_positions
    assert {0, 1, page - 1, page, page + 1} < set(range(case.positions)), "both sides of a page's edge are decoded"
    check_logits(rig, case, expected)
    rig.start(expected.tokens[: case.prompt])
    chosen = rig.decode(0, case.positions)[case.prompt - 1 :]
    own = rig.logits_of([*expected.tokens[: case.prompt], *chosen[:-1]], first=case.prompt - 1)
    assert chosen == own.argmax(1).tolist(), "the tokens chosen are the best of the kernel's own logits"


@pytest.mark.parametrize("name", QUANTISED_EXPERTS)
def test_quantised_experts(name: str, preparation: Preparation) -> None:
    case, expected = QUANTISED_EXPERTS[name], preparation.expected[name].result()
    check_logits(rig_of(case), case, expected)


def outcome(rig: Rig, longest: int) -> tuple[list[int], str, str]:
    """The tokens chosen, and the bits of the last logits and of the cache."""
    rig.state.cache.zero_()
    rig.start(random_tokens(CASE.name, CASE.prompt))
    chosen = rig.decode(0, CASE.positions, longest)
    return chosen, digest(rig.program(CASE.positions - 1).logits()), digest(rig.cache_rows(CASE.positions))


def test_the_same_bits_in_every_cut_and_on_any_number_of_sms() -> None:
    """Loaders run ahead across tokens and find each token's own choice."""
    rig = rig_of(CASE)
    whole = outcome(rig, CASE.positions)
    assert len(set(whole[0][CASE.prompt - 1 :])) > 5
    for longest in (CASE.positions, 1, 7, 64):
        assert outcome(rig, longest) == whole
    for sms in (1, 7, device_sms() - 1):
        other = rig_of(CASE, sms)
        assert outcome(other, CASE.positions) == whole


@pytest.mark.parametrize("name", EXPERT_PRESETS)
def test_true_shapes_are_nearer_to_fp32_than_bf16_is(name: str) -> None:
    """Two layers; the typical position, and the worst of most."""
    case, config, weights = EXPERT_PRESETS[name], config_of(name), weights_of(name)
    tokens = random_tokens(name, case.positions)
    rig = Rig(pack(weights, config, torch.bfloat16, case.capacity), programs_of(case, device_sms()))
    ours = rig.logits_of(tokens)
    del rig
    with torch.device("cuda"):
        tensors = {name: tensor.cuda() for name, tensor in weights.tensors()}
        true = Reference(config, tensors, torch.float32).logits(tokens).cpu()
        plain = Reference(config, tensors, torch.bfloat16).logits(tokens).cpu()
    error, bound = ((logits - true).square().mean(1).sqrt() for logits in (ours, plain))
    print(f"median rms {error.median():.2e} of {bound.median():.2e}, mean {error.mean():.2e} of {bound.mean():.2e}")
    assert error.median() <= bound.median()
    assert error.quantile(MOST) <= bound.quantile(MOST)


@pytest.fixture(scope="module")
def expert_engine() -> Any:
    """A small mixture in the product's engine."""
    from megakernel.gpu.backend import CHUNK, GpuBackend

    model = pack(weights_of(CASE.name), config_of(CASE.name), torch.bfloat16, CASE.capacity)
    with Engine(GpuBackend(model, programs_of(CASE, device_sms()), torch.device("cuda", 0), None), chunk=CHUNK) as engine:
        yield engine


def generate(engine: Engine) -> list[int]:
    return list(engine.generate(random_tokens(CASE.name, 6, seed=1), 40, reuse=False))


@pytest.mark.parametrize(("mnemonic", "layer", "counted"), [("choose", 1, True), ("expert_down", 0, False)])
def test_a_dropped_signal_is_reported_in_time(expert_engine: Engine, mnemonic: str, layer: int, counted: bool) -> None:
    """Who waits for it says so; and the next request is right.  Loaders that wait for the next layer's choice do not hang."""
    expected = generate(expert_engine)
    backend: Any = expert_engine._backend
    program = backend.program(0).result().program
    place, item = place_of(program, mnemonic, layer)
    with running(expert_engine, silenced(program, place)):
        message = fault_of(lambda: generate(expert_engine))
    if counted:
        check_report(message, program, set(item.signals))
    assert generate(expert_engine) == expected


def test_a_choice_that_never_comes_is_reported_in_time(expert_engine: Engine) -> None:
    """The record that makes it does something else: its readers, loaders among them, give up, and the next request is right."""
    from instructions.codec import Word
    from megakernel.words import device_words

    expected = generate(expert_engine)
    backend: Any = expert_engine._backend
    built = backend.program(0).result()
    place, _ = place_of(built.program, "choose", 1)
    words, good = device_words(built.program), built.words
    words[place, Word.OPCODE] = 0  # no instruction: the record only signals
    built.words = torch.from_numpy(words).to(backend.state.device)
    begun = time.perf_counter()
    with pytest.raises(KernelFault) as caught:
        generate(expert_engine)
    assert time.perf_counter() - begun < 4
    assert "position 0" in str(caught.value) and "never came" in str(caught.value)
    built.words = good
    assert generate(expert_engine) == expected

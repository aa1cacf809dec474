"""Quantised weights on the GPU: the CPU machine's numbers from the same bits, the same bits every time, true shapes.

The kernel widens codes in registers, the CPU machine before it multiplies: both then multiply the very same numbers.
"""

from __future__ import annotations

import pytest
import torch

from bench.rig import Rig, device_sms
from models.formats import Formats
from models.packed import numbers, pack
from models.reference import Reference
from tests.gpu.test_gpu_against_vm import allowed_error, clear_choices, rms
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import Case, decode_on_the_cpu, programs_of

pytestmark = pytest.mark.gpu
FP8, INT4 = Formats("fp8", "fp8"), Formats("int4", "int4")
BUCKETS = ((1, 1), (2, 2))
# Tied and untied heads, biases, heads that are padded, several pages of K, a head of another format or of none.
CASES = [
    Case("gqa4_llama3_tied", 227, 140, 40, BUCKETS, formats)
    for formats in (FP8, INT4, Formats("int4", "fp8"), Formats("plain", "int4"), Formats("fp8", "plain"))
] + [
    Case(name, 227, 60, 40, BUCKETS, formats)
    for name in ("all_biases_linear_head24", "wide_mlp_long_k", "ragged_sizes", "qwen3_head24_bias")
    for formats in (FP8, INT4)
]
PRESETS = [(name, formats) for name in ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b") for formats in (FP8, INT4)]


def named(case: Case) -> str:
    return f"{case.name}-{case.formats.body}-{case.formats.head}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_cpu_machine_s_numbers(case: Case) -> None:
    expected = decode_on_the_cpu(case, device_sms())
    model = pack(weights_of(case.name), config_of(case.name), torch.bfloat16, case.capacity, case.formats)
    rig = Rig(model, programs_of(case, device_sms()))
    logits = rig.logits_of(expected.tokens[: case.positions])
    assert torch.isfinite(logits).all()
    error, rounding = logits - expected.logits, expected.logits - expected.reference
    allowed = allowed_error(expected)
    print(f"largest error {error.abs().max():.2e} of {allowed:.2e}, rms {rms(error) / rms(rounding):.2f} of rounding's")
    assert error.abs().max() <= allowed
    assert rms(error) <= rms(rounding)
    clear = clear_choices(expected)
    assert (logits.argmax(1) == expected.logits.argmax(1))[clear].all()


@pytest.mark.parametrize("formats", [FP8, INT4], ids=lambda formats: formats.body)
def test_the_same_bits_in_every_cut(formats: Formats) -> None:
    case = Case("gqa4_llama3_tied", 227, 140, 8, BUCKETS, formats)
    model = pack(weights_of(case.name), config_of(case.name), torch.bfloat16, case.capacity, formats)
    rig = Rig(model, programs_of(case, device_sms()))
    found = []
    for longest in (1, 7, 64, 64):
        rig.start(random_tokens(case.name, case.prompt))
        tokens = rig.decode(0, case.positions, longest)
        found.append((tokens, rig.program(case.positions - 1).logits().view(torch.int32), rig.cache_rows(case.positions)))
    for tokens, logits, rows in found[1:]:
        assert tokens == found[0][0]
        assert torch.equal(logits, found[0][1]) and torch.equal(rows, found[0][2])


@pytest.mark.parametrize(("name", "formats"), PRESETS, ids=lambda value: getattr(value, "body", value))
def test_true_shapes(name: str, formats: Formats) -> None:
    """Cut to two layers: nearer to fp32 with the same weights than those, rounded to bf16, are in bf16."""
    case = Case(name, 192, 150, 150, ((1, 1), (3, 3)), formats)
    model = pack(weights_of(name), config_of(name), torch.bfloat16, case.capacity, formats)
    tokens = random_tokens(name, case.positions)
    ours = Rig(model, programs_of(case, device_sms())).logits_of(tokens)
    config, tensors = numbers(model)
    with torch.device("cuda"):
        widened = {name: tensor.cuda() for name, tensor in tensors.items()}
        true = Reference(config, widened, torch.float32).logits(tokens).cpu()
        plain = Reference(config, widened, torch.bfloat16).logits(tokens).cpu()
    error, bound = (ours - true).abs(), (plain - true).abs()
    print(f"rms {error.square().mean().sqrt():.2e} of {bound.square().mean().sqrt():.2e}, spread {true.std():.2f}")
    assert error.square().mean() <= bound.square().mean()
    assert error.max() <= bound.max()

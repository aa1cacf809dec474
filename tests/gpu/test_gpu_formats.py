"""Quantised weights on the GPU: the CPU machine's numbers from the same bits, the same bits every time, true shapes.

The kernel widens codes in registers, the CPU machine before it multiplies: both then multiply the very same numbers.  Prefill
rounds these to bf16, in a buffer, and multiplies that.
"""

from __future__ import annotations

import pytest
import torch

from bench.rig import Rig, device_sms
from megakernel.prefill.plan import BUFFERS, KINDS
from megakernel.prefill.prefill import Prefill
from megakernel.prefill.tiling import STEP
from models.formats import Formats, Packed
from models.packed import PackedModel, numbers, pack
from models.reference import Reference
from tests.gpu.test_gpu_against_vm import allowed_error, clear_choices, rms
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import Case, decode_on_the_cpu, programs_of

pytestmark = pytest.mark.gpu
FP8, INT4 = Formats("fp8", "fp8"), Formats("int4", "int4")
Q8, Q4, Q4_OFFSETS = Formats("q8_0", "q8_0"), Formats("q4_0", "q8_0"), Formats("q4_1", "q4_0")
QUANTISED = (FP8, INT4, Q8, Q4, Q4_OFFSETS)
BODIES = tuple(formats.body for formats in QUANTISED)
APART = (("int4", "fp8"), ("plain", "int4"), ("fp8", "plain"), ("plain", "q8_0"), ("q4_1", "plain"))
BUCKETS = ((1, 1), (2, 2))
# Tied and untied heads, biases, heads that are padded, several pages of K, a head of another format or of none.
CASES = [
    Case("gqa4_llama3_tied", 227, 140, 40, BUCKETS, formats) for formats in (*QUANTISED, *(Formats(*names) for names in APART))
] + [
    Case(name, 227, 60, 40, BUCKETS, formats)
    for name in ("all_biases_linear_head24", "wide_mlp_long_k", "ragged_sizes", "qwen3_head24_bias")
    for formats in QUANTISED
]
PRESETS = [("llama-3.2-1b", formats) for formats in QUANTISED]
PRESETS += [(name, formats) for name in ("llama-3.2-3b", "llama-3-8b") for formats in (FP8, INT4, Q4_OFFSETS)]

# Of prompts: padded pages along K, heads that are padded or normed, biases, one layer, true shapes.  The head is not prefill's.
READ = [
    (name, Formats(body))
    for name in ("gqa4_llama3_tied", "head64_llama3", "wide_mlp_long_k", "ragged_sizes", "qwen3_head24_bias", "granite_biases")
    for body in BODIES
] + [(name, Formats(body)) for name in ("llama-3.2-1b", "llama-3.2-3b") for body in BODIES]
LENGTHS = (1, 2, 17, 64, 65, 129, 257, 500)  # of prompts
DECODES_ERRORS = 2.0  # the rms error that prefill may have, in decode's own: it rounds the weights too


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


@pytest.mark.parametrize("formats", QUANTISED, ids=lambda formats: formats.body)
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
    pages = 2 if config_of(name).head_dim == 64 else 3  # of 192 positions
    case = Case(name, 192, 150, 150, ((1, 1), (pages, pages)), formats)
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


def model_of(name: str, formats: Formats) -> PackedModel:
    """With room for the longest prompt and its first token."""
    return pack(weights_of(name), config_of(name), torch.bfloat16, max(LENGTHS) + 1, formats)


def rounded(model: PackedModel, kind: str, layer: int, expert: int = 0) -> torch.Tensor:
    """What a matrix stands for, in bf16, as the buffers have it."""
    matrix = model.tape.matrix(kind, layer, expert)
    assert isinstance(matrix.format, Packed)
    pages = model.weights[matrix.first_page :][: matrix.pages].view(matrix.blocks, matrix.pages_per_block, -1)
    words = model.constants[matrix.scale_offset :][: matrix.pages * matrix.format.scale_words]
    rows = matrix.format.rows(pages, words.view(matrix.blocks, matrix.pages_per_block, -1)).to(torch.bfloat16)
    tiles = -(-matrix.columns // STEP)
    return rows[..., : tiles * STEP].unflatten(2, (tiles, STEP)).transpose(1, 2).reshape(-1)


@pytest.mark.parametrize(("name", "formats"), READ, ids=lambda value: getattr(value, "body", value))
def test_widened_weights_are_the_host_s_rounded_to_bf16(name: str, formats: Formats) -> None:
    """By the kernel that does that alone, and along with products."""
    model = model_of(name, formats)
    rig = Rig(model)
    chain, layers = rig.prefill.chain, range(model.config.num_layers)
    for layer in layers:
        for kind in KINDS:
            chain.widened[kind].fill_(float("nan"))
            chain.widening(kind, layer).enqueue()
            assert torch.equal(chain.buffer(kind, layer).cpu(), rounded(model, kind, layer))
            assert chain.buffer(kind, layer + 1).isnan().all(), "nothing else is written"
    for buffers in chain.widened.values():
        buffers.fill_(float("nan"))
    rig.read(random_tokens(name, 100))
    for kind in KINDS:
        for layer in [layer for layer in layers if chain.wanted(kind, layer)][-BUFFERS:]:
            assert torch.equal(chain.buffer(kind, layer).cpu(), rounded(model, kind, layer)), (kind, layer)


@pytest.mark.parametrize(("name", "formats"), READ, ids=lambda value: getattr(value, "body", value))
def test_a_prompt_read_by_prefill(name: str, formats: Formats) -> None:
    """The logits after it, and its first token, beside those of decoding it token by token."""
    model, tokens = model_of(name, formats), random_tokens(name, max(LENGTHS))
    rig, places = Rig(model), torch.tensor(LENGTHS) - 1
    config, tensors = numbers(model)
    with torch.device("cuda"):
        widened = {name: tensor.cuda() for name, tensor in tensors.items()}
        true = Reference(config, widened, torch.float32).logits(tokens)[places.cuda()].cpu()
        plain = Reference(config, widened, torch.bfloat16).logits(tokens)[places.cuda()].float().cpu()
    del widened
    decoded = rig.logits_of(tokens)[places]
    rig.state.cache.fill_(3.0e38)  # what earlier requests left must not matter
    read = []
    for length, logits in zip(LENGTHS, decoded, strict=True):
        read.append(rig.first_logits(tokens[:length]))
        for _ in range(4):
            assert torch.equal(rig.first_logits(tokens[:length]), read[-1]), "the same bits again"
        allowed = 4 * (decoded - true).abs().max()
        assert logits.max() - logits[rig.read(tokens[:length])] <= allowed
    ours = torch.stack(read)
    errors = [rms(logits - true) for logits in (ours, decoded, plain)]
    print(f"{name}: rms error {errors[0]:.2e}, decode's {errors[1]:.2e}, in bf16 {errors[2]:.2e}, spread {true.std():.2f}")
    assert torch.isfinite(ours).all()
    assert errors[0] <= DECODES_ERRORS * errors[1]
    assert (ours - decoded).abs().max() <= 6 * (decoded - true).abs().max()


@pytest.mark.parametrize("sms", [1, 7, 100])
def test_a_prompt_read_on_fewer_sms(sms: int) -> None:
    """A kernel may then begin beside the one before it: no buffer is overwritten that is still read."""
    name, formats = "llama-3.2-1b", INT4
    model, tokens = model_of(name, formats), random_tokens(name, 129)
    rig = Rig(model)
    whole = rig.first_logits(tokens)
    rig.prefill = Prefill(rig.state, rig.program(0).sizes, sms)
    few = rig.first_logits(tokens)
    assert rms(few - whole) <= 0.01 * rms(whole)
    for _ in range(9):
        assert torch.equal(rig.first_logits(tokens), few)

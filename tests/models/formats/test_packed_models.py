"""Models with quantised matrices: every source row where it belongs, padding that counts for nothing, the machine's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from instructions.base import GREEDY
from megakernel.vm import DecodeState, Vm
from models.errors import UserError
from models.families.base import HEAD
from models.formats import FORMATS, Formats, Packed, format_of
from models.packed import PackedModel, numbers, pack
from models.packing import clear_padding_rows, pack_weight
from models.quantised import Quantised, whole_pages
from models.reference import Reference
from models.weights import EMBEDDING, Weights
from scheduler.build import build_program, make_shape
from scheduler.program import read_program
from tests.support.configs import random_tensors, small_config

FP8, INT4, MIXED = Formats("fp8", "fp8"), Formats("int4", "int4"), Formats("int4", "fp8")
Q8, Q4, Q4_OFFSETS = Formats("q8_0", "q4_0"), Formats("q4_0", "q8_0"), Formats("q4_1", "q8_0")
CAPACITY = 64
MODELS = ("gqa4_llama3_tied", "all_biases_linear_head24", "wide_mlp_long_k", "head128_bias_tied")
formats = pytest.mark.parametrize(
    "formats", [FP8, INT4, MIXED, Formats("plain", "int4"), Formats("fp8", "plain"), Q8, Q4, Q4_OFFSETS], ids=str
)


def packed(name: str, formats: Formats) -> tuple[PackedModel, dict[str, torch.Tensor]]:
    config = small_config(name, CAPACITY)
    tensors = {key: value.bfloat16() for key, value in random_tensors(config, seed=4).items()}
    return pack(Weights(tensors), config, torch.bfloat16, CAPACITY, formats), tensors


@formats
@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_quantised_where_it_belongs(name: str, formats: Formats) -> None:
    model, tensors = packed(name, formats)
    _, found = numbers(model)
    for key, tensor in tensors.items():
        if tensor.ndim != 2 or key == EMBEDDING:
            assert torch.equal(found[key].to(tensor.dtype), tensor)
            continue
        format = format_of(formats.head if key == f"{HEAD}.weight" else formats.body, 2)
        if not isinstance(format, Packed):
            assert torch.equal(found[key], tensor)
        elif ".o_proj." not in key:  # whose groups may be cut by padding
            rows = whole_pages(format, tensor.float())
            assert torch.equal(found[key], format.widen(format.quantise(rows))[:, : tensor.shape[1]])
        assert (found[key].float() - tensor.float()).norm() < 0.11 * tensor.float().norm()
    if model.config.tied_embeddings and formats.head != "plain":
        assert (found[f"{HEAD}.weight"] - tensors[EMBEDDING].float()).norm() < 0.11 * tensors[EMBEDDING].float().norm()


@pytest.mark.parametrize("formats", [FP8, INT4, Q8, Q4, Q4_OFFSETS], ids=str)
def test_nothing_is_left_unwritten(formats: Formats) -> None:
    model, tensors = packed("all_biases_linear_head24", formats)
    weights = torch.full_like(model.weights.view(torch.uint8), 0xA5).view(torch.bfloat16)
    constants = torch.zeros_like(model.constants)
    clear_padding_rows(model.tape, weights)
    for matrix in model.tape.matrices:
        for source in matrix.sources:
            pack_weight(model.tape, matrix, source, tensors[source], weights, constants)
    assert torch.equal(weights.view(torch.int16), model.weights.view(torch.int16))


@pytest.mark.parametrize(
    ("name", "formats"),
    [*zip(MODELS, [FP8, INT4, MIXED, Formats("plain", "int4")], strict=True), *zip(MODELS, [Q4, Q8, Q4_OFFSETS], strict=False)],
    ids=str,
)
def test_the_cpu_machine_computes_with_those_numbers(name: str, formats: Formats) -> None:
    """As near to fp32 as bf16 activations allow: the same model with the widened weights, and with its plain ones, show it."""
    model, _ = packed(name, formats)
    prompt = [1, 5, 7, 9, 3, 11]
    shape = make_shape(model.config, sms=3, capacity=CAPACITY, bucket=CAPACITY, formats=formats)
    vm = Vm(build_program(shape, 3), model, DecodeState(shape))
    vm.state.start(prompt, GREEDY, frozenset())
    vm.launch(len(prompt))
    config, tensors = numbers(model)
    true = Reference(config, tensors, torch.float32).logits(prompt)[-1]
    rounding = (Reference(config, tensors, torch.bfloat16).logits(prompt)[-1] - true).square().mean().sqrt()
    assert (vm.logits() - true).square().mean().sqrt() <= rounding


def test_a_program_remembers_its_formats(tmp_path) -> None:  # type: ignore[no-untyped-def]
    shape = make_shape(small_config("gqa2", CAPACITY), sms=2, capacity=CAPACITY, bucket=CAPACITY, formats=MIXED)
    program = build_program(shape, 2)
    program.save(tmp_path / "program.npz")
    assert read_program(tmp_path / "program.npz").shape == shape
    model, _ = packed("gqa2", FP8)
    with pytest.raises(ValueError, match="another model or weight type"):
        Vm(program, model)


def test_a_matrix_in_the_tape_s_own_format_is_not_quantised_again() -> None:
    """Codes that no quantiser would choose arrive as they are."""
    config = small_config("gqa2", CAPACITY)
    tensors = {key: value.bfloat16() for key, value in random_tensors(config, seed=4).items()}
    format = FORMATS["int4"]
    assert isinstance(format, Packed)
    name = "model.layers.1.mlp.up_proj.weight"
    codes = format.quantise(whole_pages(format, tensors[name].float() * 3))
    codes.values[:, :4] = torch.tensor([0, 15, 7, 8], dtype=torch.uint8)
    stored: Any = Quantised(format, codes, tensors[name].shape[1])
    model = pack(Weights(tensors | {name: stored}), config, torch.bfloat16, CAPACITY, INT4)
    assert torch.equal(numbers(model)[1][name], stored.to())
    plain = pack(Weights(tensors | {name: stored}), config, torch.bfloat16, CAPACITY)
    assert torch.equal(numbers(plain)[1][name], stored.to().bfloat16())


def test_weights_that_are_no_numbers() -> None:
    config = small_config("gqa2", CAPACITY)
    tensors = {key: value.bfloat16() for key, value in random_tensors(config, seed=4).items()}
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = torch.nan
    with pytest.raises(UserError, match=r"down_proj.weight holds nan at \[3, 5\]"):
        pack(Weights(tensors), config, torch.bfloat16, CAPACITY, INT4)

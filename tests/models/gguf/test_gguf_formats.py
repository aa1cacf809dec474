"""Blocks of GGUF that are kept as they are: which, code for code, and what is made of files that mix types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from megakernel.loading import load_engine
from megakernel.request import SamplingParams
from models.checkpoint import Checkpoint, open_checkpoint
from models.config import ModelConfig
from models.errors import UserError
from models.families import PRESETS
from models.families.base import HEAD
from models.formats import PLAIN, Formats, chosen_formats
from models.gguf.blocks import format_for
from models.gguf.header import read_header
from models.gguf.weights import Place, read_codes
from models.hf_config import parse_config
from models.packed import numbers, pack
from models.quantised import Quantised
from models.random_weights import RandomWeights
from models.reference import Reference
from models.smollm2 import cached
from models.weights import EMBEDDING, Weights
from tests.support.configs import SMALL_CONFIGS
from tests.support.gguf_files import File, Stored, gguf_name, model_file, stored

KEPT = ("Q8_0", "Q4_0", "Q4_1")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
DOWN = "model.layers.1.mlp.down_proj.weight"


def small(**changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    values = {"model_type": "llama", **SMALL_CONFIGS["gqa2"], **sizes, "max_position_embeddings": 2048}
    return parse_config({**values, "bos_token_id": 1, "eos_token_id": 2, **changes})


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    return dict(RandomWeights(config, dtype=torch.float32).tensors())


def mixed(config: ModelConfig, kind: str, others: dict[str, str]) -> File:
    """A file in one type, but for some tensors."""
    tensors = weights(config)
    file = model_file(config, tensors, GGMLQuantizationType[kind])
    for name, other in others.items():
        file.tensors[gguf_name(name)] = stored(tensors[name], GGMLQuantizationType[other])
    return file


def meant(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every matrix as the library widens it, fp32, and the rows of queries and keys as Hugging Face has them."""
    assert checkpoint.gguf is not None
    found = {}
    for place in checkpoint.source.places:  # type: ignore[attr-defined]
        tensor = place.tensor
        if len(tensor.shape) == 2:
            raw = np.fromfile(tensor.path, np.uint8, tensor.size, offset=tensor.start).reshape(tensor.shape[0], -1)
            wide = torch.from_numpy(dequantize(raw, tensor.kind)).view(tensor.shape)
            if place.heads:
                wide = wide.view(place.heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            found[place.name] = wide
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KEPT)
def test_a_file_in_one_type_is_kept(kind: str, tied: bool, tmp_path: Path) -> None:
    """The very numbers of the file, on the tape and widened to bf16."""
    config = small(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(mixed(config, kind, {}).write(tmp_path / "model.gguf"))
    assert checkpoint.formats == Formats(kind.lower(), kind.lower()) == chosen_formats(None, None, checkpoint.formats)
    expected = meant(checkpoint)
    assert len(expected) == 7 * config.num_layers + (1 if tied else 2)
    _, found = numbers(pack(checkpoint.source, config, formats=checkpoint.formats))
    _, plain = numbers(pack(checkpoint.source, config, formats=PLAIN))
    for name, tensor in expected.items():
        assert torch.equal(plain[name], tensor.bfloat16()), name
        assert torch.equal(found[name], tensor.bfloat16() if name == EMBEDDING else tensor), name
    assert torch.equal(found[f"{HEAD}.weight"], expected[EMBEDDING if tied else f"{HEAD}.weight"])


@pytest.mark.parametrize("kind", KEPT)
def test_codes_by_hand(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes, every code of either sign among them, read byte by byte."""
    rows, groups = 5, 6
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    raw = np.random.default_rng(1).integers(0, 256, (rows, groups, size), dtype=np.uint8)
    numbers_end = 4 if kind == "Q4_1" else 2
    raw[:, :, :numbers_end] = np.float16(np.random.default_rng(2).uniform(-2, 2, (rows, groups, numbers_end // 2))).view(
        np.uint8
    )
    if kind == "Q8_0":
        raw[0, 0, 2:6] = [0x80, 0x7F, 0xFF, 0]  # -128, 127, -1, 0
    path = File({}, {"a": Stored(raw.tobytes(), (rows, 32 * groups), int(GGMLQuantizationType[kind]))}).write(
        tmp_path / "a.gguf"
    )
    [tensor] = read_header(path).tensors
    with open(path, "rb") as opened:
        found = read_codes(opened.fileno(), Place("a", tensor, format=format_for({kind})))
    for row in range(rows):
        for group in range(groups):
            block = raw[row, group]
            scale = float(block[:2].view(np.float16)[0])
            if kind == "Q8_0":
                expected = [scale * int(code) for code in block[2:].view(np.int8)]
            else:
                nibbles = [*(int(byte) & 15 for byte in block[numbers_end:]), *(int(byte) >> 4 for byte in block[numbers_end:])]
                offset = float(block[2:4].view(np.float16)[0]) if kind == "Q4_1" else -8 * scale
                expected = [float(np.float32(np.float32(code * scale) + np.float32(offset))) for code in nibbles]
            assert found[slice(row, row + 1)][0, 32 * group : 32 * group + 32].tolist() == expected


CASES: dict[str, tuple[str, dict[str, str], Formats]] = {
    "an embedding of 8 bits, tied": ("Q4_0", {EMBEDDING: "Q8_0"}, Formats("q4_0", "q8_0")),
    "an offset in some matrices": ("Q4_0", {DOWN: "Q4_1"}, Formats("q4_1", "q4_0")),
    "a head in a type that is not kept": ("Q4_1", {EMBEDDING: "Q5_0"}, Formats("q4_1", "plain")),
    "a matrix in a type that is not kept": ("Q4_0", {DOWN: "Q5_0", EMBEDDING: "Q8_0"}, Formats("plain", "q8_0")),
    "a matrix of more bits than others": ("Q4_0", {DOWN: "Q8_0"}, Formats("plain", "q4_0")),
    "numbers": ("F16", {}, PLAIN),
}


@pytest.mark.parametrize("case", CASES)
def test_files_of_several_types(case: str, tmp_path: Path) -> None:
    kind, others, formats = CASES[case]
    config = small(tie_word_embeddings=True)
    checkpoint = open_checkpoint(mixed(config, kind, others).write(tmp_path / "model.gguf"))
    assert checkpoint.formats == formats
    if case == "numbers":
        return
    _, found = numbers(pack(checkpoint.source, config, formats=formats))
    for name, tensor in meant(checkpoint).items():
        body = formats.body != "plain" and name != EMBEDDING
        assert torch.equal(found[name], tensor if body else tensor.bfloat16()), name
    if formats.head != "plain":
        assert torch.equal(found[f"{HEAD}.weight"], meant(checkpoint)[EMBEDDING])


def test_an_embedding_apart_from_the_head_does_not_matter(tmp_path: Path) -> None:
    config = small(tie_word_embeddings=False)
    file = mixed(config, "Q4_0", {EMBEDDING: "Q5_1", f"{HEAD}.weight": "Q8_0"})
    assert open_checkpoint(file.write(tmp_path / "model.gguf")).formats == Formats("q4_0", "q8_0")


def test_padded_heads_are_widened(tmp_path: Path) -> None:
    """A head of 24 takes 32 columns of the output projection: they are in no blocks."""
    config = small(head_dim=24, num_attention_heads=8, num_key_value_heads=4)
    checkpoint = open_checkpoint(mixed(config, "Q8_0", {}).write(tmp_path / "model.gguf"))
    assert checkpoint.formats.body == "plain"
    pack(checkpoint.source, config, formats=checkpoint.formats)


def scaled(file: File, name: str, scale: float) -> File:
    """The first block of a matrix with another scale."""
    old = file.tensors[gguf_name(name)]
    file.tensors[gguf_name(name)] = Stored(np.float16(scale).tobytes() + old.data[2:], old.shape, old.kind)
    return file


def test_scales_that_a_format_does_not_hold(tmp_path: Path) -> None:
    """Of files with both types of 4 bits, -8 scales must be a number in fp16."""
    config = small(tie_word_embeddings=True)
    other = "model.layers.0.mlp.down_proj.weight"
    for scale, fits in ((8184.0, True), (-8188.0, True), (8192.0, False), (-60000.0, False)):
        path = scaled(mixed(config, "Q4_0", {DOWN: "Q4_1"}), other, scale).write(tmp_path / "model.gguf")
        checkpoint = open_checkpoint(path)
        if fits:
            _, found = numbers(pack(checkpoint.source, config, formats=checkpoint.formats))
            assert torch.equal(found[other], meant(checkpoint)[other])
        else:
            with pytest.raises(
                UserError, match=r"model.gguf: tensor blk.0.ffn_down.weight has scales too large for Q4_1, .*bf16"
            ):
                pack(checkpoint.source, config, formats=checkpoint.formats)
    alone = scaled(mixed(config, "Q4_0", {}), other, -60000.0).write(tmp_path / "alone.gguf")
    assert Weights.collect(open_checkpoint(alone).source).by_name[other].abs().max() >= 60000


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(kind: str, value: float, tmp_path: Path) -> None:
    config = small(tie_word_embeddings=True)
    checkpoint = open_checkpoint(scaled(mixed(config, kind, {}), DOWN, value).write(tmp_path / "model.gguf"))
    for formats in (checkpoint.formats, PLAIN):
        with pytest.raises(UserError, match=rf"tensor {DOWN} holds -?(nan|inf) at \[0, 0?\d*\]: weights must be finite"):
            pack(checkpoint.source, config, formats=formats)


@pytest.mark.parametrize("kind", KEPT)
def test_the_backends_decode_it(kind: str, tmp_path: Path) -> None:
    """The CPU machine and plain PyTorch, against the numbers of the file; both nearer to them than the file widened to bf16 is,
    or as near as bf16 activations are."""
    config = small(tie_word_embeddings=True)
    path = mixed(config, kind, {EMBEDDING: "Q8_0"}).write(tmp_path / "model.gguf")
    exact = Weights.collect(open_checkpoint(path).source, torch.float32).by_name
    assert all(torch.equal(exact[name], tensor) for name, tensor in meant(open_checkpoint(path)).items())
    true = Reference(config, exact, torch.float32).logits(PROMPT)[-1]
    rounding = (Reference(config, exact, torch.bfloat16).logits(PROMPT)[-1] - true).square().mean().sqrt()
    for backend in ("vm", "torch"):
        for formats in (open_checkpoint(path).formats, PLAIN):
            body, head = (name.replace("plain", "bf16") for name in formats)
            with load_engine(path, backend=backend, capacity=32, weights=body, head=head) as engine:
                generation = engine.generate(PROMPT, 1, SamplingParams())
                list(generation)
                logits = generation.logits()
            assert (logits - true).square().mean().sqrt() <= 2 * rounding, (backend, formats)


def test_other_formats_are_made_of_it_and_fp32_is_refused(tmp_path: Path) -> None:
    config = small(tie_word_embeddings=True)
    path = mixed(config, "Q8_0", {}).write(tmp_path / "model.gguf")
    with load_engine(path, backend="vm", capacity=16, weights="fp8") as engine:
        assert engine._backend.model.tape.formats == Formats("fp8", "fp8")  # type: ignore[union-attr]
    with pytest.raises(UserError, match="q8_0 weights are widened to bf16: .* or say --weights bf16"):
        load_engine(path, backend="vm", capacity=16, dtype="float32", weights="q8_0")
    with load_engine(path, backend="vm", capacity=16, dtype="float32", weights="bf16") as engine:
        assert engine.config.hidden_size == 128


@pytest.mark.parametrize(("name", "kept"), [("smollm2-135m", False), ("qwen3-0.6b", True), ("llama-3-8b", True)])
def test_small_models_are_widened_unless_a_format_is_named(name: str, kept: bool) -> None:
    """Quantised weights make a step of theirs longer."""
    stored = Formats("q4_1", "q8_0")
    checkpoint = Checkpoint(PRESETS[name], Weights({}), None, torch.bfloat16, formats=stored)
    assert checkpoint.chosen_formats(None) == (stored if kept else PLAIN)
    assert checkpoint.chosen_formats("q4_1", "q8_0") == stored


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_is_kept_as_it_is() -> None:
    path = cached()
    assert path is not None
    checkpoint = open_checkpoint(path)
    assert checkpoint.formats == Formats("q4_1", "q8_0")
    expected, count = meant(checkpoint), 0
    for name, tensor in checkpoint.source.tensors():
        if len(tensor.shape) == 2:
            assert isinstance(tensor, Quantised)
            assert torch.equal(tensor.to(), expected[name]), name
            count += 1
    assert count == len(expected) == 7 * 30 + 1

"""Quantised checkpoints of every kind that is read: the very numbers that they stand for, on the tape and off it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megakernel.loading import load_engine
from megakernel.request import SamplingParams
from models.checkpoint import open_checkpoint
from models.families.base import HEAD
from models.formats import PLAIN, Formats
from models.packed import numbers, pack
from models.reference import Reference
from models.weights import EMBEDDING, Weights
from tests.support.quantised_checkpoints import CONFIG, KINDS, write_checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    """Taken as they are, not one code or scale changes."""
    meant = write_checkpoint(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == CONFIG
    assert checkpoint.formats == Formats(KINDS[kind][0], "plain")
    model = pack(checkpoint.source, checkpoint.config, formats=checkpoint.formats)
    _, found = numbers(model)
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def test_widened_where_it_is_asked_for(tmp_path: Path) -> None:
    meant = write_checkpoint(tmp_path, "awq")
    checkpoint = open_checkpoint(tmp_path)
    _, found = numbers(pack(checkpoint.source, checkpoint.config, formats=PLAIN))
    for name, tensor in meant.items():
        assert torch.equal(found[name].bfloat16(), tensor.bfloat16()), name
    collected = Weights.collect(checkpoint.source).by_name
    assert all(torch.equal(collected[name], tensor) for name, tensor in meant.items())


def test_a_quantised_head(tmp_path: Path) -> None:
    meant = write_checkpoint(tmp_path, "fp8 per channel", head=True)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.formats == Formats("fp8", "fp8")
    config, found = numbers(pack(checkpoint.source, checkpoint.config, formats=checkpoint.formats))
    assert not config.tied_embeddings
    for name in (f"{HEAD}.weight", EMBEDDING):
        assert torch.equal(found[name].float(), meant[name].float())


@pytest.mark.parametrize("kind", ["fp8 per tensor", "int4 asymmetric"])
def test_the_backends_decode_it(kind: str, tmp_path: Path) -> None:
    """The CPU machine and plain PyTorch, against the numbers that the checkpoint stands for."""
    meant = write_checkpoint(tmp_path, kind)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    true = Reference(CONFIG, meant, torch.float32).logits(prompt)[-1]
    rounding = (Reference(CONFIG, meant, torch.bfloat16).logits(prompt)[-1] - true).square().mean().sqrt()
    for backend in ("vm", "torch"):
        with load_engine(tmp_path, backend=backend, capacity=32) as engine:
            generation = engine.generate(prompt, 1, SamplingParams())
            list(generation)
            logits = generation.logits()
        assert (logits - true).square().mean().sqrt() <= 2 * rounding, backend

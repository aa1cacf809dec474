"""One layer of Llama-3.2-1B at its true widths on the CPU machine: what small models cannot show, K of many requests a row
block, heads of 64 in a group of 4, a head of thousands of row blocks."""

from __future__ import annotations

import dataclasses

import torch

from instructions.shape import HELD_PAGES
from megakernel.request import SamplingParams
from megakernel.sequence import Sequence
from megakernel.vm.backend import VmBackend
from models.families import PRESETS
from models.packed import pack
from models.random_weights import RandomWeights
from models.reference import Reference
from models.weights import Weights
from scheduler.buckets import BucketPrograms

CONFIG = dataclasses.replace(PRESETS["llama-3.2-1b"], num_layers=1, vocab_size=16_032)
PROMPT = [11, 16_000]


def test_a_layer_of_the_1b_shape_is_no_further_from_fp32_than_plain_bf16() -> None:
    weights = Weights.collect(RandomWeights(CONFIG))
    model = pack(weights, CONFIG, torch.bfloat16, 64)
    assert model.tape.matrix("down").pages_per_block > HELD_PAGES
    backend = VmBackend(model, BucketPrograms(CONFIG, 8, 64, 2))
    sequence = Sequence(PROMPT, 1, SamplingParams())
    assert backend.join(sequence)
    backend.decode(1)
    logits = backend.last_machine.logits()
    exact, plain = (Reference(CONFIG, weights.by_name, dtype).logits(PROMPT)[-1] for dtype in (torch.float32, torch.bfloat16))
    assert (logits - exact).abs().max() <= (plain - exact).abs().max() < 0.1 * exact.abs().max()
    assert list(sequence.ready) == [int(logits.argmax())]

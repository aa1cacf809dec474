"""Small models and programs for tests of the virtual machine; no transformers, no files."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from instructions.codec import Word, disassemble
from megakernel.vm import Vm
from megakernel.vm.interleaving import Interleaving
from models.config import ModelConfig
from models.packed import PackedModel, pack
from models.weights import Weights
from scheduler.build import build_program, make_shape
from scheduler.program import Program
from tests.support.configs import random_tensors, small_config

CAPACITY = 300
PROMPT = (3, 1, 4, 1, 5)
# Two KV heads with two query heads each, KV pages of 32 (fp32) or 64 (bf16) positions, biases, a vocabulary that is no
# multiple of 16, an MLP of several pages along K.
TINY = small_config("head128_bias_tied", positions=512)


@functools.cache
def packed(dtype: torch.dtype = torch.float32, config: ModelConfig = TINY) -> PackedModel:
    """Random weights, the same for every caller, wide enough that the next token depends on all that came before."""
    return pack(Weights(random_tensors(config, seed=5)), config, dtype, CAPACITY)


@functools.cache
def program(
    sms: int = 3,
    policy: str = "zigzag",
    bucket: int = CAPACITY,
    slices: int | None = 2,
    ring: int | None = None,
    dtype: torch.dtype = torch.float32,
    config: ModelConfig = TINY,
) -> Program:
    """A program of the tiny model."""
    shape = make_shape(config, sms=sms, capacity=CAPACITY, bucket=bucket, itemsize=dtype.itemsize, slices=slices)
    return build_program(shape, sms, policy, ring)


def vm_of(
    made: Program,
    seed: int = 0,
    interleaving: Interleaving | None = None,
    prompt: tuple[int, ...] = PROMPT,
    early: bool = False,
) -> Vm:
    """A machine at the start of a sequence."""
    dtype = torch.float32 if made.shape.itemsize == 4 else torch.bfloat16
    vm = Vm(made, packed(dtype, made.shape.config), seed=seed, interleaving=interleaving, early=early)
    vm.state.start(prompt)
    return vm


def outcome(vm: Vm, tokens: int) -> tuple[list[int], bytes]:
    """Tokens decoded in one launch, and the bits of the last logits."""
    vm.launch(tokens)
    return vm.state.generated, vm.logits().numpy().tobytes()


def mutated(made: Program, place: int, **words: int) -> Program:
    """A copy of a program with some words of record number `place` changed, named as in `Word`, with an offset after "_"."""
    changed = made.words.copy()
    for name, value in words.items():
        word, _, offset = name.partition("__")
        changed[place, Word[word] + int(offset or 0)] = value
    return dataclasses.replace(made, words=changed)


def without(made: Program, place: int) -> Program:
    """A copy of a program that lacks one record."""
    sm = int(np.searchsorted(made.starts, place, side="right")) - 1
    starts = made.starts.copy()
    starts[sm + 1 :] -= 1
    return dataclasses.replace(made, words=np.delete(made.words, place, axis=0), starts=starts)


def find(made: Program, mnemonic: str, layer: int = 0, nth: int = 0) -> int:
    """The place, among all records, of the nth instruction of a kind in a layer."""
    instructions = [item.instruction for queue in made.decoded for item in queue]
    kinds = [(instruction.MNEMONIC, instruction.layer) for instruction in instructions]
    return [place for place, kind in enumerate(kinds) if kind == (mnemonic, layer)][nth]


def text_at(made: Program, place: int) -> str:
    """The disassembly of one record."""
    return disassemble([item for queue in made.decoded for item in queue][place])

"""Decoding on the CPU machine with the logits of every position, which the engine does not hand out, and by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megakernel.vm.backend import VmBackend
from models.checkpoint import open_checkpoint
from models.packed import pack
from scheduler.buckets import BucketPrograms


def vm_backend(
    directory: Path, dtype: torch.dtype, *, sms: int, capacity: int, policy: str = "balanced", seed: int = 0
) -> VmBackend:
    """A checkpoint on the CPU machine."""
    checkpoint = open_checkpoint(directory)
    model = pack(checkpoint.source, checkpoint.config, dtype, capacity)
    return VmBackend(model, BucketPrograms(checkpoint.config, sms, capacity, dtype.itemsize, policy), seed)


def decode_with_logits(backend: VmBackend, prompt: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation of `count` tokens, and the logits after every token but the last: fp32 [positions, vocab]."""
    backend.state.start(prompt)
    logits = []
    while backend.state.position < len(prompt) + count - 1:
        backend.machine(backend.programs.place(backend.state.position)).launch(1)
        logits.append(backend.last_machine.logits())
    return backend.state.generated, torch.stack(logits)


def generated_by_transformers(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation of `count` tokens, whatever they are."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # or it hides tokens that equal the padding
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens

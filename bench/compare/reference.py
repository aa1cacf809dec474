"""The judge: the model in fp32, by the project's plain PyTorch forward pass (which its tests hold against transformers).

    python -m bench.compare.reference JOB.json

JOB names the model, the prompts, how many tokens, a seed, and a folder, into which come
- `sequences.json`: the scored prompts, each continued by tokens that the reference draws at temperature 1, so that they are
  likely under the model; and its own greedy continuations of the timed prompts;
- `scored.npy`: its logits for every drawn token, fp32 [drawn tokens, vocabulary], in their order;
- `greedy.npy`: its logits for its greedy tokens, fp32 [timed prompts, tokens, vocabulary].
A process of its own, on the GPU where there is one, gone before the engines come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoint import open_checkpoint
from models.reference import Reference
from models.weights import Weights

CHUNK = 512  # prompt tokens at a time: attention scores are [heads, chunk, context] in fp32

Choice = Callable[[np.ndarray], int]


def continued(reference: Reference, prompt: Sequence[int], tokens: int, choose: Choice) -> tuple[list[int], np.ndarray]:
    """So many tokens after a prompt, and the logits that each was chosen from, fp32 [tokens, vocabulary]."""
    reference.reset()
    for start in range(0, len(prompt), CHUNK):
        logits = reference.extend(prompt[start : start + CHUNK])[-1]
    chosen: list[int] = []
    rows = []
    while True:
        rows.append(logits.cpu().numpy())
        chosen.append(choose(rows[-1]))
        if len(chosen) == tokens:
            return chosen, np.stack(rows)
        logits = reference.extend(chosen[-1:])[-1]


def drawing(seed: int) -> Choice:
    """Draws a token from the softmax of its logits."""
    generator = np.random.default_rng(seed)

    def choose(logits: np.ndarray) -> int:
        weights = np.exp(logits.astype(np.float64) - logits.max())
        cumulative = np.cumsum(weights)
        return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))

    return choose


def run(job: dict[str, Any]) -> None:
    """Carry out a job."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = Path(job["folder"])
    checkpoint = open_checkpoint(job["model"])
    weights = Weights.collect(checkpoint.source).by_name
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    with device:  # for the tensors that the reference makes
        reference = Reference(checkpoint.config, weights, torch.float32)
        choose = drawing(job["seed"])
        scored = [continued(reference, prompt, job["scored_tokens"], choose) for prompt in job["scored"]]
        greedy = [continued(reference, prompt, job["tokens"], lambda logits: int(logits.argmax())) for prompt in job["timed"]]
    np.save(folder / "scored.npy", np.concatenate([rows for _, rows in scored]))
    np.save(folder / "greedy.npy", np.stack([rows for _, rows in greedy]))
    sequences = [[*prompt, *drawn] for prompt, (drawn, _) in zip(job["scored"], scored, strict=True)]
    found = {"scored": sequences, "greedy": [tokens for tokens, _ in greedy], "device": device.type}
    (folder / "sequences.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))

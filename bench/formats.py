"""What quantised weights cost in fidelity: the next-token distributions of the model with them, against those of the plain one.

    python -m bench.formats                                    SmolLM2-135M-Instruct; --model takes any checkpoint
    python -m bench.formats --model DIRECTORY --prompts 16 --tokens 128

Both are computed in fp32 by the project's plain forward pass, on the GPU where there is one, so that nothing but the weights
differs.  The plain model goes on from short prompts by drawing tokens at temperature 1, which are likely under it; at each of
them: the KL divergence from its distribution, by how much the log-probability of the token falls, and whether the likeliest
token is the same.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np
import torch

from bench.compare.fidelity import distances
from bench.compare.reference import continued, drawing
from megakernel.text import codec_of
from models.checkpoint import Checkpoint, open_checkpoint
from models.command import Parser, add_model, command, start, whole
from models.formats import Formats, chosen_formats
from models.packed import numbers, pack
from models.reference import Reference
from models.smollm2 import fetched

OPENINGS = (
    "The garbage collector", "Once upon a time there was", "def fibonacci(n):", "The capital of France is",
    "In physics, the energy of", "To bake bread, first", "The function returns", "Dear Sir or Madam,",
)  # fmt: skip
CHOICES = (
    ("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"), ("int4", "bf16"), ("int4", "fp8"), ("int4", "int4"),
    ("q8_0", "q8_0"), ("q4_1", "q8_0"), ("q4_0", "q8_0"),
)  # fmt: skip
MOST = 4096


@dataclass(frozen=True)
class FormatRecord:
    """Means over all positions: KL divergence and the rise of the NLL, in nats; the share of positions with the same likeliest
    token; the greatest KL divergence; and the bytes of the weights that a step reads."""

    weights: str
    head: str
    kl: float
    most_kl: float
    nll_rise: float
    same_top: float
    streamed_bytes: int


Drawn = tuple[list[int], np.ndarray]  # a prompt and what was drawn after it; the logits it was drawn from


def reference_of(checkpoint: Checkpoint, formats: Formats) -> tuple[Reference, int]:
    """The model with its weights in some formats, in fp32, and the bytes of weights that a step reads."""
    model = pack(checkpoint.source, checkpoint.config, torch.bfloat16, 1, formats)
    config, tensors = numbers(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        return Reference(config, {name: tensor.to(device) for name, tensor in tensors.items()}), model.tape.streamed_bytes


def draw(reference: Reference, prompts: Sequence[list[int]], tokens: int) -> list[Drawn]:
    """The plain model's continuations."""
    found = [continued(reference, prompt, tokens, drawing(seed)) for seed, prompt in enumerate(prompts)]
    return [([*prompt, *drawn], rows) for prompt, (drawn, rows) in zip(prompts, found, strict=True)]


def judge(reference: Reference, drawn: Sequence[Drawn], names: tuple[str, str], streamed: int) -> FormatRecord:
    """The same positions by other weights."""
    kl: list[float] = []
    rise: list[float] = []
    same: list[bool] = []
    for tokens, rows in drawn:
        targets = tokens[len(tokens) - len(rows) :]
        logits = reference.logits(tokens[:-1])[-len(rows) :].cpu().numpy()
        found = distances(logits, rows, targets)
        kl += found.kl
        rise += [ours - true for ours, true in zip(found.nll, found.reference_nll, strict=True)]
        same += found.same_top
    return FormatRecord(*names, fmean(kl), max(kl), fmean(rise), fmean(same), streamed)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.formats", description="What quantised weights cost in fidelity.")
    add_model(parser)
    parser.add_argument("--prompts", type=whole(1, MOST), default=len(OPENINGS), help="how many (default %(default)s)")
    parser.add_argument("--tokens", type=whole(1, MOST), default=64, help="drawn after each (default %(default)s)")
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    checkpoint = open_checkpoint(options.model or fetched())
    codec = codec_of(checkpoint)
    prompts = [codec.encode(OPENINGS[i % len(OPENINGS)]) for i in range(options.prompts)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records: list[FormatRecord] = []
    drawn: list[Drawn] = []
    for names in CHOICES:
        reference, streamed = reference_of(checkpoint, chosen_formats(*names))
        with device:
            drawn = drawn or draw(reference, prompts, options.tokens)
            records.append(judge(reference, drawn, names, streamed))
        record = records[-1]
        print(
            f"{record.weights:>5}, head {record.head:>5}: KL {record.kl:.2e} (most {record.most_kl:.2e}), "
            f"NLL {record.nll_rise:+.4f} nats, same likeliest token {record.same_top:.1%}, "
            f"{record.streamed_bytes / 1e6:.0f} MB a token",
            flush=True,
        )
    print(json.dumps({"model": options.model, "tokens": options.tokens, "formats": [asdict(record) for record in records]}))
    return 0


if __name__ == "__main__":
    start(main)

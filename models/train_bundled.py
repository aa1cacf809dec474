"""Makes the bundled model: tokenizer, configuration and weights of a small Llama, from the text of a Python installation.

    python -m models.train_bundled --write-corpus corpus.txt            # where the Python to be read is installed
    python -m models.train_bundled --corpus corpus.txt --steps 2000 --out models/bundled

Needs `tokenizers` and `transformers`; trains on a GPU in minutes and on a CPU overnight.  The same arguments on the same
machine give the same data order and initial weights; `--minutes` ends a run by the clock and gives that up.  Knows nothing of
how the model is run.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from models import bundled_corpus as corpus
from models.bundled_format import ARCHITECTURE, CARD, VOCABULARY, save_formats, save_weights, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train.  `context` and `batch` count tokens and windows of a step."""

    steps: int = 2000
    minutes: float = math.inf
    batch: int = 16
    context: int = 2048
    learning_rate: float = 2e-3
    final_rate: float = 0.05  # of the learning rate, where the cosine ends
    warm_up: int = 100  # steps
    weight_decay: float = 0.1
    dropout: float = 0.1  # on what each attention and MLP adds to the residual stream
    seed: int = 1
    evaluate_every: int = 100  # steps
    patience: int = 8  # evaluations without a new best before the run ends


class Stream:
    """Tokens of many records end to end on one device, and where its documents begin."""

    def __init__(self, records: list[str], tokenizer: Any, device: torch.device) -> None:
        encoded = tokenizer.encode_batch_fast(records, add_special_tokens=False)
        self.tokens = torch.tensor([token for record in encoded for token in record.ids], device=device)  # [N] int64
        self.beginnings = (self.tokens == ARCHITECTURE["bos_token_id"]).nonzero().squeeze(1)

    def sample(self, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
        """[batch, context + 1] windows: half from anywhere, half from where a document begins, as every prompt does."""
        last = len(self.tokens) - recipe.context - 1
        device = self.tokens.device
        anywhere = torch.randint(0, last, (recipe.batch,), generator=generator).to(device)
        chosen = torch.randint(0, len(self.beginnings), (recipe.batch,), generator=generator).to(device)
        begins = torch.arange(recipe.batch, device=device) % 2 == 0
        start = torch.where(begins, self.beginnings[chosen].clamp(max=last), anywhere)
        return self.tokens[start[:, None] + torch.arange(recipe.context + 1, device=device)]

    def windows(self, recipe: Recipe) -> Iterator[torch.Tensor]:
        """All the tokens once, in batches of whole windows [<= batch, context + 1]."""
        width = recipe.context + 1
        whole = self.tokens[: len(self.tokens) // width * width].reshape(-1, width)
        yield from whole.split(recipe.batch)


def make_model(recipe: Recipe) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, recipe.dropout, module.training)

    if recipe.dropout:
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)
    return model


def loss_of(model: Callable[..., Any], windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats; bf16 products on a GPU."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.device.type == "cuda"):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def compiled(model: Any, windows: torch.Tensor) -> Callable[..., Any]:
    """`torch.compile` where it works on this machine, proven by one forward and backward; else the model itself."""
    try:
        fast = torch.compile(model)
        loss_of(fast, windows).backward()
    except Exception as error:  # the compiler's failures have no common class, and none of them is fatal here
        print(f"torch.compile failed ({type(error).__name__}), training without it", flush=True)
        torch._dynamo.reset()
        return model
    finally:
        model.zero_grad(set_to_none=True)
    return fast


def optimizer_for(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; the norms do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate(recipe: Recipe, step: int, elapsed: float) -> float:
    """Linear warm-up, then a cosine over whichever runs out first, steps or seconds."""
    progress = min(1.0, max(step / recipe.steps, elapsed / (60 * recipe.minutes)))
    cosine = recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * cosine * min(1.0, (step + 1) / recipe.warm_up)


@torch.no_grad()
def validation_loss(model: Any, run: Callable[..., Any], stream: Stream, recipe: Recipe) -> float:
    model.eval()
    losses = [(loss_of(run, windows).item(), len(windows)) for windows in stream.windows(recipe)]
    model.train()
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


@dataclass(frozen=True)
class Best:
    """The evaluation whose weights were kept."""

    step: int
    loss: float
    seconds: float


def train(
    model: Any, stream: Stream, held_out: Stream, recipe: Recipe, use_compile: bool, keep: Callable[[Best], None]
) -> None:
    """Trains in place; `keep` is called at each evaluation that beats all before it."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = optimizer_for(model, recipe)
    model.train()
    run = compiled(model, stream.sample(recipe, generator)) if use_compile else model
    began, best, loss = time.monotonic(), Best(0, math.inf, 0.0), torch.tensor(math.nan)
    for step in range(recipe.steps + 1):
        elapsed = time.monotonic() - began
        ending = step == recipe.steps or elapsed > 60 * recipe.minutes
        if ending or (step and step % recipe.evaluate_every == 0):
            held = validation_loss(model, model, held_out, recipe)
            print(f"{elapsed:7.1f} s  step {step:5d}  train {loss.item():.4f}  validation {held:.4f}", flush=True)
            if held < best.loss:
                best = Best(step, held, elapsed)
                keep(best)
            if ending or step - best.step >= recipe.patience * recipe.evaluate_every:
                return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, elapsed)
        loss = loss_of(run, stream.sample(recipe, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def card(recipe: Recipe, best: Best, model: Any, records: list[str], python: str, device: torch.device) -> str:
    text = corpus.RECORD_SEPARATOR.join(records)
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        python=python,
        characters=len(text),
        digest=hashlib.sha256(text.encode()).hexdigest(),
        vocabulary=VOCABULARY,
        recipe=f"windows of {recipe.context} tokens, {recipe.batch} a step, AdamW at {recipe.learning_rate:g} with a cosine, "
        f"weight decay {recipe.weight_decay:g}, dropout {recipe.dropout:g}, seed {recipe.seed}.",
        step=best.step,
        seconds=best.seconds,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        torch=torch.__version__,
        loss=best.loss,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--write-corpus", type=Path, metavar="FILE", help="write the text of this Python there, and stop")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="train on a file that --write-corpus made")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json to reuse; default: train one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "bundled", help="directory (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: saves milliseconds a step, costs a minute")
    for name in ("steps", "minutes", "batch", "context", "learning_rate", "dropout", "seed", "evaluate_every"):
        default = getattr(Recipe, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.write_corpus:
        corpus.write(arguments.write_corpus)
        return
    from tokenizers import Tokenizer

    names = ("steps", "minutes", "batch", "context", "learning_rate", "dropout", "seed", "evaluate_every")
    recipe = Recipe(**{name: getattr(arguments, name) for name in names})
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(chosen if arguments.device == "auto" else arguments.device)
    if arguments.corpus:
        python, records = corpus.read(arguments.corpus)
    else:
        python, records = corpus.python_version(), list(corpus.records())
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer)) if arguments.tokenizer else train_tokenizer(records)
    save_formats(arguments.out, tokenizer)
    stream = Stream([record for record in records if not corpus.is_validation(record)], tokenizer, device)
    held_out = Stream([record for record in records if corpus.is_validation(record)], tokenizer, device)
    model = make_model(recipe).to(device)
    print(f"{len(stream.tokens):,} tokens, {len(held_out.tokens):,} held out, {device}", flush=True)

    def keep(best: Best) -> None:
        save_weights(arguments.out, model)
        (arguments.out / "README.md").write_text(card(recipe, best, model, records, python, device), encoding="utf-8")

    train(model, stream, held_out, recipe, arguments.compile, keep)


if __name__ == "__main__":
    main()

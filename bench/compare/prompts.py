"""Which token ids every engine is given: drawn from a seed, or cut from a text.  Knows no engine."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from models.config import ModelConfig
from models.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """timed: prompts of each context length, as many as are decoded together.  scored: short prompts that the reference
    continues, so that engines can be judged at the positions after them."""

    timed: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell two sets of prompts apart."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


def draw_prompts(config: ModelConfig, contexts: Sequence[int], scored: int, length: int, seed: int) -> Prompts:
    """Uniform ids, with the model's own first token in front.

    Ids from the first special token on are left out where the special ones stand at the end of the vocabulary, as Llama
    3's do: a trained model has never seen most of them.
    """
    special = [token for token in (config.bos_token_id, *config.eos_token_ids) if token is not None]
    end = min([config.vocab_size, *(token for token in special if token > config.vocab_size // 2)])
    generator = random.Random(seed)

    def prompt(count: int) -> tuple[int, ...]:
        return _begun(config, [generator.randrange(end) for _ in range(count)])

    return Prompts(tuple(prompt(count) for count in contexts), tuple(prompt(length) for _ in range(scored)))


def cut_prompts(config: ModelConfig, model: Path, text: Path, contexts: Sequence[int], scored: int, length: int) -> Prompts:
    """Pieces of a text, in order, in the model's own tokens.  Raises UserError where there is no tokenizer or too little
    text."""
    from tokenizers import Tokenizer  # here, because drawn prompts need none

    path = model / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: no such file, leave out --text or take a checkpoint with its tokenizer")
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{text}: cannot be read: {error.strerror}") from None
    ids: list[int] = Tokenizer.from_file(str(path)).encode(content, add_special_tokens=False).ids
    counts = [*contexts, *[length] * scored]
    if len(ids) < sum(counts):
        raise UserError(f"{text}: has {len(ids)} tokens, the prompts take {sum(counts)}: give a longer text")
    pieces = []
    for count in counts:
        pieces.append(_begun(config, ids[:count]))
        ids = ids[count:]
    return Prompts(tuple(pieces[: len(contexts)]), tuple(pieces[len(contexts) :]))


def _begun(config: ModelConfig, ids: Sequence[int]) -> tuple[int, ...]:
    """As many ids, the first of them the model's first token if it has one."""
    return tuple(ids) if config.bos_token_id is None else (config.bos_token_id, *ids[1:])

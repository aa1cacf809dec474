"""The tokenizer in a GGUF file, written as the `tokenizer.json` that the tokenizers library reads, and its chat template.

A file keeps a vocabulary, its merges or scores, and two names: of the kind of tokenizer and of how text is split before it is
merged. What the names stand for is taken as transformers takes it, token for token. It departs from that where the file says
more than transformers hears: `add_space_prefix` is obeyed, and Llama 3's vocabularies begin with BOS unless the file says no,
as llama.cpp has it; and a control token between angles is one in whatever characters it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import UserError
from models.gguf.config import CONTROL, NO_TOKEN, shown

PREFIX = "tokenizer.ggml."
USER_DEFINED = 4  # the type of a token that is text, and found whole in a prompt
LONGEST_PIECE = 256  # characters of a token whose merges are to be found
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a blank, in SentencePiece's vocabularies

# How text is split before it is merged: the expressions in the tokenizer.json of the models that these names stand for.
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS, _BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_BLANKS}"
_QWEN_2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_PATHS}|{_BLANKS}"
_GPT_4O = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATHS}|{_BLANKS}"
_GPT_2 = None  # the one that the library brings
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "smollm", "refact", "starcoder", "codeshell", "olmo", "mpt"), _GPT_2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "smaug-bpe", "falcon3", "dbrx", "pixtral", "midm-2.0"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo"), _QWEN_2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT_4O),
}
BEGINNING_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a Hugging Face directory would hold: `tokenizer.json`, the chat template, None without one, and the texts of special
    tokens by their names there ("bos_token", ...)."""

    tokenizer: bytes
    chat_template: str | None
    special_tokens: dict[str, str]


def tokenizer_files(values: Mapping[str, Any], vocab_size: int) -> TokenizerFiles:
    """From the keys of a file whose embedding has `vocab_size` rows. Raises `UserError` that names the key at fault."""
    kind = values.get(PREFIX + "model")
    if kind is None:
        raise UserError(f"{PREFIX}model is missing: the file has no tokenizer, take one that has")
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if not isinstance(kind, str) or kind not in builders:
        raise UserError(f"{PREFIX}model {shown(kind)} is not supported: use one whose tokenizer is {' or '.join(builders)}")
    vocabulary = _Vocabulary(values, vocab_size)
    template = values.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"tokenizer.chat_template is {shown(template)}: it must be a text")
    special = {f"{name}_token": vocabulary.tokens[token] for name, token in vocabulary.special.items()}
    content = json.dumps(builders[kind](vocabulary), ensure_ascii=False).encode()
    return TokenizerFiles(content, template, special)


class _Vocabulary:
    """The checked lists of a file."""

    def __init__(self, values: Mapping[str, Any], vocab_size: int) -> None:
        self.values = values
        self.tokens = self._texts("tokens")
        if len(self.tokens) > vocab_size:
            raise UserError(f"{PREFIX}tokens has {len(self.tokens)} tokens, but the embedding has {vocab_size} rows")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise UserError(f"{PREFIX}tokens holds {shown(twice)} twice: take the file from a sound model")
        self.types = self._numbers("token_type", "iu")
        self.special = {
            name: token
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (token := self._token_id(key)) is not None
        }

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise UserError(f"{PREFIX}{key} is {shown(value)}: it must be true or false")
        return value

    def split(self) -> tuple[str, str | None]:
        """The name of the way to split text, and its expression."""
        name = self.values.get(PREFIX + "pre", "default")
        if not isinstance(name, str) or name not in SPLITS:
            raise UserError(f"{PREFIX}pre {shown(name)} is not supported: use a model of {', '.join(SPLITS)}")
        return name, SPLITS[name]

    def scores(self) -> np.ndarray:
        scores = self._numbers("scores", "f")
        if scores is None:
            raise UserError(f"{PREFIX}scores is missing, with no merges beside it: take the file from a sound model")
        if not np.isfinite(scores).all():
            raise UserError(f"{PREFIX}scores holds what is no finite number: take the file from a sound model")
        return scores

    def merges(self, ids: Mapping[str, int]) -> list[list[str]] | None:
        """Pairs of tokens as they are spelled in `ids`, None where the file has no list of them."""
        if PREFIX + "merges" not in self.values:
            return None
        merges = [merge.split(" ") for merge in self._texts("merges")]
        for index, merge in enumerate(merges):
            if len(merge) != 2 or not all(part in ids for part in (*merge, "".join(merge))):
                raise UserError(
                    f"{PREFIX}merges[{index}], {shown(' '.join(merge))}, does not join two tokens to a third: "
                    "take the file from a sound model"
                )
        return merges

    def of_type(self, kind: int) -> Iterator[int]:
        """The ids of the tokens of one type."""
        if self.types is not None:
            yield from (int(token) for token in np.flatnonzero(self.types == kind))

    def _texts(self, key: str) -> list[str]:
        texts = self.values.get(PREFIX + key)
        if not isinstance(texts, list) or not texts:
            what = "is missing" if texts is None else "is no list of texts"
            raise UserError(f"{PREFIX}{key} {what}: take the file from a sound model")
        return texts

    def _numbers(self, key: str, kinds: str) -> np.ndarray | None:
        numbers = self.values.get(PREFIX + key)
        if numbers is None:
            return None
        if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in kinds or len(numbers) != len(self.tokens):
            raise UserError(f"{PREFIX}{key} is no list of {len(self.tokens)} numbers, one for each token: mend it")
        return numbers

    def _token_id(self, key: str) -> int | None:
        token = self.values.get(f"{PREFIX}{key}_token_id")
        if token is None or (type(token) is int and token == NO_TOKEN):
            return None
        if type(token) is not int or not 0 <= token < len(self.tokens):
            raise UserError(f"{PREFIX}{key}_token_id is {shown(token)}: it must be one of the {len(self.tokens)} tokens")
        return token


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Byte-level BPE, as GPT-2 has it: tokens are spelled with a visible character for each byte."""
    alphabet = _byte_alphabet()
    visible = set(alphabet)
    marked = {*vocabulary.of_type(CONTROL), *vocabulary.of_type(USER_DEFINED), *vocabulary.special.values()}
    # A text that stands for no bytes is either a mark such as <｜User｜>, found as it is, or a token that was not spelled yet.
    marks = {token for token in marked if visible.issuperset(text := vocabulary.tokens[token]) or text[:1] + text[-1:] == "<>"}
    spelled = {
        token if visible.issuperset(token) or index in marks else "".join(alphabet[byte] for byte in token.encode()): index
        for token, index in vocabulary.ids.items()
    }
    name, expression = vocabulary.split()
    merges = vocabulary.merges(spelled)
    if merges is None:
        raise UserError(f"{PREFIX}merges is missing, without which a tokenizer of this kind knows no words: take another file")
    control = [token for token in vocabulary.of_type(CONTROL) if token in marks]
    defined = [token for token in vocabulary.of_type(USER_DEFINED) if token in marks]
    splitting: dict[str, Any] = _byte_step(use_regex=expression is None)
    if expression is not None:
        split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        splitting = {"type": "Sequence", "pretokenizers": [split, splitting]}
    return {
        **_frame(vocabulary, spelled, control, defined, beginning=name in BEGINNING_BY_DEFAULT),
        "pre_tokenizer": splitting,
        "decoder": _byte_step(use_regex=True),
        "model": _bpe(spelled, merges, fuse_unk=False, byte_fallback=False),
    }


def _sentence_piece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """SentencePiece's BPE: a blank is a character of its own, and what has no token is spelled in bytes."""
    prefix = vocabulary.flag("add_space_prefix", True)
    merges = vocabulary.merges(vocabulary.ids)
    if merges is None:
        merges = _merges_by_score(vocabulary.tokens, vocabulary.ids, vocabulary.scores())
    control, defined = list(vocabulary.of_type(CONTROL)), list(vocabulary.of_type(USER_DEFINED))
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    scheme = "first" if prefix else "never"
    return {
        **_frame(vocabulary, vocabulary.ids, control, defined, beginning=True),
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(vocabulary.ids, merges, fuse_unk=True, byte_fallback=True),
    }


def _merges_by_score(tokens: Sequence[str], ids: Mapping[str, int], scores: np.ndarray) -> list[list[str]]:
    """Every way to join two tokens to a third, the best third first; of equal ones that with the longest parts."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        if len(token) > LONGEST_PIECE:
            raise UserError(f"{PREFIX}tokens holds a token of {len(token)} characters, more than {LONGEST_PIECE}: mend it")
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in parts if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-score, -len(left), -len(right), left, right) for left, right in known]
    found.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in found]


def _frame(
    vocabulary: _Vocabulary, ids: Mapping[str, int], control: list[int], defined: list[int], beginning: bool
) -> dict[str, Any]:
    """What both kinds have in common: tokens that are found in a text before it is split, and those that are put around it.

    ids: the vocabulary as it is spelled; a special token that is not in it would get another id.
    """
    special = {token for token in (*control, *vocabulary.special.values()) if vocabulary.tokens[token] in ids}
    added = [
        {
            "id": token,
            "content": vocabulary.tokens[token],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in special,
        }
        for token in sorted({*special, *defined})
        if vocabulary.tokens[token]  # an empty text would be found everywhere
    ]
    first = _around(vocabulary, ids, "bos") if vocabulary.flag("add_bos_token", beginning) else []
    last = _around(vocabulary, ids, "eos") if vocabulary.flag("add_eos_token", False) else []
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    pieces = [*({"SpecialToken": {"id": token, "type_id": 0}} for token in first), sequence]
    pieces += [{"SpecialToken": {"id": token, "type_id": 0}} for token in last]
    texts = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (*first, *last)}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]  # never asked for, but must be there
    processor = {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": texts}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "post_processor": processor if texts else None,
    }


def _around(vocabulary: _Vocabulary, ids: Mapping[str, int], name: str) -> list[str]:
    text = vocabulary.tokens[vocabulary.special[name]] if name in vocabulary.special else None
    return [text] if text and text in ids else []


def _bpe(ids: Mapping[str, int], merges: list[list[str]], fuse_unk: bool, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }


def _byte_step(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where it is visible, else one of those from 256 on, in turn."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]

"""Between text and token ids: prompts, chat templates, and text that streams as tokens arrive.

A `TextCodec` turns prompts into token ids and makes the `Detokenizer` of one request.  Models with a tokenizer have a
`ModelText`; random weights have none and get `IdsAsText`.  Knows nothing of engines, sampling or the terminal.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megakernel.chat_template import ChatTemplate, Message, no_template
from megakernel.panics import explained
from models.errors import UserError
from models.files import read_regular

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.gguf.file import GgufFile

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What a byte-fallback decoder can show for text that is not lost: it decodes a run of byte tokens as a whole or not at all,
# so one finished character of 4 bytes and 3 bytes of the next read as 7 replacement characters until the last byte comes.
_MOST_UNFINISHED = 7
_LONGEST_CHARACTER = 8  # tokens, generously: byte-level tokenizers need 4 at most
_TOKENIZER_BYTES = 10**8  # three times the largest there are
_MOST_GROWTH = 256  # of a text by replacements, where real tokenizers have 10; some 30 that double fill any memory
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_CONTROLS = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")


def terminal_safe(text: str) -> str:
    """A model's text without what a terminal obeys: control characters other than line breaks and tabs."""
    return text.translate(_CONTROLS)


class Detokenizer(Protocol):
    """Text of one request: the pieces, joined, are the text of all its tokens, and no piece is ever taken back."""

    def step(self, token_id: int) -> str:
        """The text that this token completes; often "", as when it ends inside a character."""

    def steps(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete: that of `step` for each, in less time."""

    def finish(self) -> str:
        """What is left: bytes that never became a character, as replacement characters."""


class TextCodec(Protocol):
    def encode(self, prompt: str) -> list[int]: ...

    def encode_chat(self, prompt: str) -> list[int]: ...

    def encode_messages(self, messages: Sequence[Message]) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer: ...


class IdsAsText:
    """For models without a tokenizer: a prompt's UTF-8 bytes are its ids, and ids in decimal are the text."""

    def encode(self, prompt: str) -> list[int]:
        return list(checked(prompt).encode())

    def encode_chat(self, prompt: str) -> list[int]:
        return self.encode_messages([])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        raise UserError("random weights have no chat template: leave out --chat, or name a model that has one")

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        return _DecimalIds()


class _DecimalIds:
    def __init__(self) -> None:
        self._separator = ""

    def step(self, token_id: int) -> str:
        return self.steps([token_id])

    def steps(self, token_ids: Sequence[int]) -> str:
        if not token_ids:
            return ""
        separator, self._separator = self._separator, " "
        return separator + " ".join(map(str, token_ids))

    def finish(self) -> str:
        return ""


def codec_of(checkpoint: Checkpoint) -> TextCodec:
    """What goes with a model: its tokenizer, or ids in place of text for made-up weights.  Raises UserError."""
    if checkpoint.gguf is not None:
        return ModelText.of_gguf(checkpoint.gguf, checkpoint.config.vocab_size)
    return IdsAsText() if checkpoint.directory is None else ModelText(checkpoint.directory)


class ModelText:
    """The tokenizer of a model directory (`tokenizer.json`) or of a GGUF file, and its chat template where it has one."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError where the tokenizer is missing or cannot be read."""
        path = directory / "tokenizer.json"
        if not os.path.exists(path):
            raise UserError(f"{directory} has no tokenizer.json: save the model's fast tokenizer there")
        self._take(path, read_regular(path, _TOKENIZER_BYTES), lambda: ChatTemplate.of(directory))

    @classmethod
    def of_gguf(cls, file: GgufFile, vocab_size: int) -> ModelText:
        """Of a model in GGUF, which holds its tokenizer and its template.  Raises UserError as the constructor does."""
        from models.gguf.tokenizer import tokenizer_files

        try:
            files = tokenizer_files(file.values, vocab_size)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from None

        def template() -> ChatTemplate:
            if files.chat_template is None:
                raise no_template(file.path)
            return ChatTemplate(files.chat_template, files.special_tokens, file.path)

        text = cls.__new__(cls)
        text._take(file.path, files.tokenizer, template)
        return text

    def _take(self, path: Path, content: bytes, template: Callable[[], ChatTemplate]) -> None:
        from tokenizers import Tokenizer

        _check_merges(path, content)
        with explained(f"{path} is not a tokenizer that the tokenizers library can read"):
            self._tokenizer = Tokenizer.from_buffer(content)
        _check_growth(path, self._tokenizer)
        self._tokenizer.no_truncation()  # a training length saved with the tokenizer must not cut prompts
        self._tokenizer.no_padding()
        self._path, self._template = path, template
        self._rendering: ChatTemplate | None = None  # made when a conversation comes

    def encode(self, prompt: str) -> list[int]:
        """Token ids of plain text, with the tokens that the tokenizer's own post-processor adds (BOS)."""
        return self._ids(checked(prompt), add_special_tokens=True)

    def encode_chat(self, prompt: str) -> list[int]:
        """Token ids of one user turn and the opening of the assistant's, as the chat template writes them."""
        return self.encode_messages([{"role": "user", "content": checked(prompt)}])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation and the opening of the assistant's next turn, as the chat template writes them.

        The template writes BOS itself where the model wants one, so the post-processor adds nothing.
        """
        if self._rendering is None:
            self._rendering = self._template()
        return self._ids(self._rendering.render(list(messages)), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones left out."""
        with explained(f"the tokenizer in {self._path} cannot make text of the model's tokens"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        return WindowDetokenizer(self.decode, prompt_ids)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        with explained(f"the tokenizer in {self._path} cannot take this prompt, use other words or another tokenizer"):
            ids = list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        if not ids:
            raise UserError("the prompt is empty once it is tokenized: write at least one character that the tokenizer keeps")
        return ids


def _check_merges(path: Path, content: bytes) -> None:
    """Every merge continues as the tokenizer says: the library cuts the prefix off unseen, and may end the program."""
    if not _SUBWORD_PREFIX.search(content):  # as good as always
        return
    try:
        model = json.loads(content)["model"]
        prefix, merges = model["continuing_subword_prefix"], model.get("merges") or []
        sound = all((merge.split(" ") if isinstance(merge, str) else merge)[1].startswith(prefix) for merge in merges)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # the library says what is wrong
    if not sound:
        raise UserError(f"{path} has merges without its continuing_subword_prefix: save the model's fast tokenizer there")


def _check_growth(path: Path, tokenizer: Any) -> None:
    """No prompt, and no token's text, becomes so long that it fills the memory: the library ends the program then."""
    for part in (tokenizer.normalizer, tokenizer.decoder):
        growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > _MOST_GROWTH:
            raise UserError(f"{path} may replace a text by one {growth:.2g} times as long: use a sound model's tokenizer")


def _growth(part: Any) -> float:
    """How many times as long a part of a tokenizer, as JSON, can make a text by all its replacements, one after another."""
    if isinstance(part, list):
        return math.prod(_growth(step) for step in part)
    if not isinstance(part, dict):
        return 1.0
    if part.get("type") != "Replace":
        return math.prod(_growth(inner) for inner in part.values())
    exact = part["pattern"].get("String")  # or an expression, which may match between any two characters
    return max(1.0, len(part["content"]) / len(exact)) if exact else 1.0 + len(part["content"])


class WindowDetokenizer:
    """Streams text out of a tokenizer that can only decode whole sequences.

    Decodes a window of the last tokens at each step and returns what is new in it.  The window opens on the chunk before the
    one in the making, because decoders drop a blank where a sequence starts.  Trailing replacement characters may be bytes
    of a character still to be finished and are held back; text in front of them is not.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, text = self._end_of(prompt_ids)
        self._settled = len(self._window)  # tokens of the window whose text has all been returned
        self._returned: int | None = len(text)  # characters of the window's text; None: not counted yet

    def _end_of(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        """The prompt's last tokens that are text by themselves, and that; none where its end is not text."""
        for count in range(1, min(_LONGEST_CHARACTER, len(prompt_ids)) + 1):
            tail = list(prompt_ids[-count:])
            text = self._decode(tail)
            if text and REPLACEMENT not in text:
                return tail, text
        return [], ""

    def step(self, token_id: int) -> str:
        return self.steps([token_id])

    def steps(self, token_ids: Sequence[int]) -> str:
        returned = self._count()
        self._window.extend(token_ids)
        text = self._decode(self._window)
        unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), _MOST_UNFINISHED)
        piece = text[returned : len(text) - unfinished]
        self._returned = returned + len(piece)
        if piece and not unfinished:
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._returned = None  # nobody shall wait for that with the piece in hand
        return piece

    def finish(self) -> str:
        returned = self._count()
        piece = self._decode(self._window)[returned:]
        self._returned = returned + len(piece)
        return piece

    def _count(self) -> int:
        """Characters of the window's text that have been returned."""
        return len(self._decode(self._window)) if self._returned is None else self._returned


def checked(prompt: str) -> str:
    """The prompt, or UserError where it is empty or holds half a surrogate pair (bytes that were not UTF-8)."""
    if not prompt:
        raise UserError("the prompt is empty: write at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 at character {error.start}: type it in UTF-8") from error
    return prompt

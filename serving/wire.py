"""The objects that answers are made of, as OpenAI's API writes them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: its prompts once each, its answers with their end tokens, and what of the prompts the cache held."""

    prompt: int
    completion: int
    cached: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Form:
    """One answer's objects, of a chat or of a completion."""

    chat: bool
    model: str
    fingerprint: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def _opening(self) -> str:
        """What every event begins with, up to its choices."""
        return "data: " + written(self._around(self._part, [])).removesuffix("]}")

    @property
    def _part(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def prepare(self) -> None:
        """Write what does not depend on the text, before there is any."""
        _ = self._opening

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def whole(self, texts: list[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """The answer of a request without a stream; `texts` are pairs of text and finish_reason."""
        choices = []
        for index, (text, finish) in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish})
        return self._around("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage.body()}

    def piece(self, index: int, text: str, finish: str | None = None, first: bool = False) -> bytes:
        """The event with a part of a streamed answer."""
        if not self.chat:
            said = f'"text":{quoted(text)}'
        elif finish and not text:
            said = '"delta":{}'
        else:
            said = f'"delta":{{{ROLE if first else ""}"content":{quoted(text)}}}'
        ends = "null" if finish is None else quoted(finish)
        return f'{self._opening}{{"index":{index},{said},"logprobs":null,"finish_reason":{ends}}}]}}\n\n'.encode()

    def usage(self, usage: Usage) -> bytes:
        """The last event of a stream that was asked for its usage."""
        return event(self._around(self._part, []) | {"usage": usage.body()})


ROLE = '"role":"assistant",'
quoted = json.encoder.encode_basestring  # a string as JSON
written = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + written(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"

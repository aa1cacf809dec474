"""One answer in the making: tokens in, text out, up to its end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from megakernel.text import Detokenizer, TextCodec
from serving.job import Burst, Job
from serving.stops import StopFinder


class Choice:
    """The answer of one job.  `finish` is "stop" or "length" once it has ended; `tokens` counts those that belong to it, its
    end token included."""

    def __init__(self, job: Job, text: TextCodec, stops: Sequence[str]) -> None:
        self.job, self.finish = job, None
        self.tokens = 0
        self._text = text
        self._stops = StopFinder(stops) if stops else None

    finish: str | None

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return self._text.detokenizer(self.job.prompt)

    def prepare(self) -> None:
        """Do before the first token what needs none."""
        _ = self._detokenizer

    def take(self, burst: Burst) -> str:
        """The text that these tokens bring."""
        tokens = burst.tokens[:-1] if burst.finish == "stop" else burst.tokens  # the end token is no text
        if self._stops is None:
            self.tokens += len(burst.tokens)
            shown = self._detokenizer.steps(tokens)
        else:
            shown = self._up_to_stop(self._stops, tokens)
            if self._stops.found:
                self.finish = "stop"
                return shown
            self.tokens += burst.finish == "stop"
        if burst.finish is not None:
            self.finish = burst.finish
            shown += self._rest()
        return shown

    def _up_to_stop(self, stops: StopFinder, tokens: Sequence[int]) -> str:
        """Token by token: those after the one that completes a stop string do not count."""
        shown = ""
        for token in tokens:
            self.tokens += 1
            shown += stops.step(self._detokenizer.step(token))
            if stops.found:
                break
        return shown

    def _rest(self) -> str:
        """What was held back: bytes that are no character, and what might have become a stop string."""
        rest = self._detokenizer.finish()
        if self._stops is None:
            return rest
        shown = self._stops.step(rest)
        if self._stops.found:
            self.finish = "stop"
        return shown + self._stops.finish()

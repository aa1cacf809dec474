"""Stop strings in text that streams: found across the edges of its pieces, and never shown, not even their beginnings."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Text goes in by pieces and comes out up to the stop string that is whole first, as soon as no stop string can begin in it
    any more."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the end of the text that may become a stop string
        self.found = False

    def step(self, piece: str) -> str:
        """What of the text can be shown now."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        ends = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:  # the one that is whole first, so that it does not matter how the text is cut
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(self._begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, where the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many characters at the end of the text are the beginning of the stop string."""
        for count in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:count]):
                return count
        return 0

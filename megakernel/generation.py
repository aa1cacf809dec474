"""What comes of one request, for whoever asked: its tokens as they are chosen, why it ended, what it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from megakernel.sequence import Sequence

if TYPE_CHECKING:
    from megakernel.engine import Engine

Progress = Callable[[int, int], None]


class Generation:
    """An iterator over a request's token ids, a stop token included.  Its engine makes it: see `Engine.generate`.

    To wait for a token of one generation moves all of them on that the engine decodes; what comes of the others waits for
    whoever takes it.  One that is dropped is abandoned, as by `stop`; so is one that leaves its `with` block.
    """

    def __init__(self, engine: Engine, sequence: Sequence, progress: Progress | None) -> None:
        self._engine, self._sequence, self._progress = engine, sequence, progress
        self._told = 0  # positions of the prompt of which `progress` has been told

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        ready = self._sequence.ready
        while not ready:
            if not self._wait():
                raise StopIteration
        return ready.popleft()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __del__(self) -> None:
        self.stop()

    def steps(self) -> list[int]:
        """All token ids that can be had by waiting as little as possible, at least one; [] at the end."""
        while not self._sequence.ready:
            if not self._wait():
                return []
        return self.taken()

    def taken(self) -> list[int]:
        """The token ids that are there already, maybe none; raises what ended the request once they are taken."""
        ready = self._sequence.ready
        if ready:
            tokens = list(ready)
            ready.clear()
            return tokens
        self._raise_error()
        return []

    def _wait(self) -> bool:
        """Wait for the backend once; False where nothing more will come."""
        sequence = self._sequence
        if sequence.ended:
            self._raise_error()
            return False
        self._engine.step()
        if self._progress is not None:
            self._tell(self._progress)
        return True

    def _tell(self, progress: Progress) -> None:
        """Tell how far the prompt has been read, where that is further than before and not its end."""
        position, total = self._sequence.position, len(self._sequence.prompt)
        if self._told < position < total:
            self._told = position
            progress(position, total)

    def _raise_error(self) -> None:
        error, self._sequence.error = self._sequence.error, None
        if error is not None:
            raise error

    @property
    def finish_reason(self) -> str | None:
        """ "stop" after a stop token, "length" at the limit; None while tokens are still to be taken, and where it was
        abandoned or failed."""
        return None if self._sequence.ready or self._sequence.abandoned else self._sequence.finish

    @property
    def kept(self) -> int:
        """Positions of the prompt whose keys and values were in the cache already; final once the first token is there."""
        return self._sequence.kept

    @property
    def used(self) -> int:
        """Positions of the cache that hold its keys and values."""
        return self._sequence.position

    @property
    def rows(self) -> int:
        """Positions of the cache that it may come to use."""
        return self._sequence.rows

    @property
    def count(self) -> int:
        """Tokens chosen so far, those not yet taken included."""
        return len(self._sequence.tokens) - len(self._sequence.prompt)

    @property
    def steps_made(self) -> int:
        """Steps in which its tokens were chosen, where the backend counts them; more tokens than steps are drafts' worth."""
        return self._sequence.steps

    @property
    def times(self) -> tuple[float, float]:
        """When the first and the newest tokens came, by time.perf_counter; 0 before."""
        return self._sequence.first, self._sequence.last

    @property
    def ended(self) -> bool:
        """Whether nothing more will be chosen."""
        return self._sequence.ended

    @property
    def waiting(self) -> bool:
        """Whether it waits for a column, or for room in the cache."""
        return self._engine.waits(self._sequence)

    def logits(self) -> torch.Tensor:
        """What the last token was chosen from, fp32 [vocab_size], on the host: there from the end of the request until the
        engine is asked for anything else.  Raises RuntimeError before and after."""
        if self.finish_reason is None:
            raise RuntimeError("logits are there once a request is finished")
        return self._engine.logits(self._sequence)

    def stop(self) -> None:
        """Abandon the request; the engine stays usable.  May be called by any thread, and after the end, where it does
        nothing but forget tokens that were not taken."""
        if self._sequence.finish is None or self._sequence.ready:
            self._sequence.abandon()

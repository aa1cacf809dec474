"""The engine's backend in plain PyTorch: prompts in few passes, then a pass a token; sampled on the host as by the CPU machine.

Each sequence is computed by passes of its own, whoever else is being decoded: so its tokens have the same bits alone and in
company.  On a CPU that costs nothing: there one token's product is bound by arithmetic, and eight take eight times as long.
"""

from __future__ import annotations

import torch

from instructions.sampling import draw, sampling_scores
from megakernel.backend import sampling_state
from megakernel.errors import NotNumbers, one_line
from megakernel.parts import Parts
from megakernel.sequence import Sequence
from megakernel.torch.cache import CachePart
from megakernel.torch.model import TorchModel
from megakernel.torch.threads import quickest, threads

PASS = 256  # tokens of a prompt at a time: so many that weights are read seldom, so few that others wait for a moment only
COLUMNS = 8


class TorchBackend:
    """See `megakernel.backend.Backend`; `columns` None: 8."""

    name = "torch"

    def __init__(self, model: TorchModel, columns: int | None = None) -> None:
        self.config, self.capacity, self.columns = model.config, model.capacity, columns or COLUMNS
        self.model = model
        self.parts = Parts(model.capacity, model.cache.copy)
        self.joined: dict[Sequence, CachePart] = {}
        self.chosen_from: dict[Sequence, torch.Tensor] = {}  # the logits of each one's last token
        self.threads: int | None = None  # to be measured once: bits depend on it, where attention is long

    def join(self, sequence: Sequence) -> bool:
        if len(self.joined) == self.columns:
            return False
        with one_line("starting a request"):
            if not self.parts.join(sequence):
                return False
            self.joined[sequence] = self.model.cache.part(sequence.part)
        return True

    def leave(self, sequence: Sequence) -> None:
        self.parts.leave(sequence)
        self.joined.pop(sequence, None)
        self.chosen_from.pop(sequence, None)

    def decode(self, count: int) -> None:
        with one_line("decoding"):
            if self.threads is None:
                self.threads = self.quickest()
            with threads(self.threads):
                for _ in range(count):
                    for sequence in self.joined:
                        if not sequence.ended and len(sequence.tokens) > len(sequence.prompt):
                            self.extend(sequence)
                self.read_prompt()

    def logits(self, sequence: Sequence) -> torch.Tensor:
        if sequence not in self.chosen_from:
            raise RuntimeError("its logits are no longer there: another request has been asked for since")
        return self.chosen_from[sequence].clone()

    def close(self) -> None:
        del self.model
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def quickest(self) -> int:
        """How many threads tokens had best be given: those with which one layer takes least for one."""
        if self.model.device.type != "cpu":
            return torch.get_num_threads()
        model, residual = self.model, torch.ones(1, self.config.hidden_size)
        sequence, part = next(reversed(self.joined.items()))
        # What this leaves in the cache is overwritten by the sequence's next token.
        return quickest(lambda: model.through(0, residual, sequence.position, part), torch.get_num_threads())

    def read_prompt(self) -> None:
        """Read some of the first prompt that has not been read yet, one pass, so that others wait for no more."""
        for sequence in self.joined:
            if not sequence.ended and sequence.position < len(sequence.prompt):
                if sequence.position == sequence.kept and len(self.joined) > 1:
                    self.parts.join_again(sequence)  # an answer to the same prompt may have read it
                    self.joined[sequence] = self.model.cache.part(sequence.part)
                self.extend(sequence)
                break

    @torch.inference_mode()
    def extend(self, sequence: Sequence) -> None:
        """Take in the tokens that the cache lacks, up to a pass of them, and choose the next after the last."""
        start, end = sequence.position, min(sequence.position + PASS, len(sequence.tokens))
        tokens = torch.tensor(sequence.tokens[start:end], device=self.model.device)
        residual = self.model.extend(tokens, start, self.joined[sequence])
        if end < len(sequence.tokens):
            if self.model.device.type != "cpu":
                torch.accelerator.synchronize(self.model.device)  # what has been counted is there
            sequence.position = end
            return
        logits = self.model.logits(residual[-1:])[0].cpu()
        sequence.position = end
        self.choose(sequence, logits)

    def choose(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """The next token from logits, fp32 [vocab_size], on the host; a sequence for which there is none to choose ends."""
        position = sequence.position - 1  # of the token that the logits follow
        if not bool(torch.isfinite(logits).all()):
            sequence.position = 0  # nothing of it is to be reused
            sequence.fail(NotNumbers(position))
            return
        self.chosen_from[sequence] = logits
        sampling = sampling_state(sequence.sampling)
        if sampling.cuts:
            sequence.take([draw(logits, sampling, position)])
        else:
            sequence.take([int(sampling_scores(logits, 0, sampling, position).argmax())])  # the first of equals

"""The engine's backend in plain PyTorch: the prompt in few passes, then a pass a token; sampled on the host as the CPU machine
does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from instructions.base import GREEDY
from instructions.sampling import draw, sampling_scores
from megakernel.backend import Report, sampling_state, shared_length
from megakernel.errors import NotNumbers, one_line
from megakernel.request import SamplingParams
from megakernel.torch.model import TorchModel
from megakernel.torch.threads import quickest, threads

PASS = 256  # tokens of a prompt at a time: so many that weights are read seldom, so few that an interrupt is answered soon


class TorchBackend:
    """See `megakernel.backend.Backend`."""

    name = "torch"

    def __init__(self, model: TorchModel) -> None:
        self.config, self.capacity = model.config, model.capacity
        self.model = model
        self.tokens: list[int] = []
        self.position = 0  # of them, those whose keys and values are in the cache
        self.kept = 0
        self.threads: int | None = None  # to be measured
        self.report: Report | None = None
        self.sampling = GREEDY
        self.stops: frozenset[int] = frozenset()
        self.last_logits: torch.Tensor | None = None

    def start(
        self, prompt: Sequence[int], limit: int, sampling: SamplingParams, reuse: bool = True, report: Report | None = None
    ) -> None:
        tokens = list(prompt)
        # The last token is computed in any case: its logits are asked for.
        self.kept = shared_length(self.tokens[: self.position], tokens[:-1]) if reuse else 0
        self.position = self.kept  # first, lest an interrupt leave more counted than is there
        self.tokens = tokens
        self.threads, self.report = None, report
        self.sampling, self.stops = sampling_state(sampling), frozenset(sampling.stop_token_ids)

    def decode(self, count: int) -> list[int]:
        known = len(self.tokens)
        while len(self.tokens) < known + count and not (len(self.tokens) > known and self.tokens[-1] in self.stops):
            with one_line("decoding"):
                if self.threads is None:
                    self.threads = self.quickest()
                with threads(self.threads):
                    logits = self.read()
            self.tokens.append(self.chosen(logits))
        return self.tokens[known:]

    def logits(self) -> torch.Tensor:
        if self.last_logits is None:
            raise RuntimeError("no token has been decoded yet")
        return self.last_logits.clone()

    def close(self) -> None:
        del self.model
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def quickest(self) -> int:
        """How many threads a request had best be given: those with which one layer takes least for one token."""
        if self.model.device.type != "cpu":
            return torch.get_num_threads()
        model, residual = self.model, torch.ones(1, self.config.hidden_size)
        # What this leaves in the cache is overwritten by the next token.
        return quickest(lambda: model.through(0, residual, self.position), torch.get_num_threads())

    @torch.inference_mode()
    def read(self) -> torch.Tensor:
        """Take in the tokens that the cache lacks; the logits after the last, fp32 [vocab_size], on the host."""
        while True:
            tokens = torch.tensor(self.tokens[self.position : self.position + PASS], device=self.model.device)
            residual = self.model.extend(tokens, self.position)
            if self.position + len(tokens) == len(self.tokens):
                break
            self.position += len(tokens)
            if self.model.device.type != "cpu":
                torch.accelerator.synchronize(self.model.device)  # an interrupt is answered between passes
            if self.report is not None:
                self.report(self.position)
        logits = self.model.logits(residual[-1:])[0].cpu()
        self.position = len(self.tokens)
        return logits

    def chosen(self, logits: torch.Tensor) -> int:
        """The next token; raises NotNumbers where there is nothing to choose from."""
        position = self.position - 1  # of the token that the logits follow
        if not bool(torch.isfinite(logits).all()):
            self.position = 0  # nothing of it is to be reused
            raise NotNumbers(position)
        self.last_logits = logits
        if self.sampling.cuts:
            return draw(logits, self.sampling, position)
        return int(sampling_scores(logits, 0, self.sampling, position).argmax())  # the first of equals

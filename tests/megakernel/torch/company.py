"""Many sequences on one engine that join and leave at random: does each get the tokens that it gets alone, to the bit?

    python -m tests.megakernel.torch.company --tokens 100000   # some 10 minutes

Each sequence has its own prompt, length, seed, sampling and stop tokens; some are abandoned, some wait for room, some are taken
token by token and some all at once.  What each is given is compared with the same request on an engine of its own, and so are
the logits behind its last token; one that comes to a token whose numbers are none must end alone.  Exit status 1 where anything
differs.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass, field

import torch

from megakernel.engine import Engine, Generation
from megakernel.errors import NotNumbers
from megakernel.request import SamplingParams
from models.command import Parser, command, start, whole
from tests.support.torch_models import torch_backend

MODEL = "head_not_derived"
LONGEST_PROMPT, LONGEST_ANSWER = 24, 24
POISONED = 7  # a token


@dataclass
class Outcome:
    """What a run found.  `together` counts the steps, by how many sequences shared them."""

    seed: int
    tokens: int = 0
    sequences: int = 0
    abandoned: int = 0
    stopped: int = 0
    faults: int = 0
    waited: int = 0
    logits: int = 0
    together: dict[int, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Request:
    """What is asked for, and when it is given up: after so many tokens, or never."""

    prompt: list[int]
    limit: int
    sampling: SamplingParams
    leaves: int


def engine(dtype: torch.dtype, threads: int) -> Engine:
    """Of a small model in which one token is none: a sequence that comes to it ends with an error."""
    backend = torch_backend(MODEL, dtype)
    backend.model.weights.embedding[POISONED] = torch.inf
    backend.threads = threads  # bits depend on it
    return Engine(backend)


class Company:
    """One engine that many share, and one that each has alone."""

    def __init__(self, seed: int, dtype: torch.dtype, threads: int) -> None:
        self.random, self.outcome = random.Random(seed), Outcome(seed)
        self.shared, self.alone = (engine(dtype, threads) for _ in range(2))
        self.running: dict[Generation, tuple[Request, list[int]]] = {}

    def request(self) -> Request:
        draw, vocabulary = self.random, self.shared.config.vocab_size
        prompt = [draw.randrange(POISONED + 1, vocabulary) for _ in range(draw.randrange(1, LONGEST_PROMPT))]
        if draw.random() < 0.05:
            prompt[draw.randrange(len(prompt))] = POISONED
        limit = draw.randrange(1, LONGEST_ANSWER)
        sampling = SamplingParams(
            temperature=draw.choice((0.0, 0.8, 1.5)),
            top_k=draw.choice((0, 0, 20)),
            top_p=draw.choice((1.0, 1.0, 0.9)),
            seed=draw.randrange(2**40),
            stop_token_ids=tuple(draw.sample(range(vocabulary), draw.choice((0, 0, vocabulary // 30)))),
        )
        return Request(prompt, limit, sampling, draw.randrange(limit) if draw.random() < 0.3 else limit)

    def run(self, tokens: int) -> Outcome:
        """Until so many tokens have been compared."""
        while self.outcome.tokens < tokens:
            while self.random.random() < 0.4 and len(self.running) < 2 * self.shared.columns:
                request = self.request()
                generation = self.shared.generate(request.prompt, request.limit, request.sampling, reuse=False)
                self.outcome.waited += generation.waiting
                self.running[generation] = (request, [])
            together = sum(not (generation.waiting or generation.ended) for generation in self.running)
            self.outcome.together[together] = self.outcome.together.get(together, 0) + 1
            self.shared.step()
            for generation in list(self.running):
                self.take(generation)
        return self.outcome

    def take(self, generation: Generation) -> None:
        """What has come for one, now or later; compare it once it has ended or is given up."""
        request, taken = self.running[generation]
        if self.random.random() < 0.3:
            return
        ended: str | None = None
        try:
            taken += [next(generation)] if generation.count > len(taken) and self.random.random() < 0.2 else generation.taken()
            ended = generation.finish_reason
        except NotNumbers as error:
            ended = str(error)
        if ended is None and len(taken) < request.leaves:
            return
        del self.running[generation]
        if ended is None:
            generation.stop()
        self.compare(request, taken, ended, logits_of(generation))

    def compare(self, request: Request, taken: list[int], ended: str | None, logits: torch.Tensor | None) -> None:
        outcome, expected = self.outcome, list[int]()
        own = self.alone.generate(request.prompt, request.limit, request.sampling, reuse=False)
        try:
            expected.extend(own)
            own_end = own.finish_reason
        except NotNumbers as error:
            own_end = str(error)
        outcome.sequences += 1
        outcome.tokens += len(taken)
        outcome.stopped += ended == "stop"
        outcome.abandoned += ended is None
        outcome.faults += ended not in (None, "stop", "length")
        outcome.logits += logits is not None
        right = taken == expected[: len(taken)] and ended in (None, own_end) and (ended is None or len(taken) == len(expected))
        if logits is not None:
            right = right and torch.equal(logits, own.logits())
        if not right:
            outcome.wrong.append(f"{request}: {taken} ({ended}), alone {expected} ({own_end})")


def logits_of(generation: Generation) -> torch.Tensor | None:
    """Those behind the last token, where they are still there."""
    try:
        return generation.logits()
    except RuntimeError:
        return None


def company(seed: int, dtype: torch.dtype, tokens: int, threads: int = 1) -> Outcome:
    """A run."""
    return Company(seed, dtype, threads).run(tokens)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m tests.megakernel.torch.company", description="The same tokens alone and in company.")
    parser.add_argument("--tokens", type=whole(1, 10**9), default=100_000, help="to compare (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**32), default=0, help="of every choice (default: %(default)s)")
    parser.add_argument("--threads", type=whole(1, 1024), default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: %(default)s)")
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0 where nothing differs, else 1."""
    options = parse(arguments)
    outcome = company(options.seed, getattr(torch, options.dtype), options.tokens, options.threads)
    print("\n".join(outcome.wrong[:20]))
    print(json.dumps(asdict(outcome)))
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    start(main)

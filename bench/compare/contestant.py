"""One engine in a comparison: its process and its record.  Every engine goes through these same steps.

A failure ends the engine's part and is written into its record; it never ends the comparison.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare.engines import EngineSpec, worker_command, worker_environment
from bench.compare.fidelity import Array, distances, parting
from bench.compare.plan import Deadline, Plan
from bench.compare.process import EngineFailure, EngineProcess
from bench.record import gpu_state, used_mib

WARM_TOKENS = 16  # generated before each turn's measurements: the GPU's clocks have sunk while engines changed
CLOSE_TIMEOUT = 10.0

Record = dict[str, Any]
Batch = Sequence[Sequence[int]]  # prompts of one length


class Contestant:
    """`record` holds raw measurements only, in seconds; `bench.compare.summary` makes figures of them."""

    def __init__(self, spec: EngineSpec, plan: Plan, folder: Path, deadline: Deadline) -> None:
        self.spec, self.plan, self.folder, self.deadline = spec, plan, folder, deadline
        self.process: EngineProcess | None = None
        self.streaming = "never"
        self.written_in = ""
        self.record: Record = {
            "name": spec.name,
            "label": spec.label,
            "install": spec.install,
            "status": "waiting",
            "timings": {str(context): [] for context in plan.contexts},
            "gpu": [],
            "greedy": {},
        }

    @property
    def alive(self) -> bool:
        return self.process is not None and self.record["status"] == "running"

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step with the engine running, and pause it again; a failure ends its part."""
        try:
            if self.process is not None:
                self.process.resume()
            step()
            if self.process is not None:
                self.process.pause()
        except EngineFailure as failure:
            self.fail(str(failure), failure.missing)

    def fail(self, reason: str, missing: bool = False) -> None:
        self.record["status"] = "missing" if missing else "failed"
        self.record["error"] = reason
        if self.process is not None:
            self.process.kill()

    def ask(self, request: Record, timeout: float) -> Record:
        assert self.process is not None
        return self.process.ask(request, self.deadline.within(timeout))

    def start(self) -> None:
        """Start, load, and generate once at every context, in full: what an engine compiles on first use is compiled then."""
        plan, spec = self.plan, self.spec
        before = used_mib()
        began = time.perf_counter()
        command = worker_command(spec)
        log = self.folder / f"{spec.name.replace(':', '-')}.log"
        self.process = EngineProcess(command, worker_environment(spec), log, self.folder)
        loaded = self.ask({"op": "load", "spec": vars(plan.load_spec)}, plan.start_timeout)
        self.record["load_seconds"] = time.perf_counter() - began
        self.record |= {"settings": loaded["settings"], "versions": loaded["versions"]}
        self.streaming, self.written_in = loaded["streaming"], loaded["written_in"]
        for place in range(len(plan.contexts)):
            self.generate(plan.together(place), plan.tokens, timeout=plan.start_timeout)
        self.record["ready_seconds"] = time.perf_counter() - began
        after = used_mib()
        if before is not None and after is not None:
            self.record["memory_mib"] = after - before
        self.record["status"] = "running"

    def generate(self, prompts: Batch, tokens: int, stream: bool = False, timeout: float | None = None) -> Record:
        """One generation, of several prompts together where there are several."""
        request: Record = {"op": "together", "prompts": prompts, "tokens": tokens}
        if len(prompts) == 1:
            request = {"op": "time", "prompt": prompts[0], "tokens": tokens, "stream": stream}
        return self.ask(request, self.plan.timeout if timeout is None else timeout)

    def turn(self) -> None:
        """One round's measurements: at every context a short and a long generation, and of one prompt alone, where it must be
        asked for, a streamed one."""
        plan = self.plan
        self.generate(plan.together(0), min(WARM_TOKENS, plan.tokens))
        for place, context in enumerate(plan.contexts):
            prompts = plan.together(place)
            short = self.generate(prompts, 1)
            long = self.generate(prompts, plan.tokens)
            streamed = None
            if self.streaming == "always":
                streamed = long["stamps"]
            elif self.streaming == "asked" and plan.batch == 1:
                streamed = self.generate(prompts, plan.tokens, stream=True)["stamps"]
            self.record["timings"][str(context)].append(
                {"short": short["seconds"], "long": long["seconds"], "stamps": streamed, "tokens": long["tokens"]}
            )
        self.record["gpu"].append(gpu_state())

    def profile(self) -> None:
        """The kernels that run while it generates after the longest prompts, where it knows its own by name."""
        plan = self.plan
        request = {"op": "profile", "prompts": plan.together(len(plan.contexts) - 1), "tokens": min(WARM_TOKENS, plan.tokens)}
        try:
            self.record["kernels"] = {
                **self.ask(request, plan.timeout),
                "context": plan.contexts[-1],
                "tokens": request["tokens"],
            }
        except EngineFailure as failure:  # its speed stands all the same
            self.record["kernels"] = {"error": str(failure)}

    def judge_greedy(self, tokens: list[list[int]], logits: Array) -> None:
        """Compare its greedy tokens with the reference's, and its rounds with each other; of several sequences the one counts
        that parts first."""
        batch = self.plan.batch
        for index, context in enumerate(self.plan.contexts):
            rounds = [repeat["tokens"] for repeat in self.record["timings"][str(context)]]
            if rounds:
                own = rounds[0] if batch > 1 else rounds[:1]
                places = range(index * batch, (index + 1) * batch)
                partings = [parting(found, tokens[place], logits[place]) for found, place in zip(own, places, strict=True)]
                found = min(partings, key=lambda parted: parted.agreed)
                self.record["greedy"][str(context)] = {
                    **vars(found),
                    "near_tie": found.near_tie,
                    "repeatable": all(other == rounds[0] for other in rounds),
                }

    def score(self, sequences: list[list[int]], reference: Array) -> None:
        """Its distributions at the positions that the reference has judged."""
        drawn = self.plan.scored_tokens
        places = [(ids, place) for ids in sequences for place in range(len(ids) - drawn, len(ids))]
        path = self.folder / f"{self.spec.name.replace(':', '-')}.npy"
        request = {
            "op": "score",
            "prefixes": [ids[:place] for ids, place in places],
            "vocabulary": self.plan.config.vocab_size,
            "path": str(path),
        }
        try:
            answer = self.ask(request, self.plan.start_timeout)  # sizes that are new to it are compiled here
            found = distances(np.load(path), reference, [ids[place] for ids, place in places])
        except (EngineFailure, ValueError) as failure:  # its speed stands all the same
            self.record["fidelity"] = {"error": str(failure)}
            return
        finally:
            path.unlink(missing_ok=True)
        self.record["fidelity"] = {"scoring": answer["scoring"], **{key: list(value) for key, value in vars(found).items()}}

    def finish(self) -> None:
        """End the engine."""
        if self.process is not None:
            self.process.close(CLOSE_TIMEOUT)
        if self.record["status"] == "running":
            self.record["status"] = "measured" if any(self.record["timings"].values()) else "failed"
            if self.record["status"] == "failed":
                self.record["error"] = "the time limit came before its first round"


def helper_command(module: str, *arguments: str) -> list[str]:
    """A short process of this project's own, in this Python."""
    return [sys.executable, "-m", f"bench.compare.{module}", *arguments]

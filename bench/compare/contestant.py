"""One engine in a comparison: its process and its record.  Every engine goes through these same steps.

A failure ends the engine's part and is written into its record; it never ends the comparison.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare.engines import EngineSpec, worker_environment
from bench.compare.fidelity import Array, distances, parting
from bench.compare.plan import Deadline, Plan
from bench.compare.process import EngineFailure, EngineProcess
from bench.record import gpu_state, used_mib

WARM_TOKENS = 16  # generated before each turn's measurements: the GPU's clocks have sunk while engines changed
CLOSE_TIMEOUT = 10.0

Record = dict[str, Any]


class Contestant:
    """`record` holds raw measurements only, in seconds; `bench.compare.summary` makes figures of them."""

    def __init__(self, spec: EngineSpec, plan: Plan, folder: Path, deadline: Deadline) -> None:
        self.spec, self.plan, self.folder, self.deadline = spec, plan, folder, deadline
        self.process: EngineProcess | None = None
        self.streaming = "never"
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
        command = [spec.python, "-m", "bench.compare.worker", spec.adapter, ",".join(spec.requires), ",".join(spec.packages)]
        log = self.folder / f"{spec.name.replace(':', '-')}.log"
        self.process = EngineProcess(command, worker_environment(spec), log, self.folder)
        loaded = self.ask({"op": "load", "spec": vars(plan.load_spec)}, plan.start_timeout)
        self.record["load_seconds"] = time.perf_counter() - began
        self.record |= {"settings": loaded["settings"], "versions": loaded["versions"]}
        self.streaming = loaded["streaming"]
        for prompt in plan.prompts.timed:
            self.generate(prompt, plan.tokens, timeout=plan.start_timeout)
        self.record["ready_seconds"] = time.perf_counter() - began
        after = used_mib()
        if before is not None and after is not None:
            self.record["memory_mib"] = after - before
        self.record["status"] = "running"

    def generate(self, prompt: tuple[int, ...], tokens: int, stream: bool = False, timeout: float | None = None) -> Record:
        request = {"op": "time", "prompt": list(prompt), "tokens": tokens, "stream": stream}
        return self.ask(request, self.plan.timeout if timeout is None else timeout)

    def turn(self) -> None:
        """One round's measurements: at every context a short and a long generation, and where it must be asked for a
        streamed one."""
        plan = self.plan
        self.generate(plan.prompts.timed[0], min(WARM_TOKENS, plan.tokens))
        for context, prompt in zip(plan.contexts, plan.prompts.timed, strict=True):
            short = self.generate(prompt, 1)
            long = self.generate(prompt, plan.tokens)
            streamed = None
            if self.streaming == "always":
                streamed = long["stamps"]
            elif self.streaming == "asked":
                streamed = self.generate(prompt, plan.tokens, stream=True)["stamps"]
            self.record["timings"][str(context)].append(
                {"short": short["seconds"], "long": long["seconds"], "stamps": streamed, "tokens": long["tokens"]}
            )
        self.record["gpu"].append(gpu_state())

    def judge_greedy(self, tokens: list[list[int]], logits: Array) -> None:
        """Compare its greedy tokens with the reference's, and its rounds with each other."""
        for index, context in enumerate(self.plan.contexts):
            rounds = [repeat["tokens"] for repeat in self.record["timings"][str(context)]]
            if rounds:
                found = parting(rounds[0], tokens[index], logits[index])
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
            answer = self.ask(request, self.plan.timeout)
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

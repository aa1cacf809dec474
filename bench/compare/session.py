"""The order of a comparison: floor, reference, every engine's start, rounds in which the engines take turns, scores.

All engines stay loaded, one runs at a time, the others are paused.  Interleaving the rounds spreads what drifts, the GPU's
temperature above all, over all of them.  After every stage the record so far is handed over, so that nothing is lost.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare.contestant import Contestant, helper_command
from bench.compare.engines import ROOT, EngineSpec
from bench.compare.plan import Deadline, Plan
from bench.compare.process import EngineFailure
from bench.record import describe, fingerprint, gpu_state

SCORE_SECONDS = 25.0  # kept back for each engine's scores where there is a time limit
FINISH_SECONDS = 20.0
FLOOR_TIMEOUT = 60.0

Run = dict[str, Any]
Say = Callable[[str], None]
Save = Callable[[Run], None]


class Session:
    """One comparison; `folder` takes logs and what processes exchange."""

    def __init__(self, plan: Plan, specs: Sequence[EngineSpec], folder: Path, say: Say, save: Save) -> None:
        self.plan, self.folder, self.say, self.save_run = plan, folder, say, save
        self.deadline = Deadline(plan.time_limit)
        self.contestants = [Contestant(spec, plan, folder, self.deadline) for spec in specs]
        self.run_record: Run = {
            "machine": describe(ROOT, plan.commit),
            "gpu_before": gpu_state(),
            "model": {
                "path": str(plan.model),
                "fingerprint": fingerprint(plan.model),
                "config": plan.config.to_dict(),
                "weight_bytes": plan.weight_bytes,
                "step_bytes": {str(context): plan.step_bytes(context) for context in plan.contexts},
            },
            "settings": {
                "contexts": list(plan.contexts),
                "tokens": plan.tokens,
                "batch": plan.batch,
                "repeats": plan.repeats,
                "seed": plan.seed,
                "capacity": plan.load_spec.capacity,
                "prompts": plan.prompts.digest,
            },
            "floor": [],
            "engines": [contestant.record for contestant in self.contestants],
            "notes": [],
        }

    def run(self) -> Run:
        """The whole comparison; raises nothing but KeyboardInterrupt, and leaves no process behind."""
        try:
            self.measure_floor()
            judged = self.make_reference()
            self.start_all()
            self.take_turns()
            self.list_kernels()
            if judged:
                self.judge()
        finally:
            for contestant in self.contestants:
                contestant.finish()
            self.save()
        self.measure_floor()  # again: has the machine changed?
        self.save()
        return self.run_record

    def save(self) -> None:
        self.save_run(self.run_record)

    def note(self, text: str) -> None:
        self.say(text)
        self.run_record["notes"].append(text)

    def helper(self, timeout: float, module: str, *arguments: str) -> str:
        """Run a short process of this project; what it printed.  Raises EngineFailure."""
        command = helper_command(module, *arguments)
        limit = self.deadline.within(timeout)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise EngineFailure(f"bench.compare.{module} did not end within {limit:.0f} s") from None
        if done.returncode:
            raise EngineFailure(f"bench.compare.{module} failed: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
        return done.stdout

    def measure_floor(self) -> None:
        self.say("read floor")
        try:
            output = self.helper(FLOOR_TIMEOUT, "floor", str(self.plan.weight_bytes))
            self.run_record["floor"].append(json.loads(output.splitlines()[-1]))
        except EngineFailure as failure:
            self.note(f"no read floor: {failure}")

    def make_reference(self) -> bool:
        """The fp32 reference's logits, into the folder; False where there are none."""
        plan = self.plan
        if plan.made_up:
            self.note("no fidelity: every engine has weights of its own making, the configuration is the same")
            return False
        self.say("fp32 reference")
        job = {
            "model": str(plan.model),
            "folder": str(self.folder),
            "timed": plan.prompts.timed,
            "scored": plan.prompts.scored,
            "tokens": plan.tokens,
            "scored_tokens": plan.scored_tokens,
            "seed": plan.seed,
        }
        path = self.folder / "job.json"
        path.write_text(json.dumps(job))
        try:
            self.helper(plan.start_timeout, "reference", str(path))
        except EngineFailure as failure:
            self.note(f"no fidelity: {failure}")
            return False
        return True

    def start_all(self) -> None:
        for contestant in self.contestants:
            self.say(f"start {contestant.spec.label}")
            if self.deadline.left() < self.reserve():
                contestant.fail("not started: the time limit was near")
            else:
                contestant.attempt(contestant.start)
            if "error" in contestant.record:
                self.say(f"  {contestant.record['status']}: {contestant.record['error']}")
            self.save()

    def reserve(self) -> float:
        """Seconds to keep for scores and the end."""
        return FINISH_SECONDS + SCORE_SECONDS * sum(contestant.alive for contestant in self.contestants)

    def take_turns(self) -> None:
        """Rounds; each begins with another engine, so that no engine always follows the same one."""
        for number in range(self.plan.repeats):
            self.say(f"round {number + 1} of {self.plan.repeats}")
            first = number % len(self.contestants)
            for contestant in [*self.contestants[first:], *self.contestants[:first]]:
                if self.deadline.left() < self.reserve():
                    self.note(f"the time limit ended the rounds in round {number + 1} of {self.plan.repeats}")
                    return
                if contestant.alive:
                    contestant.attempt(contestant.turn)
                    if not contestant.alive:
                        self.say(f"  {contestant.spec.label} failed: {contestant.record['error']}")
            self.save()

    def list_kernels(self) -> None:
        """What runs on the GPU for the engines that know their own kernels by name."""
        for contestant in self.contestants:
            if contestant.alive and contestant.written_in:
                self.say(f"kernels of {contestant.spec.label}")
                contestant.attempt(contestant.profile)

    def judge(self) -> None:
        """Greedy tokens and distributions against the reference."""
        found = json.loads((self.folder / "sequences.json").read_text())
        self.run_record["reference"] = {"device": found["device"], "positions": len(np.load(self._file("scored"), "r"))}
        scored, greedy = np.load(self._file("scored")), np.load(self._file("greedy"), "r")
        for contestant in self.contestants:
            if contestant.alive:
                self.say(f"score {contestant.spec.label}")
                contestant.judge_greedy(found["greedy"], greedy)
                contestant.attempt(lambda contestant=contestant: contestant.score(found["scored"], scored))  # type: ignore[misc]
        for name in ("scored", "greedy"):
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

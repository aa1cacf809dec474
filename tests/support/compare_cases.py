"""What the tests of the comparison share: records with figures that can be worked out by hand, and a small checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.configs import save_checkpoint

Record = dict[str, Any]

FAKES = "fake_engines"
HERE = Path(__file__).resolve().parent


def save_small(directory: Path) -> Path:
    """A checkpoint in fp32 with a vocabulary of 96, 256 positions, first token 1 and end token 2."""
    return save_checkpoint("mha", directory)


def repeat(short: float, step: float, tokens: int, start: int = 7, stamped: bool = True) -> Record:
    """A round's measurement, in seconds: the first token after `short`, then one every `step`."""
    stamps = [[short + index * step, 1] for index in range(tokens)] if stamped else None
    made = [start + index for index in range(tokens)]
    return {"short": short, "long": short + (tokens - 1) * step, "stamps": stamps, "tokens": made}


def engine(name: str, label: str, steps: list[float], kl: list[float] | None, tokens: int = 5) -> Record:
    """A measured engine at contexts 8 and 16, the second a millisecond a token slower; milliseconds in `steps`."""
    timings = {
        "8": [repeat(0.010, step / 1e3, tokens) for step in steps],
        "16": [repeat(0.020, (step + 1) / 1e3, tokens) for step in steps],
    }
    parted = {"agreed": tokens, "tokens": tokens, "gap": None, "relative_gap": None, "near_tie": None, "repeatable": True}
    found: Record = {
        "name": name,
        "label": label,
        "install": "",
        "status": "measured",
        "timings": timings,
        "gpu": [{"sm_mhz": 1500.0, "celsius": 40.0}, {"sm_mhz": 1980.0, "celsius": 50.0}],
        "greedy": {"8": parted, "16": parted},
        "load_seconds": 2.0,
        "ready_seconds": 3.0,
        "memory_mib": 2048.0,
        "settings": {"graphs": "yes"},
        "versions": {"python": "3.12"},
    }
    if kl is not None:
        count = len(kl)
        judged = {"kl": kl, "nll": [1.0] * count, "reference_nll": [1.0] * count, "same_top": [True] * count}
        found["fidelity"] = {"scoring": "decode steps", **judged}
    return found


def run(engines: list[Record], tokens: int = 5) -> Record:
    """A run on a GPU that reads 1 GB a millisecond, of a model of 2 GB; at context 16 a step reads 3 GB."""
    return {
        "machine": {"gpu": "Some GPU", "processor": "Some CPU", "time": "then", "commit": None},
        "model": {
            "fingerprint": "abc",
            "config": {"num_layers": 2, "hidden_size": 64},
            "weight_bytes": 2 * 10**9,
            "step_bytes": {"8": 2 * 10**9, "16": 3 * 10**9},
        },
        "settings": {"contexts": [8, 16], "tokens": tokens, "repeats": 3, "prompts": "p"},
        "floor": [{"bytes_per_second": 0.9e12}, {"bytes_per_second": 1e12}],
        "engines": engines,
        "notes": [],
    }


def record(*runs: Record) -> Record:
    return {"schema": 1, "runs": list(runs)}

"""Where the time of a step goes, as text and as JSON: the drawers, the dependencies, the critical path, the bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scheduler.timeline.account import DRAWERS, Account, account
from scheduler.timeline.pages import Bandwidth, bandwidth, streamed_bytes
from scheduler.timeline.path import PARTS, Hop, HopKind, critical_hops, hop_kinds
from scheduler.timeline.trace import Point, Trace
from scheduler.timeline.waits import Bindings, bindings, disagreement

SHOWN = 12  # kinds of dependencies and hops in the text; the JSON has all
TENTHS = 10


@dataclass(frozen=True, eq=False)
class Anatomy:
    """All that is known of the mean step of a trace; path and bandwidth are of its last token."""

    trace: Trace
    found: Bindings
    account: Account
    hops: list[Hop]
    kinds: list[HopKind]
    band: Bandwidth
    bytes: int

    @property
    def token(self) -> int:
        """The token that path and bandwidth are of."""
        return self.account.tokens[-1]


def anatomy(trace: Trace) -> Anatomy:
    """Look at the steady tokens of a trace."""
    found = bindings(trace)
    whole = account(trace, found=found)
    token = whole.tokens[-1]
    hops = critical_hops(trace, token, found)
    return Anatomy(trace, found, whole, hops, hop_kinds(hops), bandwidth(trace, token), streamed_bytes(trace, token))


def heading(seen: Anatomy) -> Iterator[str]:
    """What was looked at, and how long a step takes."""
    trace, step = seen.trace, seen.account.step
    steps = [trace.step(token) / 1e3 for token in seen.account.tokens]
    many = f", {len(steps)} tokens from {min(steps):.1f} to {max(steps):.1f}" if len(steps) > 1 else ""
    yield f"{trace.source} ({trace.machine}): position {trace.position(seen.token)}, {trace.program.sms} SMs"
    yield f"a step takes {step / 1e3:.1f} us{many}"
    rate = seen.bytes / step * 1e9
    yield f"it takes {seen.bytes / 1e9:.3f} GB from HBM, {rate / 1e12:.2f} TB/s on average"


def drawer_lines(seen: Anatomy) -> Iterator[str]:
    """The table of the SMs' time, with the dearest dependencies."""
    whole = seen.account
    yield f"{'where the time of the SMs goes':<44}{'share':>8}{'us':>9}"
    for name, text in DRAWERS.items():
        yield f"  {text:<42}{whole.share(name):>8.1%}{whole.mean(name) / 1e3:>9.1f}"
        if name != "counter":
            continue
        for row in whole.dependencies[:SHOWN]:
            share = row.time / (whole.step * whole.sms)
            hop = f"   from signal to reader {row.hop:.0f} ns" if row.waited else ""
            yield f"    {row.name:<40}{share:>8.1%}{row.time / whole.sms / 1e3:>9.1f}{hop}"
    yield f"  {'together: the step':<42}{sum(map(whole.share, DRAWERS)):>8.1%}{whole.step / 1e3:>9.1f}"


def loaders(seen: Anatomy) -> dict[str, float]:
    """Microseconds a token that a loader waits for a free page, and that it takes for the rest, mean of the SMs."""
    trace, tokens = seen.trace, list(seen.account.tokens)
    if Point.LOAD_ENDED not in trace.given:
        return {}
    times = {point: trace.at(point)[tokens].sum() for point in (Point.LOAD_BEGUN, Point.LOAD_ENDED, Point.LOAD_WAITED)}
    each = 1e3 * trace.program.sms * len(tokens)
    waited = float(times[Point.LOAD_WAITED]) / each
    return {"free_page": waited, "streaming": float(times[Point.LOAD_ENDED] - times[Point.LOAD_BEGUN]) / each - waited}


def path_lines(seen: Anatomy) -> Iterator[str]:
    """The critical path by kinds of hops."""
    step = seen.trace.step(seen.token)
    yield f"critical path: {len(seen.hops)} hops, {step / 1e3:.1f} us; means in us"
    names = ("wait", "staging", "page", "compute", "store", "signal")
    yield f"  {'hop':<36}{'n':>4}{'total':>8}{'share':>7}" + "".join(f"{name:>9}" for name in names)
    for kind in seen.kinds[:SHOWN]:
        parts = "".join(f"{kind.parts[part] / 1e3:>9.2f}" for part in PARTS)
        yield f"  {kind.kind:<36}{kind.count:>4}{kind.total / 1e3:>8.1f}{kind.total / step:>7.1%}{parts}"


def band_lines(seen: Anatomy) -> Iterator[str]:
    """Bandwidth by tenths of the step."""
    tenths = seen.band.rate.reshape(TENTHS, -1).mean(axis=1) / 1e12
    yield f"HBM bandwidth by tenths of the step, TB/s (from the {seen.band.how}):"
    yield "  " + " ".join(f"{rate:.2f}" for rate in tenths)


def text_report(trace: Trace) -> str:
    """The whole report."""
    seen = anatomy(trace)
    lines = [*heading(seen), "", *drawer_lines(seen), ""]
    if load := loaders(seen):
        text = (
            "a loader waits {free_page:.1f} us for free pages; for {streaming:.1f} us it issues copies or waits for older ones"
        )
        lines += [text.format(**load), ""]
    lines += [*path_lines(seen), "", *band_lines(seen), *(f"note: {note}" for note in trace.notes)]
    if off := disagreement(trace, seen.found):
        lines.append(f"note: some signals are stamped up to {off} ns after the waits they ended: stamps are off by so much")
    return "\n".join(lines) + "\n"


def hop_json(seen: Anatomy, hop: Hop) -> dict[str, Any]:
    """One hop of the path, with its place."""
    trace = seen.trace
    place = {"sm": int(trace.sm[hop.record]), "index": int(trace.index[hop.record])}
    return asdict(hop) | place | {"layer": trace.items[hop.record].instruction.layer, "length": hop.length}


def kind_times(trace: Trace, tokens: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Of each kind of instruction: how many a token, and the mean microseconds from READY to SIGNALLED."""
    spans = (trace.at(Point.SIGNALLED) - trace.at(Point.READY))[list(tokens)]
    found = {}
    for mnemonic in np.unique(trace.mnemonics).tolist():
        of_kind = trace.mnemonics == mnemonic
        found[mnemonic] = {"count": int(of_kind.sum()), "mean_us": float(spans[:, of_kind].mean()) / 1e3}
    return found


def json_report(trace: Trace) -> dict[str, Any]:
    """The whole report; times are microseconds where the name says us, else nanoseconds."""
    seen = anatomy(trace)
    whole = seen.account
    return {
        "source": trace.source,
        "machine": trace.machine,
        "position": trace.position(seen.token),
        "sms": trace.program.sms,
        "policy": trace.program.policy,
        "steps_us": [trace.step(token) / 1e3 for token in whole.tokens],
        "step_us": whole.step / 1e3,
        "bytes": seen.bytes,
        "drawers": {name: {"share": whole.share(name), "us": whole.mean(name) / 1e3} for name in DRAWERS},
        "dependencies": [asdict(row) for row in whole.dependencies],
        "loader_us": loaders(seen),
        "instructions": kind_times(trace, whole.tokens),
        "critical_path": {"kinds": [asdict(kind) for kind in seen.kinds], "hops": [hop_json(seen, hop) for hop in seen.hops]},
        "bandwidth": {
            "from": seen.band.how,
            "begin_us": ((seen.band.edges[:-1] - seen.band.edges[0]) / 1e3).round(3).tolist(),
            "gb_per_s": (seen.band.rate / 1e9).round(1).tolist(),
        },
        "signals_stamped_late_ns": disagreement(trace, seen.found),
        "notes": trace.notes,
    }

"""What the checker says: findings, each with its place and a mend that a person can see, and the report that holds them.

Knows nothing of how a fault is found.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "record",  # words that encode nothing, or not in the one way they should
    "field",  # a number outside what the model and the machine have
    "counter",  # signals and what is waited for do not agree
    "rows",  # rows without a writer, with two, or with no reader
    "weights",  # tape pages streamed twice or never
    "pages",  # the page plan
    "limits",  # shared memory, grid, int32
    "deadlock",
    "race",
)


@dataclass(frozen=True)
class Finding:
    """One fault.  `sm`, `index` (place in that SM's queue) and `instruction` (its disassembly) are unset where the fault
    belongs to no single instruction.  `details` are further lines: the hops of a deadlock's cycle."""

    kind: str
    message: str
    sm: int | None = None
    index: int | None = None
    instruction: str = ""
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = "" if self.sm is None else f"sm {self.sm} #{self.index} [{self.instruction}]: "
        return f"{self.kind}: {place}{self.message}"

    def lines(self) -> list[str]:
        """The finding as text, details indented."""
        return [str(self), *(f"    {line}" for line in self.details)]


@dataclass(frozen=True)
class Summary:
    """What was proven about, in numbers; `lifetime_tokens` as in `scheduler.check.machine`."""

    sms: int
    instructions: int
    counters: int
    reads: int
    ring: int
    page_uses: int
    shared_bytes: int
    lifetime_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.instructions} instructions on {self.sms} SMs, {self.counters} counters, {self.reads} reads ordered; "
            f"{self.page_uses} page uses a token through a ring of {self.ring}, {self.shared_bytes} bytes of shared memory; "
            f"counters last {self.lifetime_tokens} tokens"
        )


@dataclass(frozen=True)
class Report:
    """The checker's verdict: `summary` is there when nothing was found."""

    findings: tuple[Finding, ...]
    summary: Summary | None

    @property
    def valid(self) -> bool:
        """Whether the program may be launched."""
        return not self.findings

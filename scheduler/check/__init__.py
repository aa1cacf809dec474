"""Proof before launch: no program that can hang or race is accepted.  The argument stands in `docs/proof.md`.

The checker reads a program's words and shares no code with the scheduler that wrote them: only `instructions` and the
machine's numbers in `scheduler.limits`.
"""

from scheduler.check.checker import check, require_valid
from scheduler.check.findings import KINDS, Finding, Report, Summary
from scheduler.check.machine import launch_tokens, lifetime_tokens

__all__ = ["KINDS", "Finding", "Report", "Summary", "check", "launch_tokens", "lifetime_tokens", "require_valid"]

"""The checker: every question in the order in which the answers may rely on one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.check.cycle import deadlock_finding
from scheduler.check.fields import field_findings, page_findings, region_findings
from scheduler.check.findings import Finding, Report, Summary
from scheduler.check.listing import Listing, read_listing
from scheduler.check.machine import lifetime_tokens, machine_findings, shape_findings, shared_bytes
from scheduler.check.order import happens_before
from scheduler.check.races import Writers, end_counter_findings, end_findings, load_findings, read_findings
from scheduler.check.rows import row_findings, weight_findings
from scheduler.check.signals import signal_findings
from scheduler.errors import ScheduleError

if TYPE_CHECKING:
    from scheduler.program import Program

SHOWN = 3  # findings in the message of an exception


def check(program: Program) -> Report:
    """Prove that a program can neither hang nor race, from its words alone; see `docs/proof.md` for what that means."""
    listing, findings = read_listing(program)
    findings += shape_findings(program.shape)
    if listing is None or findings:
        return Report(tuple(findings), None)
    findings = list(field_findings(listing))
    if findings:
        return Report(tuple(findings), None)
    for questions in (region_findings, page_findings, machine_findings, signal_findings, row_findings, weight_findings):
        findings += questions(listing)
    findings = findings or order_findings(listing)
    return Report(tuple(findings), None if findings else summarise(program, listing))


def order_findings(listing: Listing) -> list[Finding]:
    """Deadlocks and races of a program that is sound in all else."""
    order, stuck = happens_before(listing)
    if order is None:
        return [deadlock_finding(listing, stuck)]
    writers = Writers(listing)
    return [
        *end_counter_findings(listing, writers),
        *read_findings(listing, order, writers),
        *end_findings(listing, order, writers),
        *load_findings(listing, order, writers),
    ]


def summarise(program: Program, listing: Listing) -> Summary:
    """The numbers of a valid program."""
    return Summary(
        sms=listing.sms,
        instructions=len(listing.items),
        counters=len(listing.targets),
        reads=sum(len(regions) for table in (listing.reads, listing.loads, listing.selects) for regions in table),
        ring=listing.ring,
        page_uses=int(listing.uses.sum()),
        shared_bytes=shared_bytes(listing.shape, listing.ring),
        lifetime_tokens=lifetime_tokens(program),
    )


def require_valid(program: Program) -> None:
    """Raise ScheduleError, with the first findings, unless the program is proven."""
    findings = check(program).findings
    if findings:
        more = f" (and {len(findings) - SHOWN} more)" if len(findings) > SHOWN else ""
        shown = "; ".join(" | ".join(finding.lines()) for finding in findings[:SHOWN])
        raise ScheduleError(f"the program is not safe to run: {shown}{more}")

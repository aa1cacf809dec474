"""`python -m scheduler.check PROGRAM`: exit 0 and a summary for a saved program that is proven, else 1 and the findings.

Exit 2 with one line for a file that holds no program.
"""

from __future__ import annotations

from pathlib import Path

from models.command import Parser, command, start
from scheduler.check import check
from scheduler.program import read_program

SHOWN = 20


@command
def main(arguments: list[str] | None = None) -> int:
    """Check one saved program and print the verdict."""
    parser = Parser(prog="python -m scheduler.check", description="Prove that a program cannot hang or race.")
    parser.add_argument("program", type=Path, help="a file written by `python -m scheduler`")
    path = parser.parse_args(arguments).program
    report = check(read_program(path))
    if report.valid:
        print(f"{path}: proven free of deadlocks and races: {report.summary}")
        return 0
    for finding in report.findings[:SHOWN]:
        print("\n".join(finding.lines()))
    if len(report.findings) > SHOWN:
        print(f"... and {len(report.findings) - SHOWN} more")
    print(f"{path}: refused, {len(report.findings)} findings")
    return 1


if __name__ == "__main__":
    start(main)

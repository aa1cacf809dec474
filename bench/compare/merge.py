"""Several records as one: for engines that could not be measured in one go, and to print and draw a record again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import UserError

SCHEMA = 1

Record = dict[str, Any]


def read_record(path: Path) -> Record:
    """A record that `python -m bench.compare` wrote.  Raises UserError that names the file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or not record.get("runs"):
        raise UserError(f"{path}: not a record of this version, measure anew")
    return record


def merged(paths: Sequence[Path]) -> Record:
    """All runs of some records.  Raises UserError for runs that measured different things."""
    records = [(path, read_record(path)) for path in paths]
    first_path, first = records[0]
    for path, record in records:
        for run in record["runs"]:
            for what, known, found in differences(first["runs"][0], run):
                raise UserError(f"{path}: {what} is {found}, in {first_path} it is {known}: only like can be compared")
    return {"schema": SCHEMA, "runs": [run for _, record in records for run in record["runs"]]}


def differences(first: Record, other: Record) -> list[tuple[str, Any, Any]]:
    """(what, in the first run, in the other) for everything that must be the same."""
    known, found = compared(first), compared(other)
    return [(what, known[what], found[what]) for what in known if known[what] != found[what]]


def compared(run: Record) -> Record:
    """What two runs must have in common, by name."""
    settings = {name: run["settings"][name] for name in ("contexts", "tokens", "prompts")}
    settings["batch"] = run["settings"].get("batch", 1)  # records from before there was a choice
    return {"GPU": run["machine"]["gpu"], "checkpoint": run["model"]["fingerprint"], **settings}

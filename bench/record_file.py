"""Where the record of a measurement is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.chart import Draw
from models.errors import writing
from models.output import write_file


def record_name(record: dict[str, Any]) -> str:
    """The record's file name: what was measured, on what, of what, when, at which commit."""
    parts = [
        record["benchmark"],
        (record["machine"]["gpu"] or "unknown").removeprefix("NVIDIA "),
        Path(record["model"].removeprefix("random:")).name,
        *record.get("formats", ()),
        *(f"{each['sequences']}x{each['depth']}" for each in record.get("columns", ())[:1]),
        *([f"zipf-{record['zipf']:g}"] if record.get("zipf") else ()),
        record["machine"]["time"][:10],
        record["machine"]["commit"] or "unknown",
    ]
    return "_".join(re.sub(r"[^a-z0-9.+]+", "-", part.lower()).strip("-") for part in parts) + ".json"


def make_folder(folder: Path) -> None:
    """The folder of the record, before anything is measured; raises UserError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def save_record(record: dict[str, Any], folder: Path, draw: Draw | None = None) -> None:
    """Write a record and its picture, say where, and print the record as one line of JSON; raises UserError."""
    path = folder / record_name(record)
    with writing(path):
        write_file(path, json.dumps(record, indent=1) + "\n")
    print(f"record: {path}" if draw is None else f"record: {path}, picture: {draw(record, path.with_suffix('.svg'))}")
    print(json.dumps(record))

"""A picture of a record of `bench.serve`: time to the first token and time a token over the load, at their percentiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chart import plotting, save

COLOURS = {"p50": "#2f6f9f", "p95": "#5b9a68", "p99": "#b03a2e"}


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the picture as SVG; raises UserError without matplotlib."""
    loads = record["loads"]
    shares = [100 * load["share"] for load in loads]
    with plotting("serve", "; the record is written") as plt:
        figure, (first, each) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axes, field, title in (
            (first, "first_token_ms", "Time to the first token"),
            (each, "ms_per_token", "Time a token after it"),
        ):
            for name, colour in COLOURS.items():
                axes.semilogy(shares, [load[field][name] for load in loads], "o-", color=colour, label=name)
            axes.set(xlabel="load, % of one request after the other", ylabel="ms", title=title)
            axes.set_xticks(shares, [f"{share:.0f}" for share in shares])
            axes.legend(frameon=False)
        return save(plt, figure, path)

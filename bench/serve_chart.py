"""A picture of a record of `bench.serve`: time to the first token and time a token over the load, at their percentiles, and the
medians of other servers, at as many requests a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chart import plotting, save
from bench.serve_peers import PEERS

COLOURS = {"p50": "#2f6f9f", "p95": "#5b9a68", "p99": "#b03a2e"}
PEER_COLOURS = ("#7a5195", "#d98f2b")
LABELS = {peer.name: peer.label for peer in PEERS}


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the picture as SVG; raises UserError without matplotlib."""
    loads = record["loads"]
    shares = [100 * load["share"] for load in loads]
    peers = {name: peer for name, peer in record.get("peers", {}).items() if "loads" in peer}
    with plotting("serve", "; the record is written") as plt:
        figure, (first, each) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axes, field, title in (
            (first, "first_token_ms", "Time to the first token"),
            (each, "ms_per_token", "Time a token after it"),
        ):
            for name, colour in COLOURS.items():
                axes.semilogy(shares, [load[field][name] for load in loads], "o-", color=colour, label=name)
            for (name, peer), colour in zip(peers.items(), PEER_COLOURS, strict=False):
                values = [load[field]["p50"] for load in peer["loads"]]
                axes.semilogy(shares, values, "o--", color=colour, label=f"{LABELS.get(name, name)}, p50")
            axes.set(xlabel="load, % of one request after the other", ylabel="ms", title=title)
            axes.set_xticks(shares, [f"{share:.0f}" for share in shares])
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which("{x:g}")
        figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        return save(plt, figure, path)

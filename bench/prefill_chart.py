"""A picture of a record of `bench.prefill`: time to the first token over the prompt's length, and its parts.

python -m bench.prefill_chart RECORD.json PICTURE.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chart import draw_record, plotting, save
from models.command import command, start

OURS, PROJECTIONS, ATTENTION, GUIDE = "#2f6f9f", "#5b9a68", "#b03a2e", "#999999"


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the picture as SVG; raises UserError without matplotlib."""
    first = {int(length): spread["median"] for length, spread in record["first_token_ms"].items()}
    with plotting("prefill", ", then python -m bench.prefill_chart") as plt:
        figure, (times, rates) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        lengths = sorted(first)
        times.loglog(lengths, [first[length] for length in lengths], "o-", color=OURS, label="first token")
        best = min(lengths, key=lambda length: first[length] / length)
        linear = [first[best] * length / best for length in lengths]
        times.loglog(lengths, linear, ":", color=GUIDE, label="in proportion to the length")
        times.set(xlabel="tokens of the prompt", ylabel="ms", title="Time to the first token")
        times.legend(frameon=False)
        chunks = record["kernels"]
        ends = [chunk["start"] + chunk["tokens"] for chunk in chunks]
        for name, other, label, colour in (
            ("projections", "cublas", "projections", PROJECTIONS),
            ("attention", "sdpa", "attention", ATTENTION),
        ):
            rates.semilogx(ends, [chunk[name] for chunk in chunks], "o-", color=colour, label=label)
            their = {"cublas": "cuBLAS", "sdpa": "SDPA"}[other]
            rates.semilogx(ends, [chunk[other] for chunk in chunks], "x:", color=colour, label=f"{their}, the same")
        rates.set(xlabel="tokens up to the chunk's end", ylabel="TFLOP/s", title="Rates of the last chunk's kernels")
        rates.set_ylim(0, 1.3 * max(max(chunk["cublas"], chunk["projections"]) for chunk in chunks))
        rates.legend(frameon=False, loc="upper left", ncols=2)
        for axes in (times, rates):
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
            axes.minorticks_off()
        return save(plt, figure, path)


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the record cannot be drawn."""
    return draw_record("prefill", draw, arguments)


if __name__ == "__main__":
    start(main)

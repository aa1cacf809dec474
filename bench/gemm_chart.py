"""A picture of a record of `bench.gemm`: the rate at which weights are read over the number of tokens, matrix by matrix.

python -m bench.gemm_chart RECORD.json PICTURE.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chart import draw_record, plotting, save
from models.command import command, start

LINES = {  # name in the record: label, marker and line, colour
    "fp8": ("ours, FP8", "o-", "#2f6f9f"),
    "bf16": ("ours, bf16 tokens", "o--", "#5b9a68"),
    "cublas_fp8": ("cuBLAS, FP8", "x-", "#b03a2e"),
    "cublas_bf16": ("cuBLAS, bf16", "x--", "#c98a3c"),
    "plain": ("plain Triton, FP8", "^:", "#777777"),
}


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the picture as SVG; raises UserError without matplotlib."""
    shapes = record["shapes"]
    with plotting("gemm", ", then python -m bench.gemm_chart") as plt:
        figure, axes = plt.subplots(1, len(shapes), figsize=(3.6 * len(shapes), 3.8), layout="constrained", squeeze=False)
        for shape, plot in zip(shapes, axes[0], strict=True):
            tokens = [int(number) for number in shape["tokens"]]
            for name, (label, line, colour) in LINES.items():
                there = [number for number in tokens if name in shape["tokens"][str(number)]["us"]]
                times = [shape["tokens"][str(number)]["us"][name]["median"] for number in there]
                plot.plot(there, times, line, color=colour, label=label)
            plot.axhline(shape["floor_us"], color="#333333", linewidth=0.8, linestyle=":", label="read floor, FP8")
            plot.set_xscale("log", base=2)
            plot.set(xlabel="tokens", title=f"{shape['rows']:,} × {shape['columns']:,}", ylim=0)
            plot.set_xticks(tokens, [str(number) for number in tokens])
            plot.minorticks_off()
        axes[0][0].set_ylabel("µs")
        axes[0][0].legend(frameon=False, fontsize=8)
        return save(plt, figure, path)


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the record cannot be drawn."""
    return draw_record("gemm", draw, arguments)


if __name__ == "__main__":
    start(main)

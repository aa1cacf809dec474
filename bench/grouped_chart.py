"""A picture of a record of `bench.grouped`: TFLOP/s of gate and up over the tokens, a panel a model.

python -m bench.grouped_chart RECORD.json PICTURE.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chart import draw_record, plotting, save
from models.command import command, start

WAYS = {
    "ours": ("this kernel", "o-", "#2f6f9f"),
    "torch": ("torch._grouped_mm", "x-", "#5b9a68"),
    "loop": ("a loop of torch.mm", "+-", "#b03a2e"),
    "dense": ("cuBLAS, dense", ":", "#999999"),
}


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the picture as SVG; raises UserError without matplotlib."""
    drawn = [each for each in record["results"] if (each["case"]["matrix"], each["case"]["load"]) == ("gate_up", "balanced")]
    names = list(dict.fromkeys(each["case"]["experts"]["name"] for each in drawn))
    with plotting("grouped", ", then python -m bench.grouped_chart") as plt:
        figure, panels = plt.subplots(
            1, max(1, len(names)), figsize=(3.6 * max(1, len(names)), 3.8), layout="constrained", squeeze=False, sharey=True
        )
        for axes, name in zip(panels[0], names, strict=False):
            found = sorted((e for e in drawn if e["case"]["experts"]["name"] == name), key=lambda e: e["case"]["tokens"])
            tokens = [each["case"]["tokens"] for each in found]
            for way, (label, style, colour) in WAYS.items():
                if way not in found[0]["rates"]:
                    continue
                axes.semilogx(tokens, [each["rates"][way] for each in found], style, color=colour, label=label)
            axes.set(title=name, xlabel="tokens", ylim=0)
            axes.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=45)
            axes.minorticks_off()
        panels[0][0].set_ylabel("TFLOP/s")
        panels[0][0].legend(frameon=False, fontsize=8)
        return save(plt, figure, path)


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the record cannot be drawn."""
    return draw_record("grouped", draw, arguments)


if __name__ == "__main__":
    start(main)

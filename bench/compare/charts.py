"""Two pictures of a record, as PNG and SVG: latency as bars, and latency against fidelity.

Every engine is drawn alike; only rows less faithful than transformers' bf16 look different, whichever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compare.engines import BASELINE
from bench.compare.summary import Row, Speed, rows
from models.errors import UserError
from models.output import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawing = tuple[Figure, Sequence[Axes]]

BAR, UNFAITHFUL, INK, FLOOR = "#2f6f9f", "#c9c9c9", "#222222", "#b03a2e"
CUT = 3.0  # times the shortest bar of those as faithful as the baseline
TICKS = [value * scale for scale in (0.01, 0.1, 1, 10, 100, 1000) for value in (1, 1.5, 2, 3, 5, 7)]
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "svg.hashsalt": "compare",  # the same figures give the same file
}
Record = dict[str, Any]


def draw(record: Record, folder: Path) -> list[Path]:
    """Write latency.png, latency.svg and, if anything was scored, fidelity.png and fidelity.svg.  Raises UserError without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the charts need matplotlib: pip install matplotlib, then --merge the record") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # a time of nothing comes of noise on a model too small to measure, and has no bar
    measured = [row for row in rows(record["runs"]) if row.speeds and min(entry.step.median for entry in row.speeds) > 0]
    written = []
    with plt.rc_context(STYLE):
        for name, figure in (("latency", latency(measured, record)), ("fidelity", fidelity(measured, record))):
            if figure is None:
                continue
            for kind in ("png", "svg"):
                written.append(folder / f"{name}.{kind}")
                content, metadata = BytesIO(), {"Date": None} if kind == "svg" else None
                figure.savefig(content, format=kind, dpi=160, metadata=metadata, facecolor="white")
                write_file(written[-1], content.getvalue())
            plt.close(figure)
    return written


def subject(record: Record) -> str:
    """What was measured, in a line."""
    run = record["runs"][0]
    size = run["model"]["weight_bytes"] / 2e9
    return f"{size:.2f} B weights in bf16, batch {run['settings'].get('batch', 1)}, greedy, {run['machine']['gpu'] or 'no GPU'}"


def entitle(figure: Figure, title: str, engines: Sequence[Row], record: Record, legend: str, faithless: str) -> None:
    """The title, and below it what marks mean, as far as they occur."""
    remarks = [legend] if legend else []
    if any(unfaithful(row) for row in engines):
        remarks.append(f"{faithless}: less faithful than transformers' bf16")
    text = f"{title}: {subject(record)}" + (f"\n{'; '.join(remarks)}" if remarks else "")
    figure.suptitle(text, fontsize=10.5, color=INK)


def ordered(measured: Sequence[Row]) -> list[Row]:
    """The fastest first, at the first context."""
    return sorted(measured, key=lambda row: row.speeds[0].step.median)


def unfaithful(row: Row) -> bool:
    return bool(row.fidelity is not None and row.fidelity.less_faithful)


def latency(measured: Sequence[Row], record: Record) -> Figure | None:
    """A panel for every context: milliseconds a token, whiskers from the least to the most, and the read floor."""
    import matplotlib.pyplot as plt

    if not measured:
        return None
    contexts = sorted({entry.context for row in measured for entry in row.speeds})
    engines = ordered(measured)
    height = 1.3 + 0.42 * len(engines)
    figure, grid = plt.subplots(1, len(contexts), figsize=(2.6 + 3.0 * len(contexts), height), squeeze=False, sharey=True)
    figure.set_layout_engine("constrained")
    for axes, context in zip(grid[0], contexts, strict=True):
        panel(axes, engines, context)
    grid[0][0].set_yticks(range(len(engines)), [row.label for row in engines])
    grid[0][0].invert_yaxis()
    batch = record["runs"][0]["settings"].get("batch", 1)
    entitle(
        figure,
        "Milliseconds a token" if batch == 1 else "Milliseconds a step",
        engines,
        record,
        "dashed: read floor of bf16 weights",
        "hatched",
    )
    return figure


def panel(axes: Axes, engines: Sequence[Row], context: int) -> None:
    """The bars of one context.  Those that are far longer than others are cut, so that the others can be told apart."""
    found = [(place, row, entry) for place, row in enumerate(engines) for entry in row.speeds if entry.context == context]
    limit = longest_bar([(row, entry) for _, row, entry in found])
    for place, row, entry in found:
        faithless = unfaithful(row)
        color, hatch = (UNFAITHFUL, "//") if faithless else (BAR, "")
        axes.barh(place, min(entry.step.median, limit), height=0.7, color=color, hatch=hatch)
        text = f"{entry.step.median:.2f}"
        if entry.step.median > limit:
            axes.annotate(f"{text} \N{RIGHTWARDS ARROW}", (limit, place), (-5, 0), textcoords="offset points",
                          va="center", ha="right", color=INK if faithless else "white")  # fmt: skip
        else:
            whisker(axes, place, entry)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the floor's line
            axes.annotate(text, (entry.step.most, place), (4, 0), textcoords="offset points", va="center", bbox=box)
    draw_floor(axes, next((entry.floor for _, _, entry in found if entry.floor is not None), None))
    axes.set_title(f"prompt of {context} tokens")
    axes.set_xlim(0, limit)
    axes.set_xlabel("ms per token" if found[0][2].batch == 1 else "ms per step")


def longest_bar(found: Sequence[tuple[Row, Speed]]) -> float:
    """Milliseconds up to which bars are drawn: a little more than `CUT` times what the fastest engine takes, or the longest of
    all; the fastest of the faithful ones, if there are any, as weights of fewer bits would have all others cut."""
    shortest = min(entry.step.median for row, entry in found if not unfaithful(row) or all(unfaithful(row) for row, _ in found))
    return 1.25 * max(entry.step.most for _, entry in found if entry.step.median <= CUT * shortest)


def draw_floor(axes: Axes, floor: float | None) -> None:
    if floor is not None:
        axes.axvline(floor, color=FLOOR, linewidth=1.3, linestyle="--", label="read floor of bf16 weights")


def whisker(axes: Axes, place: int, entry: Speed) -> None:
    axes.plot([entry.step.least, entry.step.most], [place, place], color=INK, linewidth=1.2)


def fidelity(measured: Sequence[Row], record: Record) -> Figure | None:
    """KL to the model in fp32 over milliseconds a token at the first context: down and left is better."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    judged = [row for row in ordered(measured) if row.fidelity is not None and row.fidelity.kl > 0]
    if not judged:
        return None
    figure, axes = plt.subplots(figsize=(9.2, 4.4))
    figure.set_layout_engine("constrained")
    axes.set(xscale="log", yscale="log")
    points = [(row.speeds[0].step.median, row.fidelity.kl, row) for row in judged if row.fidelity is not None]
    for place, (x, y, row) in enumerate(points):
        color = plt.get_cmap("tab10")(place % 10)
        face = "none" if unfaithful(row) else color
        axes.scatter(x, y, s=80, facecolor=face, edgecolor=color, linewidth=1.8, label=row.label, zorder=3)
        if row.name == BASELINE:
            axes.axhline(y, color=INK, linewidth=0.9, linestyle=":", label="transformers' own bf16 error")
    floor = judged[0].speeds[0].floor
    draw_floor(axes, floor)
    times, errors = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.set_xlim(0.85 * min(*times, floor or times[0]), 1.2 * max(times))
    axes.set_ylim(min(errors) / 2, max(errors) * 2)
    axes.set_xticks([tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    first = judged[0].speeds[0]
    axes.set_xlabel(
        f"ms per {'token' if first.batch == 1 else 'step'} after a prompt of {first.context} tokens (faster is left)"
    )
    axes.set_ylabel("KL divergence from fp32, nats (faithful is down)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    entitle(figure, "Latency and fidelity", judged, record, "", "hollow")
    return figure

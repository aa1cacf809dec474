"""A picture of a record of `bench.prefill`: time to the first token over the prompt's length, and its parts.

python -m bench.prefill_chart RECORD.json PICTURE.svg
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from models.command import Parser, command, start
from models.errors import UserError, printable
from models.output import output_path, write_file

STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "prefill"}
OURS, PROJECTIONS, ATTENTION, GUIDE = "#2f6f9f", "#5b9a68", "#b03a2e", "#999999"


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the picture as SVG; raises UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib, then python -m bench.prefill_chart") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = {int(length): spread["median"] for length, spread in record["first_token_ms"].items()}
    with plt.rc_context(STYLE):
        figure, (times, rates) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        lengths = sorted(first)
        times.loglog(lengths, [first[length] for length in lengths], "o-", color=OURS, label="first token")
        last = lengths[-1]
        linear = [first[last] * length / last for length in lengths]
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
        rates.set(xlabel="tokens up to the chunk's end", ylabel="TFLOP/s", title="Rates of the last chunk's kernels", ylim=0)
        rates.legend(frameon=False)
        for axes in (times, rates):
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
            axes.minorticks_off()
        content = BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    write_file(path, content.getvalue())
    return path


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the record cannot be drawn."""
    parser = Parser(prog="python -m bench.prefill_chart", description="Draw a record of bench.prefill.")
    parser.add_argument("record", type=Path)
    parser.add_argument("picture", type=output_path)
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.record.read_text())
        picture = draw(record, options.picture)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.record} is no record of bench.prefill: {printable(str(error))}") from None
    print(picture)
    return 0


if __name__ == "__main__":
    start(main)

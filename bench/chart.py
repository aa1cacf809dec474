"""What pictures of records share: matplotlib, SVG that depends on the record alone, and the command that draws one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from models.command import Parser
from models.errors import UserError, printable
from models.output import output_path, write_file

Draw = Callable[[dict[str, Any], Path], Path]


@contextmanager
def plotting(name: str, mend: str) -> Iterator[Any]:
    """`matplotlib.pyplot` in the style of `bench.<name>`; raises UserError with the mend where there is none."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"the picture needs matplotlib: pip install matplotlib{mend}") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": name}
    with plt.rc_context(style):
        yield plt


def save(plt: Any, figure: Any, path: Path) -> Path:
    """Write a figure as SVG, without the date, and close it."""
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    write_file(path, content.getvalue())
    return path


def draw_record(name: str, draw: Draw, arguments: list[str] | None) -> int:
    """The command `bench.<name>_chart`: 0, or UserError where the record cannot be drawn."""
    parser = Parser(prog=f"python -m bench.{name}_chart", description=f"Draw a record of bench.{name}.")
    parser.add_argument("record", type=Path)
    parser.add_argument("picture", type=output_path)
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.record.read_text())
        picture = draw(record, options.picture)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.record} is no record of bench.{name}: {printable(str(error))}") from None
    print(picture)
    return 0

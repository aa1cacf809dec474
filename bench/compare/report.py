"""A record as text: pipe tables that read well in a terminal and are Markdown.  Knows nothing of how figures are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.compare.fidelity import NEAR_TIE, SURE
from bench.compare.kernels import MEMORY, OTHER, OWN
from bench.compare.summary import Row, Speed, absent, agreement, rows
from bench.record import Spread

MARK = " †"
NONE = "–"

Record = dict[str, Any]


def report(record: Record) -> str:
    """Everything worth reading, ending with a newline."""
    runs = record["runs"]
    measured = rows(runs)
    contexts = sorted({entry.context for row in measured for entry in row.speeds})
    parts = [headline(run) for run in runs]
    table_of = speed_table if settings_of(runs)["batch"] == 1 else batch_table
    parts += [table_of(measured, context) for context in contexts]
    if measured:
        parts += [fidelity_table(measured, contexts), start_table(measured)]
    parts += [
        kernel_tables(runs),
        missing_list(runs),
        unscored_list(measured),
        repeated_list(runs),
        settings_list(runs),
        notes_list(runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def settings_of(runs: Sequence[Record]) -> Record:
    """What was measured, which is the same in all runs of a record."""
    return {"batch": 1, **runs[0]["settings"]}


def summary(record: Record) -> dict[str, Any]:
    """The figures of the tables, for programs."""
    runs = record["runs"]
    return {"rows": [asdict(row) for row in rows(runs)], "absent": [asdict(entry) for entry in absent(runs)]}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(line[place]) for line in [header, *lines]) for place in range(len(header))]

    def drawn(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([drawn(header), rule, *(drawn(line) for line in lines)])


def headline(run: Record) -> str:
    machine, model, settings = run["machine"], run["model"], run["settings"]
    config = model["config"]
    size = model["weight_bytes"] / 1e9
    rates = [floor["bytes_per_second"] for floor in run["floor"] if floor.get("bytes_per_second")]
    floor = "not measured" if not rates else " and ".join(f"{rate / 1e12:.3f}" for rate in rates) + " TB/s"
    return "\n".join(
        [
            f"{machine['gpu'] or 'no GPU'}, {machine['processor']}, {machine['time']}, commit {machine['commit'] or 'unknown'}"
            + (f", {run['note']}" if run.get("note") else ""),
            f"{config['num_layers']} layers, hidden size {config['hidden_size']}, {size:.3f} GB of bf16 weights a token; "
            f"{together(settings)}{settings['tokens']} tokens, {settings['repeats']} rounds; "
            f"reads measured at {floor}{clock_range(run)}",
        ]
    )


def together(settings: Record) -> str:
    batch = settings.get("batch", 1)
    return "" if batch == 1 else f"{batch} prompts of one length at once, after each "


def clock_range(run: Record) -> str:
    states = [state for engine in run["engines"] for state in engine["gpu"] if state]
    if not states or not all("sm_mhz" in state and "celsius" in state for state in states):
        return ""
    clocks, heat = [state["sm_mhz"] for state in states], [state["celsius"] for state in states]
    return f"; SM clock {min(clocks):.0f}–{max(clocks):.0f} MHz, {min(heat):.0f}–{max(heat):.0f} °C"


def at(row: Row, context: int) -> Speed | None:
    return next((entry for entry in row.speeds if entry.context == context), None)


def speed_table(measured: Sequence[Row], context: int) -> str:
    found = [(row, entry) for row in measured if (entry := at(row, context)) is not None]
    found.sort(key=lambda pair: pair[1].step.median)
    lines = [
        [
            marked(row),
            f"{entry.step.median:.3f}",
            between(entry.step, 3),
            NONE if entry.streamed is None else f"{entry.streamed.median:.3f}",
            f"{entry.tokens_per_second:.0f}",
            NONE if entry.floor_share is None else f"{entry.floor_share:.0%}",
            f"{entry.first_token.median:.1f}",
            between(entry.first_token, 1),
        ]
        for row, entry in found
    ]
    title = f"Prompt of {context} tokens{floor_remark([entry for _, entry in found], 'token')}"
    header = ["engine", "ms/token", "least–most", "streamed", "tokens/s", "of floor", "first token, ms", "least–most"]
    return f"{title}\n\n{table(header, lines)}"


def floor_remark(entries: Sequence[Speed], what: str) -> str:
    floor = next((entry.floor for entry in entries if entry.floor is not None), None)
    return "" if floor is None else f" (read floor of bf16 weights: {floor:.3f} ms a {what})"


def batch_table(measured: Sequence[Row], context: int) -> str:
    """Several prompts together: the whole generation first, then its parts."""
    found = [(row, entry) for row in measured if (entry := at(row, context)) is not None]
    found.sort(key=lambda pair: -pair[1].whole.median)
    lines = [
        [
            marked(row),
            f"{entry.whole.median:.0f}",
            between(entry.whole, 0),
            f"{entry.first_token.median:.1f}",
            f"{entry.step.median:.3f}",
            between(entry.step, 3),
            f"{entry.tokens_per_second:.0f}",
            NONE if entry.floor_share is None else f"{entry.floor_share:.0%}",
        ]
        for row, entry in found
    ]
    batch = found[0][1].batch
    title = f"{batch} prompts of {context} tokens at once{floor_remark([entry for _, entry in found], 'step')}"
    remark = f"tokens/s: those of all {batch} over the time from the request until all are on the host, prefill included."
    header = ["engine", "tokens/s", "least–most", "first tokens, ms", "ms/step", "least–most", "tokens/s, decode", "of floor"]
    return f"{title}\n{remark}\n\n{table(header, lines)}"


def marked(row: Row) -> str:
    return row.label + (MARK if row.fidelity is not None and row.fidelity.less_faithful else "")


def between(found: Spread, digits: int) -> str:
    return f"{found.least:.{digits}f}–{found.most:.{digits}f}"


def fidelity_table(measured: Sequence[Row], contexts: Sequence[int]) -> str:
    lines = []
    for row in measured:
        judged = row.fidelity
        cells = [NONE] * 3 if judged is None else [f"{judged.kl:.2e}", f"{judged.nll_excess:+.2e}", f"{judged.same_top:.1%}"]
        path = NONE if judged is None else judged.scoring
        lines.append([marked(row), *cells, *(parted(row.greedy.get(context)) for context in contexts), path])
    header = ["engine", "KL", "NLL excess", "same top", *(f"agrees, {context}" for context in contexts), "scored by"]
    return (
        "Fidelity to the model in fp32: KL divergence and excess NLL of the next token in nats, and greedy tokens in common "
        f"before the first difference (~: a near tie, within {NEAR_TIE:.0%} of the logits' spread; *: its own rounds differ)."
        f"\n{MARK.strip()}: less faithful than transformers in bf16, by more than {SURE:.0f} standard errors."
        f"\n\n{table(header, lines)}"
    )


def parted(found: Record | None) -> str:
    if found is None:
        return NONE
    unstable = "" if found["repeatable"] else " *"
    if found["gap"] is None:
        return f"all {found['tokens']}{unstable}"
    kind = " ~" if found["near_tie"] else f" (gap {found['gap']:.2f})"
    return f"{found['agreed']}{kind}{unstable}"


def start_table(measured: Sequence[Row]) -> str:
    lines = [
        [
            row.label,
            f"{row.load_seconds:.1f}",
            f"{row.ready_seconds:.1f}",
            NONE if row.memory_mib is None else f"{row.memory_mib / 1024:.2f}",
            *([NONE] if not row.speeds or row.speeds[0].longest_gap is None else [f"{row.speeds[0].longest_gap:.1f}"]),
        ]
        for row in measured
    ]
    header = ["engine", "loaded, s", "ready, s", "GPU memory, GiB", "longest gap in a stream, ms"]
    return f"Start (ready: has generated once at every context)\n\n{table(header, lines)}"


def kernel_tables(runs: Sequence[Record]) -> str:
    """What ran on the GPU, of the engines that know their own kernels by name."""
    return "\n\n".join(
        kernel_table(engine["label"], engine["kernels"]) for run in runs for engine in run["engines"] if "kernels" in engine
    )


def kernel_table(label: str, found: Record) -> str:
    if "error" in found:
        return f"Kernels of {label}: not listed, {found['error']}"
    kernels = [kernel for kernel in found["kernels"] if kernel["kind"] != MEMORY]
    foreign = [kernel for kernel in kernels if kernel["kind"] != OWN]
    says = f"all {len(kernels)} are {found['written_in']}, its own"
    if foreign:
        says = f"{len(kernels) - len(foreign)} of {len(kernels)} are {found['written_in']}, its own; {len(foreign)} are others"
    words = {OWN: f"{found['written_in']}, its own", MEMORY: "copy or fill of memory", OTHER: "other"}
    ordered = sorted(found["kernels"], key=lambda kernel: kernel["kind"] == MEMORY)
    lines = [[k["name"], words[k["kind"]], str(k["count"]), f"{k['microseconds']:.0f}"] for k in ordered]
    when = f"while it generated {found['tokens']} tokens after a prompt of {found['context']}"
    return f"Kernels of {label} {when}, by a profile: {says}\n\n{table(['kernel', 'what', 'runs', 'µs'], lines)}"


def missing_list(runs: Sequence[Record]) -> str:
    lines = [f"- {e.label}: {e.reason}" + (f"\n  install: {e.install}" if e.install else "") for e in absent(runs)]
    return "Not measured\n\n" + "\n".join(dict.fromkeys(lines)) if lines else ""


def unscored_list(measured: Sequence[Row]) -> str:
    lines = [f"- {row.label}: {row.fidelity_problem}" for row in measured if row.fidelity is None]
    return "Not scored\n\n" + "\n".join(lines) if lines else ""


def repeated_list(runs: Sequence[Record]) -> str:
    found = [f"- {label}, prompt of {context}: run {run + 1} took {ratio:.3f} of run 1's time"
             for label, context, run, ratio in agreement(runs)]  # fmt: skip
    return "Engines in more than one run\n\n" + "\n".join(found) if found else ""


def settings_list(runs: Sequence[Record]) -> str:
    lines = []
    for run in runs:
        for engine in run["engines"]:
            if "settings" in engine:
                versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
                settings = "; ".join(f"{name}: {value}" for name, value in engine["settings"].items())
                lines.append(f"- {engine['label']} ({versions}): {settings}")
    return "Settings\n\n" + "\n".join(lines) if lines else ""


def notes_list(runs: Sequence[Record]) -> str:
    notes = [f"- {note}" for run in runs for note in run["notes"]]
    return "Notes\n\n" + "\n".join(notes) if notes else ""

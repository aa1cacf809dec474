"""What to say when no actor can go on: who waits for what, the most telling first."""

from __future__ import annotations

from collections.abc import Sequence

from instructions.codec import disassemble
from megakernel.vm.cells import Actor, Cell
from megakernel.vm.errors import VmError
from megakernel.vm.record import Record

SHOWN = 8  # stuck actors listed after the first


def signallers(queues: Sequence[Sequence[Record]], cell: Cell) -> str:
    """Who raises a counter, in words; empty for any other cell."""
    if not cell.name.startswith("counter "):
        return ""
    number = int(cell.name.removeprefix("counter "))
    names = [f"sm {record.sm} #{record.index}" for queue in queues for record in queue if number in record.item.signals]
    if not names:
        return ", which nobody signals"
    return f", signalled once a token by each of {', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"


def describe(actor: Actor, queues: Sequence[Sequence[Record]]) -> str:
    """What one stuck actor waits for."""
    assert actor.need is not None
    cell, want, opens = actor.need
    who = "loader" if actor.loads else "consumer"
    opening = ", to open the token" if opens else ""
    return f"{who}, token {actor.token}, waits for {cell.name} >= {want}, seen {cell.value}{opening}{signallers(queues, cell)}"


def stuck_error(queues: Sequence[Sequence[Record]], consumers: Sequence[Actor], loaders: Sequence[Actor]) -> VmError:
    """A `VmError` for the waits that can never be met.

    First the consumers that wait for a counter, the farthest behind first, for others only wait for what they would do; then
    whoever waits for pages, then those that wait for a token to begin or end.
    """

    def telling(actor: Actor) -> tuple[bool, bool, bool, int, int, int]:
        name, opens = (actor.need.cell.name, actor.need.opens) if actor.need is not None else ("", False)
        between = opens or name.startswith("tokens")
        return (between or not name.startswith("counter"), between, actor.loads, actor.token, actor.index, actor.sm)

    stuck = sorted((actor for actor in [*consumers, *loaders] if is_stuck(actor)), key=telling)
    first = stuck[0]
    lines = [f"no SM can go on: {describe(first, queues)}"]
    for actor in stuck[1 : 1 + SHOWN]:
        lines.append(f"also sm {actor.sm} #{actor.index} [{text_of(actor, queues)}]: {describe(actor, queues)}")
    if len(stuck) > 1 + SHOWN:
        lines.append(f"and {len(stuck) - 1 - SHOWN} more")
    return VmError(first.sm, first.index, text_of(first, queues), "\n  ".join(lines))


def is_stuck(actor: Actor) -> bool:
    """Whether an actor is blocked on a wait that is not met."""
    return actor.need is not None and actor.need.cell.value < actor.need.want


def text_of(actor: Actor, queues: Sequence[Sequence[Record]]) -> str:
    """The instruction an actor is at, disassembled; an empty queue has none."""
    queue = queues[actor.sm]
    return disassemble(queue[actor.index].item) if queue else "empty queue"

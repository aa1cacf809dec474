"""Where everything stands: a column for each SM, a band for each operation, the layers one below the other.

A program's DAG is very regular and very wide (a counter joins a hundred producers to a hundred readers), so a general
layered layout would take minutes to say less.  Bands are ordered by the longest path to them; networkx finds it.  Places
are within their group, because groups fold in the page.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx

from instructions.base import Instruction
from instructions.embed import Embed
from scheduler.draw.listing import Listing
from scheduler.graph import program_graph, token_graph
from scheduler.program import Program

CELL_HEIGHT = 16.0
ROW = 20.0  # from one instruction to another of the same operation below it
LEAST_GAP = 84.0  # below a band: edges, and in the middle of them the counters
FLATTEST = 20.0  # a gap is never flatter than this, or a hundred edges cannot be told apart
HEADER = 34.0
LEAST_PITCH, LEAST_WIDTH = 24.0, 960.0
SPREAD = 18.0  # least distance between counters side by side

GroupKey = tuple[int, int]  # 0 before the layers, 1 a layer, 2 after them; the layer


class Place(NamedTuple):
    """Centre of a node, in its group."""

    group: int
    x: float
    y: float


@dataclass(frozen=True)
class Band:
    """All instructions of one kind in one group; `y` is its top."""

    mnemonic: str
    y: float
    height: float
    count: int


@dataclass(frozen=True)
class Group:
    """What folds: a layer, or what comes before or after them all."""

    name: str
    height: float
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Layout:
    """`records[i]` and `counters[c]` are places; None where the record or the counter is not drawn."""

    pitch: float
    width: float
    groups: tuple[Group, ...]
    records: tuple[Place | None, ...]
    counters: tuple[Place | None, ...]


def group_key(instruction: Instruction) -> GroupKey:
    """Which group an instruction belongs to."""
    if instruction.LAYERED:
        return 1, instruction.layer
    return (0, 0) if isinstance(instruction, Embed) else (2, 0)


def group_name(key: GroupKey) -> str:
    """The group in words."""
    return ("embedding", f"layer {key[1]}", "head and sampling")[key[0]]


def ranks(program: Program) -> list[int]:
    """The longest path to every record within one token, in edges."""
    rank = {}
    for depth, generation in enumerate(nx.topological_generations(token_graph(program_graph(program)))):
        rank.update(dict.fromkeys(generation, depth))
    return [rank["i", sm, index] for sm, queue in enumerate(program.decoded) for index in range(len(queue))]


def spread(wanted: list[float], width: float) -> list[float]:
    """Places near the wanted ones, in their order, SPREAD apart (or as far as the width allows), within the width."""
    step = min(SPREAD, width / (len(wanted) + 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed, least = [0.0] * len(wanted), step / 2
    for i in order:
        placed[i] = least = max(wanted[i], least)
        least += step
    most = width - step / 2
    for i in reversed(order):
        placed[i] = most = min(placed[i], most)
        most -= step
    return placed


class Arranger:
    """Works out a layout, group by group."""

    def __init__(self, listing: Listing, layer: int | None) -> None:
        self.listing, program = listing, listing.program
        self.pitch = max(LEAST_PITCH, LEAST_WIDTH / program.sms)
        self.width = self.pitch * program.sms
        self.gap = max(LEAST_GAP, self.width / FLATTEST)
        self.records: list[Place | None] = [None] * len(listing.items)
        self.counters: list[Place | None] = [None] * program.counters
        self.band_of: dict[int, tuple[int, int]] = {}  # record: place of its group, place of its band
        rank = ranks(program)
        found: dict[GroupKey, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, item in enumerate(listing.items):
            if layer is None or group_key(item.instruction) == (1, layer):
                found[group_key(item.instruction)][item.instruction.MNEMONIC].append(i)
        self.members = {
            key: dict(sorted(bands.items(), key=lambda band: max(rank[i] for i in band[1])))
            for key, bands in sorted(found.items())
        }

    def groups(self) -> tuple[Group, ...]:
        """Place all records, then the counters below the last of their producers."""
        groups = []
        for number, (key, members) in enumerate(self.members.items()):
            incoming = self.incoming(number, members)
            bands, y = [], HEADER + (self.gap if incoming else 0.0)
            for place, (mnemonic, records) in enumerate(members.items()):
                rows = self.place_band(number, place, y, records)
                bands.append(Band(mnemonic, y, rows * ROW, len(records)))
                y += rows * ROW + self.gap
            groups.append(Group(group_name(key), y, tuple(bands)))
        self.place_counters(groups)
        return tuple(groups)

    def incoming(self, group: int, members: dict[str, list[int]]) -> set[int]:
        """Place, above the group, the counters it waits for whose producers are not drawn; returns them."""
        if len(self.members) > 1:
            return set()
        drawn = {i for records in members.values() for i in records}
        waited = {wait.counter for i in drawn for wait in self.listing.items[i].waits if not wait.lag}
        counters = sorted(c for c in waited if drawn.isdisjoint(self.listing.producers[c]))
        step = self.width / (len(counters) + 1)
        for place, counter in enumerate(counters):
            self.counters[counter] = Place(group, (place + 1) * step, HEADER + self.gap / 2)
        return set(counters)

    def place_band(self, group: int, band: int, y: float, records: list[int]) -> int:
        """Place one operation's records; returns how many rows they take."""
        rows: dict[int, int] = defaultdict(int)
        for i in records:
            sm = int(self.listing.sm[i])
            self.records[i] = Place(group, (sm + 0.5) * self.pitch, y + (rows[sm] + 0.5) * ROW)
            self.band_of[i] = group, band
            rows[sm] += 1
        return max(rows.values())

    def place_counters(self, groups: list[Group]) -> None:
        """Each counter below the middle of its producers, in the gap below the last of their bands."""
        gaps: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        for counter, producers in enumerate(self.listing.producers):
            drawn = [i for i in producers if i in self.band_of]
            if drawn:
                places = [place.x for i in drawn if (place := self.records[i]) is not None]
                gaps[max(self.band_of[i] for i in drawn)].append((counter, sum(places) / len(places)))
        for (group, number), found in gaps.items():
            band = groups[group].bands[number]
            for (counter, _), x in zip(found, spread([x for _, x in found], self.width), strict=True):
                self.counters[counter] = Place(group, x, band.y + band.height + self.gap / 2)


def arrange(listing: Listing, layer: int | None = None) -> Layout:
    """The layout of a program, or of one of its layers."""
    arranger = Arranger(listing, layer)
    groups = arranger.groups()
    return Layout(arranger.pitch, arranger.width, groups, tuple(arranger.records), tuple(arranger.counters))

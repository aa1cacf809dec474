"""How a checkpoint holds the tensors of a model: under which names, and several in one.

Most are stored as `models.weights` names them. Modules may have other names, and the matrices of all experts of a layer may be
one tensor; which of it is so is seen by what is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from models.config import ModelConfig
from models.families import layer_of
from models.families.base import Linear, layer_module
from models.weights import expected_tensors

Place = tuple[int, slice]  # an expert and its rows


@dataclass(frozen=True)
class Piece:
    """A tensor of the model, and where it lies in the stored one; all of that where no place is given."""

    name: str
    place: Place | None = None


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its shape, and what it holds."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def stored_tensors(config: ModelConfig, present: Collection[str]) -> dict[str, Stored]:
    """What a checkpoint that holds tensors of these names must hold, by name, in the order of the network."""
    expected = expected_tensors(config)
    moved: dict[str, tuple[str, Stored] | None] = {}  # by the names in `expected`; None: handed over with another
    for layer in range(config.num_layers):
        for linear in layer_of(config).linears:
            for name, other in renamed(linear, layer):
                if name not in present and other in present:
                    moved[name] = other, Stored(expected[name], (Piece(name),))
            stacked = stacked_name(config, linear, layer, present)
            if stacked is not None:
                first, *others = names = list(experts_names(config, linear, layer))
                rows = sum(linear.rows(config).values())
                shape = (config.num_experts, rows, expected[first][1])
                moved[first] = stacked, Stored(shape, tuple(places(config, linear, names)))
                moved |= dict.fromkeys(others)
    stored: dict[str, Stored] = {}
    for name, size in expected.items():
        found = moved.get(name, (name, Stored(size, (Piece(name),))))
        if found is not None:
            stored[found[0]] = found[1]
    return stored


def renamed(linear: Linear, layer: int) -> Iterator[tuple[str, str]]:
    """The weights of modules, and other names that they may have."""
    for module in linear.modules:
        for other in module.other_names:
            yield f"{layer_module(layer, module.name)}.weight", f"{layer_module(layer, other)}.weight"


def experts_names(config: ModelConfig, linear: Linear, layer: int) -> Iterator[str]:
    """The weights of all experts, one expert after another."""
    for expert in linear.copies(config):
        yield from (f"{layer_module(layer, module)}.weight" for module in linear.rows(config, expert))


def stacked_name(config: ModelConfig, linear: Linear, layer: int, present: Collection[str]) -> str | None:
    """The tensor that holds all experts' weights of a layer, None where each has its own."""
    names = [layer_module(layer, name) for name in linear.stacked]
    found = next((name for name in names if name in present), None)
    apart = any(name in present for name in experts_names(config, linear, layer))
    return None if apart or not names else found or (names[0] if linear.published_stacked else None)


def places(config: ModelConfig, linear: Linear, names: list[str]) -> Iterator[Piece]:
    """Where the weights of experts lie in a tensor that holds all of them [experts, rows of all modules, columns]."""
    left = iter(names)
    for expert in linear.copies(config):
        start = 0
        for rows in linear.rows(config, expert).values():
            yield Piece(next(left), (expert, slice(start, start + rows)))
            start += rows

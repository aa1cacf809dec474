"""Quantising by trial: several scales, of which each group of columns keeps the best."""

from __future__ import annotations

from collections.abc import Iterable

import torch

Try = tuple[torch.Tensor, ...]


def best(tries: Iterable[Try]) -> Try:
    """What was found for each group where its error was least, but the error: each try is the squared error [rows, groups] and
    what gives it, [rows, groups] or [rows, groups, columns]."""
    kept: Try = ()
    for found in tries:
        less = found[0] < kept[0] if kept else None
        kept = found if less is None else tuple(chosen(less, new, old) for new, old in zip(found, kept, strict=True))
    return kept[1:]


def chosen(where: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` in the groups that are meant."""
    return torch.where(where if new.ndim == where.ndim else where[..., None], new, old)

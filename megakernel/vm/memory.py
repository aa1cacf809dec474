"""The machine's memory, which knows who may read what: every value remembers when it was written.

Activations carry the epoch of their last write, and are filled with NaN before each token.  The KV cache carries, for
every row of every layer, the last position written.  A read of what this token's program has not written is a `Fault`.
"""

from __future__ import annotations

import numpy as np
import torch

from instructions.base import Region
from instructions.matvec import DTYPES
from instructions.shape import Shape, ceil_div
from megakernel.vm.errors import Fault

NEVER = -1


def check_bounds(region: Region, layers: int, rows: int) -> None:
    """Refuse a region outside its buffer."""
    if not (0 <= region.layer < layers and 0 <= region.start < region.stop <= rows):
        raise Fault(f"{region} lies outside its buffer of {layers} layers of {rows} rows")


class Activations:
    """All fp32 activation buffers of one program, [activation elements], with the epoch of every element's last write."""

    def __init__(self, shape: Shape) -> None:
        self.buffers = shape.buffers
        self.values = torch.full((shape.arena_elements,), torch.nan)
        self.epochs = np.full(shape.arena_elements, NEVER, dtype=np.int64)

    def poison(self) -> None:
        """Fill everything with NaN: nothing may be carried over to the next token."""
        self.values.fill_(torch.nan)

    def span(self, region: Region, column: int = 0) -> slice:
        """Where a region of a column lies; raises Fault for one that lies nowhere."""
        buffer = self.buffers[region.buffer]
        check_bounds(region, buffer.layers, buffer.rows)
        first = buffer.base + region.layer * buffer.stride + column * buffer.column
        return slice(first + region.start, first + region.stop)

    def written(self, region: Region, epoch: int, columns: int = 1) -> bool:
        """Whether every row has been written in this epoch, in so many columns."""
        return all(bool((self.epochs[self.span(region, column)] == epoch).all()) for column in range(columns))

    def read(self, region: Region, epoch: int, column: int = 0) -> torch.Tensor:
        """A view of the rows, fp32; every one must have been written in this epoch."""
        span = self.span(region, column)
        stale = self.epochs[span] != epoch
        if stale.any():
            row = int(stale.argmax())
            last = int(self.epochs[span][row])
            when = "never written" if last == NEVER else f"last written in epoch {last}"
            raise Fault(f"reads {region} in epoch {epoch}, but row {region.start + row} was {when}")
        return self.values[span]

    def write(self, region: Region, values: torch.Tensor, epoch: int, column: int = 0) -> None:
        """Store [rows] fp32; none may have been written in this epoch already, and none may be NaN."""
        span = self.span(region, column)
        if values.shape != (region.stop - region.start,):
            raise Fault(f"writes {list(values.shape)} values to {region}")
        twice = self.epochs[span] == epoch
        if twice.any():
            raise Fault(f"writes {region}, but row {region.start + int(twice.argmax())} was written in epoch {epoch} already")
        if torch.isnan(values).any():
            raise Fault(f"writes NaN to {region}: it used a value nobody wrote, or the model's numbers overflow")
        self.values[span] = values
        self.epochs[span] = epoch


class KvCache:
    """K and V of all layers, in pages as `Shape` lays them out, in the weight type.

    Rows of positions that nobody wrote are NaN, in the cache and in every page that is loaded from it.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.head_rows, self.page_positions, self.tile_columns = shape.head_rows, shape.page_positions, shape.tile_columns
        self.head_pages = shape.head_pages
        self.layers, self.rows = shape.config.num_layers, shape.buffers["kv"].rows
        self.sequences, self.sequence_rows, self.sequence_pages = shape.sequences, shape.new_rows, shape.sequence_pages
        layout = (shape.cache_pages, shape.head_tiles, shape.page_positions, shape.tile_columns)
        self.pages = torch.full(layout, torch.nan, dtype=DTYPES[shape.itemsize])
        self.last = np.full((self.layers, self.rows), NEVER, dtype=np.int64)  # last position written

    def rows_of(self, sequence: int) -> slice:
        """The rows of one sequence."""
        return slice(sequence * self.sequence_rows, (sequence + 1) * self.sequence_rows)

    def clear(self, sequence: int = 0) -> None:
        """Forget every position of a sequence."""
        last = self.last[:, self.rows_of(sequence)]
        used = ceil_div(int(last.max()) + 1, self.page_positions)
        pages = self.pages[sequence * self.sequence_pages :][: self.sequence_pages]
        pages.unflatten(0, (-1, self.head_pages))[:, :used] = torch.nan
        last.fill(NEVER)

    def truncate(self, sequence: int, positions: int) -> None:
        """Forget what follows the first `positions` of a sequence: it was computed from drafts that were wrong."""
        last = self.last[:, self.rows_of(sequence)]
        np.minimum(last, positions - 1, out=last)

    def parts(self, region: Region, position: int) -> list[torch.Tensor]:
        """Views of the cache that hold a region's rows at one position, one for each tile they touch."""
        check_bounds(region, self.layers, self.rows)
        sequence, row = divmod(region.start, self.sequence_rows)
        parts, stop = [], row + region.stop - region.start
        page, slot = divmod(position, self.page_positions)
        page += self.shape.cache_page(region.layer, 0, 0, sequence)
        while row < stop:
            head, dim = divmod(row, self.head_rows)  # K and V heads in turn
            tile, column = divmod(dim, self.tile_columns)
            count = min(stop - row, self.head_rows - dim, self.tile_columns - column)
            index = page + head * self.head_pages
            parts.append(self.pages[index, tile, slot, column : column + count])
            row += count
        return parts

    def check_last(self, region: Region, position: int, action: str) -> None:
        """Every row must have been written at this position, and at none later."""
        last = self.last[region.layer, region.start : region.stop]
        wrong = last != position
        if wrong.any():
            row = int(wrong.argmax())
            when = "never written" if last[row] == NEVER else f"last written at position {last[row]}"
            raise Fault(f"{action}, but row {region.start + row} was {when}")

    def write(self, region: Region, values: torch.Tensor, position: int, again: bool = False) -> None:
        """Append fp32 rows [rows], rounded to the cache's type; positions must be written one after another.

        `again`: by a column that repeats the one before it, so that the position is written twice.
        """
        parts = self.parts(region, position)
        if values.shape != (region.stop - region.start,):
            raise Fault(f"writes {list(values.shape)} values to {region}")
        self.check_last(region, position if again else position - 1, f"writes {region} at position {position}")
        if torch.isnan(values).any():
            raise Fault(f"writes NaN to {region}: it used a value nobody wrote, or the model's numbers overflow")
        for part, chunk in zip(parts, values.split([part.numel() for part in parts]), strict=True):
            part.copy_(chunk)
        self.last[region.layer, region.start : region.stop] = position

    def place(self, index: int) -> tuple[int, int, int]:
        """Layer, K or V head among those of all sequences, and first position of page `index`."""
        sequence, own = divmod(index, self.sequence_pages)
        head, page = divmod(own, self.head_pages)
        layer, head = divmod(head, self.sequence_rows // self.head_rows)
        return layer, head + sequence * (self.sequence_rows // self.head_rows), page * self.page_positions

    def load(self, index: int, past: int, cached: int | None = None) -> torch.Tensor:
        """A copy of page `index`, [page elements], for a token with `past` positions before it; the rest of it is NaN.

        Where only the first `cached` of them are in the cache, so is what lies behind those.
        """
        layer, head, first = self.place(index)
        cached = past if cached is None else cached
        count = min(cached - first, self.page_positions)
        if not (0 <= index < len(self.pages) and past > first):
            raise Fault(f"loads KV page {index}, which holds none of the {past} positions cached")
        count = max(count, 0)
        last = int(self.last[layer, head * self.head_rows : (head + 1) * self.head_rows].min())
        if last < first + count - 1:
            name = f"{'KV'[head % 2]} of head {head // 2} in layer {layer}"
            raise Fault(f"loads KV page {index} ({name}) up to position {first + count - 1}, but only {last} is written")
        copy = self.pages[index].clone()
        copy[:, count:] = torch.nan
        return copy.flatten()

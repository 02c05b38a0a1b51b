"""KV cache with one row (slot) per running sequence; rows leave and enter during decoding.

All rows end at one common column, so that a step writes one column; the mask says how far a row reaches to the left.

      columns   0 . . . start . . . . write            row 0   . . . p p p p a a a      p prompt, a answer
                                                       row 1   . . . . . p p a a a      . not read: masked
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_SPARE_COLUMNS = 16  # room for answers when a buffer is made, and what it grows by


@dataclass
class Columns:
    """Which part of the slots is in use, the same in every layer.

    Attributes:
        max_rows: Slots of buffers that are made from now on.
        rows: Slots in use: the first ones.
        start: Column of the first token of the row that reaches furthest to the left.
        write: Column that the next token of every row goes to.
        capacity: Columns of the buffers.
        fill: What stands where a row has not written, if not 0; nobody may read it.
    """

    max_rows: int
    rows: int = 0
    start: int = 0
    write: int = 0
    capacity: int = 0
    fill: float = 0.0


class BatchCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, in buffers of shape (slots, heads, capacity, head dimension).

    Args:
        columns: Shared by all layers.
        keys: Of a prompt, for heads, dimension, dtype and device.
        values: The same.
    """

    is_sliding = False  # it holds every column; the mask keeps a sliding window's width

    def __init__(self, columns: Columns, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.columns, self.is_initialized = columns, True
        self.buffers = [self._empty(states, columns.capacity) for states in (keys, values)]

    def _empty(self, states: torch.Tensor, capacity: int) -> torch.Tensor:
        # A number, not whatever was there: a masked column still counts as 0 x its value, and 0 x NaN is NaN.
        shape = (self.columns.max_rows, states.shape[1], capacity, states.shape[3])
        return states.new_full(shape, self.columns.fill)

    @property
    def keys(self) -> torch.Tensor:
        """Those in use, shape (rows, heads, columns, head dimension)."""
        return self.buffers[0][: self.columns.rows, :, self.columns.start : self.columns.write]

    @property
    def values(self) -> torch.Tensor:
        """Those in use, shape (rows, heads, columns, head dimension)."""
        return self.buffers[1][: self.columns.rows, :, self.columns.start : self.columns.write]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the buffers are there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values of one token of each row, and returns those of all columns in use."""
        place = self.columns
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: place.rows, :, place.write : place.write + 1] = states
        used = slice(place.start, place.write + 1)
        return self.buffers[0][: place.rows, :, used], self.buffers[1][: place.rows, :, used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of columns that attention reads, and the first of them, counted from the first in use."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of columns in use."""
        return self.columns.write - self.columns.start

    def get_max_length(self) -> int:
        """Returns -1: buffers grow."""
        return -1

    def place(self, states: tuple[torch.Tensor, torch.Tensor], sources: list[int], row: int, column: int) -> None:
        """Copies keys and values of rows `sources` of `states` into the slots from `row` on, beginning at `column`."""
        for buffer, read in zip(self.buffers, states, strict=True):
            if self.columns.fill:
                buffer[row : row + len(sources)] = self.columns.fill
            buffer[row : row + len(sources), :, column : column + read.shape[2]] = read[sources]

    def move_rows(self, sources: list[int], targets: list[int]) -> None:
        """Copies the columns in use of some slots over those of others."""
        used = slice(self.columns.start, self.columns.write)
        for buffer in self.buffers:
            buffer[targets, :, used] = buffer[sources, :, used]

    def move_columns(self, shift: int, capacity: int) -> None:
        """Moves the columns in use by `shift`, in buffers that have `capacity` columns from now on."""
        place = self.columns
        old, new = slice(place.start, place.write), slice(place.start + shift, place.write + shift)
        for number, buffer in enumerate(self.buffers):
            target = buffer if buffer.shape[2] == capacity else self._empty(buffer, capacity)
            target[: place.rows, :, new] = buffer[: place.rows, :, old].clone()  # they may overlap
            self.buffers[number] = target


class BatchCache(Cache):
    """KV cache of the running candidates, one row each.

    Args:
        max_rows: Slots.
    """

    def __init__(self, max_rows: int) -> None:
        super().__init__(layers=[])
        self.layers: list[BatchCacheLayer] = []
        self.columns = Columns(max_rows)

    def make_room(self, width: int) -> None:
        """Arranges the columns so that rows of `width` tokens can enter and one token more be written."""
        place = self.columns
        if place.rows == 0:
            place.start = place.write = 0
        used = place.write - place.start
        if width <= place.write < place.capacity:
            return
        write = max(used, width)
        capacity = max(place.capacity, write + _SPARE_COLUMNS)
        for layer in self.layers:
            layer.move_columns(write - place.write, capacity)
        place.start, place.write, place.capacity = write - used, write, capacity

    def expect_no_more_rows(self) -> None:
        """Says that no row will enter any more: what the last rows grow to need not be as high as it was."""
        self.columns.max_rows = self.columns.rows

    def admit(self, states: list[tuple[torch.Tensor, torch.Tensor]], sources: list[int]) -> None:
        """Lets rows enter at the common column; their columns must have been made room for.

        Args:
            states: Keys and values of each layer, shape (prompts, heads, width, head dimension), ending together.
            sources: Which prompt each row goes on from, one number per new row.
        """
        place, width = self.columns, states[0][0].shape[2]
        self._begin(states)
        for layer, read in zip(self.layers, states, strict=True):
            layer.place(read, sources, place.rows, place.write - width)
        place.rows, place.start = place.rows + len(sources), min(place.start, place.write - width)

    def _begin(self, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if not self.layers:
            self.layers = [BatchCacheLayer(self.columns, *read) for read in states]

    def keep_only(self, rows: int, sources: list[int], targets: list[int]) -> None:
        """Leaves the first `rows` slots in use, after the slots `sources` have been copied over `targets`."""
        if sources:
            for layer in self.layers:
                layer.move_rows(sources, targets)
        self.columns.rows = rows


class CrossAttentionCache(BatchCache):
    """The same for what a decoder reads of its encoder: nothing is written to it, and rows begin at one column.

    Args:
        max_rows: Slots.
        width: Tokens of the longest prompt that will enter.
    """

    def __init__(self, max_rows: int, width: int) -> None:
        super().__init__(max_rows)
        self.columns.capacity = width

    def admit(self, states: list[tuple[torch.Tensor, torch.Tensor]], sources: list[int]) -> None:
        """Lets rows enter, their first token in column 0.

        Args:
            states: Keys and values of each layer, shape (prompts, heads, width, head dimension), beginning together.
            sources: Which prompt each row reads, one number per new row.
        """
        place, width = self.columns, states[0][0].shape[2]
        self._begin(states)
        for layer, read in zip(self.layers, states, strict=True):
            layer.place(read, sources, place.rows, 0)
        place.rows, place.write = place.rows + len(sources), max(place.write, width)

    def narrow(self, width: int) -> None:
        """Leaves the first `width` columns in use."""
        self.columns.write = width

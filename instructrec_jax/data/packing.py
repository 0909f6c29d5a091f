"""Packing: examples of any length into the rows of a batch, and what of an order of examples has been given away.

Examples come in order, each into the first row with room (first-fit). Where one has room in none, the batch ends, or, with a look-ahead,
up to so many examples wait for the next batch, in which they come first, while those behind them fill the rows. (Grain packs alike, at
about ten times the time per example, which on a processor is taken from the step.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from instructrec_jax.data.tokenise import FIELDS

Batch = dict[str, np.ndarray]
Table = Int32[np.ndarray, "tokens fields"]


class Position(NamedTuple):
    """How far an order has been given away: its places below ``given``, but for those that are ``held`` back (ascending)."""

    given: int = 0
    held: tuple[int, ...] = ()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Position:
        """From JSON values; ``held`` may be missing."""
        return cls(state["given"], tuple(state.get("held", ())))

    @property
    def count(self) -> int:
        """How many examples have been given away."""
        return self.given - len(self.held)


def packed(
    examples: Callable[[int], Table],
    first: int,
    held: Mapping[int, Table],
    rows: int,
    length: int,
    look_ahead: int = 0,
) -> tuple[Batch, int, dict[int, Table]]:
    """A batch of the examples ``held`` back, by place, and of those from place ``first`` on, each in the first row with room.

    Args:
        examples: place of the order to example, at most ``length`` tokens.
        first: place that comes next.
        held: examples of earlier places.
        rows: of the batch.
        length: places of a row.
        look_ahead: examples that may be held back at one time; 0 = the batch ends at the first one without room.

    Returns:
        The batch ``[rows, length]``, the place that comes next, and what is held back now.
    """
    fields = np.zeros((rows, length, len(FIELDS)), np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    used, count = [0] * rows, [0] * rows

    def has_room(table: Table) -> bool:
        size = len(table)
        row = next((row for row in range(rows) if used[row] + size <= length), None)
        if row is None:
            return False
        start, end = used[row], used[row] + size
        count[row] += 1
        fields[row, start:end] = table
        segments[row, start:end] = count[row]
        positions[row, start:end] = _COUNTING[:size] if size <= len(_COUNTING) else np.arange(size)
        used[row] = end
        return True

    waiting = {place: table for place, table in held.items() if not has_room(table)}
    place = first
    while min(used) < length:
        table = examples(place)
        if not has_room(table):
            if len(waiting) >= look_ahead:
                break
            waiting[place] = table
        place += 1
    columns = np.ascontiguousarray(np.moveaxis(fields, 2, 0))
    batch = {key: column.view(kind) for (key, kind), column in zip(FIELDS.items(), columns)}
    return {**batch, "segment_ids": segments, "positions": positions}, place, waiting


_COUNTING = np.arange(4096, dtype=np.int32)


@dataclass(frozen=True)
class Remaining:
    """Places of the order of all epochs that were not given away: ``holes`` (ascending, all below ``start``), then all from ``start``."""

    holes: tuple[int, ...] = ()
    start: int = 0

    def __getitem__(self, index: int) -> int:
        return self.holes[index] if index < len(self.holes) else self.start + index - len(self.holes)

    def after(self, positions: Sequence[Position]) -> Remaining:
        """What remains once each process p of N is at its position in places p, p + N, ... of these."""
        count = len(positions)
        following = [p + count * at.given for p, at in enumerate(positions)]
        beyond = max(*following, len(self.holes))
        held = [p + count * place for p, at in enumerate(positions) for place in at.held]
        behind = [i for i in range(min(following), beyond) if i // count >= positions[i % count].given]
        return Remaining(tuple(self[i] for i in sorted(held + behind)), self[beyond])

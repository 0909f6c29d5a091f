"""A table while it is checked: bad rows stop the reading, or are left out and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from instructrec_jax.data.sources import values
from instructrec_jax.data.sources.files import Loaded
from instructrec_jax.data.text import plain
from instructrec_jax.errors import DataError

_DROP_HINT = "; data.clean.bad_row: drop leaves such rows out and counts them"


@dataclass
class Rows:
    """A table while it is checked: the rows that are left, and what was dropped for which reason."""

    loaded: Loaded
    drop: bool  # bad_row
    table: pa.Table = field(init=False)
    record: Int[np.ndarray, " rows"] = field(init=False)  # record number in the file
    dropped: dict[str, tuple[int, int]] = field(default_factory=dict)  # reason -> (count, first row of the file)

    def __post_init__(self) -> None:
        self.table = self.loaded.table
        self.record = np.arange(self.table.num_rows)
        if self.loaded.broken:
            self.dropped["wrong number of fields"] = (self.loaded.broken, self.loaded.origin.broken()[0][0])

    @property
    def total(self) -> int:
        """Records in the file, broken ones included."""
        return self.loaded.table.num_rows + self.loaded.broken

    def row(self, index: int) -> int:
        """The file's row (1-based) of row ``index`` of the table as it is now."""
        return self.loaded.origin.row(self.record[index])

    def keep(self, mask: Bool[np.ndarray, " rows"]) -> None:
        """Keep only these rows."""
        self.table, self.record = self.table.filter(pa.array(mask)), self.record[mask]

    def reject(
        self,
        bad: Bool[np.ndarray, " rows"],
        reason: str,
        column: str,
        problem: Callable[[int], str],
        remedy: str,
        *,
        drop: bool | None = None,
    ) -> Bool[np.ndarray, " rows"]:
        """Stop at the first bad row, or drop the bad rows and count them. Returns the mask that was kept."""
        if not bad.any():
            return ~bad
        first, count = int(np.argmax(bad)), int(bad.sum())
        if not (self.drop if drop is None else drop):
            more = f" ({count:,} such rows)" if count > 1 else ""
            hint = _DROP_HINT if drop is None else ""
            raise DataError(
                problem(first) + more, file=self.loaded.file, row=self.row(first), column=column, remedy=remedy + hint
            )
        self.dropped[reason] = (count, self.row(first))
        self.keep(~bad)
        return ~bad

    def set(self, name: str, column: pa.Array) -> None:
        """Replace or add a column."""
        if name in self.table.column_names:
            self.table = self.table.set_column(self.table.column_names.index(name), name, column)
        else:
            self.table = self.table.append_column(name, column)

    def text(self, name: str) -> pa.Array:
        """A column as strings."""
        return values.as_text(self.table[name])

    def cell(self, name: str, index: int) -> str:
        """One cell, for a message."""
        value = str(self.table[name][index].as_py())
        return repr(value if len(value) <= 60 else value[:57] + "...")

    def filled(self, name: str) -> None:
        """Make a required text column strings; cells without visible text are bad rows."""
        text = self.text(name)
        self.set(name, text)
        # Most cells begin with a letter or digit; only the others can turn out to be empty.
        doubtful = ~pc.match_substring_regex(text, r"^[0-9A-Za-z]").to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(doubtful):
            doubtful[i] = not plain(text[int(i)].as_py())
        self.reject(doubtful, f"empty {name}", name, lambda _: "empty", f"fill in the {name}")

    def numbers(self, name: str) -> None:
        """Make a column float64, null where a cell is empty."""
        column, bad = values.as_numbers(self.table[name])
        good = self.reject(
            bad,
            f"{name} not a number",
            name,
            lambda i: f"{self.cell(name, i)} is not a number",
            "write a finite number like 4.5",
        )
        self.set(name, pa.array(column[good], pa.float64(), from_pandas=True))

    def integers(self, name: str) -> None:
        """Make a column int64; an empty cell is a bad row."""
        column, bad = values.as_integers(self.table[name])
        good = self.reject(
            bad,
            f"{name} not a whole number",
            name,
            lambda i: f"{self.cell(name, i)} is not a whole number",
            "write a whole number in every row, or leave the column out",
        )
        self.set(name, pa.array(column[good], pa.int64()))

    def times(self, name: str) -> str:
        """Make a time column int64 seconds; a finer part goes to ``nanosecond``. Returns a note on the unit."""
        seconds, nanos, bad, unit = values.as_times(self.table[name])
        good = self.reject(
            bad,
            f"{name} not a time",
            name,
            lambda i: f"{self.cell(name, i)} is not a time",
            "write seconds since 1970 or an ISO 8601 date in every row, or leave the column out",
        )
        self.set(name, pa.array(seconds[good], pa.int64()))
        if nanos.any():
            self.set("nanosecond", pa.array(nanos[good], pa.int64()))
        return f"{name} read as {unit}" if unit != "seconds" else ""

    def unique(self, name: str) -> None:
        """A key column: a second row with the same key is a bad row (the first one stays)."""
        first_of: dict[str, int] = {}
        twice = np.zeros(self.table.num_rows, bool)
        ids = self.table[name].to_pylist()
        for i, key in enumerate(ids):
            twice[i] = first_of.setdefault(key, i) != i
        self.reject(
            twice,
            f"duplicate {name}",
            name,
            lambda i: f"{ids[i]!r} stands in row {self.row(first_of[ids[i]])} and again in row {self.row(i)}",
            "keep one of the two rows",
        )

    def note(self) -> str:
        """What was dropped, in words."""
        return "; ".join(f"{n:,} dropped: {reason} (first: row {row})" for reason, (n, row) in self.dropped.items())

"""The tables that everything else is made from, and the indexed form that training and evaluation read.

Arrow schema (``RawData``), column by column:

| table | column | type | |
|---|---|---|---|
| interactions | ``user_id``, ``item_id`` | string | required; numbers are read as text, so ``007`` stays ``007`` |
| | ``timestamp`` | int64 | seconds; this or ``position`` is required |
| | ``position`` | int64 | order of the user's events, 1 = oldest |
| | ``rating`` | float64 | optional |
| | ``event`` | string | optional |
| items | ``item_id``, ``title`` | string | required, ``item_id`` unique, ``title`` not empty |
| | any other | string, float64 or list<string> | ``image_path`` and ``audio_path`` are kept as paths |
| users | ``user_id`` | string | required, unique |
| | any other | string or float64 | features |
| tags | ``user_id``, ``item_id``, ``tag`` | string | optional table: the users' own words |
| | ``timestamp`` | int64 | optional |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Int

TRAIN, VALID, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class Step:
    """One cleaning step with its counts, for the report: nothing is lost silently."""

    name: str
    interactions: tuple[int, int]  # before, after
    users: tuple[int, int]
    items: tuple[int, int]
    detail: str = ""


@dataclass(frozen=True)
class RawData:
    """Tables as read from a source: checked against the schema above, not yet cleaned."""

    name: str
    interactions: pa.Table
    items: pa.Table
    users: pa.Table | None = None
    tags: pa.Table | None = None
    steps: tuple[Step, ...] = ()

    def with_step(self, step: Step, **tables: pa.Table | None) -> RawData:
        """A copy with some tables replaced and one more step on record."""
        return replace(self, steps=(*self.steps, step), **tables)


@dataclass(frozen=True)
class Catalogue:
    """Items by index 0..I-1, in the order of the cleaned items table."""

    item_ids: list[str]
    titles: list[str]
    table: pa.Table  # all columns, row i = item index i

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """item_id -> item index."""
        return {item_id: i for i, item_id in enumerate(self.item_ids)}

    def lists(self, column: str) -> list[list[str]]:
        """A list column (genres, categories) as Python lists; empty lists where the column is absent."""
        if column not in self.table.column_names:
            return [[] for _ in self.item_ids]
        return [list(v) if v is not None else [] for v in self.table[column].to_pylist()]


@dataclass(frozen=True)
class Cases:
    """Evaluation cases: history = events ``[offsets[user], end)`` of the split data, truth = ``target``."""

    user: Int[np.ndarray, " cases"]
    end: Int[np.ndarray, " cases"]  # event index of the target: the history ends just before it
    target: Int[np.ndarray, " cases"]

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class SplitData:
    """Cleaned, ordered, split interactions as flat arrays. Events of one user are consecutive, oldest first."""

    name: str
    user_ids: list[str]
    catalogue: Catalogue
    offsets: Int[np.ndarray, " users_plus_1"]  # events of user u: [offsets[u], offsets[u+1])
    item: Int[np.ndarray, " events"]  # item index
    split: Int[np.ndarray, " events"]  # TRAIN, VALID or TEST; never decreasing within a user
    time: Int[np.ndarray, " events"] | None = None  # timestamp in seconds, if there is one
    rating: np.ndarray | None = None
    users: pa.Table | None = None  # row u = user index u (nulls where a user has no row)
    tags: list[tuple[int, int, str]] = field(
        default_factory=list
    )  # (user index or -1, item index, tag): training events only
    steps: tuple[Step, ...] = ()
    first_user: int = 0  # of a part: the number of its user 0 in the whole, which keys and records are made of

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.catalogue)

    @cached_property
    def user(self) -> Int[np.ndarray, " events"]:
        """User index of every event."""
        return np.repeat(np.arange(self.num_users), np.diff(self.offsets))

    @cached_property
    def repeats(self) -> bool:
        """Whether somebody has an item more than once: what a user had may be what they want next, so rankings leave nothing out."""
        pairs = self.user * np.int64(self.num_items) + self.item
        return len(np.unique(pairs)) < len(pairs)

    def history(self, user: int, end: int | None = None) -> Int[np.ndarray, " n"]:
        """Items of a user's events before event index ``end`` (default: all training events), oldest first."""
        start, stop = int(self.offsets[user]), int(self.offsets[user + 1])
        if end is None:
            return self.item[start:stop][self.split[start:stop] == TRAIN]
        return self.item[start:end]

    def histories(self, cases: Cases) -> list[Int[np.ndarray, " n"]]:
        """All events before each case's target."""
        return [self.history(int(user), int(end)) for user, end in zip(cases.user, cases.end)]

    def left_out(self, histories: Sequence[Int[np.ndarray, " n"]]) -> Sequence[Int[np.ndarray, " n"]] | None:
        """What is no candidate of a ranking: the items of the history, or None, nothing, where users have items again.

        There, leaving the history out but for the target would put a target that the user had before above all that resembles it.
        """
        return None if self.repeats else histories

    def part(self, first: int, last: int) -> SplitData:
        """Users ``first`` to ``last`` (exclusive) as data of their own, without copies; tags and the users table stay with the whole."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        return replace(
            self,
            user_ids=self.user_ids[first:last],
            offsets=self.offsets[first : last + 1] - start,
            item=self.item[start:stop],
            split=self.split[start:stop],
            time=None if self.time is None else self.time[start:stop],
            rating=None if self.rating is None else self.rating[start:stop],
            users=None,
            tags=[],
            first_user=self.first_user + first,
        )

    def parts(self, events: int) -> Iterator[SplitData]:
        """All users in parts of about so many events; a user is in one part."""
        for first, last in user_ranges(self.offsets, events):
            yield self.part(first, last)

    def cases(self, split: int) -> Cases:
        """Every event of a split that has at least one event before it, as an evaluation case."""
        index = np.flatnonzero(self.split == split)
        index = index[index > self.offsets[self.user[index]]]
        return Cases(user=self.user[index], end=index, target=self.item[index])

    @cached_property
    def train_popularity(self) -> Int[np.ndarray, " items"]:
        """Training interactions per item."""
        return np.bincount(self.item[self.split == TRAIN], minlength=self.num_items)


def user_ranges(offsets: Int[np.ndarray, " users_plus_1"], events: int) -> list[tuple[int, int]]:
    """(first, last + 1) of consecutive users with at least ``events`` events together, the end of the list aside."""
    out, first = [], 0
    while first < len(offsets) - 1:
        last = min(int(np.searchsorted(offsets, offsets[first] + events)), len(offsets) - 1)
        last = max(last, first + 1)
        out.append((first, last))
        first = last
    return out

"""Which events a family of instructions takes as targets: those with the smallest keys among all training events.

The key of the last one taken is found by counting, in one pass over the events. From then on every event decides by itself, so that
parts of the data give, each alone, what the whole gives; memory does not grow with the number of events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from instructrec_jax.data.schema import TRAIN, SplitData, user_ranges
from instructrec_jax.instructions.keyed import keys, mix_array

Parts = Callable[[], Iterable[SplitData]]  # the users of a data set, part by part; the same on every call

_ALL = (1 << 64) - 1
_CHUNK = 1 << 16  # events whose keys exist at one time: a processor's cache holds them, which is three times as fast
_SPREAD = 8.0  # standard deviations that the key of the last target may lie from where uniform keys put it


class Stage(NamedTuple):
    """A stretch of the training stream: one family, each event at most once."""

    family: str  # "sequential", or a family's name
    number: int  # of the family's keys
    first: int  # places of a user's events that are left out at the beginning, 0 or 1
    turn: int = 0  # how many times every event was taken before
    limit: int = _ALL  # events with keys up to this one are targets


@dataclass(frozen=True)
class Plan:
    """What all parts of a data set have in common."""

    stages: tuple[Stage, ...]  # in the order of the stream
    windows: int  # sequential windows of all users
    popularity: Int[np.ndarray, " items"]  # training events per item


class _Chunk(NamedTuple):
    """Events of some whole users, and what the keys of all stages have in common."""

    start: int  # index of the first event
    people: Int[np.ndarray, " users"]
    count: Int[np.ndarray, " users"]  # events of each
    of_place: UInt64[np.ndarray, " events"]  # the place of every event in its user's history, hashed
    free: tuple[
        Bool[np.ndarray, " events"], ...
    ]  # the training events, without the first ``Stage.first`` ones of every user

    def keys(self, seed: int, stage: Stage) -> UInt64[np.ndarray, " events"]:
        """The keys of all events, also of those that are not free."""
        of_user = keys(seed, stage.number, stage.turn, self.people)
        return mix_array(np.repeat(of_user, self.count) ^ self.of_place)


def _chunks(part: SplitData) -> Iterator[_Chunk]:
    for first, last in user_ranges(part.offsets, _CHUNK):
        start, stop = int(part.offsets[first]), int(part.offsets[last])
        count = np.diff(part.offsets[first : last + 1])
        place = np.arange(start, stop) - np.repeat(part.offsets[first:last], count)
        of_place = mix_array(np.arange(count.max(initial=0), dtype=np.uint64))[place]
        train = part.split[start:stop] == TRAIN
        yield _Chunk(start, np.arange(first, last) + part.first_user, count, of_place, (train, train & (place > 0)))


def targets(seed: int, stage: Stage, part: SplitData, most: int = 0) -> Int[np.ndarray, " targets"]:
    """The events of a part that a stage takes, ascending; of a user at most those ``most`` with the smallest keys (0 = all)."""
    found: list[np.ndarray] = []
    found_keys: list[np.ndarray] = []
    for chunk in _chunks(part):
        key = chunk.keys(seed, stage)
        taken = np.flatnonzero((key <= np.uint64(stage.limit)) & chunk.free[stage.first])
        found.append(taken + chunk.start)
        found_keys.append(key[taken])
    event = np.concatenate(found) if found else np.zeros(0, np.int64)
    if not most or not len(event):
        return event
    user = np.searchsorted(part.offsets, event, side="right") - 1
    order = np.lexsort((np.concatenate(found_keys), user))
    start = np.searchsorted(user, user)  # events are ascending, so users are
    return np.sort(event[order][np.arange(len(event)) - start < most])


def with_limits(stages: Sequence[tuple[Stage, int]], parts: Parts, seed: int, pool: Sequence[int]) -> list[Stage]:
    """The stages, each with the key that makes it take as many events as given (at least 1).

    Args:
        stages: (stage, number of events).
        parts: the users.
        seed: of the keys.
        pool: events that a stage with ``first`` 0, and one with ``first`` 1, may choose from.
    """
    limits: dict[Stage, int] = {stage: _ALL for stage, count in stages if count >= pool[stage.first]}
    open_stages = {stage: count for stage, count in stages if stage not in limits}
    spread = _SPREAD
    while open_stages:
        between = {stage: _bounds(count, pool[stage.first], spread) for stage, count in open_stages.items()}
        below = dict.fromkeys(open_stages, 0)
        near: dict[Stage, list[np.ndarray]] = {stage: [] for stage in open_stages}
        for part in parts():
            for chunk in _chunks(part):
                for stage, (low, high) in between.items():
                    key, free = chunk.keys(seed, stage), chunk.free[stage.first]
                    below[stage] += int(np.count_nonzero((key < low) & free))
                    near[stage].append(key[(key >= low) & (key <= high) & free])
        for stage, count in list(open_stages.items()):
            found, place = np.sort(np.concatenate(near[stage])), count - below[stage] - 1
            if 0 <= place < len(found):
                limits[stage] = int(found[place])
                del open_stages[stage]
        spread *= 8  # keys that are no random numbers to speak of; in the end every key lies between the bounds
    return [stage._replace(limit=limits[stage]) for stage, _ in stages]


def _bounds(count: int, pool: int, spread: float) -> tuple[np.uint64, np.uint64]:
    """Keys between which the ``count``-th smallest of ``pool`` uniform keys lies."""
    share = count / pool
    width = spread * ((share * (1 - share) / pool) ** 0.5 + 1 / pool)
    low, high = (int(min(max(at, 0.0), 1.0) * 2**64) for at in (share - width, share + width))
    return np.uint64(min(low, _ALL)), np.uint64(min(high, _ALL))

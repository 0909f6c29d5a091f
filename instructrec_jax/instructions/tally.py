"""Which labels, brands or words weigh most in histories: counted by numpy, for it is asked for as many histories as there are tastes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float, Int

_NEAR = 0.3  # share of the heaviest one's weight that another needs to be named beside it


class Tally:
    """Facets of every item, as numbers.

    Args:
        facets: of each item.
        damping: by what the weight of a facet is divided.
    """

    def __init__(self, facets: Sequence[Sequence[str]], damping: Callable[[str], float]):
        self._names = sorted(set(chain.from_iterable(facets)))
        number = {name: n for n, name in enumerate(self._names)}
        self._damping = np.array([damping(name) for name in self._names])
        self._size = np.fromiter(map(len, facets), np.int64, len(facets))
        self._start = np.cumsum(self._size) - self._size
        self._facet = np.fromiter(map(number.__getitem__, chain.from_iterable(facets)), np.int64)

    def heaviest(
        self,
        items: Int[np.ndarray, " events"],
        weights: Float[np.ndarray, " events"],
        most: int,
        history: Int[np.ndarray, " events"],
        histories: int,
        *,
        often: bool = False,
    ) -> list[list[str]]:
        """The ``most`` heaviest facets of some histories, the heaviest first, ties by name.

        Args:
            items: of the events of all histories.
            weights: of the events.
            most: facets of a history.
            history: whose event each is, 0..histories-1.
            histories: how many there are.
            often: only facets that a history meets twice, if there is any.
        """
        said: list[list[str]] = [[] for _ in range(histories)]
        size, facets = self._size[items], len(self._names)
        place = np.repeat(self._start[items] - (np.cumsum(size) - size), size)
        place += np.arange(len(place))
        cell = np.repeat(history, size) * facets + self._facet[place]
        if not len(cell):
            return said
        known = None
        if histories * facets > 8 * len(cell):  # no long table for a few numbers
            known, cell = np.unique(cell, return_inverse=True)
        times = np.bincount(cell)
        found = np.flatnonzero(times)
        total = np.bincount(cell, np.repeat(weights, size))[found]  # added up in the order of the events
        whose, facet = np.divmod(found if known is None else known[found], facets)
        if often:
            twice = times[found] > 1
            kept = twice | ~np.isin(whose, whose[twice])
            total, whose, facet = total[kept], whose[kept], facet[kept]
        score = total / self._damping[facet]
        begun = np.flatnonzero(np.diff(whose, prepend=-1))
        best = np.repeat(np.maximum.reduceat(score, begun), np.diff(begun, append=len(whose)))
        near = score >= _NEAR * best
        whose, facet, score = whose[near], facet[near], score[near]
        order = np.lexsort((facet, -score, whose))  # facets are numbered by name
        for number, name in zip(whose[order].tolist(), facet[order].tolist(), strict=True):
            if len(said[number]) < most:
                said[number].append(self._names[name])
        return said

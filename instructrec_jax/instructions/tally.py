"""Which labels, brands or words weigh most in a history: counted by numpy, for it is asked for as many histories as there are tastes."""

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
        self._names = list(dict.fromkeys(chain.from_iterable(facets)))
        number = {name: n for n, name in enumerate(self._names)}
        self._damping = np.array([damping(name) for name in self._names])
        self._all = np.arange(len(self._names))
        self._size = np.fromiter(map(len, facets), np.int64, len(facets))
        self._start = np.cumsum(self._size) - self._size
        self._facet = np.fromiter(map(number.__getitem__, chain.from_iterable(facets)), np.int64)

    def heaviest(
        self, items: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"], most: int, *, often: bool = False
    ) -> list[str]:
        """The ``most`` heaviest facets of a history, the heaviest first, ties by name; ``often``: only those met twice, if any is."""
        size = self._size[items]
        place = np.repeat(self._start[items] - (np.cumsum(size) - size), size)
        place += np.arange(len(place))
        facet = self._facet[place]
        known = self._all
        if len(known) > 8 * len(facet):  # no long table for a few numbers
            known, facet = np.unique(facet, return_inverse=True)
        times = np.bincount(facet)
        found = np.flatnonzero(times > (often and times.max(initial=0) > 1))
        if not len(found):
            return []
        total = np.bincount(facet, np.repeat(weights, size))[found]  # added up in the order of the events
        found = known[found]
        score = total / self._damping[found]
        near = score >= _NEAR * score.max()
        best = sorted((-s, self._names[n]) for s, n in zip(score[near].tolist(), found[near].tolist()))
        return [name for _, name in best[:most]]

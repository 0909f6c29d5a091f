"""SLIT: a linear model of what follows what, in closed form (Choi et al., "Session-aware Linear Item-Item Models for Session-based
Recommendation", WWW 2021, arXiv 2103.16104).

Every training event t gives one row of two matrices: X_t, what its user did before, and Y_t, what follows from t on, both by item and
weighted 1/distance (event t itself has the weight 1 in Y). The weights that minimise ||Y - XB||² + l2 ||B||² are

    B = (X'X + l2 I)⁻¹ X'Y

and a history scores the catalogue by its newest ``past`` events, weighted 1/distance, times B. Unlike EASE it knows the order of events,
and in small logs it is hard to beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError
from instructrec_jax.retrieval.base import check_dense, not_fitted, training_events

_EVENTS = 1 << 18  # rows of X and Y that exist at one time


class SLIT:
    """score = (the newest events of the history, weighted 1/distance) B."""

    name = "slit"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {
        "l2": (100.0, 30.0, 300.0, 1000.0, 3000.0),
        "past": (20, 10, 40),
        "future": (5, 1, 2, 10),
    }

    def __init__(self, l2: float = 100.0, past: int = 20, future: int = 5, max_items: int = 25_000) -> None:
        """Choose the model.

        Args:
            l2: the ridge.
            past: newest events that predict.
            future: events that are predicted from one place, the nearest ones.
            max_items: largest catalogue for which the dense system is solved.

        Raises:
            ConfigError: ``l2`` is not positive, or a number of events is below 1.
        """
        if not l2 > 0 or past < 1 or future < 1:
            raise ConfigError(f"slit: l2 = {l2}, past = {past}, future = {future}: want l2 > 0 and at least one event")
        self.l2, self.past, self.future, self.max_items = l2, past, future, max_items
        self.weights: np.ndarray | None = None
        self._system: tuple[np.ndarray, np.ndarray] | None = None

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Solve the system: about 16 I² bytes of memory and 3 I³ operations.

        Raises:
            ConfigError: the catalogue has more than ``max_items`` items.
        """
        self.weights = self.solved(self.system(data, include_valid))
        return self

    def system(self, data: SplitData, include_valid: bool) -> tuple[np.ndarray, np.ndarray]:
        """(X'X, X'Y), float32 ``[I, I]`` each: what does not depend on ``l2``."""
        items = data.num_items
        check_dense("slit", items, self.max_items, 16)
        use = training_events(data, include_valid)
        item, user = data.item[use], data.user[use]
        gram, cross = np.zeros((items, items), np.float32), np.zeros((items, items), np.float32)
        for first in range(0, len(item), _EVENTS):
            last = min(first + _EVENTS, len(item))
            before = _window(item, user, first, last, range(-self.past, 0), items)
            after = _window(item, user, first, last, range(self.future), items)
            gram += (before.T @ before).toarray()
            cross += (before.T @ after).toarray()
        return gram, cross

    def solved(self, system: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, "I I"]:
        """B of a system, with this ``l2``."""
        import scipy.linalg

        gram = system[0].copy()
        gram[np.diag_indices(len(gram))] += self.l2
        factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
        return scipy.linalg.cho_solve(factor, system[1], check_finite=False).astype(np.float32)

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """Newest events times weights; an empty history scores 0 everywhere."""
        if self.weights is None:
            raise not_fitted(self.name)
        return recent(histories, len(self.weights), self.past) @ self.weights


def recent(histories: Sequence[Int[np.ndarray, " n"]], items: int, past: int) -> sp.csr_matrix:
    """``[cases, I]``, float32: the newest ``past`` events of each history by item, weighted 1/distance to the event that follows."""
    newest = [np.asarray(h, np.int64)[::-1][:past] for h in histories]
    rows = np.repeat(np.arange(len(newest)), [len(h) for h in newest])
    columns = np.concatenate([np.zeros(0, np.int64), *newest])
    weights = np.concatenate([np.zeros(0), *(1 / np.arange(1, len(h) + 1) for h in newest)])
    return sp.csr_matrix((weights.astype(np.float32), (rows, columns)), shape=(len(newest), items))


def _window(
    item: Int[np.ndarray, " events"],
    user: Int[np.ndarray, " events"],
    first: int,
    last: int,
    places: range,
    items: int,
) -> sp.csr_matrix:
    """Row t: what the user of event t did at these places relative to it, weighted 1/distance."""
    rows, columns, weights = [], [], []
    here = np.arange(first, last)
    for place in places:
        there = here + place
        inside = here[(there >= 0) & (there < len(item))]
        same = inside[user[inside] == user[inside + place]]
        rows.append(same - first)
        columns.append(item[same + place])
        weights.append(np.full(len(same), 1 / (-place if place < 0 else place + 1), np.float32))
    cells = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    return sp.csr_matrix(cells, shape=(last - first, items))

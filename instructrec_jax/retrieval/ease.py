"""EASE: a linear item-item model in closed form (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW
2019, arXiv 1905.03375).

With X the binary users x items matrix and G = X'X, the weights that minimise ||X - XB||^2 + l2 ||B||^2 subject to
diag(B) = 0 are B_ij = -P_ij / P_jj off the diagonal, P = (G + l2 I)^-1 (equation 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError
from instructrec_jax.retrieval.base import check_dense, history_matrix, not_fitted, training_matrix


class EASE:
    """score = (the history as a 0/1 vector) B. ``last`` = N takes only the newest N events of the history."""

    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"l2": (500.0, 50.0, 100.0, 200.0, 1000.0, 2000.0)}

    def __init__(self, l2: float = 500.0, last: int | None = None, max_items: int = 25_000) -> None:
        """Choose the model.

        Args:
            l2: the ridge. Where it is large against item counts the model orders items as co-occurrence counts do, so
                one default serves small sets too.
            last: newest events of a history that are scored; None = all.
            max_items: largest catalogue for which the dense inverse is tried.

        Raises:
            ConfigError: ``l2`` is not positive, or ``last`` is below 1.
        """
        if not l2 > 0:
            raise ConfigError(f"ease: l2 = {l2}, want more than 0", remedy="the paper uses 200 to 1000")
        if last is not None and last < 1:
            raise ConfigError(f"ease: last = {last}, want at least 1, or none for the whole history")
        self.l2, self.last, self.max_items = l2, last, max_items
        self.weights: np.ndarray | None = None

    @property
    def name(self) -> str:
        """``ease`` or ``ease_last10``."""
        return "ease" if self.last is None else f"ease_last{self.last}"

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Invert the Gram matrix: about 24 I^2 bytes of memory and 2 I^3 operations.

        Raises:
            ConfigError: the catalogue has more than ``max_items`` items.
        """
        items = data.num_items
        check_dense("ease", items, self.max_items, 24)
        x = training_matrix(data, include_valid)
        by_item = x.T.tocsr()
        gram = np.empty((items, items), np.float64)
        # In stripes: the whole sparse product would be larger than the dense matrix where data are dense.
        for start in range(0, items, 1024):
            gram[start : start + 1024] = (by_item[start : start + 1024] @ x).toarray()
        gram[np.diag_indices(items)] += self.l2
        inverse = np.linalg.inv(gram)
        del gram
        weights = inverse.astype(np.float32)
        weights /= -np.diag(inverse).astype(np.float32)
        np.fill_diagonal(weights, 0)
        self.weights = weights
        return self

    def with_last(self, last: int | None) -> EASE:
        """The same fitted weights with another ``last``: the inverse is not computed again."""
        other = EASE(self.l2, last, self.max_items)
        other.weights = self.weights
        return other

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """History times weights; an empty history scores 0 everywhere."""
        if self.weights is None:
            raise not_fitted(self.name)
        return history_matrix(histories, len(self.weights), self.last) @ self.weights


class EaseLast(EASE):
    """EASE whose number of scored events is a setting to tune, under one name whatever it is."""

    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"last": (10, 1, 2, 3, 5, 20, 50, None), "l2": EASE.grid["l2"]}

    def __init__(self, l2: float = 500.0, last: int | None = 10, max_items: int = 25_000) -> None:
        """As ``EASE``."""
        super().__init__(l2, last, max_items)

    @property
    def name(self) -> str:
        """``ease_last``."""
        return "ease_last"

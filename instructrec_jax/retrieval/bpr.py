"""BPR: matrix factorisation that learns to rank, by the ``implicit`` library.

Rendle et al., "BPR: Bayesian personalized ranking from implicit feedback", UAI 2009: of an event and an item that the user did not
touch, the event shall score higher (log sigmoid of the difference, by stochastic gradients).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError
from instructrec_jax.retrieval.base import not_fitted, training_matrix


class BPR:
    """score = x_u . y_i + b_i for a user of the fit; for anybody else x is the mean of the history's y.

    A user's factor is what the fit left: it does not follow events that come later.
    """

    name = "bpr"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {
        "factors": (64, 32, 128),
        "learning_rate": (0.01, 0.005, 0.02, 0.05),
        "regularization": (0.01, 0.001, 0.03, 0.1),
        "iterations": (100, 50, 200, 400),
    }

    def __init__(
        self,
        factors: int = 64,
        learning_rate: float = 0.01,
        regularization: float = 0.01,
        iterations: int = 100,
        seed: int = 0,
    ) -> None:
        """Choose the model.

        Args:
            factors: D.
            learning_rate: of the stochastic gradients.
            regularization: of factors and biases.
            iterations: passes of as many samples as there are events.
            seed: of start and samples. One thread fits, so that a seed gives one result.

        Raises:
            ConfigError: a number that is not positive.
        """
        if factors < 1 or learning_rate <= 0 or regularization < 0 or iterations < 1:
            raise ConfigError(
                f"bpr: factors = {factors}, learning_rate = {learning_rate}, regularization = {regularization}, "
                f"iterations = {iterations}: all must be above 0"
            )
        self.factors, self.learning_rate, self.regularization = factors, learning_rate, regularization
        self.iterations, self.seed = iterations, seed
        self.user: Float[np.ndarray, "U D1"] | None = None  # a last column of ones beside the items' biases
        self.item: Float[np.ndarray, "I D1"] | None = None
        self._known: Bool[np.ndarray, " U"] = np.zeros(0, bool)

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Sample and step."""
        from implicit.cpu.bpr import BayesianPersonalizedRanking

        matrix = training_matrix(data, include_valid)
        model = BayesianPersonalizedRanking(
            self.factors,
            self.learning_rate,
            self.regularization,
            iterations=self.iterations,
            num_threads=1,
            random_state=self.seed,
        )
        model.fit(matrix, show_progress=False)
        self.user, self.item = np.asarray(model.user_factors), np.asarray(model.item_factors)
        self._known = np.diff(matrix.indptr) > 0
        return self

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """``users``: user indices of the fitted data; without them everybody is new. An empty history scores the biases."""
        if self.user is None or self.item is None:
            raise not_fitted(self.name)
        taste = np.zeros((len(histories), self.item.shape[1]), np.float32)
        taste[:, -1] = 1
        for row, history in enumerate(histories):
            if users is not None and self._known[users[row]]:
                taste[row] = self.user[users[row]]
            elif len(history):
                taste[row, :-1] = self.item[np.asarray(history, np.int64), :-1].mean(axis=0)
        return taste @ self.item.T

    def arrays(self) -> dict[str, np.ndarray]:
        """Both factors, and who was there at the fit."""
        if self.user is None or self.item is None:
            raise not_fitted(self.name)
        return {"user": self.user, "item": self.item, "known": self._known}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """See ``base.Stored``."""
        self.user, self.item, self._known = arrays["user"], arrays["item"], arrays["known"]
        return self

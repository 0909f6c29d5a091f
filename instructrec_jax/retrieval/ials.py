"""iALS: matrix factorisation for implicit feedback by alternating least squares, by the ``implicit`` library.

Hu, Koren and Volinsky, "Collaborative filtering for implicit feedback datasets", ICDM 2008: minimise
sum_ui c_ui (p_ui - x_u . y_i)^2 + reg (|x|^2 + |y|^2), where p is 1 for events and 0 elsewhere, c is ``alpha`` for events and 1
elsewhere. Rendle et al., "Revisiting the performance of iALS on item recommendation benchmarks" (RecSys 2022), show what tuning
gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError
from instructrec_jax.retrieval.base import history_matrix, not_fitted, training_matrix


class IALS:
    """score = x(history) . y_i, where x solves the user's half of the problem for the history: known and new users alike."""

    name = "ials"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {
        "factors": (64, 32, 128, 192),
        "alpha": (10.0, 2.0, 5.0, 20.0, 40.0),
        "regularization": (10.0, 0.1, 1.0, 30.0, 100.0),
        "iterations": (15, 30),
    }

    def __init__(
        self,
        factors: int = 64,
        alpha: float = 10.0,
        regularization: float = 10.0,
        iterations: int = 15,
        seed: int = 0,
    ) -> None:
        """Choose the model.

        Args:
            factors: D.
            alpha: weight of an event; everything else weighs 1.
            regularization: of both factors.
            iterations: alternations.
            seed: of the start.

        Raises:
            ConfigError: a number that is not positive.
        """
        if factors < 1 or alpha <= 0 or regularization <= 0 or iterations < 1:
            raise ConfigError(
                f"ials: factors = {factors}, alpha = {alpha}, regularization = {regularization}, iterations = {iterations}: "
                "all must be above 0"
            )
        self.factors, self.alpha, self.regularization = factors, alpha, regularization
        self.iterations, self.seed = iterations, seed
        self._model: Any = None

    def _fresh(self) -> Any:
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):  # the library warns of more, and has threads of its own
            return AlternatingLeastSquares(
                self.factors, self.regularization, self.alpha, iterations=self.iterations, random_state=self.seed
            )

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Alternate."""
        from threadpoolctl import threadpool_limits

        model = self._fresh()
        with threadpool_limits(1, "blas"):
            model.fit(training_matrix(data, include_valid), show_progress=False)
        self._model = model
        return self

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """Fold every history in, then one product; an empty history scores 0 everywhere."""
        if self._model is None:
            raise not_fitted(self.name)
        items = self._model.item_factors
        matrix = history_matrix(histories, len(items))
        found = self._model.recalculate_user(np.arange(len(histories)), matrix)
        return (found @ items.T).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """The item factors ``[I, D]``: a user's are solved for."""
        if self._model is None:
            raise not_fitted(self.name)
        return {"item": self._model.item_factors}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """See ``base.Stored``."""
        self._model = self._fresh()
        self._model.item_factors = np.ascontiguousarray(arrays["item"], np.float32)
        return self

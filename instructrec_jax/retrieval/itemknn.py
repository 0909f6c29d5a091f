"""Item-based nearest neighbours: cosine of item columns, by the ``implicit`` library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError
from instructrec_jax.retrieval.base import history_matrix, not_fitted, training_matrix


class ItemKNN:
    """score(j) = sum over the history's items i of cos(i, j), where j is among the ``neighbours`` nearest of i (i
    included).
    """

    name = "itemknn"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"neighbours": (100, 10, 20, 50, 200, 500)}

    def __init__(self, neighbours: int = 100) -> None:
        """neighbours: most entries kept per row of the similarity matrix. Raises ``ConfigError`` if below 1."""
        if neighbours < 1:
            raise ConfigError(f"itemknn: neighbours = {neighbours}, want at least 1")
        self.neighbours = neighbours
        self.similarity: Any = None  # SciPy CSR [I, I], float32

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Compute the similarity matrix."""
        from implicit.nearest_neighbours import CosineRecommender
        from implicit.utils import ParameterWarning

        model = CosineRecommender(K=self.neighbours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParameterWarning)  # the library hands itself a COO matrix
            model.fit(training_matrix(data, include_valid).astype(np.float64), show_progress=False)
        self.similarity = sp.csr_matrix(model.similarity).astype(np.float32)
        return self

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """Sum of the history items' similarity rows; an empty history scores 0 everywhere."""
        if self.similarity is None:
            raise not_fitted(self.name)
        return (history_matrix(histories, self.similarity.shape[0]) @ self.similarity).toarray()

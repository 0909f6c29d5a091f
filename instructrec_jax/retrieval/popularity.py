"""Popularity: the same list for everybody, by number of training interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.retrieval.base import not_fitted, training_events


class Popularity:
    """Score of an item = its training interactions."""

    name = "popularity"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {}

    def __init__(self) -> None:
        self.counts: np.ndarray | None = None

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Count."""
        self.counts = np.bincount(data.item[training_events(data, include_valid)], minlength=data.num_items).astype(
            np.float32
        )
        return self

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """The counts, once per case (a read-only view)."""
        if self.counts is None:
            raise not_fitted(self.name)
        return np.broadcast_to(self.counts, (len(histories), len(self.counts)))

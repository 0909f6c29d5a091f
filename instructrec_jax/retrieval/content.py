"""Likeness of content: the next item looks like the last ones. It needs no event of an item, so it ranks new items too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.data import features
from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.retrieval.base import not_fitted

WIDTH = 128  # of the text features that are made where none are given


class Content:
    """score = cosine of an item's text vector with the mean of the (unit) vectors of the newest ``last`` events."""

    name = "content"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"last": (10, 1, 2, 3, 5, 20, 50, None)}

    def __init__(self, last: int | None = 10, vectors: Float[np.ndarray, "I F"] | None = None) -> None:
        """Choose the model.

        Args:
            last: newest events of a history that count; None = all.
            vectors: text features of the items, see ``text_part``; None = TF-IDF + SVD of the catalogue's text.

        Raises:
            ConfigError: ``last`` below 1.
        """
        if last is not None and last < 1:
            raise ConfigError(f"content: last = {last}, want at least 1, or none for the whole history")
        self.last, self._given = last, vectors
        self.vectors: Float[np.ndarray, "I F"] | None = None  # of length 1, or 0 for an item without words

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Scale the vectors. (They are made from the catalogue and from training tags: ``include_valid`` changes nothing.)

        Raises:
            UserError: there are no vectors, or not one per item.
        """
        vectors = features.content_features(data, WIDTH) if self._given is None else self._given
        if len(vectors) != data.num_items:
            raise UserError(f"content: {len(vectors)} vectors for {data.num_items} items")
        if not vectors.any():
            raise UserError(
                f"{data.name}: no text features of items", remedy="set model.content_features or model.text_encoder"
            )
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.vectors = (vectors / np.where(length > 0, length, 1)).astype(np.float32)
        return self

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """Cosines; an empty history scores 0 everywhere."""
        if self.vectors is None:
            raise not_fitted(self.name)
        taste = np.zeros((len(histories), self.vectors.shape[1]), np.float32)
        for row, history in enumerate(histories):
            newest = np.asarray(history, np.int64)[-self.last if self.last else 0 :]
            if len(newest):
                taste[row] = self.vectors[newest].mean(axis=0)
        length = np.linalg.norm(taste, axis=1, keepdims=True)
        return (taste / np.where(length > 0, length, 1)) @ self.vectors.T


def text_part(item_features: Float[np.ndarray, "I Fc"], cooccurrence: int) -> Float[np.ndarray, "I F"]:
    """The columns of prepared item features that come from text; the last block comes from events.

    Args:
        item_features: as ``data/features.py: item_features`` writes them.
        cooccurrence: the setting ``model.cooccurrence_features``.
    """
    behind = min(cooccurrence, len(item_features) - 1)  # the block's width, as its SVD has it
    return item_features[:, : max(item_features.shape[1] - behind, 0)]

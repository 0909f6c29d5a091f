"""What weighs most in histories, before it is put into words: worked out by numpy for many histories at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.instructions.facets import Facets
from instructrec_jax.instructions.packs import FRAMES
from instructrec_jax.instructions.tally import Tally

MOST = 3  # names in a taste
_HALF_LIFE = 30  # events after which an event of the history counts half
_DISLIKED = 0.25  # weight of events rated below the history's own mean
_CLEAR = 0.5  # share of the history that a decade needs to be worth a word


class Taste(NamedTuple):
    """What weighs most in one history."""

    frame: str = ""  # of the domain, which the names fill; "" = there are none
    names: Sequence[str] = ()  # labels, brands or title words, the heaviest first, at most ``MOST``
    decade: int = 0  # of most of the weight; 0 = of no one decade


class Tastes:
    """Tastes by the facets of a catalogue.

    Args:
        facets: of the catalogue.
        length: events of a history that count, the newest.
    """

    def __init__(self, facets: Facets, length: int):
        self._facets, self._length = facets, length
        self._weights = 0.5 ** (np.arange(length - 1, -1, -1) / _HALF_LIFE)
        self._tallies: dict[str, Tally] = {}

    def of(
        self, data: SplitData, users: Int[np.ndarray, " histories"], ends: Int[np.ndarray, " histories"]
    ) -> list[Taste]:
        """The tastes that the users' events before the indices ``ends`` show.

        Weights are halved every 30 events back, and smaller for events rated below the history's mean.
        """
        start = np.maximum(data.offsets[users], ends - self._length)
        size = ends - start
        history = np.repeat(np.arange(len(ends)), size)
        event = np.arange(len(history)) + np.repeat(start - (np.cumsum(size) - size), size)
        items, weights = data.item[event], self._weights[event - ends[history]]
        if data.rating is not None:
            rating = np.asarray(data.rating[event], np.float64)
            known = ~np.isnan(rating)  # an unknown rating compares as not below
            total = np.bincount(history, np.where(known, rating, 0.0), len(ends))
            mean = total / np.maximum(np.bincount(history, known, len(ends)), 1)
            weights = np.where(rating < mean[history], weights * _DISLIKED, weights)

        frames, names = [""] * len(ends), [[] for _ in ends]
        unsaid = np.ones(len(ends), bool)
        for frame in FRAMES:
            left = unsaid[history]
            if not left.any():
                break
            found = self._tally(frame).heaviest(
                items[left], weights[left], MOST, history[left], len(ends), often=frame == "worded"
            )
            for number, said in enumerate(found):
                if said:
                    frames[number], names[number], unsaid[number] = frame, said, False
        return list(map(Taste, frames, names, self._heaviest_decades(items, weights, history, len(ends))))

    def _tally(self, frame: str) -> Tally:
        """The facets that a frame of the domain is filled with."""
        if frame not in self._tallies:
            facets = self._facets
            if frame == "labelled":
                of_items = facets.labels
            elif frame == "branded":
                of_items = [(brand,) if brand else () for brand in facets.brands]
            else:
                of_items = [words[:MOST] for words in facets.title_words]
            frequency = facets.document_frequency
            self._tallies[frame] = Tally(of_items, lambda facet: max(frequency[facet.lower()], 1) ** 0.25)
        return self._tallies[frame]

    @cached_property
    def _decades(self) -> tuple[Int[np.ndarray, " decades"], Int[np.ndarray, " items"]]:
        """The decades of the catalogue, and the place of each item's among them."""
        decades, of_item = np.unique(np.asarray(self._facets.decades, np.int64), return_inverse=True)
        return decades, of_item

    def _heaviest_decades(
        self,
        items: Int[np.ndarray, " events"],
        weights: Float[np.ndarray, " events"],
        history: Int[np.ndarray, " events"],
        histories: int,
    ) -> list[int]:
        """The decade of most of each history's weight, or 0."""
        decades, of_item = self._decades
        cell = history * len(decades) + of_item[items]
        total = np.bincount(cell, weights, histories * len(decades)).reshape(histories, -1)
        last = len(decades) - 1 - total[:, ::-1].argmax(axis=1)  # of decades as heavy as each other the newest
        # Both are added up in the order of the events: a share of exactly a half stays one.
        clear = total[np.arange(histories), last] >= _CLEAR * np.bincount(history, weights, histories)
        return np.where(clear & (np.bincount(history, minlength=histories) > 0), decades[last], 0).tolist()

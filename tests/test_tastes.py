"""Tastes of many histories at once are what one history after the other gives, event by event."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from instructrec_jax.instructions.facets import Facets
from instructrec_jax.instructions.packs import load_domain
from instructrec_jax.instructions.tastes import MOST, Taste, Tastes
from tests.small_split import small_split


def _plain(facets: Facets, items: list[int], ratings: list[float], length: int) -> Taste:
    """The taste of one history, oldest event first."""
    items, ratings = items[-length:], ratings[-length:]
    known = [rating for rating in ratings if rating == rating]
    mean = sum(known) / len(known) if known else 0.0
    back = range(len(items) - 1, -1, -1)
    weights = [0.5 ** (age / 30) * (0.25 if rating < mean else 1.0) for age, rating in zip(back, ratings, strict=True)]
    decades: dict[int, float] = {}
    for item, weight in zip(items, weights, strict=True):
        decades[facets.decades[item]] = decades.get(facets.decades[item], 0.0) + weight
    decade = max(decades, key=lambda d: (decades[d], d)) if decades else 0
    clear = decade if decades and decades[decade] >= 0.5 * sum(weights) else 0
    for frame, of_items in (
        ("labelled", facets.labels),
        ("branded", [(brand,) if brand else () for brand in facets.brands]),
        ("worded", [words[:3] for words in facets.title_words]),
    ):
        total: dict[str, float] = {}
        for item, weight in zip(items, weights, strict=True):
            for facet in of_items[item]:
                total[facet] = total.get(facet, 0.0) + weight
        times = Counter(facet for item in items for facet in of_items[item])
        if frame == "worded" and max(times.values(), default=0) > 1:
            total = {facet: weight for facet, weight in total.items() if times[facet] > 1}
        score = {f: weight / facets.document_frequency[f.lower()] ** 0.25 for f, weight in total.items()}
        best = sorted(score, key=lambda facet: (-score[facet], facet))[:MOST]
        if best:
            return Taste(frame, [facet for facet in best if score[facet] >= 0.3 * score[best[0]]], clear)
    return Taste("", [], clear)


@pytest.mark.parametrize("rated", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("length", [3, 64])
def test_many_tastes_are_those_of_each(labelled: bool, rated: bool, length: int) -> None:
    data = small_split(labelled=labelled, rated=rated)
    if data.rating is not None:
        rating = np.array(data.rating, np.float32)
        rating[::5] = np.nan
        data = replace(data, rating=rating)
    facets = Facets(data.catalogue, load_domain("films"))
    ends = np.random.default_rng(0).permutation(len(data.item))
    found = Tastes(facets, length).of(data, data.user[ends], ends)
    assert {taste.frame for taste in found} >= ({"labelled"} if labelled else {"worded"})
    assert any(taste.decade for taste in found) == labelled
    for end, taste in zip(ends.tolist(), found, strict=True):
        begun = int(data.offsets[data.user[end]])
        ratings = [np.nan] * (end - begun) if data.rating is None else data.rating[begun:end].tolist()
        assert taste == _plain(facets, data.item[begun:end].tolist(), ratings, length)

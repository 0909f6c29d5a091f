import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrec_jax.instructions.tally import Tally

_FACETS = st.lists(st.lists(st.sampled_from(string.ascii_letters), max_size=4, unique=True), min_size=1, max_size=40)


def _plain(
    facets: Sequence[Sequence[str]], frequency: Counter, weights: list[float], most: int, often: bool
) -> list[str]:
    """What ``Tally.heaviest`` says, one facet at a time."""
    total: dict[str, float] = {}
    times = Counter(facet for of_item in facets for facet in of_item)
    for of_item, weight in zip(facets, weights, strict=True):
        for facet in of_item:
            total[facet] = total.get(facet, 0.0) + weight
    if often and max(times.values(), default=0) > 1:
        total = {facet: weight for facet, weight in total.items() if times[facet] > 1}
    score = {facet: weight / frequency[facet] for facet, weight in total.items()}
    best = sorted(score, key=lambda facet: (-score[facet], facet))[:most]
    return [facet for facet in best if score[facet] >= 0.3 * score[best[0]]]


@given(_FACETS, st.data())
@settings(deadline=None)
def test_the_heaviest_facets_of_a_history(facets, data):
    """Few items of a catalogue with many facets as well as many of one with few."""
    items = data.draw(st.lists(st.integers(0, len(facets) - 1), max_size=60))
    weights = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 0.1]), min_size=len(items), max_size=len(items)))
    most, often = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    frequency = Counter(facet for of_item in facets for facet in of_item)
    tally = Tally(facets, frequency.__getitem__)
    found = tally.heaviest(np.array(items, np.int64), np.array(weights), most, often=often)
    assert found == _plain([facets[i] for i in items], frequency, weights, most, often)


def test_a_history_without_facets_says_nothing():
    assert Tally([(), ("a",)], lambda _: 1.0).heaviest(np.array([0, 0]), np.ones(2), 3) == []
    assert Tally([()], lambda _: 1.0).heaviest(np.array([0]), np.ones(1), 3) == []

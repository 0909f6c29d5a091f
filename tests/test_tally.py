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
def test_the_heaviest_facets_of_histories(facets, data):
    """Few items of a catalogue with many facets as well as many of one with few, of one history and of several."""
    one = st.lists(st.tuples(st.integers(0, len(facets) - 1), st.sampled_from([0.25, 0.5, 1.0, 0.1])), max_size=60)
    histories = data.draw(st.lists(one, min_size=1, max_size=5))
    most, often = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    frequency = Counter(facet for of_item in facets for facet in of_item)
    items, weights = (
        np.array([event[field] for history in histories for event in history], kind)
        for field, kind in ((0, np.int64), (1, np.float64))
    )
    whose = np.repeat(np.arange(len(histories)), list(map(len, histories)))
    found = Tally(facets, frequency.__getitem__).heaviest(items, weights, most, whose, len(histories), often=often)
    for said, history in zip(found, histories, strict=True):
        assert said == _plain([facets[i] for i, _ in history], frequency, [w for _, w in history], most, often)


def test_a_history_without_facets_says_nothing():
    whose = np.zeros(2, np.int64)
    assert Tally([(), ("a",)], lambda _: 1.0).heaviest(np.array([0, 0]), np.ones(2), 3, whose, 2) == [[], []]
    assert Tally([()], lambda _: 1.0).heaviest(np.array([0, 0]), np.ones(2), 3, whose, 1) == [[]]

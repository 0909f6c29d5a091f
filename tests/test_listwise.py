"""Tournament and sliding window: a perfect judge is obeyed, a judge sees no more than it can, nobody is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.errors import UserError
from instructrec_jax.scoring import Request
from instructrec_jax.scoring.listwise import sliding_window, tournament


class Judge:
    """Scores a candidate by its own number, and notes the largest list that it saw."""

    def __init__(self) -> None:
        self.most = self.calls = self.lists = 0

    def __call__(self, requests: list[Request]) -> list[np.ndarray]:
        self.calls += 1
        self.lists += len(requests)
        self.most = max([self.most, *(len(r.candidates) for r in requests)])
        return [np.asarray(r.candidates, np.float32) for r in requests]


LISTS = st.lists(st.lists(st.integers(0, 10_000), max_size=60, unique=True), max_size=5)


@given(LISTS, st.integers(2, 12), st.data())
def test_a_tournament_finds_the_best_and_loses_nobody(lists: list[list[int]], group: int, data: st.DataObject) -> None:
    judge = Judge()
    keep = data.draw(st.integers(1, group - 1))
    orders = tournament(judge, [Request([1], c) for c in lists], group=group, keep=keep)
    for candidates, order in zip(lists, orders):
        assert sorted(order.tolist()) == list(range(len(candidates)))
        if candidates:
            assert candidates[order[0]] == max(candidates)
    assert judge.most <= group


def test_the_papers_ten_groups_of_ten() -> None:
    judge = Judge()
    candidates = np.random.default_rng(0).permutation(100).tolist()
    order = tournament(judge, [Request([1], candidates)], group=10, keep=1)[0]
    assert (judge.calls, judge.lists, judge.most) == (2, 11, 10)
    assert candidates[order[0]] == 99
    assert len(order) == 100


@given(LISTS, st.integers(2, 12), st.data())
def test_a_window_carries_the_best_to_the_front(lists: list[list[int]], window: int, data: st.DataObject) -> None:
    judge = Judge()
    step = data.draw(st.integers(1, window - 1))
    orders = sliding_window(judge, [Request([1], c) for c in lists], window=window, step=step)
    for candidates, order in zip(lists, orders):
        assert sorted(order.tolist()) == list(range(len(candidates)))
        best = sorted(candidates, reverse=True)[: window - step]
        assert [candidates[i] for i in order[: len(best)]] == best
    assert judge.most <= window


def test_enough_passes_sort_everything() -> None:
    candidates = np.random.default_rng(1).permutation(40)
    order = sliding_window(Judge(), [Request([1], candidates)], window=4, step=2, passes=20)[0]
    assert candidates[order].tolist() == list(range(39, -1, -1))


def test_bad_numbers() -> None:
    with pytest.raises(UserError, match="group = 1, keep = 1"):
        tournament(Judge(), [], group=1)
    with pytest.raises(UserError, match="window = 4, step = 4"):
        sliding_window(Judge(), [], window=4, step=4)
    with pytest.raises(UserError, match="request 0: the whole catalogue cannot be ranked in groups"):
        tournament(Judge(), [Request([1])])

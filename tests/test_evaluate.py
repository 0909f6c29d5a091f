"""What ``evaluate`` writes beside its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from instructrec_jax.cases import Task, rank
from instructrec_jax.data.schema import TEST
from instructrec_jax.evaluate import write_lists
from instructrec_jax.evaluation.recommendations import evaluate_lists, read_recommendations
from tests.test_recommendations import toy


def test_the_written_list_knows_none_of_the_test_events(tmp_path: Path) -> None:
    """With two test events per user, an oracle that puts both on top must be judged perfect from its file.

    The list of a user's last case has the first test event in its history and leaves it out.
    """
    data = toy(test=2)
    cases = data.cases(TEST)
    assert len(cases) == 2 * data.num_users
    oracle = np.zeros((data.num_users, data.num_items), np.float32)
    for user, item in zip(cases.user, cases.target):
        oracle[user, item] = 1 + item / 100  # no ties
    ranked = rank(Task.of(data, cases), lambda a, b: oracle[cases.user[a:b]], 5)
    write_lists(tmp_path / "lists.csv.gz", data, cases, ranked)
    row = evaluate_lists(read_recommendations(tmp_path / "lists.csv.gz", data, k=5), data, cutoffs=(5,))
    np.testing.assert_allclose(row.values["ndcg@5"], 1)
    np.testing.assert_allclose(row.values["recall@5"], 1)


def test_where_users_have_items_again_nothing_is_left_out() -> None:
    """u0 ends with an item that it had; what ranks everything that a user had on top does not find it first for that."""
    data = toy(histories=((0, 1, 2, 1), (4, 5, 0, 3), (2, 3, 4, 5)))
    assert data.repeats and not toy().repeats
    task = Task.of(data, cases := data.cases(TEST))
    assert task.exclude is None and Task.of(toy(), toy().cases(TEST)).exclude is not None
    had = np.zeros((3, data.num_items), np.float32)
    for row, history in enumerate(task.histories):
        had[row, history] = [1, 2, 3]  # the newest is best
    ranked = rank(task, lambda a, b: had[a:b], 8)
    assert ranked.ranks.expected_rank.tolist() == [2, 4 + 4 / 2, 4 + 4 / 2]
    assert ranked.lists[0, :3].tolist() == [2, 1, 0]
    # Among sampled candidates, which hold none of the history, the target stands against the negatives alone.
    few = rank(replace(task, candidates=np.array([[3, 6], [6, 7], [6, 7]])), lambda a, b: had[a:b], 8)
    assert few.ranks.expected_rank.tolist() == [1, 2, 2]
    assert len(cases) == 3

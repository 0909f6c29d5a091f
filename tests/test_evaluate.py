"""What ``evaluate`` writes beside its tables."""

from __future__ import annotations

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
    histories = [data.history(int(u), int(e)) for u, e in zip(cases.user, cases.end)]
    oracle = np.zeros((data.num_users, data.num_items), np.float32)
    for user, item in zip(cases.user, cases.target):
        oracle[user, item] = 1 + item / 100  # no ties
    ranked = rank(Task(cases, histories), lambda a, b: oracle[cases.user[a:b]], 5)
    write_lists(tmp_path / "lists.csv.gz", data, cases, ranked)
    row = evaluate_lists(read_recommendations(tmp_path / "lists.csv.gz", data, k=5), data, cutoffs=(5,))
    np.testing.assert_allclose(row.values["ndcg@5"], 1)
    np.testing.assert_allclose(row.values["recall@5"], 1)

"""Tasks that begin later: each example once per epoch, exact after a restore, the same on any number of processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.data.curriculum import Curriculum, begins
from instructrec_jax.data.loader import training_iterator
from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import TASKS, task_of
from instructrec_jax.errors import ConfigError
from tests.test_loader import LENGTH, equal, made  # noqa: F401 - a fixture

LATER = {"search": 0.5, "describe": 1.0, "pointwise": 1.75}


@given(st.lists(st.sampled_from((0.0, 0.25, 0.5, 1.0, 1.5, 3.0)), min_size=1, max_size=40), st.integers(0, 3))
def test_each_epoch_has_what_has_begun_once(moments: list[float], seed: int) -> None:
    order, place = Curriculum(np.asarray(moments), seed), 0
    for epoch in range(6):
        due = [number for number, begin in enumerate(moments) if begin < epoch + 1]
        found = [order[place + n] for n in range(len(due))]
        assert sorted(found) == due
        place += len(due)


def test_a_task_that_begins_within_an_epoch_is_spread_over_its_rest() -> None:
    moments = np.repeat([0.0, 0.75], 2000)
    order = Curriculum(moments, 0)
    late = np.asarray([moments[order[place]] > 0 for place in range(4000)])
    # Three quarters of the early ones come first; then early and late ones mix evenly: 500 and 2,000.
    assert abs(int(np.argmax(late)) - 1500) < 60
    rest = late[1600:]
    assert abs(rest[: len(rest) // 2].mean() - 0.8) < 0.03 and abs(rest[len(rest) // 2 :].mean() - 0.8) < 0.03
    again = np.asarray([moments[order[place]] > 0 for place in range(4000, 8000)])
    assert abs(again[:1000].mean() - 0.5) < 0.06


def test_batches_know_no_task_before_its_time(made) -> None:  # noqa: F811
    read = Records(made[0])
    tasks = [task_of(read[n]) for n in range(len(read))]
    assert set(LATER) < set(tasks)
    stream = training_iterator(made[0], made[1], batch_size=4, sequence_length=LENGTH, seed=0, curriculum=LATER)
    given, found = 0, []
    while given < sum(tasks.count(task) for task in set(tasks) - {"describe", "pointwise"}):
        found.append(set(np.unique(next(stream)["task"]).tolist()))
        given = stream.get_state()["given"]
    stream.close()
    late = {TASKS.index(task) + 1 for task in ("describe", "pointwise")}
    assert not set.union(*found[:-1]) & late
    assert TASKS.index("search") + 1 not in found[0]


@pytest.mark.parametrize("steps", [1, 9])
def test_a_restored_iterator_continues_with_the_very_next_batch(made, steps: int) -> None:  # noqa: F811
    settings = {"batch_size": 4, "sequence_length": LENGTH, "seed": 3, "curriculum": LATER}
    whole = training_iterator(made[0], made[1], **settings)
    for _ in range(steps):
        next(whole)
    other = training_iterator(made[0], made[1], **settings)
    other.set_state(whole.get_state())
    assert all(equal(next(whole), next(other)) for _ in range(20))
    whole.close()
    other.close()


def test_processes_share_one_order(made) -> None:  # noqa: F811
    read = Records(made[0])
    order = Curriculum(begins(read, LATER), 0)
    streams = [
        training_iterator(
            made[0], made[1], batch_size=4, sequence_length=LENGTH, seed=0, curriculum=LATER, process_index=p, process_count=2
        )
        for p in range(2)
    ]  # fmt: skip
    for index, stream in enumerate(streams):
        batch = next(stream)
        count = stream.get_state()["given"]
        expected = Counter(TASKS.index(task_of(read[order[index + 2 * n]])) + 1 for n in range(count))
        rows = [np.stack([s, t], -1) for s, t in zip(batch["segment_ids"], batch["task"])]
        found = Counter(int(row[row[:, 0] == n][0, 1]) for row in rows for n in range(1, row[:, 0].max() + 1))
        assert found == expected
        stream.close()


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ({"serach": 1.0}, r"unknown task 'serach' \(did you mean 'search'"),
        ({"search": -1.0}, "search = -1"),
        ({"pairwise": 1.0}, "no example of pairwise"),
        (dict.fromkeys(("sequential", "search", "rerank", "pointwise", "describe"), 1.0), "no task begins at 0"),
    ],
)
def test_what_does_not_fit_is_an_error(made, curriculum: dict[str, float], message: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        begins(Records(made[0]), curriculum)

"""The table by wordings: what was trained on beside what was held out, on the same cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instructrec_jax import prepare, run, wordings
from instructrec_jax.config import Config
from instructrec_jax.data.schema import TEST
from instructrec_jax.instructions.example import InstructionExample
from tests.tiny import tiny_config, write_slice


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    tmp = tmp_path_factory.mktemp("wordings")
    write_slice(tmp / "data")
    config = tiny_config(tmp)
    prepare.prepare(config, lambda _: None)
    return config


class Oracle:
    """Knows the target of every prompt, but for those of held-out wordings of ``lost``: of them it ranks the target last."""

    def __init__(self, items: int, lost: str):
        self.items, self.lost = items, lost
        self.asked: list[str] = []

    def score_all(self, prompts: list[InstructionExample]) -> np.ndarray:
        scores = np.zeros((len(prompts), self.items), np.float32)
        for row, prompt in enumerate(prompts):
            self.asked.append(prompt.template)
            scores[row, prompt.target] = -1 if prompt.template.startswith(self.lost) else 1
        return scores


def test_held_out_wordings_are_told_from_trained_ones(config: Config) -> None:
    with run.session(config) as s:
        cases = s.prepared.data.cases(TEST)
        oracle: Any = Oracle(s.prepared.data.num_items, "gift")
        result = wordings.measure(s, oracle, cases, TEST, lambda _: None)
    assert result is not None
    found = {row.name: (row.metrics["ndcg@10"].mean, row.metrics["hr@1"].mean) for row in result.rows}
    assert found["sequential: seq.p1.a, trained"] == found["sequential: seq.p1.held, held out"] == (1, 1)
    assert found["search-vague: gift.p0.i1.search, held out"] == (0, 0)
    assert found["personal-search-vague: gift.p1.i1.search, held out"] == (0, 0)
    assert found["search, trained: mean of 3"] == (1, 1)
    assert found["search, held out: mean of 3"] == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert result.notes["search, held out"] == {
        "wordings": 3, "ndcg@10 mean": pytest.approx(1 / 3), "least": 0, "largest": 1,
    }  # fmt: skip
    # Every wording is asked as often: the cases are the same.
    assert len({oracle.asked.count(name) for name in set(oracle.asked)}) == 1 and len(set(oracle.asked)) == 8


def test_families_that_were_not_trained_and_the_number_of_cases(config: Config) -> None:
    some = replace(
        config,
        name="some",
        instructions=replace(config.instructions, families=("seq",)),
        evaluate=replace(config.evaluate, wording_cases=7),
    )
    prepare.prepare(some, lambda _: None)
    with run.session(some) as s:
        oracle: Any = Oracle(s.prepared.data.num_items, "none")
        result = wordings.measure(s, oracle, s.prepared.data.cases(TEST), TEST, lambda _: None)
    assert result is not None and result.cases <= 7
    states = {row.name.rpartition(", ")[2] for row in result.rows if row.name.startswith("search: ")}
    assert states == {"not trained", "held out"}

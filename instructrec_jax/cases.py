"""Cases of an evaluation: which ones, what is left out of their rankings, their candidates, and how a system ranks them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax import prepare
from instructrec_jax.config import Config
from instructrec_jax.data.schema import Cases, SplitData
from instructrec_jax.evaluation import metrics
from instructrec_jax.evaluation.hard_negatives import DEPTH, list_name, read_lists
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.negatives import listed_negatives, negatives_name, sample_negatives
from instructrec_jax.scoring import Scorer

_BLOCK = 512  # cases scored at a time: scores [block, I] are the largest array here


class Measured(Protocol):
    """A config and its prepared data: what cases and their candidates depend on."""

    @property
    def config(self) -> Config: ...  # noqa: D102
    @property
    def prepared(self) -> prepare.Prepared: ...  # noqa: D102


def sample_cases(cases: Cases, most: int, seed: int) -> Cases:
    """At most ``most`` cases, a fixed random sample in the original order."""
    if len(cases) <= most:
        return cases
    pick = np.sort(np.random.default_rng(seed).choice(len(cases), most, replace=False))
    return Cases(cases.user[pick], cases.end[pick], cases.target[pick])


def frozen_negatives(
    s: Measured, cases: Cases, histories: list[np.ndarray], n: int
) -> tuple[str, Int[np.ndarray, "cases n"]]:
    """The protocol's name with sampler and seed, and ``n`` frozen negatives of each case.

    Hard ones are the first of a user's list that the case allows; the name says how many had to be uniform.
    """
    settings, data = s.config.evaluate, s.prepared.data
    if settings.negatives == "file":
        lists, _ = read_lists(settings.negatives_file, data, s.config.data.hash_ids, k=n + DEPTH)
        negatives, taken = listed_negatives(
            lists[cases.user],
            data.num_items,
            histories,
            n,
            seed=settings.negatives_seed,
            user=cases.user,
            target=cases.target,
            best=True,
        )
        uniform = 1 - float(taken.mean()) / n
        name = f"1+{n} hard {list_name(settings.negatives_file)}"
        return f"{name}, {100 * uniform:.2g} % uniform seed {settings.negatives_seed}" if uniform else name, negatives
    counts = data.train_popularity if settings.negatives == "popularity" else None
    negatives = sample_negatives(
        data.num_items,
        histories,
        n,
        seed=settings.negatives_seed,
        user=cases.user,
        target=cases.target,
        popularity=counts,
    )
    return negatives_name(n, popularity=counts is not None, seed=settings.negatives_seed), negatives


def with_target(cases: Cases, negatives: Int[np.ndarray, "cases n"]) -> Int[np.ndarray, "cases C"]:
    """The target in column 0, and the negatives beside it."""
    return np.concatenate([cases.target[:, None], negatives], axis=1)


def rank_first(scores: Float[np.ndarray, "cases C"]) -> metrics.TargetRank:
    """Ranks of candidate 0 among the columns."""
    own = scores[:, :1]
    return metrics.TargetRank((scores > own).sum(1).astype(np.int64), (scores == own).sum(1).astype(np.int64) - 1)


def rank_cases(
    scorer: Scorer,
    prompts: list[InstructionExample],
    cases: Cases,
    exclude: Sequence[np.ndarray] | None,
    block: int = 1024,
) -> metrics.TargetRank:
    """Full-catalogue ranks of the targets, a block of cases at a time: scores ``[block, I]`` are never kept.

    ``exclude``: as of ``SplitData.left_out``.
    """
    parts = []
    for start in range(0, len(cases), block):
        stop = start + block
        scores: Float[np.ndarray, "cases I"] = scorer.score_all(prompts[start:stop])
        out = exclude and exclude[start:stop]
        parts.append(metrics.rank_of_target(scores, cases.target[start:stop], out, first_case=start))
    return metrics.TargetRank.concatenate(parts)


ScoreBlock = Callable[[int, int], Float[np.ndarray, "cases I"]]


@dataclass(frozen=True)
class Task:
    """Cases to rank, their histories, what is left out of each ranking, and the candidates of a sampled protocol."""

    cases: Cases
    histories: list[Int[np.ndarray, " n"]]
    exclude: Sequence[Int[np.ndarray, " n"]] | None  # see ``SplitData.left_out``
    candidates: Int[np.ndarray, "cases C"] | None = None

    @classmethod
    def of(cls, data: SplitData, cases: Cases) -> Task:
        """Full ranking of cases."""
        histories = data.histories(cases)
        return cls(cases, histories, data.left_out(histories))


@dataclass(frozen=True)
class Ranked:
    """One system's ranks and lists on a task."""

    ranks: metrics.TargetRank
    lists: Int[np.ndarray, "cases k"]
    scores: Float[np.ndarray, "cases k"]
    seconds: float


def rank(task: Task, score: ScoreBlock, k: int) -> Ranked:
    """Rank every case with ``score(start, stop)`` over the whole catalogue, a block of cases at a time."""
    ranks, lists, kept = [], [], []
    begun = time.perf_counter()
    for start in range(0, len(task.cases), _BLOCK):
        stop = min(start + _BLOCK, len(task.cases))
        scores = score(start, stop)
        chosen = None if task.candidates is None else task.candidates[start:stop]
        exclude = task.exclude and task.exclude[start:stop]
        ranks.append(
            metrics.rank_of_target(scores, task.cases.target[start:stop], exclude, candidates=chosen, first_case=start)
        )
        top = metrics.top_lists(scores, k, exclude, first_case=start)
        lists.append(top)
        kept.append(np.take_along_axis(scores, np.maximum(top, 0), axis=1))
    seconds = time.perf_counter() - begun
    return Ranked(metrics.TargetRank.concatenate(ranks), np.concatenate(lists), np.concatenate(kept), seconds)


def against_negatives(s: Measured, task: Task, n: int) -> tuple[str, Task]:
    """The same cases against ``n`` frozen negatives each, and the protocol's name with sampler and seed."""
    name, negatives = frozen_negatives(s, task.cases, task.histories, n)
    return name, replace(task, candidates=negatives)

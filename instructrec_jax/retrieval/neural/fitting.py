"""Epochs with early stopping on validation NDCG@10, and what fitted parameters look like on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from instructrec_jax.config import MeshConfig
from instructrec_jax.data.schema import VALID, Cases, SplitData
from instructrec_jax.evaluation.metrics import TargetRank, metrics_at, rank_of_target
from instructrec_jax.retrieval.base import Budget
from instructrec_jax.training.mesh import make_mesh

Params = dict[str, Any]
Score = Callable[[Any, list[np.ndarray], np.ndarray], np.ndarray]  # parameters, histories, users -> [cases, I]
_BLOCK = 512  # cases scored at a time


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """A mesh of one device: these models are small, and a result must not depend on how many devices there are."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        yield


def run_epochs(
    state: Any,
    epoch: Callable[[Any, int], Any],
    params_of: Callable[[Any], Params],
    validate: Callable[[Params], float] | None,
    budget: Budget,
) -> tuple[Params, int, list[float]]:
    """Epochs until validation has not improved for ``budget.patience`` of them: (best parameters on the host, their epoch, curve).

    Without ``validate`` all ``budget.epochs`` are run and the last parameters are the best.
    """
    best: Params | None = None
    chosen, curve = budget.epochs, []
    for number in range(1, budget.epochs + 1):
        state = epoch(state, number)
        if validate is None:
            continue
        curve.append(validate(params_of(state)))
        if best is None or curve[-1] > curve[chosen - 1]:
            best, chosen = jax.tree.map(np.asarray, params_of(state)), number
        elif number - chosen >= budget.patience:
            break
    return best if best is not None else jax.tree.map(np.asarray, params_of(state)), chosen, curve


def validation(data: SplitData, score: Score, budget: Budget) -> Callable[[Params], float] | None:
    """Mean NDCG@10 over (a fixed sample of) the validation cases, full ranking; None where there are none."""
    cases = data.cases(VALID)
    if not len(cases):
        return None
    if len(cases) > budget.users:
        pick = np.sort(np.random.default_rng(budget.seed).choice(len(cases), budget.users, replace=False))
        cases = Cases(cases.user[pick], cases.end[pick], cases.target[pick])
    histories = [data.history(int(u), int(e)) for u, e in zip(cases.user, cases.end)]

    def mean(params: Params) -> float:
        parts = []
        for start in range(0, len(cases), _BLOCK):
            part = slice(start, start + _BLOCK)
            scores = score(params, histories[part], cases.user[part])
            parts.append(rank_of_target(scores, cases.target[part], histories[part], first_case=start))
        return float(metrics_at(TargetRank.concatenate(parts), (10,))["ndcg@10"].mean())

    return mean


def flat(params: Params) -> dict[str, np.ndarray]:
    """Nested parameters by names like ``layer_0/query``."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in found}


def nested(arrays: Mapping[str, np.ndarray]) -> Params:
    """The inverse of ``flat``."""
    out: Params = {}
    for name, value in arrays.items():
        *folders, last = name.split("/")
        place = out
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return out

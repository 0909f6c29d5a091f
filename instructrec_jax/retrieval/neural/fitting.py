"""Epochs with early stopping on validation NDCG@10, and what fitted parameters look like on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from instructrec_jax.config import MeshConfig
from instructrec_jax.data.schema import VALID, Cases, SplitData
from instructrec_jax.evaluation.metrics import TargetRank, metrics_at, rank_of_target
from instructrec_jax.retrieval.base import Budget
from instructrec_jax.training.mesh import make_mesh

Params = dict[str, Any]
Epoch = Callable[[Any, int], Any]  # state, number from 1 -> state
Score = Callable[[Any, list[np.ndarray], np.ndarray], np.ndarray]  # parameters, histories, users -> [cases, I]
_BLOCK = 512  # cases scored at a time
_QUIET = 15  # seconds between lines of progress


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """A mesh of one device: these models are small, and a result must not depend on how many devices there are."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        yield


class Fitted(NamedTuple):
    """What a fit gives."""

    params: Params  # on the host
    epochs: int  # that they were trained for
    curve: list[float]  # validation NDCG@10 after every epoch of the fit that chose their number


def fitted(
    training: Callable[[bool], tuple[Any, Epoch]],
    validate: Callable[[Params], float] | None,
    budget: Budget,
    *,
    include_valid: bool,
    epochs: int | None,
) -> Fitted:
    """Train for as long as validation says, or for ``epochs``; with ``include_valid`` then once more, on all events for as long.

    Args:
        training: (first state, function of an epoch) without or with the validation events; a state begins with the parameters.
        validate: mean NDCG@10 of parameters; None where there are no validation cases: then all of the budget is used.
        budget: most epochs, patience.
        include_valid: what ``fit`` was asked for.
        epochs: a number chosen before; None = choose.
    """
    if epochs is not None:
        return run_epochs(*training(include_valid), None, replace(budget, epochs=epochs))
    if validate is None or not include_valid:
        return run_epochs(*training(include_valid), validate, budget)
    _, chosen, curve = run_epochs(*training(False), validate, budget)
    return run_epochs(*training(True), None, replace(budget, epochs=chosen))._replace(curve=curve)


def run_epochs(state: Any, epoch: Epoch, validate: Callable[[Params], float] | None, budget: Budget) -> Fitted:
    """Epochs until validation has not improved for ``budget.patience`` of them; the best parameters are kept, without validation the
    last.
    """
    best, chosen, curve = None, budget.epochs, []
    said = time.monotonic()
    for number in range(1, budget.epochs + 1):
        state = epoch(state, number)
        value = ""
        if validate is not None:
            curve.append(validate(state[0]))
            value = f", validation ndcg@10 {curve[-1]:.4f}"
            if best is None or curve[-1] > curve[chosen - 1]:
                best, chosen = jax.tree.map(np.asarray, state[0]), number
            elif number - chosen >= budget.patience:
                break
        if budget.say is not None and time.monotonic() - said > _QUIET:
            said = time.monotonic()
            budget.say(f"    epoch {number} of at most {budget.epochs}{value}")
    return Fitted(best if best is not None else jax.tree.map(np.asarray, state[0]), chosen, curve)


def validation(data: SplitData, score: Score, budget: Budget) -> Callable[[Params], float] | None:
    """Mean NDCG@10 over (a fixed sample of) the validation cases, full ranking; None where there are none."""
    cases = data.cases(VALID)
    if not len(cases):
        return None
    if len(cases) > budget.users:
        pick = np.sort(np.random.default_rng(budget.seed).choice(len(cases), budget.users, replace=False))
        cases = Cases(cases.user[pick], cases.end[pick], cases.target[pick])
    histories = data.histories(cases)
    exclude = data.left_out(histories)

    def mean(params: Params) -> float:
        parts = []
        for start in range(0, len(cases), _BLOCK):
            part = slice(start, start + _BLOCK)
            scores = score(params, histories[part], cases.user[part])
            out = exclude and exclude[part]
            parts.append(rank_of_target(scores, cases.target[part], out, first_case=start))
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

"""Ranking metrics per case, and what lists of recommendations look like beyond accuracy.

**The tie rule.** A metric is its expected value when the items that share the target's score are put in a uniformly
random order. With ``greater`` candidates scored strictly above the target and ``ties`` *other* candidates scored
exactly like it, the target's position is uniform on ``greater + 1 .. greater + ties + 1``. The expectation has a closed
form, so the rule is
deterministic, does not depend on the order of the catalogue, and neither rewards nor punishes a constant score: a
recommender that scores all I items alike gets HR@k = k / I. (Cf. McSherry and Najork, "Computing information retrieval
performance measures efficiently in the presence of tied scores", ECIR 2008.)

**Who is a candidate.** Every item of the catalogue except those in the case's history; the target is always a
candidate, even when the user had it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from instructrec_jax.data import store
from instructrec_jax.errors import UserError

MISSING = -1  # an empty place of a list
UNKNOWN = -2  # an item outside the catalogue; further unknown items may be told apart by -3, -4, ...
NOT_RANKED = int(np.iinfo(np.int64).max) // 2  # "greater" of a target that is in no list

Exclude = Any  # one array of item indices per case, or a SciPy sparse [cases, I]


@dataclass(frozen=True)
class TargetRank:
    """Where the target stands: ``greater`` candidates above it, ``ties`` other candidates level with it."""

    greater: Int[np.ndarray, " cases"]
    ties: Int[np.ndarray, " cases"]

    def __len__(self) -> int:
        return len(self.greater)

    @property
    def expected_rank(self) -> Float[np.ndarray, " cases"]:
        """Mean position over tie orders, 1 = best; infinite where the target is not ranked."""
        rank = 1.0 + self.greater + self.ties / 2
        return np.where(self.greater >= NOT_RANKED, np.inf, rank)

    @staticmethod
    def concatenate(parts: Sequence[TargetRank]) -> TargetRank:
        """Batches put end to end."""
        if not parts:
            return TargetRank(np.zeros(0, np.int64), np.zeros(0, np.int64))
        return TargetRank(np.concatenate([p.greater for p in parts]), np.concatenate([p.ties for p in parts]))


def rank_of_target(
    scores: Float[np.ndarray, "cases I"],
    target: Int[np.ndarray, " cases"],
    exclude: Exclude | None = None,
    *,
    candidates: Int[np.ndarray, "cases C"] | None = None,
    first_case: int = 0,
) -> TargetRank:
    """Count the candidates above and level with each case's target.

    Args:
        scores: higher is better; infinities are ordinary values.
        target: item index of the truth.
        exclude: items that are no candidates (the history); the target stays one even if it is listed.
        candidates: rank only against these item indices, for sampled protocols (-1 = none; the target and repeats are
            not counted). Default: the whole catalogue.
        first_case: number of the batch's first case, for messages.

    Raises:
        UserError: a score is NaN, a target or index is outside the catalogue, or shapes do not match.
    """
    scores, target = np.asarray(scores), np.asarray(target)
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise UserError(f"scores {scores.shape} and targets {target.shape} do not match: want [cases, I] and [cases]")
    cases, items = scores.shape
    if cases and (target.min() < 0 or target.max() >= items):
        bad = int(np.flatnonzero((target < 0) | (target >= items))[0])
        raise UserError(f"case {first_case + bad}: target {target[bad]} is outside the catalogue of {items} items")
    _no_nan(scores, first_case)
    own = scores[np.arange(cases), target]
    if candidates is None:
        greater = np.count_nonzero(scores > own[:, None], axis=1).astype(np.int64)
        ties = np.count_nonzero(scores == own[:, None], axis=1).astype(np.int64) - 1
        sign, rows, columns = -1, *_pairs(exclude, cases, items, first_case)
    else:
        greater, ties = np.zeros(cases, np.int64), np.zeros(cases, np.int64)
        sign, rows, columns = 1, *_candidate_pairs(candidates, exclude, cases, items, first_case)
    keep = columns != target[rows]
    rows, columns = rows[keep], columns[keep]
    other = scores[rows, columns]
    greater += sign * np.bincount(rows[other > own[rows]], minlength=cases)
    ties += sign * np.bincount(rows[other == own[rows]], minlength=cases)
    return TargetRank(greater, ties)


def rank_in_lists(lists: Int[np.ndarray, "cases k"], target: Int[np.ndarray, " cases"]) -> TargetRank:
    """Rank of the target in ranked lists: its first place, or ``NOT_RANKED`` where the list lacks it."""
    lists, target = np.asarray(lists), np.asarray(target)
    hit = lists == target[:, None]
    place = hit.argmax(1) if lists.shape[1] else np.zeros(len(lists), np.int64)
    return TargetRank(np.where(hit.any(1), place, NOT_RANKED).astype(np.int64), np.zeros(len(lists), np.int64))


def metrics_at(ranks: TargetRank, cutoffs: Sequence[int]) -> dict[str, Float[np.ndarray, " cases"]]:
    """``hr@k``, ``ndcg@k`` and ``mrr@k`` per case, for one relevant item, by the tie rule above. All lie in [0, 1].

    At position p (1 = best) a case earns, if p <= k and else nothing: HR 1, NDCG 1 / log2(p + 1) (the ideal DCG of one
    relevant item is 1), MRR 1 / p.
    """
    check_cutoffs(cutoffs)
    places = np.arange(max(cutoffs, default=0), dtype=np.float64)
    out: dict[str, Float[np.ndarray, " cases"]] = {}
    for name, gain in (("hr", np.ones_like(places)), ("ndcg", 1 / np.log2(places + 2)), ("mrr", 1 / (places + 1))):
        total = np.concatenate([[0.0], np.cumsum(gain)])  # total[p] = gain of the first p places
        for k in cutoffs:
            first, last = np.minimum(ranks.greater, k), np.minimum(ranks.greater + ranks.ties + 1, k)
            out[f"{name}@{k}"] = (total[last] - total[first]) / (ranks.ties + 1)
    return out


def list_metrics(
    lists: Int[np.ndarray, "cases k"], relevant: Sequence[np.ndarray], cutoffs: Sequence[int]
) -> dict[str, Float[np.ndarray, " cases"]]:
    """``recall@k``, ``ndcg@k``, ``hr@k`` and ``mrr@k`` of ranked lists with one or more relevant items per case.

    Recall = hits in the first k / number of relevant items. NDCG = DCG / ideal DCG, where the ideal list starts with
    min(k, number of relevant items) hits. HR = 1 if the first k hold any relevant item. MRR = 1 / place of the first
    hit. An item counts once, at its first place; a repeat fills a place and earns nothing. With one relevant item these
    are the same as ``metrics_at``.

    Raises:
        UserError: a case has no relevant item (such cases are not evaluated: drop them, and say how many).
    """
    check_cutoffs(cutoffs)
    lists = np.asarray(lists)
    cases, width = lists.shape
    sizes = np.array([len(np.unique(r)) for r in relevant], dtype=np.int64)
    if len(sizes) != cases:
        raise UserError(f"{cases} lists but {len(sizes)} sets of relevant items")
    if (sizes == 0).any():
        raise UserError(
            f"case {int(np.flatnonzero(sizes == 0)[0])} has no relevant item", remedy="leave such cases out"
        )
    span = 1 + max(int(lists.max(initial=0)), max((int(np.max(r)) for r in relevant), default=0))
    wanted = (
        np.concatenate([np.unique(r) + i * span for i, r in enumerate(relevant)]) if cases else np.zeros(0, np.int64)
    )
    keys = lists.astype(np.int64) + np.arange(cases)[:, None] * span
    hit = np.isin(keys, wanted) & (lists >= 0) & ~_repeats(lists)
    discount = 1 / np.log2(np.arange(max(width, max(cutoffs))) + 2.0)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    first = np.where(hit.any(1), hit.argmax(1) if width else 0, NOT_RANKED)
    out: dict[str, Float[np.ndarray, " cases"]] = {}
    for k in cutoffs:
        top = hit[:, :k]
        out[f"recall@{k}"] = top.sum(1) / sizes
        out[f"ndcg@{k}"] = (top * discount[: top.shape[1]]).sum(1) / ideal[np.minimum(k, sizes)]
        out[f"hr@{k}"] = (first < k).astype(np.float64)
        out[f"mrr@{k}"] = np.where(first < k, 1.0 / (np.minimum(first, k) + 1), 0.0)
    return out


def top_lists(
    scores: Float[np.ndarray, "cases I"], k: int, exclude: Exclude | None = None, *, first_case: int = 0
) -> Int[np.ndarray, "cases k"]:
    """The k best items per case, best first; -1 where fewer than k are left. A score of -inf is never recommended.

    A list needs one order: equal scores go by item index. Accuracy does not depend on it (``rank_of_target``).

    Raises:
        UserError: a score is NaN.
    """
    scores = np.array(scores, copy=True)
    cases, items = scores.shape
    _no_nan(scores, first_case)
    rows, columns = _pairs(exclude, cases, items, first_case)
    scores[rows, columns] = -np.inf
    out = np.full((cases, k), MISSING, np.int32)
    if not cases or not items or k < 1:
        return out
    # Everything at or above the k-th value, then a full sort of those few: exact also where ties straddle place k.
    floor = np.partition(scores, items - min(k, items), axis=1)[:, items - min(k, items)]
    rows, columns = np.nonzero((scores >= floor[:, None]) & (scores > -np.inf))
    order = np.lexsort((columns, -scores[rows, columns], rows))
    rows, columns = rows[order], columns[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    keep = place < k
    out[rows[keep], place[keep]] = columns[keep]
    return out


# ------------------------------------------------------------------------------------------------------ beyond accuracy


def list_quality(
    lists: Int[np.ndarray, "cases k"], popularity: Int[np.ndarray, " I"], k: int
) -> dict[str, Float[np.ndarray, " cases"]]:
    """Per-case qualities of the first k places. NaN where a case has nothing to average over.

    ``popularity@k``: mean number of training interactions of the recommended items. ``novelty@k``: mean of
    -log2 p(item) in bits, p = (count + 1) / (all counts + I), so an item never seen in training is finite.
    ``out_of_catalogue@k``: share of the filled places that hold no catalogue item. ``duplicate@k``: share of the filled
    places that repeat an earlier one (``UNKNOWN`` has no identity and is never a repeat; -3, -4, ... have one).
    ``short@k``: 1 where fewer than k places are filled.
    """
    lists, popularity = _first(lists, k), np.asarray(popularity)
    items = len(popularity)
    known = (lists >= 0) & (lists < items)
    filled = lists != MISSING
    bits = -np.log2((popularity + 1.0) / (popularity.sum() + items)) if items else np.zeros(0)
    index = np.where(known, lists, 0)
    take = (lambda a: np.where(known, a[index], 0.0)) if items else (lambda a: np.zeros(lists.shape))
    return {
        f"popularity@{k}": _ratio(take(popularity.astype(np.float64)).sum(1), known.sum(1)),
        f"novelty@{k}": _ratio(take(bits).sum(1), known.sum(1)),
        f"out_of_catalogue@{k}": _ratio((filled & ~known).sum(1), filled.sum(1)),
        f"duplicate@{k}": _ratio(_repeats(lists).sum(1), filled.sum(1)),
        f"short@{k}": (filled.sum(1) < k).astype(np.float64),
    }


def exposure(lists: Int[np.ndarray, "cases k"], items: int, k: int | None = None) -> Int[np.ndarray, " I"]:
    """How often each catalogue item is recommended in the first k places of all lists."""
    lists = np.asarray(lists) if k is None else _first(lists, k)
    return np.bincount(lists[(lists >= 0) & (lists < items)], minlength=items)


def coverage(counts: Int[np.ndarray, " I"]) -> float:
    """Share of the catalogue that is recommended at least once, in [0, 1]."""
    return float(np.count_nonzero(counts) / len(counts)) if len(counts) else float("nan")


def gini(counts: Int[np.ndarray, " I"]) -> float:
    """Gini coefficient of exposure over the whole catalogue, unrecommended items included.

    0 = all alike, (I-1)/I = one item, NaN = nothing is recommended. The formula is ``data.store.gini``'s.
    """
    return store.gini(counts) if np.sum(counts) else float("nan")


# -------------------------------------------------------------------------------------------------------------- helpers


def check_cutoffs(cutoffs: Sequence[int]) -> None:
    """Raise ``UserError`` unless there are cutoffs and all are at least 1."""
    if not cutoffs or min(cutoffs) < 1:
        raise UserError(f"cutoffs {tuple(cutoffs)}: want one or more, each at least 1")


def _first(lists: np.ndarray, k: int) -> np.ndarray:
    lists = np.asarray(lists)
    if lists.ndim != 2 or lists.shape[1] < k:
        raise UserError(f"lists of shape {lists.shape} cannot be measured at k = {k}: want [cases, k or more]")
    return lists[:, :k]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _repeats(lists: np.ndarray) -> Bool[np.ndarray, "cases k"]:
    """True at every place that holds what an earlier place of the same list holds (MISSING and UNKNOWN are never
    repeats).
    """
    order = np.argsort(lists, axis=1, kind="stable")
    ordered = np.take_along_axis(lists, order, 1)
    again = np.zeros(lists.shape, bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != MISSING) & (ordered[:, 1:] != UNKNOWN)
    out = np.zeros(lists.shape, bool)
    np.put_along_axis(out, order, again, 1)
    return out


def _no_nan(scores: np.ndarray, first_case: int) -> None:
    bad = np.isnan(scores)
    if bad.any():
        case = int(np.flatnonzero(bad.any(1))[0])
        raise UserError(
            f"case {first_case + case}: {int(bad[case].sum())} of {scores.shape[1]} scores are NaN "
            f"(first at item {int(np.flatnonzero(bad[case])[0])}); "
            f"{int(bad.any(1).sum())} of {len(scores)} cases in the batch have some",
            remedy="a model that gives NaN has diverged: use an earlier checkpoint",
        )


def _pairs(exclude: Exclude | None, cases: int, items: int, first_case: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (case, item) pairs of an exclusion."""
    none = np.zeros(0, np.int64)
    if exclude is None:
        return none, none
    if sp.issparse(exclude):
        if exclude.shape != (cases, items):
            raise UserError(f"the exclusion mask is {exclude.shape}, the scores are {(cases, items)}")
        exclude_rows, columns = exclude.nonzero()
    else:
        if len(exclude) != cases:
            raise UserError(f"{len(exclude)} histories to exclude for {cases} cases")
        exclude_rows = np.repeat(np.arange(cases), [len(e) for e in exclude])
        columns = np.concatenate([np.asarray(e, np.int64) for e in exclude]) if cases else none
    bad = (columns < 0) | (columns >= items)
    if bad.any():
        where = int(np.flatnonzero(bad)[0])
        raise UserError(
            f"case {first_case + int(exclude_rows[where])}: item {columns[where]} is outside the {items} items"
        )
    keys = np.unique(exclude_rows.astype(np.int64) * items + columns)
    return keys // max(items, 1), keys % max(items, 1)


def _candidate_pairs(
    candidates: np.ndarray, exclude: Exclude | None, cases: int, items: int, first_case: int
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = _pairs([row[row != MISSING] for row in np.asarray(candidates)], cases, items, first_case)
    out_rows, out_columns = _pairs(exclude, cases, items, first_case)
    keep = ~np.isin(rows * items + columns, out_rows * items + out_columns)
    return rows[keep], columns[keep]

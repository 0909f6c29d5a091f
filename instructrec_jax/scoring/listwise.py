"""Rank long candidate lists with a method that sees a few candidates at a time.

* *Tournament*: at random into groups, the best of each group play on (InstructRec's ten groups of ten, arXiv 2305.07001, section 3).
* *Sliding window*: a window moves from the end of a first ranking to its front and carries its best forward (RankGPT, arXiv 2304.09542).

Both are made for ``labels``, whose list has as many places as there are letters, and take any function that scores requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from instructrec_jax.errors import UserError
from instructrec_jax.scoring.requests import Request

Score = Callable[[list[Request]], list[np.ndarray]]


def tournament(
    score: Score, requests: Sequence[Request], *, group: int = 10, keep: int = 1, seed: int = 0
) -> list[Int[np.ndarray, " C"]]:
    """Places of every request's candidates, the best first: ``order[0]`` is the index of the winner in its list.

    In a round, candidates are dealt at random into groups of at most ``group``, of about equal size; the ``keep`` best of each go on,
    until one group is left. Who leaves in a later round stands before who leaves in an earlier one; within a round the place in the
    group decides, and then the score.

    Args:
        score: scores of requests, such as ``lambda r: scorer.score(r, "labels", shifts=2)``. All groups of a round are one call.
        requests: with lists of candidates.
        group: most candidates at a time, at least 2.
        keep: winners of a group, fewer than ``group``.
        seed: of the deals; request n is dealt by (seed, n, round).

    Raises:
        UserError: numbers out of range, or the whole catalogue as candidates.
    """
    if group < 2 or not 1 <= keep < group:
        raise UserError(
            f"group = {group}, keep = {keep}", remedy="at least 2 candidates in a group, and fewer winners than that"
        )
    playing = [np.arange(len(_listed(n, r))) for n, r in enumerate(requests)]
    places: list[list[np.ndarray]] = [[] for _ in requests]  # of each round, the last one first
    number = 0
    while any(len(p) for p in playing):
        deals: list[tuple[int, np.ndarray]] = []
        for n, players in enumerate(playing):
            if len(players):
                dealt = np.random.default_rng((seed, n, number)).permutation(players)
                # The deal is random; a final of one group keeps it too, so that no place is the candidate's own.
                deals += [(n, g) for g in np.array_split(dealt, -(-len(dealt) // group))]
        scores = score([Request(requests[n].prompt, _pick(requests[n].candidates, g)) for n, g in deals])
        ranked: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for (n, g), values in zip(deals, scores):
            order = np.argsort(-np.asarray(values), kind="stable")
            ranked.setdefault(n, []).append((g[order], np.asarray(values)[order]))
        for n, groups in ranked.items():
            last = len(groups) == 1
            stay = 0 if last else min(keep, min(len(g) for g, _ in groups) - 1) or 1
            out = [
                (place, -value, who) for g, v in groups for place, (who, value) in enumerate(zip(g, v)) if place >= stay
            ]
            places[n].insert(0, np.asarray([who for *_, who in sorted(out)], np.int64))
            playing[n] = np.concatenate([g[:stay] for g, _ in groups]) if not last else np.zeros(0, np.int64)
        number += 1
    return [np.concatenate(p) if p else np.zeros(0, np.int64) for p in places]


def sliding_window(
    score: Score, requests: Sequence[Request], *, window: int = 20, step: int = 10, passes: int = 1
) -> list[Int[np.ndarray, " C"]]:
    """Places of every request's candidates, the best first, starting from the order given (a retriever's).

    A window over the last ``window`` candidates is sorted by its scores, moves ``step`` towards the front, and so on: the ``window - step``
    best of the list reach the front in one pass.

    Args:
        score: scores of requests; all requests' windows of one position are one call.
        requests: with lists of candidates, the likeliest first.
        window: candidates at a time, at least 2.
        step: how far the window moves, from 1 to ``window - 1``.
        passes: how often from the end to the front.

    Raises:
        UserError: numbers out of range, or the whole catalogue as candidates.
    """
    if window < 2 or not 1 <= step < window or passes < 1:
        raise UserError(
            f"window = {window}, step = {step}, passes = {passes}", remedy="e.g. window 20, step 10, one pass"
        )
    orders = [np.arange(len(_listed(n, r))) for n, r in enumerate(requests)]
    for _ in range(passes):
        ends = [len(order) for order in orders]
        while any(end > 1 for end in ends):
            now = [n for n, end in enumerate(ends) if end > 1]
            cuts = [slice(max(0, ends[n] - window), ends[n]) for n in now]
            asked = [
                Request(requests[n].prompt, _pick(requests[n].candidates, orders[n][c])) for n, c in zip(now, cuts)
            ]
            for n, cut, values in zip(now, cuts, score(asked)):
                orders[n][cut] = orders[n][cut][np.argsort(-np.asarray(values), kind="stable")]
                ends[n] = ends[n] - step if cut.start else 0
    return orders


def _listed(number: int, request: Request) -> Any:
    if isinstance(request.candidates, str):
        raise UserError(f"request {number}: the whole catalogue cannot be ranked in groups", remedy="give a list")
    return request.candidates


def _pick(candidates: Any, which: np.ndarray) -> Any:
    return candidates[which] if isinstance(candidates, np.ndarray) else [candidates[i] for i in which]

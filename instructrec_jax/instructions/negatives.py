"""Frozen negatives: items that a user has not met, drawn by keys: a case has the same ones in any order and batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt64

from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.keyed import keys, mix_array

_MASK_CELLS = 32_000_000  # size of the boolean case x item table that exists at one time


def negatives_name(n: int, *, popularity: bool = False, seed: int = 0) -> str:
    """The name that a metric on ``n`` sampled negatives carries, e.g. ``"1+99 uniform seed 0"``."""
    return f"1+{n} {'popularity' if popularity else 'uniform'} seed {seed}"


def sample_negatives(
    num_items: int,
    exclude: Sequence[Int[np.ndarray, " seen"]],
    n: int,
    *,
    seed: int,
    user: Int[np.ndarray, " cases"],
    target: Int[np.ndarray, " cases"],
    popularity: Int[np.ndarray, " items"] | None = None,
) -> Int[np.ndarray, "cases n"]:
    """``n`` different items per case, none of them the target or in the case's ``exclude``.

    The draw of a case depends on (seed, user, target) and its own excluded items only. With ``popularity`` (counts) an
    item's chance is proportional to its count, one item after another without putting back; items with count 0 are
    never drawn.

    Args:
        num_items: I; items are 0..I-1.
        exclude: per case, the items of the history (repeats allowed).
        n: negatives per case.
        seed: seed of the sampler, part of the metric's name.
        user: user index per case.
        target: item index per case.
        popularity: counts per item, or None for uniform.

    Returns:
        int32 ``[cases, n]``, in drawn order.

    Raises:
        ConfigError: a case has fewer than ``n`` items left to draw from; both numbers are named.
    """
    cases = len(target)
    out = np.empty((cases, n), np.int32)
    if not n or not cases:
        return out
    user, target = np.asarray(user, np.int64), np.asarray(target, np.int64)
    weights = None if popularity is None else np.maximum(np.asarray(popularity, np.int64), 0)
    case_keys = keys(seed, user, target)
    chunk = max(1, _MASK_CELLS // max(num_items, 1))
    for start in range(0, cases, chunk):
        rows = slice(start, min(start + chunk, cases))
        banned = _banned(num_items, exclude[rows], target[rows], weights)
        free = num_items - banned.sum(1)
        if (free < n).any():
            worst = int(np.argmin(free))
            raise ConfigError(
                f"{n} negatives per case are asked for, but user {int(user[start + worst])} has only "
                f"{int(free[worst])} of {num_items} items left to draw from",
                remedy="ask for fewer negatives or candidates, or use a larger catalogue",
            )
        out[rows] = _draw(case_keys[rows], banned, n, weights)
    return out


def _banned(
    num_items: int, exclude: Sequence[np.ndarray], target: np.ndarray, weights: np.ndarray | None
) -> Bool[np.ndarray, "cases items"]:
    banned = np.zeros((len(target), num_items), bool)
    if weights is not None:
        banned[:, weights == 0] = True
    lengths = np.fromiter((len(e) for e in exclude), np.int64, len(target))
    if lengths.sum():
        banned[np.repeat(np.arange(len(target)), lengths), np.concatenate([np.asarray(e) for e in exclude])] = True
    banned[np.arange(len(target)), target] = True
    return banned


def _draw(
    case_keys: UInt64[np.ndarray, " cases"], banned: np.ndarray, n: int, weights: np.ndarray | None
) -> Int[np.ndarray, "cases n"]:
    """The first ``n`` acceptable numbers of each case's endless keyed stream; exact ranking where that is slow."""
    out = np.empty((len(case_keys), n), np.int32)
    cumulative = None if weights is None else np.cumsum(weights)
    todo = np.arange(len(case_keys))
    width, most = n + n // 4 + 8, 16 * n + 64  # fixed by n alone, so a case's result does not depend on its neighbours
    while len(todo):
        bits = mix_array(case_keys[todo, None] + mix_array(np.arange(width, dtype=np.uint64)))
        if cumulative is None:
            drawn = ((bits >> np.uint64(32)) * np.uint64(banned.shape[1]) >> np.uint64(32)).astype(np.int64)
        else:
            drawn = np.searchsorted(cumulative, (bits % np.uint64(cumulative[-1])).astype(np.int64), side="right")
        good = ~banned[todo[:, None], drawn] & ~_repeats(drawn)
        rank = np.cumsum(good, axis=1)
        full = rank[:, -1] >= n
        out[todo[full]] = drawn[full][(good & (rank <= n))[full]].reshape(-1, n)
        todo = todo[~full]
        if width == most:
            break
        width = min(2 * width, most)
    for row in todo:  # few items left, or very uneven weights
        out[row] = _exact(case_keys[row], banned[row], n, weights)
    return out


def _repeats(drawn: Int[np.ndarray, "cases width"]) -> Bool[np.ndarray, "cases width"]:
    """True where a number already occurred further left in its row."""
    width = drawn.shape[1]
    coded = np.sort(drawn * width + np.arange(width), axis=1)  # by number, then by place: the first of a number stays
    item, place = np.divmod(coded, width)
    repeated = np.zeros(drawn.shape, bool)
    np.put_along_axis(repeated, place[:, 1:], item[:, 1:] == item[:, :-1], axis=1)
    return repeated


def _exact(case_key: np.uint64, banned: np.ndarray, n: int, weights: np.ndarray | None) -> Int[np.ndarray, " n"]:
    """Weighted sampling without putting back by exponential keys (Efraimidis and Spirakis, IPL 2006)."""
    free = np.flatnonzero(~banned)
    bits = mix_array(mix_array(np.asarray([case_key], np.uint64)) ^ mix_array(free.astype(np.uint64)))
    wait = -np.log(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    if weights is not None:
        wait = wait / weights[free]
    return free[np.argsort(wait, kind="stable")[:n]].astype(np.int32)

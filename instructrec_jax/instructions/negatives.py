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


def listed_negatives(
    lists: Int[np.ndarray, "cases k"],
    num_items: int,
    exclude: Sequence[Int[np.ndarray, " seen"]],
    n: int,
    *,
    seed: int,
    user: Int[np.ndarray, " cases"],
    target: Int[np.ndarray, " cases"],
    best: bool = False,
) -> tuple[Int[np.ndarray, "cases n"], Int[np.ndarray, " cases"]]:
    """Hard negatives: ``n`` different items per case from its list, and uniform ones where the list has too few.

    None is the target or in the case's ``exclude``. The draw of a case depends on (seed, user, target), its list and its own
    excluded items only.

    Args:
        lists: items per case, best first; what is below 0 is no item.
        num_items, exclude, n, seed, user, target: as in ``sample_negatives``.
        best: the first ``n`` of the list instead of a draw.

    Returns:
        int32 ``[cases, n]``, those of the list first; and how many these are.

    Raises:
        ConfigError: as ``sample_negatives``.
    """
    out, taken = np.empty((len(target), n), np.int32), np.zeros(len(target), np.int64)
    user, target = np.asarray(user, np.int64), np.asarray(target, np.int64)
    case_keys = keys(seed, user, target)
    chunk = max(1, _MASK_CELLS // max(num_items, 1))
    for start in range(0, len(target), chunk):
        rows = slice(start, min(start + chunk, len(target)))
        banned, case_key, case = (
            _banned(num_items, exclude[rows], target[rows], None),
            case_keys[rows],
            np.arange(start, rows.stop),
        )
        _check_room(banned, n, user[rows])
        listed = np.maximum(lists[rows], 0)
        at = np.arange(len(listed))[:, None]
        good = (lists[rows] >= 0) & ~banned[at, listed] & ~_repeats(listed)
        place = np.broadcast_to(np.arange(listed.shape[1], dtype=np.uint64), listed.shape)
        order = place if best else mix_array(case_key[:, None] ^ mix_array(listed.astype(np.uint64)))
        first = np.argsort(np.where(good, order, ~np.uint64(0)), axis=1, kind="stable")[:, :n]
        chosen, real = np.take_along_axis(listed, first, axis=1), np.take_along_axis(good, first, axis=1)
        out[rows, : first.shape[1]], taken[rows] = chosen, real.sum(1)
        banned[np.broadcast_to(at, chosen.shape)[real], chosen[real]] = True
        missing = n - taken[rows]
        for count in np.unique(missing[missing > 0]).tolist():
            short = np.flatnonzero(missing == count)
            out[case[short], n - count :] = _draw(case_key[short], banned[short], count, None)
    return out, taken


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
        _check_room(banned, n, user[rows])
        out[rows] = _draw(case_keys[rows], banned, n, weights)
    return out


def _check_room(banned: Bool[np.ndarray, "cases items"], n: int, user: Int[np.ndarray, " cases"]) -> None:
    free = banned.shape[1] - banned.sum(1)
    if (free < n).any():
        worst = int(np.argmin(free))
        raise ConfigError(
            f"{n} negatives per case are asked for, but user {int(user[worst])} has only "
            f"{int(free[worst])} of {banned.shape[1]} items left to draw from",
            remedy="ask for fewer negatives or candidates, or use a larger catalogue",
        )


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

"""Bootstrap intervals over users and a paired randomisation test, both by SciPy and both seeded.

The unit is the **user**: where a user has several cases they are averaged first, so each user counts once and cases
of one user, which are not independent, do not make an interval look narrower than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.errors import UserError

_MANY = 5_000  # differing users from which on the null distribution is as good as normal
_BATCH_NUMBERS = 8_000_000  # numbers in one batch of resamples: 64 MB


@dataclass(frozen=True)
class Interval:
    """A mean over users with its 95 % interval (NaN limits: fewer than two users)."""

    mean: float
    low: float
    high: float
    users: int


@dataclass(frozen=True)
class PairedTest:
    """Mean difference a - b over users, its interval, and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p: float
    users: int
    changed: int  # users on whom the two differ at all


def per_user(
    values: Float[np.ndarray, " cases"], user: Int[np.ndarray, " cases"] | None
) -> Float[np.ndarray, " users"]:
    """Mean of each user's cases, in the order of ascending user index; cases with NaN are left out."""
    values = np.asarray(values, dtype=np.float64)
    if user is not None and np.shape(user) != values.shape:
        raise UserError(f"{values.shape} values but {np.shape(user)} users")
    keep = ~np.isnan(values)
    if user is None:
        return values[keep]
    _, inverse = np.unique(np.asarray(user)[keep], return_inverse=True)
    if len(inverse) == 0:
        return np.zeros(0)
    return np.bincount(inverse, weights=values[keep]) / np.bincount(inverse)


def bootstrap_mean(
    values: Float[np.ndarray, " cases"],
    user: Int[np.ndarray, " cases"] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    method: Literal["percentile", "BCa"] = "percentile",
) -> Interval:
    """Mean over users and its 95 % bootstrap interval (``scipy.stats.bootstrap``; Efron 1979, BCa: Efron 1987).

    Args:
        values: one number per case; NaN = the case has no value and is left out.
        user: user of each case; None = every case is its own user.
        method: BCa corrects for skew and costs users^2 operations.
    """
    return bootstrap_means({"": values}, user, resamples=resamples, seed=seed, method=method)[""]


def bootstrap_means(
    values: dict[str, Float[np.ndarray, " cases"]],
    user: Int[np.ndarray, " cases"] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    method: Literal["percentile", "BCa"] = "percentile",
) -> dict[str, Interval]:
    """``bootstrap_mean`` of many metrics at once; metrics over the same users share the resamples.

    All values alike: the interval is that value (a bootstrap cannot know what it has not seen: with n users and no
    hit at all, the true rate may still be as high as 3 / n).
    """
    from scipy import stats  # takes a second, which no command that trains is to wait for

    out: dict[str, Interval] = {}
    together: dict[int, list[tuple[str, np.ndarray]]] = {}
    for name, column in values.items():
        column = per_user(column, user)
        n = len(column)
        mean = float(column.mean()) if n else float("nan")
        if n and np.ptp(column) == 0:
            mean = float(column[0])  # the mean of equal floats may differ from them in the last digit
            limit = mean if n > 1 else float("nan")
            out[name] = Interval(mean, limit, limit, n)
        elif n < 2:
            out[name] = Interval(mean, float("nan"), float("nan"), n)
        else:
            out[name] = Interval(mean, mean, mean, n)  # keeps the order of names; limits follow
            together.setdefault(n, []).append((name, column))
    for n, columns in together.items():
        block = np.stack([column for _, column in columns])
        interval = stats.bootstrap(
            (block,),
            np.mean,
            axis=-1,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _BATCH_NUMBERS // block.size),
            confidence_level=0.95,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        for (name, _), low, high in zip(columns, np.atleast_1d(interval.low), np.atleast_1d(interval.high)):
            out[name] = Interval(out[name].mean, float(low), float(high), n)
    return out


def paired_test(
    a: Float[np.ndarray, " cases"],
    b: Float[np.ndarray, " cases"],
    user: Int[np.ndarray, " cases"] | None = None,
    *,
    resamples: int = 10_000,
    interval_resamples: int = 2000,
    seed: int = 0,
) -> PairedTest:
    """Paired randomisation test of two systems over the same cases (``scipy.stats.permutation_test``).

    Null hypothesis: for each user it is a coin toss which system gets which value, so the sign of each difference
    is random (Fisher's randomisation test; Smucker, Allan and Carterette, CIKM 2007). Two-sided; with few differing
    users all sign patterns are enumerated and p is exact; with thousands the distribution is taken for normal, as the central limit
    theorem has it (to sample it takes 6 s for 10,000 users).

    Raises:
        UserError: the two have different numbers of cases.
    """
    from scipy import stats

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise UserError(
            f"a paired test needs the same cases on both sides, got {a.shape} and {b.shape}",
            remedy="evaluate both systems on the same split and protocol",
        )
    difference = per_user(a - b, user)
    interval = bootstrap_mean(difference, resamples=interval_resamples, seed=seed)
    changed = difference[difference != 0]  # a sign flip of zero changes nothing
    if not len(changed):
        return PairedTest(interval.mean, interval.low, interval.high, 1.0, len(difference), 0)
    if len(changed) == 1:
        p = 1.0  # two sign patterns, both as extreme as the one seen
    elif len(changed) > _MANY:
        # The sum of the differences with random signs has the sum of their squares as its variance.
        p = 2 * stats.norm.sf(abs(changed.sum()) / np.sqrt((changed**2).sum()))
    else:
        p = stats.permutation_test(
            (changed,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _BATCH_NUMBERS // len(changed)),
            alternative="two-sided",
            rng=np.random.default_rng(seed),
        ).pvalue
    return PairedTest(interval.mean, interval.low, interval.high, float(p), len(difference), len(changed))

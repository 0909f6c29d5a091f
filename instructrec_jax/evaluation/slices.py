"""Where a recommender is good: by length of history and popularity of the target; and how evenly it shows the
catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.errors import UserError


@dataclass(frozen=True)
class HeatMap:
    """Mean of a metric by history length (rows) and target popularity (columns), ready to draw."""

    rows: list[str]  # labels, e.g. "5-9"
    columns: list[str]
    mean: Float[np.ndarray, "rows columns"]  # NaN where no case falls
    count: Int[np.ndarray, "rows columns"]
    row_mean: Float[np.ndarray, " rows"]  # over all columns
    column_mean: Float[np.ndarray, " columns"]  # over all rows


def bucket_edges(values: Int[np.ndarray, " cases"], buckets: int = 5) -> Int[np.ndarray, " edges"]:
    """Lower edges of at most ``buckets`` buckets with about equally many cases; fewer where values repeat a lot."""
    values = np.asarray(values)
    if not len(values):
        return np.zeros(1, np.int64)
    quantiles = np.quantile(values, np.arange(buckets) / buckets, method="higher")
    return np.unique(np.concatenate([[values.min()], quantiles])).astype(np.int64)


def heat_map(
    values: Float[np.ndarray, " cases"],
    history_length: Int[np.ndarray, " cases"],
    target_popularity: Int[np.ndarray, " cases"],
    *,
    length_edges: Sequence[int] | None = None,
    popularity_edges: Sequence[int] | None = None,
    buckets: int = 5,
) -> HeatMap:
    """Slice a metric (usually ``ndcg@10``) in two directions. Cases weigh alike.

    Args:
        values: the metric per case.
        history_length: events in the case's history.
        target_popularity: training interactions of the target.
        length_edges, popularity_edges: lower edges of the buckets, ascending; the last bucket is open. A smaller value
            falls in the first bucket. Default: about equally many cases per bucket (``bucket_edges``).

    Raises:
        UserError: the three arrays differ in length, or edges do not ascend.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) == len(history_length) == len(target_popularity):
        raise UserError(
            f"a slice needs one value, length and popularity per case: "
            f"{len(values)}, {len(history_length)}, {len(target_popularity)}"
        )
    rows, row_names = _buckets(np.asarray(history_length), length_edges, buckets)
    columns, column_names = _buckets(np.asarray(target_popularity), popularity_edges, buckets)
    shape = (len(row_names), len(column_names))
    flat = rows * shape[1] + columns
    count = np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)
    total = np.bincount(flat, weights=values, minlength=shape[0] * shape[1]).reshape(shape)
    return HeatMap(
        row_names,
        column_names,
        _divide(total, count),
        count,
        _divide(total.sum(1), count.sum(1)),
        _divide(total.sum(0), count.sum(0)),
    )


def lorenz(counts: Int[np.ndarray, " I"], points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Lorenz curve of exposure: share of items (least shown first) against their share of all recommendations.

    Returns x and y of at most ``points`` points from (0, 0) to (1, 1). The diagonal is even exposure; the Gini
    coefficient is twice the area between the two. Where nothing is recommended the diagonal is returned.
    """
    x = np.sort(np.asarray(counts, dtype=np.float64))
    if not len(x) or x.sum() == 0:
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    share = np.concatenate([[0.0], np.cumsum(x) / x.sum()])
    index = np.unique(np.linspace(0, len(x), points).round().astype(np.int64))
    return index / len(x), share[index]


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _buckets(values: np.ndarray, edges: Sequence[int] | None, buckets: int) -> tuple[np.ndarray, list[str]]:
    lower = bucket_edges(values, buckets) if edges is None else np.asarray(edges, dtype=np.int64)
    if not len(lower) or (np.diff(lower) <= 0).any():
        raise UserError(f"bucket edges {lower.tolist()} must ascend")
    names = []
    for start, stop in zip(lower, [*lower[1:], None]):
        if stop is None:
            names.append(f"{start}+")
        else:
            names.append(str(start) if stop == start + 1 else f"{start}-{stop - 1}")
    return np.maximum(np.searchsorted(lower, values, side="right") - 1, 0), names

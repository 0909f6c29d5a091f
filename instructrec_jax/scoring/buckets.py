"""Padded shapes in a few sizes, so that a new length or a new number of requests does not compile again."""

from __future__ import annotations

import numpy as np


def bucket(n: int, smallest: int = 8, *, steps: int = 2) -> int:
    """The smallest size >= n of the series with ``steps`` sizes per doubling: 8, 12, 16, 24, 32, ... for ``steps = 2``.

    At most a share ``2 ** (1 / steps) - 1`` of a padded shape is waste, and lengths up to n use O(steps · log n) sizes.
    """
    size = smallest
    while size < n:
        size *= 2
    half = size // 2
    for k in range(1, steps):
        middle = half + half * k // steps
        if middle >= n and middle >= smallest:
            return middle
    return size


def groups_by_length(lengths: list[int], batch: int) -> list[np.ndarray]:
    """Indices sorted by length and cut into batches: prompts of one batch need about the same padding."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[start : start + batch] for start in range(0, len(order), batch)]

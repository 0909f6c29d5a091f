"""Histories as windows of one length, so that a model has one compiled shape for training and one for scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import UserError
from instructrec_jax.retrieval.base import training_events


def windows(
    data: SplitData, include_valid: bool, length: int, rng: np.random.Generator | None = None
) -> tuple[Int[np.ndarray, "W S"], Int[np.ndarray, "W S"]]:
    """All steps from one training event to the next: (item that is read + 1, item that follows + 1), 0 = padding on the left.

    Every step of a user is in exactly one window. Users with more than ``length`` steps are cut into several windows, backwards from
    the newest event, or with ``rng`` from a random place, so that every epoch has other cuts.
    """
    use = training_events(data, include_valid)
    item, user = data.item[use].astype(np.int64), data.user[use]
    same = user[1:] == user[:-1]
    read, follows, owner = item[:-1][same], item[1:][same], user[:-1][same]
    steps = np.bincount(owner, minlength=data.num_users)
    last = np.cumsum(steps)[owner] - 1  # number of the user's last step
    shift = np.zeros(data.num_users, np.int64)
    if rng is not None:
        shift = np.where(steps > length, rng.integers(0, length, data.num_users), 0)
    from_end = last - np.arange(len(owner)) + shift[owner]
    # The newest window of a shifted user is short: it stands at the right end too.
    column = length - 1 - from_end % length + np.where(from_end < length, shift[owner], 0)
    blocks = -(-(steps + shift) // length)
    row = (np.cumsum(blocks) - 1)[owner] - from_end // length
    inputs = np.zeros((int(blocks.sum()), length), np.int32)
    targets = np.zeros_like(inputs)
    inputs[row, column], targets[row, column] = read + 1, follows + 1
    return inputs, targets


def batches(
    arrays: Sequence[np.ndarray], size: int, rng: np.random.Generator | None = None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows in blocks of one size, in random order with ``rng``; the last block is filled with zeros."""
    order = np.arange(len(arrays[0])) if rng is None else rng.permutation(len(arrays[0]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        blank = size - len(rows)
        yield tuple(np.concatenate([a[rows], np.zeros((blank, *a.shape[1:]), a.dtype)]) for a in arrays)


def newest(histories: Sequence[Int[np.ndarray, " n"]], length: int, items: int) -> Int[np.ndarray, "cases S"]:
    """The newest ``length`` events of each history as item + 1, at the right end.

    Raises:
        UserError: an item is outside the catalogue of ``items``.
    """
    out = np.zeros((len(histories), length), np.int32)
    for row, history in enumerate(histories):
        cut = np.asarray(history, np.int64)[-length:]
        if len(cut) and (cut.min() < 0 or cut.max() >= items):
            raise UserError(f"history {row} holds item {cut.max()}, the catalogue has {items}")
        out[row, length - len(cut) :] = cut + 1
    return out

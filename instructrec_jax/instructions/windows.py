"""Windows over the histories of users: what the sequential instructions show, for many users at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64


class Windows(NamedTuple):
    """Windows, one user after the other and of a user the oldest first."""

    user: Int[np.ndarray, " windows"]  # among those asked for
    first: Int[np.ndarray, " windows"]  # place of the first event among the user's
    end: Int[np.ndarray, " windows"]  # exclusive
    dense_from: Int[np.ndarray, " windows"]  # place in the window of the first event that no earlier one shows


class KeyedWindows(NamedTuple):
    """Windows with the keys that choose their wordings; ``user`` is an index into the data."""

    windows: Windows
    number: UInt64[np.ndarray, " windows"]
    after: UInt64[np.ndarray, " windows"]  # the key after ``number``
    draws: UInt64[np.ndarray, "windows copies"]  # ``key(number, copy)``, so to speak: of ``after`` and the copy


def num_windows(count: Int[np.ndarray, " users"], length: int, most: int = 0) -> Int[np.ndarray, " users"]:
    """How many windows users have with so many events; see ``windows``."""
    found = (count > 0) + -(-np.maximum(count - length, 0) // _stride(length))
    return np.minimum(found, most) if most else found


def windows(count: Int[np.ndarray, " users"], length: int, most: int = 0) -> Windows:
    """Windows of at most ``length`` events over histories of ``count`` events, each half a length after the one before it.

    Of a user with more than ``most`` (0 = any number) the newest are kept.
    """
    stride = _stride(length)
    kept = num_windows(count, length, most)
    user = np.repeat(np.arange(len(count)), kept)
    number = np.arange(len(user)) - np.repeat(np.cumsum(kept) - num_windows(count, length), kept)
    end = np.minimum(length + number * stride, count[user])
    first = np.maximum(end - length, 0)
    shown = np.where(number > 0, length + (number - 1) * stride, 0)
    return Windows(user, first, end, shown - first)


def _stride(length: int) -> int:
    return max(1, length // 2)

"""Keyed random numbers: a 64-bit hash of (seed, user, ...), the same for one case whatever the order or the batch.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). ``key`` works on Python
integers and ``keys`` on arrays; both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from jaxtyping import UInt64

_MASK = (1 << 64) - 1
_GAMMA, _A, _B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
T = TypeVar("T")


def mix(x: int) -> int:
    """One SplitMix64 step of a 64-bit integer."""
    x = (x + _GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * _A) & _MASK
    x = ((x ^ (x >> 27)) * _B) & _MASK
    return x ^ (x >> 31)


_mixed = lru_cache(1 << 14)(mix)  # of seeds, places and levels, which come again and again


def key(seed: int, *parts: int) -> int:
    """A 64-bit key of the seed and any number of integers, order matters."""
    out = _mixed(seed & _MASK)
    for part in parts:
        out = mix(out ^ _mixed(part & _MASK))
    return out


def mix_array(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """``mix`` on an array of uint64."""
    x = x + np.uint64(_GAMMA)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_A)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_B)
    return x ^ (x >> np.uint64(31))


def keys(seed: int, *parts: int | np.ndarray) -> UInt64[np.ndarray, "*shape"]:
    """``key`` for arrays: the parts (integers or integer arrays) are broadcast."""
    out = np.asarray([mix(seed & _MASK)], np.uint64)
    for part in parts:
        array = np.asarray([part & _MASK], np.uint64) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        out = mix_array(out ^ mix_array(array))
    return out


def pick(options: Sequence[T], number: int) -> T:
    """One of the options by a key."""
    return options[number % len(options)]


def fraction(number: int) -> float:
    """A key as a float in [0, 1)."""
    return (number >> 11) * 2.0**-53

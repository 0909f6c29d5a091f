"""Variants of a test: a few in every run, the others with ``-m slow``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], *usual: Any) -> list[Any]:
    """Values of one parameter, of which all but the usual ones are slow.

    Raises:
        ValueError: a usual value is none of them.
    """
    values = list(values)
    if missing := [value for value in usual if value not in values]:
        raise ValueError(f"{missing[0]!r} is none of {values}")
    return [value if value in usual else pytest.param(value, marks=pytest.mark.slow) for value in values]

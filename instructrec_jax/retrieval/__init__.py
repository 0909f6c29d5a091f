"""Candidate retrieval by the classic recommenders, which double as baselines.

Every recommender has a ``name``, ``fit(data, include_valid) -> self`` and ``score(histories, users=None) -> [cases,
I]`` (``base.Recommender``). ``make`` builds one by name. None of them imports JAX.
"""

from __future__ import annotations

import re
from typing import Any

from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.retrieval.base import Recommender

NAMES = ("popularity", "itemknn", "ease", "ease_last10", "slit", "bm25")


def make(name: str, **options: Any) -> Recommender:
    """A recommender, not fitted: ``popularity``, ``itemknn``, ``ease``, ``ease_last10`` (any ``ease_lastN``), ``slit``, ``bm25``.

    Args:
        name: one of the names above.
        **options: keyword arguments of the recommender's class.

    Raises:
        UserError: an unknown name; the message gives the nearest one.
    """
    if name == "popularity":
        from instructrec_jax.retrieval.popularity import Popularity

        return Popularity(**options)
    if name == "itemknn":
        from instructrec_jax.retrieval.itemknn import ItemKNN

        return ItemKNN(**options)
    last = re.fullmatch(r"ease_last([1-9]\d*)", name)
    if name == "ease" or last:
        from instructrec_jax.retrieval.ease import EASE

        return EASE(**({"last": int(last[1])} if last else {}), **options)
    if name == "slit":
        from instructrec_jax.retrieval.slit import SLIT

        return SLIT(**options)
    if name == "bm25":
        from instructrec_jax.retrieval.bm25 import BM25

        return BM25(**options)
    raise UserError(
        f"no recommender {name!r}{did_you_mean(name, NAMES)}",
        remedy=f"one of {', '.join(NAMES)}, or ease_lastN for any N",
    )

"""Candidate retrieval by the classic recommenders, which double as baselines.

Every recommender has a ``name``, ``fit(data, include_valid) -> self`` and ``score(histories, users=None) -> [cases,
I]`` (``base.Recommender``), and a ``grid`` of the values that tuning may try. ``make`` builds one by name. None of them
imports JAX before it is fitted.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.retrieval.base import Recommender

_CLASSES = {
    "popularity": "popularity.Popularity",
    "itemknn": "itemknn.ItemKNN",
    "ease": "ease.EASE",
    "ease_last": "ease.EaseLast",
    "slit": "slit.SLIT",
    "ials": "ials.IALS",
    "bpr": "bpr.BPR",
    "bm25": "bm25.BM25",
    "content": "content.Content",
    "gmf": "neural.collaborative.GMF",
    "mlp": "neural.collaborative.MLP",
    "neumf": "neural.collaborative.NeuMF",
    "gru4rec": "neural.sequential.GRU4Rec",
    "sasrec": "neural.sequential.SASRec",
}
NAMES = (*_CLASSES, "ease_last10")


def class_of(name: str) -> type:
    """The class of a recommender: ``popularity``, ``itemknn``, ``ease``, ``ease_last10`` (any ``ease_lastN``), ``sasrec``, ...

    Raises:
        UserError: an unknown name; the message gives the nearest one.
    """
    known = "ease" if re.fullmatch(r"ease_last[1-9]\d*", name) else name
    if known not in _CLASSES:
        raise UserError(
            f"no recommender {name!r}{did_you_mean(name, NAMES)}",
            remedy=f"one of {', '.join(NAMES)}, or ease_lastN for any N",
        )
    module, _, attribute = _CLASSES[known].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def make(name: str, **options: Any) -> Recommender:
    """A recommender, not fitted.

    Args:
        name: as for ``class_of``.
        **options: keyword arguments of the recommender's class.

    Raises:
        UserError: an unknown name; the message gives the nearest one.
    """
    last = re.fullmatch(r"ease_last([1-9]\d*)", name)
    return class_of(name)(**({"last": int(last[1])} if last else {}), **options)

"""Recommendations for one person: known or new, with or without words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.evaluation.metrics import top_lists
from instructrec_jax.run import Session, trained
from instructrec_jax.wanted import People


def recommend(
    run_dir: str | Path,
    *,
    user: str | None = None,
    items: Sequence[str] = (),
    wish: str | None = None,
    preference: str | None = None,
    language: str | None = None,
    count: int = 10,
    set_name: str = "",
) -> dict[str, Any]:
    """The ``count`` best catalogue items that the person has not had yet; where users of the data have items again, the best of all.

    Args:
        run_dir: a trained run.
        user: user id of the data; None = a new user.
        items: further items of the history, newest last, by id or exact title.
        wish: what is wanted, in words; an item that it names is not recommended (``wanted.py``).
        preference: taste in words.
        language: "en" or "zh".
        count: length of the list.
        set_name: of a mixture, the set whose items are ranked.

    Returns:
        ``{"user", "wish", "history": [titles], "like": [titles that the wish names], "items": [{"item_id", "title", "score", "about"}]}``;
        the score is the log probability of the item under the matching head.

    Raises:
        UserError: unknown user or item (with the nearest known title), or a folder that is no trained run.
    """
    with trained(run_dir) as (whole, params, _step):
        s = whole.one_set(set_name)
        data = s.prepared.data
        prompt, history, like = People(s).wanted(
            user, [find_item(s, name) for name in items], wish, preference, language
        )
        scores = s.scorer(params, batch_size=1).score_all([prompt])
        out = [np.asarray(like if data.repeats else (*history, *like), np.int64)]
        top = top_lists(scores, count, out)[0]
        titles, genres = data.catalogue.titles, [data.catalogue.lists(c) for c in s.config.data.list_columns]
        return {
            "user": user,
            "wish": wish,
            "history": [titles[i] for i in history],
            "like": [titles[i] for i in like],
            "items": [
                {
                    "item_id": data.catalogue.item_ids[i],
                    "title": titles[i],
                    "score": float(scores[0, i]),
                    "about": [label for column in genres for label in column[i]],
                }
                for i in top.tolist()
                if i >= 0
            ],
        }


def find_item(s: Session, name: str) -> int:
    """Catalogue index of an item id or an exact title."""
    catalogue = s.prepared.data.catalogue
    if name in catalogue.index:
        return catalogue.index[name]
    if name in catalogue.titles:
        return catalogue.titles.index(name)
    raise UserError(f"no item with id or title {name!r}{did_you_mean(name, catalogue.titles)}")

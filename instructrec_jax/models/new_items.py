"""Items that no training event has shown: they keep their content, and nothing that training only pushed down.

In the softmax over the catalogue an item that is never a target learns one thing, that it is never a target: its learned part turns away
from all users and its bias falls. That says nothing of the item. So where items are ranked, such an item has the vector W c_i alone,
and the bias of items that training has hardly seen, or one above it that validation has chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

RARE = 0.1  # share of the seen items, the least popular, whose mean bias a new item takes


def with_new_items(
    variables: Mapping[str, Any], popularity: Int[np.ndarray, " items"], lift: float = 0.0
) -> Mapping[str, Any]:
    """The variables of a model with what training has taught of unseen items taken back.

    Args:
        variables: of ``LanguageModel``; without item tokens, and where every item was seen, they come back as they are.
        popularity: training events of each item of the catalogue.
        lift: logits that new items stand above the bias of rarely seen ones (``fit_new_items.py``).
    """
    params = variables["params"]
    new = popularity == 0
    if "item_bias" not in params or not new.any() or new.all():
        return variables
    seen = np.flatnonzero(~new)
    rare = seen[np.argsort(popularity[seen], kind="stable")[: max(1, round(RARE * len(seen)))]]
    rows = params["item_bias"].shape[0]
    is_new, is_rare = (np.zeros(rows, bool) for _ in range(2))
    is_new[: len(new)] = new
    is_rare[rare] = True

    @jax.jit
    def taken_back(bias: jax.Array, learned: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        usual = jnp.sum(jnp.where(is_rare, bias, 0)) / len(rare) + lift
        return jnp.where(is_new, usual, bias), None if learned is None else jnp.where(is_new[:, None], 0, learned)

    bias, learned = taken_back(params["item_bias"], params.get("item_id"))
    changed = {"item_bias": bias} if learned is None else {"item_bias": bias, "item_id": learned}
    return {**variables, "params": {**params, **changed}}

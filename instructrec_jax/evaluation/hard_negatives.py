"""Hard negatives out of a retriever's file: what it would recommend to a user, as candidates that are hard to tell from the target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int

from instructrec_jax.data.privacy import user_keys
from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.evaluation.recommendations import read_recommendations

DEPTH = 100  # places of a list that are read


def read_lists(
    path: str | Path, data: SplitData, hash_ids: str = "", *, k: int = DEPTH
) -> tuple[Int[np.ndarray, "U k"], str]:
    """The first ``k`` items of every user's list, best first, and what was found, in words.

    Users without a list, places behind the end of one, and items that the catalogue lacks are -1.

    Args:
        path: a recommendation file (``recommendations.py``).
        data: whose users and items it speaks of.
        hash_ids: as of ``DataConfig``.

    Raises:
        ConfigError: no file is named.
        DataError: as ``read_recommendations``; none of its items is in the catalogue.
    """
    if not str(path):
        raise ConfigError("negatives: file, but no negatives_file", remedy="name a recommendation file of a retriever")
    read = read_recommendations(path, data, k=k, user_key=user_keys(hash_ids))
    if (read.lists < 0).all():
        raise DataError(
            f"none of its {read.unknown_items} items is in {data.name} ({data.num_items} items), e.g. "
            f"{read.unknown_item_examples[0]!r} where the catalogue has {data.catalogue.item_ids[0]!r}",
            file=path,
            column="item_id",
            remedy="write item ids as they stand in the items file",
        )
    lists = np.full((data.num_users, min(k, read.longest)), -1, np.int32)
    lists[read.user] = np.maximum(read.lists[:, : lists.shape[1]], -1)
    found = f"lists of {len(read.user):,} of {data.num_users:,} users"
    for count, what in ((read.unknown_users, "unknown users"), (read.unknown_items, "unknown items")):
        found += f"; {count:,} {what} are left out" if count else ""
    return lists, found


def list_name(path: str | Path) -> str:
    """What a protocol calls the retriever: the file's name without its suffix."""
    return Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]

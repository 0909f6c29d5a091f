"""A small split data set by hand: films with genres, years and tags, or products with nothing but titles."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from instructrec_jax.data.schema import TEST, TRAIN, VALID, Catalogue, SplitData

GENRES = ("Drama", "Comedy", "Crime", "Sci-Fi", "Romance", "Western")
TAGS = ("atmospheric", "time travel", "dark comedy", "heist", "slow", "In Netflix queue")


def small_split(
    users: int = 12,
    items: int = 60,
    *,
    longest: int = 40,
    seed: int = 0,
    labelled: bool = True,
    rated: bool = True,
) -> SplitData:
    """Users with 4 to ``longest`` events, the last two of which are valid and test. No text would hold the ids."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    item = np.concatenate([rng.permutation(items)[:n] for n in lengths])
    split = np.concatenate([[TRAIN] * (n - 2) + [VALID, TEST] for n in lengths])
    ids = [f"zq{i:04d}x" for i in range(items)]
    if labelled:
        titles = [f"Picture {chr(65 + i % 26)}{chr(97 + i // 26)} ({1950 + i})" for i in range(items)]
        genres = [sorted({GENRES[i % 6], GENRES[i * i % 6]}) for i in range(items)]
        table = pa.table({"item_id": ids, "title": titles, "genres": pa.array(genres, pa.list_(pa.string()))})
    else:
        makes = ("Steel", "Copper", "Brass", "Nylon", "Rubber", "Glass")
        things = ("bolt", "valve", "hose", "clamp")
        titles = [f"{makes[i % 6]} {things[i % 4]} Q{i}" for i in range(items)]
        table = pa.table({"item_id": ids, "title": titles})
    events = [(u, int(i)) for u in range(users) for i in item[offsets[u] : offsets[u + 1] - 2][::3]]
    tags = [(u, i, TAGS[(u + i) % 6]) for u, i in events] if labelled else []
    return SplitData(
        name="small",
        user_ids=[f"wk{u:04d}y" for u in range(users)],
        catalogue=Catalogue(item_ids=ids, titles=titles, table=table),
        offsets=offsets,
        item=item,
        split=split.astype(np.int8),
        rating=rng.integers(1, 6, len(item)).astype(np.float64) if rated else None,
        tags=tags,
    )

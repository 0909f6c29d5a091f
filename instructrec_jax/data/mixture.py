"""Several data sets as one, each with a stretch of the items and of the users to itself, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from instructrec_jax.data.features import UserFeatures
from instructrec_jax.data.schema import Catalogue, SplitData
from instructrec_jax.instructions.example import Feature, InstructionExample
from instructrec_jax.instructions.keyed import keys


@dataclass(frozen=True)
class Space:
    """Where a set lies in the whole: first and last + 1 of its items, users and user features; and its share of the examples."""

    name: str
    weight: float
    items: tuple[int, int]
    users: tuple[int, int]
    features: tuple[int, int]
    columns: dict[str, str]  # of its items table, to that of the whole
    feature_tokens: int  # most of a user
    examples: int = 0  # in an epoch
    statistics: dict[str, Any] | None = None  # of the set alone

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Space:
        """The inverse of ``dataclasses.asdict``."""
        return Space(**{**tree, **{name: tuple(tree[name]) for name in ("items", "users", "features")}})


def spaces(
    names: Sequence[str], weights: Sequence[float], parts: Sequence[SplitData], users: Sequence[UserFeatures]
) -> list[Space]:
    """One stretch after the other. A column of another type than in an earlier set gets the set's name before its own."""
    out: list[Space] = []
    first, types = (0, 0, 0), {}
    for name, weight, data, features in zip(names, weights, parts, users, strict=True):
        last = (first[0] + data.num_items, first[1] + data.num_users, first[2] + len(features.names))
        columns = {}
        for column in data.catalogue.table.schema:
            same = types.setdefault(column.name, column.type) == column.type
            columns[column.name] = column.name if same else f"{name}:{column.name}"
        items, people, tokens = zip(first, last)
        out.append(Space(name, weight, items, people, tokens, columns, features.index.shape[1]))
        first = last
    return out


def joined(name: str, sets: Sequence[Space], parts: Sequence[SplitData]) -> SplitData:
    """The sets' items, users, events and tags one after the other; ids carry the set's name: ``films:42``.

    Times are kept if all sets have them; a rating that a set lacks is not a number. Tables of users stay with the sets
    (their features do not: ``joined_users``).
    """
    tables, ids = [], []
    for space, part in zip(sets, parts, strict=True):
        table = part.catalogue.table.rename_columns([space.columns[n] for n in part.catalogue.table.column_names])
        ids += [f"{space.name}:{i}" for i in part.catalogue.item_ids]
        tables.append(table)
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    table = table.set_column(table.column_names.index("item_id"), "item_id", pa.array(ids, pa.string()))
    events = np.cumsum([0, *(len(p.item) for p in parts)])
    offsets = [p.offsets[1:] + start for p, start in zip(parts, events)]
    ratings = [p.rating if p.rating is not None else np.full(len(p.item), np.nan) for p in parts]
    times = [p.time for p in parts if p.time is not None]
    return SplitData(
        name=name,
        user_ids=[f"{space.name}:{user}" for space, part in zip(sets, parts) for user in part.user_ids],
        catalogue=Catalogue(ids, [title for p in parts for title in p.catalogue.titles], table),
        offsets=np.concatenate([[0], *offsets]).astype(np.int64),
        item=np.concatenate([p.item + space.items[0] for space, p in zip(sets, parts)]),
        split=np.concatenate([p.split for p in parts]),
        time=np.concatenate(times) if len(times) == len(parts) else None,
        rating=np.concatenate(ratings) if any(p.rating is not None for p in parts) else None,
        tags=[
            (user + space.users[0] if user >= 0 else -1, item + space.items[0], tag)
            for space, part in zip(sets, parts)
            for user, item, tag in part.tags
        ],
    )


def own(data: SplitData, space: Space) -> SplitData:
    """A set of the whole with items, users and ids as they were before."""
    (first, last), skip = space.items, len(space.name) + 1
    part = data.part(*space.users)
    table = data.catalogue.table.slice(first, last - first).select(list(space.columns.values()))
    table = table.rename_columns(list(space.columns))
    ids = [name[skip:] for name in data.catalogue.item_ids[first:last]]
    table = table.set_column(table.column_names.index("item_id"), "item_id", pa.array(ids, pa.string()))
    return replace(
        part,
        name=space.name,
        user_ids=[name[skip:] for name in part.user_ids],
        catalogue=Catalogue(ids, data.catalogue.titles[first:last], table),
        item=part.item - first,
        rating=None if part.rating is None or np.isnan(part.rating).all() else part.rating,
        tags=[
            (user - space.users[0] if user >= 0 else -1, item - first, tag)
            for user, item, tag in data.tags
            if first <= item < last
        ],
        first_user=0,
    )


def joined_users(sets: Sequence[Space], users: Sequence[UserFeatures]) -> UserFeatures:
    """The features of all sets' users; those of two sets are different features even under one name."""
    names = [f"{space.name}:{name}" for space, part in zip(sets, users, strict=True) for name in part.names]
    width = max((space.feature_tokens for space in sets), default=0)
    index = np.full((sets[-1].users[1], width), -1, np.int32)
    value = np.zeros(index.shape, np.float32)
    for space, part in zip(sets, users):
        rows = slice(*space.users)
        index[rows, : space.feature_tokens] = np.where(part.index >= 0, part.index + space.features[0], -1)
        value[rows, : space.feature_tokens] = part.value
    return UserFeatures(names, index, value)


def own_users(users: UserFeatures, space: Space) -> UserFeatures:
    """The inverse of ``joined_users`` for one set."""
    rows, (first, last) = slice(*space.users), space.features
    index = users.index[rows, : space.feature_tokens]
    names = [name[len(space.name) + 1 :] for name in users.names[first:last]]
    return UserFeatures(names, np.where(index >= 0, index - first, -1), users.value[rows, : space.feature_tokens])


def shifted(example: InstructionExample, space: Space) -> InstructionExample:
    """A set's example with the whole's items, users and features."""
    first = space.items[0]
    return example._replace(
        user=example.user + space.users[0] if example.user >= 0 else -1,
        target=example.target + first if example.target >= 0 else -1,
        prompt_items=tuple(i + first for i in example.prompt_items),
        answer_items=tuple(i + first for i in example.answer_items),
        candidates=tuple(i + first for i in example.candidates),
        features=tuple(Feature(f.index + space.features[0], f.value) for f in example.features),
    )


def shares(weights: Sequence[float], records: Sequence[int]) -> list[int]:
    """Examples of each set in an epoch, in the ratio of the weights; together as many as the sets that have a weight hold."""
    total = sum(n for n, weight in zip(records, weights) if weight)
    return [round(total * weight / sum(weights)) for weight in weights]


def drawn(count: int, records: int, seed: int, number: int) -> Int[np.ndarray, " count"]:
    """Which of a set's records stand in an epoch, ascending: all as often as they fit, and the rest by keys."""
    rest = np.argsort(keys(seed, number, np.arange(records)), kind="stable")[: count % records]
    return np.sort(np.concatenate([np.tile(np.arange(records), count // records), rest]))

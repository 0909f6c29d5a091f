"""Cleaning: text, minimum rating, duplicates, k-core, minimum history. Each rule leaves a ``Step`` with counts before
and after.

The rules run in this order, each only where the configuration asks for it:

1. *text*: ``text.clean_text`` over item text, ``text.plain`` over user features and tags (see ``data/text.py``).
2. *scrub*: personal data in item text (not titles), tags and user features becomes a mark (``privacy.Scrubber``).
3. *minimum rating*: interactions rated below ``min_rating`` go, and so do unrated ones.
4. *duplicates*: of a repeated (user, item) pair the first or the last event stays, by timestamp, then position; of
   those at the same moment the one with the lowest (first) or highest (last) rating, so that the order of the file's
   rows does not matter.
5. *k-core*: users and items with fewer than k interactions go, again and again until none is left. Users must also
   reach ``min_user_events`` here, otherwise dropping them afterwards would break the core again.
6. *minimum history*: without k-core, users with fewer than ``min_user_events`` events go.

Items without interactions stay in the catalogue (they are cold items) unless k-core is on: then the catalogue is
exactly the core.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from instructrec_jax.config import CleanConfig
from instructrec_jax.data.privacy import Scrubber
from instructrec_jax.data.schema import RawData, Step
from instructrec_jax.data.text import clean_array
from instructrec_jax.errors import DataError

_NOT_TEXT = ("item_id", "user_id", "image_path", "audio_path")


def clean(raw: RawData, config: CleanConfig) -> RawData:
    """Apply the rules of ``config``; one ``Step`` per rule that is on.

    Raises:
        DataError: a rule left no interaction (the message says which rule and what to loosen), or a rule needs ratings
        that
            the data do not have.
    """
    raw = clean_texts(raw, html=config.html)
    if config.scrub != "none":
        raw = scrub_texts(raw, Scrubber(config.scrub))
    if config.min_rating is not None:
        raw = drop_low_ratings(raw, config.min_rating)
    if config.duplicates != "keep":
        raw = drop_duplicates(raw, config.duplicates)
    if config.k_core > 0:
        raw = drop_outside_core(raw, config.k_core, max(config.k_core, config.min_user_events))
    elif config.min_user_events > 1:
        raw = drop_short_histories(raw, config.min_user_events)
    return raw


def codes(column: pa.Array | pa.ChunkedArray) -> tuple[Int[np.ndarray, " rows"], list[str]]:
    """A string column as codes [rows] into its distinct values, in order of first appearance."""
    encoded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def time_keys(interactions: pa.Table) -> list[Int[np.ndarray, " rows"]]:
    """What orders a user's events, most significant first: timestamp (and its nanosecond part), then position."""
    names = ("timestamp", "nanosecond", "position")
    return [interactions[n].to_numpy() for n in names if n in interactions.column_names]


def rating_key(interactions: pa.Table) -> np.ndarray:
    """Ratings [rows], missing ones lowest; a last key that makes sorting independent of the order of rows."""
    if "rating" not in interactions.column_names:
        return np.zeros(interactions.num_rows)
    return np.nan_to_num(interactions["rating"].to_numpy().astype(np.float64), nan=-np.inf)


def _distinct(table: pa.Table, column: str) -> int:
    return len(pc.unique(table[column]))


def _filtered(
    raw: RawData,
    keep: Bool[np.ndarray, " rows"],
    name: str,
    remedy: str,
    *,
    items: pa.Table | None = None,
    detail: str = "",
) -> RawData:
    before = raw.interactions
    after = before.filter(pa.array(keep)).combine_chunks()
    if not after.num_rows:
        counts = f"{before.num_rows:,} interactions of {_distinct(before, 'user_id'):,} users before"
        raise DataError(f"{raw.name}: the step {name!r} left no interaction ({counts}, 0 after)", remedy=remedy)
    catalogue = raw.items if items is None else items
    step = Step(
        name,
        interactions=(before.num_rows, after.num_rows),
        users=(_distinct(before, "user_id"), _distinct(after, "user_id")),
        items=(raw.items.num_rows, catalogue.num_rows),
        detail=detail,
    )
    return raw.with_step(step, interactions=after, items=catalogue)


# ---------------------------------------------------------------------------------------------------------------- text


def clean_texts(raw: RawData, *, html: bool) -> RawData:
    """Clean every text that may enter a prompt. Control and slot characters go even without ``html``."""
    changed: dict[str, int] = {}
    tables: dict[str, pa.Table | None] = {}
    for label, table, markup in (("items", raw.items, html), ("users", raw.users, False), ("tags", raw.tags, False)):
        if table is not None:
            tables[label] = _clean_table(table, label, markup, changed)
    tags, dropped = tables.get("tags"), 0
    if tags is not None:
        visible = pc.not_equal(tags["tag"], "")
        dropped = tags.num_rows - int(pc.sum(visible).as_py() or 0)
        tables["tags"] = tags.filter(visible) if dropped else tags
    detail = ", ".join(f"{n:,} values of {name} changed" for name, n in changed.items()) or "nothing to change"
    if dropped:
        detail += f", {dropped:,} tags without visible text dropped"
    n, users = raw.interactions.num_rows, _distinct(raw.interactions, "user_id")
    items = raw.items.num_rows
    step = Step("text" if html else "text (HTML kept)", (n, n), (users, users), (items, items), detail)
    return raw.with_step(step, **tables)


def _clean_table(table: pa.Table, label: str, html: bool, changed: dict[str, int]) -> pa.Table:
    for i, (name, kind) in enumerate(zip(table.column_names, table.schema.types)):
        if name in _NOT_TEXT:
            continue
        if pa.types.is_string(kind):
            column, count = clean_array(table[name], html=html)
            if name == "title":
                column = _keep_titles(table, column, html)
        elif pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
            column, count = _clean_lists(table[name].combine_chunks(), html)
        else:
            continue
        if count:
            changed[f"{label}.{name}"] = count
            table = table.set_column(i, name, column)
    return table


def _keep_titles(table: pa.Table, cleaned: pa.Array, html: bool) -> pa.Array:
    """A title that is nothing but markup would be lost: it keeps its characters."""
    empty = pc.equal(cleaned, "")
    if not html or not pc.any(empty).as_py():
        return cleaned
    return pc.if_else(empty, clean_array(table["title"], html=False)[0], cleaned)


def _clean_lists(column: pa.Array, html: bool) -> tuple[pa.Array, int]:
    words, count = clean_array(column.flatten(), html=html)
    if not count:
        return column, 0
    rest = iter(words.to_pylist())
    rows = [[w for w in (next(rest) for _ in cell) if w] if cell is not None else [] for cell in column.to_pylist()]
    return pa.array(rows, column.type), count


def scrub_texts(raw: RawData, scrubber: Scrubber) -> RawData:
    """Personal data out of every text but titles, which the catalogue's owner wrote. A tag that was nothing else goes."""
    tables: dict[str, pa.Table | None] = {}
    for label, table in (("items", raw.items), ("users", raw.users), ("tags", raw.tags)):
        if table is None:
            continue
        for i, (name, kind) in enumerate(zip(table.column_names, table.schema.types)):
            if name in _NOT_TEXT or name == "title":
                continue
            column = table[name].combine_chunks()
            if pa.types.is_string(kind):
                table = table.set_column(i, name, scrubber.column(column))
            elif pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
                rest = iter(scrubber.column(column.flatten()).to_pylist())
                rows = [None if cell is None else [next(rest) for _ in cell] for cell in column.to_pylist()]
                table = table.set_column(i, name, pa.array(rows, kind))
        tables[label] = table
    tags, dropped = tables.get("tags"), 0
    if tags is not None:
        says = pc.invert(pc.match_substring_regex(tags["tag"], r"^(\[[a-z-]+\][ ,;.]*)+$"))
        dropped = tags.num_rows - int(pc.sum(says).as_py() or 0)
        tables["tags"] = tags.filter(says) if dropped else tags
    detail = ", ".join(f"{n:,} {kind}" for kind, n in scrubber.counts.most_common()) or "nothing found"
    detail += f"; {dropped:,} tags dropped" if dropped else ""
    n, users = raw.interactions.num_rows, _distinct(raw.interactions, "user_id")
    step = Step(f"scrub ({scrubber.engine})", (n, n), (users, users), (raw.items.num_rows,) * 2, detail)
    return raw.with_step(step, **tables)


# ----------------------------------------------------------------------------------------------------------------- rows


def drop_low_ratings(raw: RawData, minimum: float) -> RawData:
    """Interactions rated below ``minimum``, and unrated ones, go."""
    if "rating" not in raw.interactions.column_names:
        raise DataError(
            f"{raw.name}: data.clean.min_rating = {minimum:g}, but the interactions have no rating column",
            column="rating",
            remedy="set data.clean.min_rating to null, or map the ratings in data.columns",
        )
    rating = raw.interactions["rating"].to_numpy().astype(np.float64)
    unrated = int(np.isnan(rating).sum())
    detail = f"{unrated:,} of the dropped have no rating" if unrated else ""
    top = f"; the highest rating is {np.nanmax(rating):g}" if unrated < len(rating) else "; no interaction has a rating"
    remedy = f"lower data.clean.min_rating{top}"
    return _filtered(raw, rating >= minimum, f"rating at least {minimum:g}", remedy, detail=detail)


def drop_duplicates(raw: RawData, which: str) -> RawData:
    """Of each repeated (user, item) pair only the ``"first"`` or the ``"last"`` event stays."""
    log = raw.interactions
    (user, _), (item, _) = codes(log["user_id"]), codes(log["item_id"])
    order = np.lexsort((rating_key(log), *reversed(time_keys(log)), item, user))
    same = (user[order][1:] == user[order][:-1]) & (item[order][1:] == item[order][:-1])
    keep = np.ones(log.num_rows, bool)
    keep[order[1:][same] if which == "first" else order[:-1][same]] = False
    return _filtered(raw, keep, f"duplicates: keep {which}", "", detail=f"{int(same.sum()):,} repeated user-item pairs")


def core_mask(
    user: Int[np.ndarray, " rows"], item: Int[np.ndarray, " rows"], user_min: int, item_min: int
) -> tuple[Bool[np.ndarray, " rows"], int]:
    """The largest set of rows in which each user has ``user_min`` and each item ``item_min`` of them, and the rounds it
    took.
    """
    keep, rounds = np.ones(len(user), bool), 0
    while True:
        enough_user = np.bincount(user[keep], minlength=int(user.max(initial=-1)) + 1) >= user_min
        enough_item = np.bincount(item[keep], minlength=int(item.max(initial=-1)) + 1) >= item_min
        now = keep & enough_user[user] & enough_item[item]
        if now.sum() == keep.sum():
            return keep, rounds
        keep, rounds = now, rounds + 1


def drop_outside_core(raw: RawData, k: int, user_min: int) -> RawData:
    """k-core: users with fewer than ``user_min`` events and items with fewer than ``k`` go; the catalogue becomes the
    core's items.
    """
    (user, _), (item, _) = codes(raw.interactions["user_id"]), codes(raw.interactions["item_id"])
    keep, rounds = core_mask(user, item, user_min, k)
    left = pc.unique(raw.interactions["item_id"].filter(pa.array(keep)))
    items = raw.items.filter(pc.is_in(raw.items["item_id"], value_set=left)).combine_chunks()
    detail = f"rounds: {rounds}" + (f"; users need {user_min} events" if user_min != k else "")
    loosen = "data.clean.k_core" + (" or data.clean.min_user_events" if user_min > k else "")
    return _filtered(raw, keep, f"{k}-core", f"lower {loosen} (0 = off)", items=items, detail=detail)


def drop_short_histories(raw: RawData, minimum: int) -> RawData:
    """Users with fewer than ``minimum`` events go; the catalogue stays."""
    user, _ = codes(raw.interactions["user_id"])
    count = np.bincount(user)
    dropped = int((count < minimum).sum())
    detail = f"{dropped:,} users dropped, {int((count == 1).sum()):,} of them with a single event" if dropped else ""
    remedy = f"lower data.clean.min_user_events; the longest history has {int(count.max(initial=0))} events"
    return _filtered(raw, count[user] >= minimum, f"users with at least {minimum} events", remedy, detail=detail)

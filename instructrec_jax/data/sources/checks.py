"""From loaded tables to ``RawData``: types, and every check of the schema.

A check that fails is a ``DataError`` with file, row and column. With ``data.clean.bad_row: drop`` the row is left out
instead and counted by reason in the read step, which names the first such row. ``data.clean.unknown_item`` rules
interactions whose item the items table lacks: ``error``; ``drop``, counted; or ``title-less``, which adds the item with
its id as its title (and nothing else), so that logs with a gap in the catalogue stay usable and the item's row says
that nothing is known about it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from instructrec_jax.config import DataConfig
from instructrec_jax.data.schema import RawData, Step
from instructrec_jax.data.sources import values
from instructrec_jax.data.sources.files import Loaded
from instructrec_jax.data.sources.mapping import OPTIONAL, REQUIRED
from instructrec_jax.data.sources.rows import Rows
from instructrec_jax.errors import DataError, did_you_mean


def assemble(name: str, loaded: dict[str, Loaded], config: DataConfig, origin: str) -> RawData:
    """Check the tables (our column names, see ``mapping.rename``) against the schema.

    Args:
        name: name of the data set.
        loaded: ``interactions`` and ``items``, optionally ``users`` and ``tags``.
        config: mapping of list columns, and the rules for bad rows and unknown items.
        origin: what the read step calls the source.

    Raises:
        DataError: any bad row that the configuration does not allow to drop, with file, row, column and remedy.
    """
    drop = config.clean.bad_row == "drop"
    rows = {table: Rows(one, drop) for table, one in loaded.items()}
    notes: list[str] = []
    log = rows["interactions"]
    users_before = len(pc.unique(log.text("user_id")))
    _read_items(rows["items"], config, notes)
    _read_interactions(log, notes)
    if "users" in rows:
        rows["users"].filled("user_id")
        rows["users"].unique("user_id")
        _features(rows["users"], ("user_id",), config, notes, "users")
    if "tags" in rows:
        _read_tags(rows["tags"])
    _not_empty(rows)
    for table, one in rows.items():
        if one.dropped:
            notes.append(f"{table}: {one.note()}")
    items, interactions = rows["items"].table, log.table
    step = Step(
        f"read {origin}",
        interactions=(log.total, interactions.num_rows),
        users=(users_before, len(pc.unique(interactions["user_id"]))),
        items=(rows["items"].total, items.num_rows),
        detail="; ".join(notes),
    )
    tables = {table: one.table.combine_chunks() for table, one in rows.items() if table in ("users", "tags")}
    raw = RawData(
        name, interactions.combine_chunks(), items.combine_chunks(), tables.get("users"), tables.get("tags"), (step,)
    )
    return _unknown_items(raw, rows, config)


def _not_empty(rows: Mapping[str, Rows]) -> None:
    for table in ("interactions", "items"):
        if not rows[table].table.num_rows:
            raise DataError(
                f"no usable row is left: {rows[table].note()}",
                file=rows[table].loaded.file,
                remedy="mend the file, or the mapping in data.columns",
            )


def _read_interactions(log: Rows, notes: list[str]) -> None:
    names = log.table.column_names
    if "timestamp" not in names and "position" not in names:
        raise DataError(
            f"neither timestamp nor position{did_you_mean('timestamp', names)}; the file has {', '.join(names)}",
            file=log.loaded.file,
            row=1,
            column="timestamp",
            remedy="events need an order: map one in data.columns ({timestamp: ...}), or add position (1 = oldest)",
        )
    known = (*REQUIRED["interactions"], *OPTIONAL["interactions"])
    ignored = [n for n in names if n not in known]
    if ignored:
        notes.append(f"interactions: columns not used: {', '.join(ignored)}")
    log.table = log.table.select([n for n in known if n in names])
    log.filled("user_id")
    log.filled("item_id")
    if "timestamp" in names:
        notes.extend(filter(None, [log.times("timestamp")]))
    if "position" in names:
        log.integers("position")
    if "rating" in names:
        log.numbers("rating")
    if "event" in names:
        log.set("event", log.text("event"))
    if "position" in names:
        _distinct_positions(log)


def _distinct_positions(log: Rows) -> None:
    """A position is one event of a user. Dropping takes all rows that contradict each other: none of them is known to
    be right.
    """
    user = log.table["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    position = log.table["position"].to_numpy()
    order = np.lexsort((position, user))
    same = (user[order][1:] == user[order][:-1]) & (position[order][1:] == position[order][:-1])
    if not same.any():
        return
    clash = np.zeros(len(order), bool)
    clash[order[1:][same]] = clash[order[:-1][same]] = True

    def problem(i: int) -> str:
        other = next(int(j) for j in np.flatnonzero((user == user[i]) & (position == position[i])) if j != i)
        rows = f"rows {log.row(i)} and {log.row(other)}"
        return f"user {log.cell('user_id', i)} has two events at position {position[i]}: {rows}"

    log.reject(clash, "position not unique", "position", problem, "number each user's events 1, 2, 3, ...")


def _read_items(items: Rows, config: DataConfig, notes: list[str]) -> None:
    items.filled("item_id")
    items.filled("title")
    items.unique("item_id")
    _features(items, ("item_id", "title"), config, notes, "items")


def _features(rows: Rows, done: tuple[str, ...], config: DataConfig, notes: list[str], table: str) -> None:
    for name in rows.table.column_names:
        if name in done:
            continue
        if name in config.list_columns and table == "items":
            rows.set(name, values.as_lists(rows.table[name], config.list_separator))
            continue
        column = values.as_feature(name, rows.table[name])
        if column is None:
            notes.append(f"{table}: column {name} left out ({rows.table[name].type})")
            rows.table = rows.table.drop_columns([name])
        else:
            rows.set(name, column)


def _read_tags(tags: Rows) -> None:
    names = tags.table.column_names
    tags.table = tags.table.select([n for n in (*REQUIRED["tags"], *OPTIONAL["tags"]) if n in names])
    for name in REQUIRED["tags"]:
        tags.filled(name)
    if "timestamp" in names:
        tags.times("timestamp")
        tags.table = tags.table.select([*REQUIRED["tags"], "timestamp"])


def _unknown_items(raw: RawData, rows: Mapping[str, Rows], config: DataConfig) -> RawData:
    """Events and tags whose item the items table lacks: an error, a counted drop, or (for events) a new item."""
    rule, known = config.clean.unknown_item, raw.items["item_id"]
    tables: dict[str, pa.Table] = {}
    counts: dict[str, int] = {}
    unknown_ids: list[str] = []
    for table in ("interactions", "tags"):
        if table not in rows:
            continue
        one = rows[table]
        bad = pc.invert(pc.is_in(one.table["item_id"], value_set=known)).to_numpy()
        if not bad.any():
            continue
        counts[table] = int(bad.sum())
        if table == "interactions":
            unknown_ids = sorted(set(one.table["item_id"].filter(pa.array(bad)).to_pylist()))
            if rule == "title-less":
                continue
        one.reject(
            bad,
            "unknown item",
            "item_id",
            lambda i, one=one: f"item {one.cell('item_id', i)} is not in {rows['items'].loaded.file}",
            "add the item there, or set data.clean.unknown_item to drop or title-less",
            drop=rule != "error",
        )
        tables[table] = one.table.combine_chunks()
    if not counts:
        return raw
    if rule == "title-less" and unknown_ids:
        fresh = pa.table({"item_id": unknown_ids, "title": unknown_ids})
        tables["items"] = _fill(pa.concat_tables([raw.items, fresh], promote_options="default").combine_chunks())
        detail = f"{len(unknown_ids):,} items added with their id as title, for {counts['interactions']:,} interactions"
    else:
        detail = (
            f"{counts.get('interactions', 0):,} interactions with {len(unknown_ids):,} items that the items table lacks"
        )
    if "tags" in counts:
        detail += f"; {counts['tags']:,} tags of such items dropped"
    after = tables.get("interactions", raw.interactions)
    if not after.num_rows:
        raise DataError(
            "no interaction is about a known item",
            file=rows["interactions"].loaded.file,
            column="item_id",
            remedy=f"check that item ids are written the same way as in {rows['items'].loaded.file}",
        )
    step = Step(
        f"unknown items: {rule}",
        interactions=(raw.interactions.num_rows, after.num_rows),
        users=(len(pc.unique(raw.interactions["user_id"])), len(pc.unique(after["user_id"]))),
        items=(raw.items.num_rows, tables.get("items", raw.items).num_rows),
        detail=detail,
    )
    return raw.with_step(step, **tables)


def _fill(items: pa.Table) -> pa.Table:
    """Text and lists of added items are empty, not null; numbers stay null."""
    for i, (name, kind) in enumerate(zip(items.column_names, items.schema.types)):
        if pa.types.is_string(kind):
            items = items.set_column(i, name, pc.fill_null(items[name], ""))
        elif pa.types.is_list(kind):
            items = items.set_column(i, name, pa.array([cell or [] for cell in items[name].to_pylist()], kind))
    return items

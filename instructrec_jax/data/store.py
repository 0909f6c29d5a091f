"""A prepared split on disk: Parquet tables and one JSON file, written atomically and verified at load; and its
statistics.

Layout of a folder::

    events.parquet          item, split[, time][, rating]: all users' events, one after the other
    users.parquet           user_id, events (how many of the rows above are theirs)
    user_features.parquet   the aligned users table, if there is one
    items.parquet           the catalogue, row i = item index i
    tags.parquet            user, item, tag
    split.json              name, cleaning steps, rows, bytes and sha256 of every file; written last

Other files in the folder are left alone. A crash while writing leaves the old ``split.json`` beside new tables at
worst, which ``load_split`` reports as a damaged file; it never loads a mixture.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from instructrec_jax.data.schema import SPLIT_NAMES, TRAIN, Catalogue, SplitData, Step, user_ranges
from instructrec_jax.errors import DataError

MANIFEST = "split.json"
_FORMAT = 1
_GROUP_ROWS = 1 << 17  # of a row group: the least that is read for a part of the users
_AGAIN = "run `instructrec data prepare` again"


def save_split(data: SplitData, folder: str | Path) -> Path:
    """Write ``data`` into ``folder`` (made if need be) and return the folder. ``load_split`` gives back exactly the
    same.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = _tables(data)
    temporary = Path(tempfile.mkdtemp(prefix=".split-", dir=folder))
    try:
        files: dict[str, dict[str, Any]] = {}
        for name, table in tables.items():
            sink = io.BytesIO()
            # Arrow calls a list's child "item"; the Parquet standard's "element" would come back as another type.
            pq.write_table(table, sink, compression="zstd", use_compliant_nested_type=False, row_group_size=_GROUP_ROWS)
            content = sink.getvalue()
            _write(temporary / name, content)
            files[name] = {"rows": table.num_rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        body = {"format": _FORMAT, "name": data.name, "steps": [asdict(step) for step in data.steps], "files": files}
        body["sha256"] = _digest(body)
        _write(temporary / MANIFEST, json.dumps(body, ensure_ascii=False, indent=1).encode("utf-8"))
        for name in (*tables, MANIFEST):
            (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    stale = folder / "user_features.parquet"
    if data.users is None and stale.exists():
        stale.unlink()
    return folder


def load_split(folder: str | Path) -> SplitData:
    """Read what ``save_split`` wrote, after comparing every file with its sum.

    Raises:
        DataError: the folder or a file is missing, or a file was damaged or changed (named, with both sums).
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise DataError("no prepared data here", file=manifest, remedy="run `instructrec data prepare CONFIG` first")
    try:
        body = json.loads(manifest.read_bytes())
        recorded = body.pop("sha256")
        intact = recorded == _digest(body)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact, body = False, {}
    if not intact:
        raise DataError("damaged: the file does not match its own checksum", file=manifest, remedy=_AGAIN)
    if body["format"] != _FORMAT:
        raise DataError(f"format {body['format']}, this version reads {_FORMAT}", file=manifest, remedy=_AGAIN)
    tables = {name: _verified(folder / name, entry) for name, entry in body["files"].items()}

    events, items = tables["events.parquet"], tables["items.parquet"]
    users, tags = tables["users.parquet"], tables["tags.parquet"]
    return SplitData(
        name=body["name"],
        user_ids=users["user_id"].to_pylist(),
        catalogue=Catalogue(items["item_id"].to_pylist(), items["title"].to_pylist(), items),
        offsets=np.concatenate([[0], np.cumsum(users["events"].to_numpy())]).astype(np.int64),
        item=events["item"].to_numpy(),
        split=events["split"].to_numpy(),
        time=events["time"].to_numpy() if "time" in events.column_names else None,
        rating=events["rating"].to_numpy() if "rating" in events.column_names else None,
        users=tables.get("user_features.parquet"),
        tags=list(zip(tags["user"].to_pylist(), tags["item"].to_pylist(), tags["tag"].to_pylist())),
        steps=tuple(
            Step(s["name"], tuple(s["interactions"]), tuple(s["users"]), tuple(s["items"]), s["detail"])
            for s in body["steps"]
        ),
    )


class StoredSplit:
    """What ``save_split`` wrote, read a part of the users at a time; memory does not grow with the number of events.

    Sums are not checked: ``load_split`` does that.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        tables = {n: pq.read_table(self._folder / f"{n}.parquet").combine_chunks() for n in ("users", "items", "tags")}
        users, items, tags = tables["users"], tables["items"], tables["tags"]
        self._user_ids = users["user_id"]
        self.offsets = np.concatenate([[0], np.cumsum(users["events"].to_numpy())]).astype(np.int64)
        self._events = pq.ParquetFile(self._folder / "events.parquet")
        groups = [self._events.metadata.row_group(n).num_rows for n in range(self._events.num_row_groups)]
        self._group_ends = np.cumsum(groups)
        self._group: tuple[int, pa.Table] | None = None  # the last one read: the next part begins in it
        columns = self._events.schema_arrow.names
        nothing = np.zeros(0, np.float64)
        #: The data set without users and events: catalogue and tags.
        self.frame = SplitData(
            name=json.loads((self._folder / MANIFEST).read_text("utf-8"))["name"],
            user_ids=[],
            catalogue=Catalogue(items["item_id"].to_pylist(), items["title"].to_pylist(), items),
            offsets=np.zeros(1, np.int64),
            item=np.zeros(0, np.int64),
            split=np.zeros(0, np.int8),
            rating=nothing if "rating" in columns else None,
            tags=list(zip(tags["user"].to_pylist(), tags["item"].to_pylist(), tags["tag"].to_pylist())),
        )
        self._columns = [name for name in ("item", "split", "rating") if name in columns]

    def part(self, first: int, last: int) -> SplitData:
        """Users ``first`` to ``last`` (exclusive), as ``SplitData.part`` gives them, without times."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        table = self._rows(start, stop)
        return replace(
            self.frame,
            user_ids=self._user_ids[first:last].to_pylist(),
            offsets=self.offsets[first : last + 1] - start,
            item=table["item"].to_numpy(),
            split=table["split"].to_numpy(),
            rating=table["rating"].to_numpy() if "rating" in self._columns else None,
            tags=[],
            first_user=first,
        )

    def parts(self, events: int) -> Iterator[SplitData]:
        """All users in parts of about so many events; a user is in one part."""
        for first, last in self.ranges(events):
            yield self.part(first, last)

    def ranges(self, events: int) -> list[tuple[int, int]]:
        """(first, last + 1) of the users of these parts."""
        return user_ranges(self.offsets, events)

    def _rows(self, start: int, stop: int) -> pa.Table:
        first, last = np.searchsorted(self._group_ends, (start, max(start, stop - 1)), side="right")
        found = []
        for number in range(int(first), min(int(last), len(self._group_ends) - 1) + 1):
            if self._group is None or self._group[0] != number:
                self._group = number, self._events.read_row_group(number, columns=self._columns)
            begun = int(self._group_ends[number]) - self._group[1].num_rows
            found.append(self._group[1].slice(max(start - begun, 0), stop - max(start, begun)))
        return pa.concat_tables(found) if found else self._events.schema_arrow.empty_table()


def _tables(data: SplitData) -> dict[str, pa.Table]:
    events: dict[str, Any] = {"item": pa.array(data.item), "split": pa.array(data.split)}
    if data.time is not None:
        events["time"] = pa.array(data.time)
    if data.rating is not None:
        events["rating"] = pa.array(data.rating)  # NaN stays NaN, so that the column has no nulls
    tags = {
        "user": pa.array([t[0] for t in data.tags], pa.int64()),
        "item": pa.array([t[1] for t in data.tags], pa.int64()),
        "tag": pa.array([t[2] for t in data.tags], pa.string()),
    }
    users = {"user_id": pa.array(data.user_ids, pa.string()), "events": pa.array(np.diff(data.offsets), pa.int64())}
    tables = {
        "events.parquet": pa.table(events),
        "users.parquet": pa.table(users),
        "items.parquet": data.catalogue.table,
    }
    if data.users is not None:
        tables["user_features.parquet"] = data.users
    return {**tables, "tags.parquet": pa.table(tags)}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def _verified(path: Path, entry: dict[str, Any]) -> pa.Table:
    if not path.is_file():
        raise DataError(f"missing, but {MANIFEST} lists it", file=path, remedy=_AGAIN)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise DataError(
            f"damaged or changed: {len(content)} bytes, sha256 {found}; "
            f"expected {entry['bytes']} bytes, sha256 {entry['sha256']}",
            file=path,
            remedy=_AGAIN,
        )
    return pq.read_table(pa.BufferReader(content)).combine_chunks()


# ----------------------------------------------------------------------------------------------------------- statistics


def statistics(data: SplitData) -> dict[str, Any]:
    """Figures for the report and the command line; plain numbers, JSON-ready.

    ``history_length`` holds quantiles of events per user; ``events`` and ``items_per_split`` count per split;
    ``tied_last_timestamp`` is the share of users whose newest timestamp belongs to two or more of their events (None
    without timestamps); ``popularity_gini`` is the Gini index of training interactions over the whole catalogue (0 =
    all items alike); ``top_1_percent_share`` is the part of training interactions on the most popular 1 % of items;
    ``cold_items`` have no training event; ``title_language`` is ``zh`` if most titles with letters hold Chinese
    characters, else ``en`` (a hint for templates).
    """
    length = np.diff(data.offsets)
    popularity = np.sort(data.train_popularity)
    users, items, events = data.num_users, data.num_items, len(data.item)
    quantiles = np.quantile(length, (0, 0.25, 0.5, 0.75, 0.9, 1)) if users else np.zeros(6)
    names = ("min", "25%", "median", "75%", "90%", "max")
    return {
        "name": data.name,
        "users": users,
        "items": items,
        "interactions": events,
        "density": events / (users * items) if users and items else 0.0,
        "history_length": {**dict(zip(names, map(float, quantiles))), "mean": float(length.mean()) if users else 0.0},
        "events": {name: int((data.split == i).sum()) for i, name in enumerate(SPLIT_NAMES)},
        "items_per_split": {name: len(np.unique(data.item[data.split == i])) for i, name in enumerate(SPLIT_NAMES)},
        "users_without_training_events": int((np.bincount(data.user[data.split == TRAIN], minlength=users) == 0).sum()),
        "tied_last_timestamp": _tied_last(data),
        "first_time": int(data.time.min()) if data.time is not None and events else None,
        "last_time": int(data.time.max()) if data.time is not None and events else None,
        "rating_mean": float(np.nanmean(data.rating))
        if data.rating is not None and np.isfinite(data.rating).any()
        else None,
        "repeated_pairs": events - len(np.unique(data.user * max(items, 1) + data.item)),
        "popularity_gini": gini(popularity),
        "top_1_percent_share": float(popularity[-max(1, items // 100) :].sum() / max(1, popularity.sum())),
        "cold_items": int((popularity == 0).sum()),
        "tags": len(data.tags),
        "item_columns": data.catalogue.table.column_names,
        "user_columns": data.users.column_names if data.users is not None else [],
        "title_language": _title_language(data.catalogue.titles),
        "duplicate_titles": items - len(set(data.catalogue.titles)),
    }


def gini(counts: np.ndarray) -> float:
    """Gini index of non-negative counts [n]: 0 = all alike (or all zero), (n-1)/n = all on one.

    G = sum_i (2 i - n - 1) x_(i) / (n sum x), x sorted upwards, i from 1.
    """
    counts = np.sort(np.asarray(counts, np.float64))
    n, total = len(counts), counts.sum()
    if not n or not total:
        return 0.0
    return float(2 * (np.arange(1, n + 1) * counts).sum() / (n * total) - (n + 1) / n)


def _tied_last(data: SplitData) -> float | None:
    if data.time is None or not data.num_users:
        return None
    last = data.offsets[1:] - 1
    long = np.diff(data.offsets) > 1
    return float((data.time[last[long]] == data.time[last[long] - 1]).sum() / data.num_users)


def _title_language(titles: list[str]) -> str:
    chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in title) for title in titles)
    words = sum(any(c.isalpha() for c in title) for title in titles)
    return "zh" if chinese * 2 > words else "en"

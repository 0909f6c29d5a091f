"""Files of recommendations, made by anything: read, checked, evaluated with the same metrics, and written.

A file is CSV (``.csv``, ``.csv.gz``) or Parquet with the columns ``user_id``, ``item_id`` and ``score`` (higher is
better) or ``rank`` (1 = best) or both. **Order of a list:** by score, falling; equal scores by ``rank`` if the file has
it; then by place in the file. Without ``score``, by ``rank``, then by place in the file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from instructrec_jax.data.privacy import hashed_column
from instructrec_jax.data.schema import SPLIT_NAMES, TEST, SplitData
from instructrec_jax.data.sources.files import read_file
from instructrec_jax.data.sources.values import as_numbers, as_text
from instructrec_jax.errors import DataError, UserError, did_you_mean
from instructrec_jax.evaluation import metrics
from instructrec_jax.evaluation.table import Row
from instructrec_jax.files import in_bucket, path_of

COLUMNS = ("user_id", "item_id", "score", "rank")
SUFFIXES = (".csv", ".csv.gz", ".parquet")
_EXAMPLES = 5


@dataclass(frozen=True)
class Recommendations:
    """Ranked lists of the known users of a file, and what the file holds beyond them."""

    name: str
    user: Int[np.ndarray, " lists"]  # user index, ascending
    lists: Int[np.ndarray, "lists k"]  # item index, best first; -1 empty, -3, -4, ... an item the catalogue lacks
    rows: int  # rows of the file
    longest: int  # length of the longest list, before the cut to k
    unknown_users: int = 0  # users that the data lack; their rows are not evaluated
    unknown_user_examples: tuple[str, ...] = ()
    unknown_items: int = 0  # distinct items that the catalogue lacks; they keep their places in the lists
    unknown_item_rows: int = 0
    unknown_item_examples: tuple[str, ...] = ()
    duplicates: int = 0  # rows that repeat an earlier (user, item) of the file


def read_recommendations(
    path: str | Path,
    data: SplitData,
    *,
    k: int = 20,
    columns: Mapping[str, str] | None = None,
    name: str = "",
    user_key: Callable[[str], str] | None = None,
) -> Recommendations:
    """Read a file of recommendations and index it against a data set.

    Args:
        path: ``.csv``, ``.csv.gz`` or ``.parquet``.
        data: whose users and items the file speaks of.
        k: places kept per list.
        columns: our column name -> the file's column name.
        name: what the system is called; default: the file's name.
        user_key: the file's name of a user -> the data's (``privacy.user_keys``); None = they are the same.

    Raises:
        DataError: no such file, another suffix, empty, not UTF-8, a missing column, a score or rank that is no number,
            an empty id, or no user of the file is in the data. File, row and column are named.
    """
    path = Path(path)
    columns_read = _read(path, dict(columns or {}))
    user_text, item_text = columns_read["user_id"], columns_read["item_id"]
    user = _index(hashed_column(user_text, user_key) if user_key else user_text, data.user_ids)
    item = _index(item_text, data.catalogue.item_ids)
    none = np.zeros(len(user))
    score, rank = columns_read.get("score", none), columns_read.get("rank", none)

    strangers = user_text.filter(pa.array(user < 0)).unique().to_pylist()
    if (user < 0).all():
        raise DataError(
            f"none of its {len(strangers)} users is in {data.name} ({data.num_users} users), e.g. {strangers[0]!r} "
            f"where the data have {data.user_ids[0]!r}",
            file=path,
            column="user_id",
            remedy="write user ids as they stand in the interactions file",
        )
    foreign = item_text.filter(pa.array(item < 0)).dictionary_encode()
    foreign_names = foreign.dictionary.to_pylist() if len(foreign) else []
    if len(foreign):
        item[item < 0] = metrics.UNKNOWN - 1 - foreign.indices.to_numpy()  # each unknown item keeps an identity

    order = np.lexsort((np.arange(len(user)), rank, -score, user))
    order = order[user[order] >= 0]
    listed, start, inverse = np.unique(user[order], return_index=True, return_inverse=True)
    place = np.arange(len(order)) - start[inverse]
    lists = np.full((len(listed), k), metrics.MISSING, np.int64)
    keep = place < k
    lists[inverse[keep], place[keep]] = item[order][keep]
    known = user[order] * (data.num_items + len(foreign_names) + 1) + item[order] + len(foreign_names)
    return Recommendations(
        name=name or path.name.removesuffix(".gz").rsplit(".", 1)[0],
        user=listed,
        lists=lists,
        rows=len(user),
        longest=int(place.max(initial=-1)) + 1,
        unknown_users=len(strangers),
        unknown_user_examples=tuple(strangers[:_EXAMPLES]),
        unknown_items=len(foreign_names),
        unknown_item_rows=len(foreign),
        unknown_item_examples=tuple(foreign_names[:_EXAMPLES]),
        duplicates=len(known) - len(np.unique(known)),
    )


def evaluate_lists(
    recommendations: Recommendations,
    data: SplitData,
    *,
    split: int = TEST,
    cutoffs: Sequence[int] = (1, 3, 5, 10, 20),
    baseline: bool = False,
) -> Row:
    """Metrics of ranked lists: one case per user with events in ``split``, the relevant items being those events'
    items.

    A relevant item that is not in the list earns nothing. A user without a list earns 0 and is counted. The list is
    judged as it was delivered: an item from the user's history, a repeat or an item outside the catalogue fills its
    place (their rates are in the row's values and notes). With one relevant item per user, HR, NDCG and MRR are
    those of ``metrics_at``.

    Raises:
        UserError: no user has events in the split, or a cutoff is larger than the lists are wide.
    """
    metrics.check_cutoffs(cutoffs)
    width = recommendations.lists.shape[1]
    if max(cutoffs) > width:
        raise UserError(f"cutoff {max(cutoffs)} needs lists of that length, they were read to k = {width}")
    cases = data.cases(split)
    users, first = np.unique(cases.user, return_index=True)
    if not len(users):
        raise UserError(f"{data.name} has no {SPLIT_NAMES[split]} cases to evaluate on", remedy="check data.split")
    relevant = np.split(
        cases.target[np.argsort(cases.user, kind="stable")], np.cumsum(np.bincount(cases.user)[users])[:-1]
    )
    lists = np.full((len(users), width), metrics.MISSING, np.int64)
    at = np.searchsorted(recommendations.user, users)
    at_safe = np.minimum(at, max(len(recommendations.user) - 1, 0))
    has = recommendations.user[at_safe] == users if len(recommendations.user) else np.zeros(len(users), bool)
    lists[has] = recommendations.lists[at_safe[has]]
    values = metrics.list_metrics(lists, relevant, cutoffs)
    k = min(10, width)
    values[f"seen@{k}"] = _seen(lists[:, :k], data, users, cases.end[first])
    return Row(
        name=recommendations.name,
        user=users,
        values=values,
        lists=lists,
        baseline=baseline,
        notes={
            "rows": recommendations.rows,
            "users_without_list": int((~has).sum()),
            "lists_without_case": int((~np.isin(recommendations.user, users)).sum()),
            "unknown_users": recommendations.unknown_users,
            "unknown_user_examples": list(recommendations.unknown_user_examples),
            "unknown_items": recommendations.unknown_items,
            "unknown_item_rows": recommendations.unknown_item_rows,
            "unknown_item_examples": list(recommendations.unknown_item_examples),
            "duplicate_rows": recommendations.duplicates,
            "longest_list": recommendations.longest,
        },
    )


def write_recommendations(
    path: str | Path,
    data: SplitData,
    user: Int[np.ndarray, " lists"],
    lists: Int[np.ndarray, "lists k"],
    scores: Float[np.ndarray, "lists k"] | None = None,
) -> Path:
    """Write ranked lists as ``user_id, item_id, score, rank`` (CSV, gzipped CSV or Parquet by suffix), all or nothing.

    Args:
        user: user index of each list.
        lists: item indices, best first; -1 = empty place.
        scores: score of each place; default: minus the rank.

    Raises:
        UserError: another suffix, shapes that do not match, a NaN score, or an item outside the catalogue.
    """
    path, user, lists = path_of(path), np.asarray(user), np.asarray(lists)
    _check_suffix(path)
    if lists.ndim != 2 or len(user) != len(lists) or (scores is not None and np.shape(scores) != lists.shape):
        raise UserError(f"lists {lists.shape}, users {user.shape} and scores {np.shape(scores)} do not match")
    rows, places = np.nonzero(lists != metrics.MISSING)
    items = lists[rows, places]
    bad = (items < 0) | (items >= data.num_items)
    if bad.any():
        raise UserError(f"list {int(rows[bad][0])} holds item {int(items[bad][0])}, the catalogue has {data.num_items}")
    score = np.asarray(scores)[rows, places].astype(np.float64) if scores is not None else -(places + 1.0)
    if np.isnan(score).any():
        raise UserError(f"list {int(rows[np.isnan(score)][0])} has a NaN score")
    table = pa.table(
        {
            "user_id": pa.array(data.user_ids, pa.string()).take(pa.array(user[rows], pa.int64())),
            "item_id": pa.array(data.catalogue.item_ids, pa.string()).take(pa.array(items, pa.int64())),
            "score": pa.array(score),
            "rank": pa.array(places + 1, pa.int64()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=None if in_bucket(path) else path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        if path.name.endswith(".parquet"):
            pq.write_table(table, temporary)
        else:
            with pa.output_stream(temporary, compression="gzip" if path.name.endswith(".gz") else None) as stream:
                pyarrow.csv.write_csv(table, stream)
        if in_bucket(path):  # an object appears when it is complete
            path.write_bytes(Path(temporary).read_bytes())
            return path
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


# -------------------------------------------------------------------------------------------------------------- helpers


def _seen(lists: np.ndarray, data: SplitData, users: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Share of the filled places that hold an item from the history before the user's first case."""
    out = np.full(len(users), np.nan)
    for i, (user, stop) in enumerate(zip(users, end)):
        filled = lists[i] != metrics.MISSING
        if filled.any():
            out[i] = np.isin(lists[i][filled], data.history(int(user), int(stop))).mean()
    return out


def _index(text: pa.Array, ids: list[str]) -> np.ndarray:
    """Place of each string in ``ids``, -1 where it is not there."""
    found = pc.index_in(text, value_set=pa.array(ids, pa.string()))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _check_suffix(path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: cannot tell the format from the name", remedy=f"use one of {', '.join(SUFFIXES)}")


def _read(path: Path, columns: dict[str, str]) -> dict[str, Any]:
    """The file's columns by our names: ids as Arrow strings, score and rank as float64."""
    _check_suffix(path)
    unknown = set(columns) - set(COLUMNS)
    if unknown:
        raise UserError(f"column mapping for {sorted(unknown)}", remedy=f"a recommendation has {', '.join(COLUMNS)}")
    loaded = read_file(path)
    names = loaded.table.column_names
    wanted = {ours: columns.get(ours, ours) for ours in COLUMNS}
    for ours, theirs in wanted.items():
        if theirs not in names and (ours.endswith("_id") or ours in columns):
            raise DataError(
                f"no such column{did_you_mean(theirs, names)}; there are {', '.join(names)}",
                file=path,
                column=theirs,
                remedy="rename it, or map our column name to the file's",
            )
    present = {ours: theirs for ours, theirs in wanted.items() if theirs in names}
    if "score" not in present and "rank" not in present:
        raise DataError(
            f"needs a score or a rank column; there are {', '.join(names)}",
            file=path,
            column="score",
            remedy="add score (higher is better) or rank (1 = best)",
        )
    out: dict[str, Any] = {}
    for ours, theirs in present.items():
        if ours.endswith("_id"):
            out[ours] = as_text(loaded.table[theirs])
            bad, problem = pc.equal(out[ours], "").to_numpy(zero_copy_only=False), "empty id"
        else:
            out[ours], bad = as_numbers(loaded.table[theirs])
            bad, problem = bad | np.isnan(out[ours]), "is not a finite number"
        if bad.any():
            record = int(bad.argmax())
            cell = "" if ours.endswith("_id") else f"{loaded.table[theirs][record].as_py()!r} "
            count = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
            raise DataError(
                f"{cell}{problem}{count}",
                file=path,
                row=loaded.origin.row(record),
                column=theirs,
                remedy="fix or remove the row",
            )
    return out

"""From cleaned tables to ``SplitData``: events in order, each of them train, valid or test.

**Order.** A user's events are sorted by timestamp (with its part below the second, if the log has one), then by
``position``, then by the tie rule. Where the log has no timestamps, positions are unique and the tie rule is never
asked.

**Tie rule.** Many logs hold several events of a user at one second: 44 % of ML-100K's users have a tied newest
timestamp, so the rule decides which item is held out. Sorting ties by item id, or leaving them in the order of a file
that is sorted by item id, tells the answer: the held-out item would be the one with the highest id among its
neighbours, and a model that sees ids (or anything in their order) can learn that. So ``tie: hash`` orders ties by a
keyed 64-bit hash of (seed, user id, item id, occurrence of the repeated pair). It carries no information, is the same
on every machine and in every process, and does not depend on the order of rows in the file. ``tie: input`` keeps the
file's row order, for comparison with published splits.

**Splits.**

* ``leave-one-out``: a user's last event is test, the last but one valid, the rest train.
* ``last-n``: the last n events are test, the n before them valid.
* ``global-time``: two moments cut the whole log. Events at or after the later one are test, those between valid. Events
  of one second are never torn apart. A user who begins after the cut has no training history and is kept, and counted.
* ``cold-items``: a keyed share of the items is new to the model: none of their events is a training event. A user's newest
  event on a new item is test; their earlier events on new items and everything after the test event are dropped, and
  counted. The newest of the others is valid. A user without an event on a new item gives a valid event alone.

In the first two, a user with fewer than 2n + 1 events cannot give both and still have a history: all of their events
stay in train.

With ``learn_valid`` the validation events join the training events once they have been chosen, so the test events stay
what they were.

**Tags.** A user's tag is kept only if its (user, item) pair is a training event of that user and nowhere held out, and
if it was not written at or after the user's first held-out event. Everything else could tell the target.

Users are indexed in the order of their ids as text, items in the order of the items table.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, Int8, UInt64

from instructrec_jax.config import SplitConfig
from instructrec_jax.data.cleaning import rating_key, time_keys
from instructrec_jax.data.schema import TEST, TRAIN, VALID, Catalogue, RawData, SplitData, Step
from instructrec_jax.errors import ConfigError, DataError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def split(raw: RawData, config: SplitConfig) -> SplitData:
    """Order and split the interactions of ``raw``.

    Raises:
        ConfigError: n or the fractions are out of range.
        DataError: ``global-time`` without timestamps, or a cut that leaves no training event.
    """
    _check(config)
    log = raw.interactions
    catalogue = Catalogue(raw.items["item_id"].to_pylist(), raw.items["title"].to_pylist(), raw.items.combine_chunks())
    user_ids = sorted(pc.unique(log["user_id"]).to_pylist())
    user = pc.index_in(log["user_id"], value_set=pa.array(user_ids, pa.string())).to_numpy().astype(np.int64)
    item = pc.index_in(log["item_id"], value_set=raw.items["item_id"].combine_chunks())
    if item.null_count:
        lost = log["item_id"].filter(pc.is_null(item))[0].as_py()
        raise DataError(f"{raw.name}: item {lost!r} has interactions but is not in the items table", column="item_id")
    item = item.to_numpy().astype(np.int32)

    order = event_order(log, user, item, user_ids, catalogue.item_ids, config)
    user, item = user[order], item[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))]).astype(np.int64)
    time = log["timestamp"].to_numpy()[order] if "timestamp" in log.column_names else None
    rating = log["rating"].to_numpy().astype(np.float64)[order] if "rating" in log.column_names else None
    read = len(item)
    if config.kind == "global-time":
        labels, detail = _by_time(raw.name, user, time, config)
    elif config.kind == "cold-items":
        labels, keep, detail = _by_new_items(user, item, catalogue.item_ids, config)
        user, item = user[keep], item[keep]
        time, rating = (column if column is None else column[keep] for column in (time, rating))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))]).astype(np.int64)
    else:
        labels, detail = _by_rank(user, offsets, 1 if config.kind == "leave-one-out" else config.n)

    if config.learn_valid:
        labels[labels == VALID] = TRAIN
        detail = "; ".join(filter(None, ["validation events are training events too", detail]))
    tags, tag_detail = _training_tags(raw.tags, user_ids, catalogue.item_ids, user, item, labels, time)
    cold = catalogue_cold(item, labels, len(catalogue))
    counts = ", ".join(
        f"{name} {int((labels == s).sum()):,}" for name, s in (("train", TRAIN), ("valid", VALID), ("test", TEST))
    )
    parts = [counts, detail, f"{cold:,} items without a training event" if cold else "", tag_detail]
    users, items = len(user_ids), len(catalogue)
    step = Step(
        f"split {config.kind}", (read, len(item)), (users, users), (items, items), "; ".join(p for p in parts if p)
    )
    return SplitData(
        name=raw.name,
        user_ids=user_ids,
        catalogue=catalogue,
        offsets=offsets,
        item=item,
        split=labels,
        time=time,
        rating=rating,
        users=_aligned_users(raw.users, user_ids),
        tags=tags,
        steps=(*raw.steps, step),
    )


def catalogue_cold(item: Int[np.ndarray, " events"], labels: Int8[np.ndarray, " events"], items: int) -> int:
    """How many items of the catalogue have no training event."""
    return int((np.bincount(item[labels == TRAIN], minlength=items) == 0).sum())


def _check(config: SplitConfig) -> None:
    if config.n < 1:
        raise ConfigError(f"data.split.n = {config.n}", remedy="at least 1")
    if config.kind == "cold-items" and not 0 < config.cold_fraction < 1:
        raise ConfigError(f"data.split.cold_fraction = {config.cold_fraction}", remedy="above 0 and below 1")
    valid, test = config.valid_fraction, config.test_fraction
    if config.kind == "global-time" and not (0 <= valid < 1 and 0 <= test < 1 and valid + test < 1):
        raise ConfigError(
            f"data.split.valid_fraction = {valid} and test_fraction = {test}",
            remedy="both from 0, and their sum below 1",
        )


# ---------------------------------------------------------------------------------------------------------------- order


def event_order(
    log: pa.Table,
    user: Int[np.ndarray, " events"],
    item: Int[np.ndarray, " events"],
    user_ids: list[str],
    item_ids: list[str],
    config: SplitConfig,
) -> Int[np.ndarray, " events"]:
    """Row numbers of ``log`` by user, and within a user by time, position and tie rule (see the module's docstring)."""
    times = time_keys(log)
    if config.tie == "input":
        return np.lexsort((*reversed(times), user))
    # Occurrence of a repeated pair at one moment, so that repeats are shuffled among the others and not always side by
    # side. Such rows differ in their rating at most, which numbers them independently of the order of rows.
    pair = np.lexsort((rating_key(log), *reversed(times), item, user))
    keys = [user, item, *times]
    repeat = np.all([key[pair][1:] == key[pair][:-1] for key in keys], axis=0) if len(pair) > 1 else np.zeros(0, bool)
    start = np.concatenate([[True], ~repeat])[: len(pair)]
    position = np.arange(len(pair))
    occurrence = np.empty(len(pair), np.int64)
    occurrence[pair] = position - np.maximum.accumulate(np.where(start, position, 0))
    ties = _mix(
        _mix(_hashes("user", user_ids, config.seed)[user] ^ _rotated(_hashes("item", item_ids, config.seed)[item]))
        + occurrence.astype(np.uint64) * _GOLDEN
    )
    return np.lexsort((ties, *reversed(times), user))


def _hashes(kind: str, ids: list[str], seed: int) -> UInt64[np.ndarray, " ids"]:
    """A keyed 64-bit hash of each id (BLAKE2b; Python's own hash differs between processes)."""
    key, person = str(seed).encode(), kind.encode()
    joined = b"".join(hashlib.blake2b(i.encode("utf-8"), digest_size=8, key=key, person=person).digest() for i in ids)
    return np.frombuffer(joined, "<u8").astype(np.uint64)


def _rotated(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    return (x << np.uint64(31)) | (x >> np.uint64(33))


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit reaches every output bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --------------------------------------------------------------------------------------------------------------- labels


def _by_rank(
    user: Int[np.ndarray, " events"], offsets: Int[np.ndarray, " users_plus_1"], n: int
) -> tuple[Int8[np.ndarray, " events"], str]:
    length = np.diff(offsets)
    from_end = offsets[user + 1] - 1 - np.arange(len(user))
    eligible = length[user] >= 2 * n + 1
    labels = np.full(len(user), TRAIN, np.int8)
    labels[eligible & (from_end < 2 * n)] = VALID
    labels[eligible & (from_end < n)] = TEST
    short = int((length < 2 * n + 1).sum())
    return labels, f"{short:,} users with fewer than {2 * n + 1} events stay whole in train" if short else ""


def _by_time(
    name: str, user: Int[np.ndarray, " events"], time: Int[np.ndarray, " events"] | None, config: SplitConfig
) -> tuple[Int8[np.ndarray, " events"], str]:
    if time is None:
        raise DataError(
            f"{name}: data.split.kind = global-time needs timestamps, and the interactions have only positions",
            column="timestamp",
            remedy="set data.split.kind to leave-one-out or last-n, or map a timestamp column in data.columns",
        )
    moments = np.sort(time)

    def cut(share: float) -> int:
        at = round(len(moments) * share)
        return int(moments[at]) if at < len(moments) else int(moments[-1]) + 1

    test_from = cut(1 - config.test_fraction)
    valid_from = min(cut(1 - config.test_fraction - config.valid_fraction), test_from)
    labels = np.where(time >= test_from, TEST, np.where(time >= valid_from, VALID, TRAIN)).astype(np.int8)
    trained = np.bincount(user[labels == TRAIN], minlength=int(user[-1]) + 1) > 0
    if not trained.any():
        raise DataError(
            f"{name}: no event lies before the first cut (time {valid_from}): too many events share one moment",
            column="timestamp",
            remedy="lower data.split.valid_fraction and test_fraction, or set data.split.kind to leave-one-out",
        )
    new = int((~trained).sum())
    detail = f"valid from time {valid_from}, test from time {test_from}"
    for split_name, label, share in (("valid", VALID, config.valid_fraction), ("test", TEST, config.test_fraction)):
        if share > 0 and not (labels == label).any():
            detail += f"; no {split_name} event, because many events share one moment"
    return labels, detail + (f"; {new:,} users begin after the first cut and have no training history" if new else "")


def _by_new_items(
    user: Int[np.ndarray, " events"], item: Int[np.ndarray, " events"], item_ids: list[str], config: SplitConfig
) -> tuple[Int8[np.ndarray, " kept"], Int[np.ndarray, " kept"], str]:
    """Labels of the events that are kept, and which those are."""
    there = np.unique(item)
    hashes = _hashes("new item", item_ids, config.seed)[there]
    count = round(config.cold_fraction * len(there))
    is_new = np.zeros(len(item_ids), bool)
    is_new[there[np.argsort(hashes, kind="stable")[:count]]] = True
    new = is_new[item]
    place = np.arange(len(item))

    # The test event: the newest on a new item that has two events on others before it, one to learn from and one to validate on.
    first = np.searchsorted(user, user)
    running = np.concatenate([[0], np.cumsum(~new)])
    warm_before = running[place] - running[first]
    last = np.full(int(user[-1]) + 1, -1)
    usable = new & (warm_before >= 2)
    np.maximum.at(last, user[usable], place[usable])
    test = last[user]
    keep = np.where(test >= 0, (place == test) | (~new & (place < test)), ~new)

    kept = np.flatnonzero(keep)
    labels = np.where(new[kept], TEST, TRAIN).astype(np.int8)
    warm = kept[~new[kept]]
    newest = np.full(len(last), -1)
    np.maximum.at(newest, user[warm], warm)
    several = np.bincount(user[warm], minlength=len(last)) >= 2
    labels[np.isin(kept, newest[several & (newest >= 0)])] = VALID
    dropped = len(item) - len(kept)
    return labels, kept, f"{count:,} items are new; {dropped:,} events on them or after a test event are dropped"


# ----------------------------------------------------------------------------------------------------- users and tags


def _aligned_users(users: pa.Table | None, user_ids: list[str]) -> pa.Table | None:
    """Row u = user u; features are null where the users table has no such user."""
    if users is None:
        return None
    ids = pa.array(user_ids, pa.string())
    rows = users.take(pc.index_in(ids, value_set=users["user_id"].combine_chunks()))
    return rows.set_column(rows.column_names.index("user_id"), "user_id", ids).combine_chunks()


def _training_tags(
    tags: pa.Table | None,
    user_ids: list[str],
    item_ids: list[str],
    user: Int[np.ndarray, " events"],
    item: Int[np.ndarray, " events"],
    labels: Int8[np.ndarray, " events"],
    time: Int[np.ndarray, " events"] | None,
) -> tuple[list[tuple[int, int, str]], str]:
    """Tags that cannot tell a held-out event, sorted by (user, item, tag), and the counts of the others by reason."""
    if tags is None:
        return [], ""
    held = labels != TRAIN
    pairs = user * len(item_ids) + item
    train_pairs, held_pairs = np.unique(pairs[~held]), np.unique(pairs[held])
    tag_user = pc.fill_null(pc.index_in(tags["user_id"], value_set=pa.array(user_ids, pa.string())), -1).to_numpy()
    tag_item = pc.fill_null(pc.index_in(tags["item_id"], value_set=pa.array(item_ids, pa.string())), -1).to_numpy()
    tag_pair = np.where((tag_user < 0) | (tag_item < 0), -1, tag_user.astype(np.int64) * len(item_ids) + tag_item)
    on_held = np.isin(tag_pair, held_pairs)
    on_train = np.isin(tag_pair, train_pairs) & ~on_held
    late = np.zeros(len(tag_pair), bool)
    if time is not None and "timestamp" in tags.column_names:
        first_held = np.full(len(user_ids), np.iinfo(np.int64).max)
        np.minimum.at(first_held, user[held], time[held])
        late = on_train & (tags["timestamp"].to_numpy() >= first_held[np.maximum(tag_user, 0)])
    keep = np.flatnonzero(on_train & ~late)
    words = tags["tag"].to_pylist()
    kept = sorted({(int(tag_user[i]), int(tag_item[i]), words[i]) for i in keep})
    reasons = {
        "on a held-out item": int(on_held.sum()),
        "not on an event of the user": int((~on_held & ~on_train).sum()),
        "written at or after the user's first held-out event": int(late.sum()),
        "repeated": len(keep) - len(kept),
    }
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items() if n)
    return kept, f"tags: {len(kept):,} of {len(words):,} kept" + (f" (dropped: {dropped})" if dropped else "")

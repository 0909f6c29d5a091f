"""Splits: the order of events is written down, deterministic, and tells nothing; held-out items leak nowhere."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrec_jax.config import DataConfig, SplitConfig
from instructrec_jax.data import sources
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.schema import TEST, TRAIN, VALID, SplitData
from instructrec_jax.data.splits import split
from instructrec_jax.errors import ConfigError, DataError
from tests.datasets import NO_RULES, raw_data, shared_data, table_config

HASH = SplitConfig()


def events(data: SplitData) -> list[tuple]:
    """Everything about the events, by id, in order."""
    rating = [None] * len(data.item) if data.rating is None else np.nan_to_num(data.rating, nan=-1).tolist()
    names = [data.catalogue.item_ids[i] for i in data.item]
    return list(zip([data.user_ids[u] for u in data.user], names, data.split.tolist(), rating))


def of_user(data: SplitData, user: str) -> list[str]:
    u = data.user_ids.index(user)
    return [data.catalogue.item_ids[i] for i in data.item[data.offsets[u] : data.offsets[u + 1]]]


# Few users, items and moments: many ties and many repeated pairs.
_logs = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from(["u1", "u2", "电"]),
            "item": st.sampled_from(["a", "b", "c", "d", "NA"]),
            "timestamp": st.integers(0, 3),
            "rating": st.sampled_from([1.0, 2.0, None]),
        }
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=_logs,
    seed=st.integers(0, 3),
    shuffle=st.randoms(use_true_random=False),
    keep=st.sampled_from(["keep", "first", "last"]),
)
def test_order_of_rows_never_changes_the_split(rows, seed, shuffle: random.Random, keep):
    items, config = ["d", "a", "NA", "c", "b"], replace(HASH, seed=seed)
    rules = replace(NO_RULES, duplicates=keep)
    permuted = shuffle.sample(rows, len(rows))
    one = split(clean(raw_data(rows, items), rules), config)
    two = split(clean(raw_data(permuted, items), rules), config)
    assert events(one) == events(two)
    assert one.offsets.tolist() == two.offsets.tolist()


@settings(max_examples=100, deadline=None)
@given(rows=_logs, n=st.integers(1, 3))
def test_each_eligible_user_has_exactly_n_test_and_n_valid_events_and_they_are_the_last(rows, n):
    kind = "leave-one-out" if n == 1 else "last-n"
    data = split(raw_data(rows), SplitConfig(kind=kind, n=n))
    assert len(data.item) == len(rows)
    for u in range(data.num_users):
        labels = data.split[data.offsets[u] : data.offsets[u + 1]].tolist()
        k = n if len(labels) >= 2 * n + 1 else 0
        assert labels == [TRAIN] * (len(labels) - 2 * k) + [VALID] * k + [TEST] * k
        times = data.time[data.offsets[u] : data.offsets[u + 1]]  # pyright: ignore
        assert (np.diff(times) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(rows=_logs, valid=st.floats(0, 0.4), test=st.floats(0, 0.4))
def test_global_time_cuts_the_whole_log_at_two_moments(rows, valid, test):
    config = SplitConfig(kind="global-time", valid_fraction=valid, test_fraction=test)
    try:
        data = split(raw_data(rows), config)
    except DataError as error:
        assert "share one moment" in str(error)
        return
    assert data.time is not None and len(data.item) == len(rows)
    for early, late in ((TRAIN, VALID), (VALID, TEST), (TRAIN, TEST)):
        a, b = data.time[data.split == early], data.time[data.split == late]
        assert not len(a) or not len(b) or a.max() < b.min()
    assert (np.diff(data.split.astype(int))[np.diff(data.user) == 0] >= 0).all()


def tie_key(user: str, item: str, occurrence: int, seed: int = 0) -> int:
    """The written rule in plain integers, without NumPy."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def hashed(kind: str, text: str) -> int:
        key, person = str(seed).encode(), kind.encode()
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key, person=person).digest(), "little")

    def mix(x: int) -> int:
        x = (x + golden) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    h = hashed("item", item)
    rotated = ((h << 31) | (h >> 33)) & mask
    return mix((mix(hashed("user", user) ^ rotated) + occurrence * golden) & mask)


@settings(max_examples=100, deadline=None)
@given(rows=_logs, share=st.sampled_from([0.2, 0.5, 0.8]), seed=st.integers(0, 3))
def test_new_items_have_no_event_before_the_test(rows, share, seed):
    raw = clean(raw_data(rows, ["a", "b", "c", "d", "NA"]), replace(NO_RULES, duplicates="keep"))
    whole, data = (
        split(raw, replace(HASH, kind=kind, seed=seed, cold_fraction=share)) for kind in ("last-n", "cold-items")
    )
    new = set(data.item[data.split == TEST])
    assert not new & set(data.item[data.split != TEST])
    for user, name in enumerate(data.user_ids):
        labels = data.split[data.offsets[user] : data.offsets[user + 1]].tolist()
        assert labels == sorted(labels) and labels.count(TEST) <= 1 and labels.count(VALID) <= 1
        if TEST in labels:
            assert labels.count(TRAIN) >= 1 and labels.count(VALID) == 1
        # What is kept is in the order of the whole.
        before = iter(of_user(whole, name))
        assert all(item in before for item in of_user(data, name))
    assert data.steps[-1].interactions == (len(whole.item), len(data.item))


def test_a_refit_learns_the_validation_events_and_leaves_the_test_events_as_they_were():
    raw = clean(sources.read(DataConfig(), "ml"), replace(NO_RULES, k_core=5))
    first, again = (split(raw, replace(HASH, learn_valid=learn)) for learn in (False, True))
    np.testing.assert_array_equal(first.item, again.item)
    np.testing.assert_array_equal(first.split == TEST, again.split == TEST)
    assert (first.split == VALID).sum() == first.num_users and not (again.split == VALID).any()
    assert set(first.tags) <= set(again.tags)


def test_ties_are_the_same_in_every_process_and_on_every_platform():
    """Fixed values: a change here would silently change every published split."""
    rows = [{"user": "u", "item": i, "timestamp": 7} for i in "abcdefgh"]
    got = "".join(of_user(split(raw_data(rows), HASH), "u"))
    code = (
        "from tests.test_splits import *\n"
        "rows = [{'user': 'u', 'item': i, 'timestamp': 7} for i in 'hgfedcba']\n"
        "print(''.join(of_user(split(raw_data(rows), HASH), 'u')))"
    )
    root = str(Path(__file__).resolve().parents[1])
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == got
    assert got == "".join(sorted("abcdefgh", key=lambda item: tie_key("u", item, 0))) == "dgehcabf"
    assert "".join(of_user(split(raw_data(rows), replace(HASH, seed=1)), "u")) != got, "the seed is the key"


def test_ties_carry_no_information_about_ids_or_the_order_of_rows():
    """Two tied events each: the one with the smaller id, and the one first in the file, comes last in half of the
    users.
    """
    rows = [{"user": f"u{u}", "item": i, "timestamp": 1} for u in range(2000) for i in ("a", "b")]
    data = split(raw_data(rows), HASH)
    last_is_a = np.mean([of_user(data, f"u{u}")[-1] == "a" for u in range(2000)])
    assert abs(last_is_a - 0.5) < 0.05  # 4.5 standard deviations
    assert all(
        of_user(split(raw_data(rows[:20]), replace(HASH, tie="input")), f"u{u}") == ["a", "b"] for u in range(10)
    )


def test_repeats_at_one_moment_are_shuffled_among_the_others():
    rows = [{"user": f"u{u}", "item": i, "timestamp": 1} for u in range(300) for i in ("a", "a", "b")]
    data = split(raw_data(rows), HASH)
    middle = np.mean([of_user(data, f"u{u}")[1] == "b" for u in range(300)])
    assert 0.2 < middle < 0.47


def test_timestamp_goes_before_position_and_position_alone_suffices():
    rows = [
        {"user": "u", "item": i, "timestamp": t, "position": p} for i, t, p in (("a", 1, 9), ("b", 2, 1), ("c", 1, 3))
    ]
    assert of_user(split(raw_data(rows), HASH), "u") == ["c", "a", "b"]
    for row in rows:
        del row["timestamp"]
    data = split(raw_data(rows), HASH)
    assert of_user(data, "u") == ["b", "c", "a"] and data.time is None


def test_users_by_id_items_by_table_and_short_users_counted():
    rows = [
        {"user": u, "item": i, "position": n} for u, items in (("9", "xyz"), ("10", "x")) for n, i in enumerate(items)
    ]
    users = pa.table({"user_id": ["9", "other"], "age": [30.0, 1.0]})
    data = split(raw_data(rows, items=["z", "cold", "y", "x"], users=users), HASH)
    assert data.user_ids == ["10", "9"] and data.catalogue.item_ids == ["z", "cold", "y", "x"]
    assert data.users is not None and data.users.to_pylist() == [
        {"user_id": "10", "age": None},
        {"user_id": "9", "age": 30.0},
    ]
    assert "1 users with fewer than 3 events stay whole in train" in data.steps[-1].detail
    assert data.cases(TEST).target.tolist() == [0] and data.history(1).tolist() == [3]


def test_tags_that_could_tell_a_held_out_event_are_left_out():
    rows = [{"user": "u", "item": i, "timestamp": t} for t, i in enumerate("abcab")] + [
        {"user": "v", "item": "a", "timestamp": 9}
    ]
    # u: train a b c, valid a, test b (repeats): only c is nowhere held out. v has one event: all train.
    tags = [("u", "a", "on valid"), ("u", "b", "on test"), ("u", "c", "early"), ("u", "c", "late"), ("v", "a", "mine"),
            ("v", "b", "not mine"), ("w", "a", "stranger"), ("u", "c", "early")]  # fmt: skip
    raw = raw_data(rows, tags=tags)
    assert raw.tags is not None
    raw = replace(raw, tags=raw.tags.append_column("timestamp", pa.array([0, 0, 2, 3, 99, 0, 0, 2])))
    data = split(raw, HASH)
    ids = [(data.user_ids[u], data.catalogue.item_ids[i], word) for u, i, word in data.tags]
    assert ids == [("u", "c", "early"), ("v", "a", "mine")]
    detail = data.steps[-1].detail
    for words in ("2 of 8 kept", "2 on a held-out item", "2 not on an event", "1 written at or after", "1 repeated"):
        assert words in detail


def test_no_tag_of_the_real_set_is_on_a_held_out_event():
    data = split(clean(sources.read(DataConfig(), "x"), DataConfig().clean), HASH)
    held = set(zip(data.user[data.split != TRAIN].tolist(), data.item[data.split != TRAIN].tolist()))
    train = set(zip(data.user[data.split == TRAIN].tolist(), data.item[data.split == TRAIN].tolist()))
    pairs = {(u, i) for u, i, _ in data.tags}
    assert pairs and pairs <= train and not pairs & held


def test_global_time_without_timestamps_and_settings_out_of_range():
    raw = raw_data([{"user": "u", "item": i, "position": n} for n, i in enumerate("abc")])
    with pytest.raises(DataError, match="needs timestamps"):
        split(raw, SplitConfig(kind="global-time"))
    with pytest.raises(ConfigError, match="sum below 1"):
        split(raw, SplitConfig(kind="global-time", valid_fraction=0.5, test_fraction=0.5))
    with pytest.raises(ConfigError, match="n = 0"):
        split(raw, SplitConfig(kind="last-n", n=0))


def test_users_who_begin_after_the_cut_are_kept_and_counted():
    rows = [{"user": "old", "item": "a", "timestamp": t} for t in range(8)]
    rows += [{"user": "new", "item": "b", "timestamp": t} for t in (8, 9)]
    data = split(raw_data(rows), SplitConfig(kind="global-time"))
    assert data.user_ids == ["new", "old"] and data.history(0).tolist() == []
    assert "1 users begin after the first cut" in data.steps[-1].detail
    assert data.cases(TEST).user.tolist() == [0]


def test_ml_100k_ties_change_the_held_out_item():
    raw = sources.read(table_config(shared_data("ml-100k")), "ml-100k")
    one, two = split(raw, HASH), split(raw, replace(HASH, tie="input"))
    differ = np.mean(one.item[one.split == TEST] != two.item[two.split == TEST])
    assert 0.1 < differ < 0.44, "ties decide the test item, for no more users than have a tied last timestamp"

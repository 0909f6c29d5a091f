"""The store gives back exactly what it took, names what is damaged, and its statistics are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructrec_jax.config import DataConfig, SplitConfig
from instructrec_jax.data import sources, store
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.schema import SplitData
from instructrec_jax.data.splits import split
from instructrec_jax.errors import DataError
from tests.datasets import raw_data, shared_data, table_config
from tests.small_split import small_split


def same(a: SplitData, b: SplitData) -> None:
    assert (a.name, a.user_ids, a.tags, a.steps) == (b.name, b.user_ids, b.tags, b.steps)
    assert (a.catalogue.item_ids, a.catalogue.titles) == (b.catalogue.item_ids, b.catalogue.titles)
    assert a.catalogue.table.equals(b.catalogue.table, check_metadata=True)
    assert (a.users is None) == (b.users is None)
    assert a.users is None or b.users is None or a.users.equals(b.users, check_metadata=True)
    for name in ("offsets", "item", "split", "time", "rating"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture(scope="module")
def small() -> SplitData:
    config = DataConfig()
    return split(clean(sources.read(config, "ml-latest-small"), config.clean), config.split)


def tiny(**changes: object) -> SplitData:
    rows = [{"user": u, "item": i, "timestamp": t, "rating": r} for u, i, t, r in
            (("u", "a", 1, 5.0), ("u", "b", 2, None), ("u", "c", 2, 1.0), ("v", "a", 3, 2.0))]  # fmt: skip
    users = pa.table({"user_id": ["u"], "age": [3.0]})
    raw = raw_data(rows, items=["a", "b", "c", "电"], tags=[("u", "a", "好, 'x'")], users=users)
    return replace(split(raw, SplitConfig()), **changes)  # pyright: ignore


def test_round_trip_of_the_embedded_set(tmp_path, small):
    assert store.save_split(small, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    same(store.load_split(tmp_path / "new" / "folder"), small)


@pytest.mark.parametrize("changes", [{}, {"users": None}, {"time": None}, {"rating": None}, {"tags": []}])
def test_round_trip_with_and_without_optional_parts(tmp_path, changes):
    store.save_split(tiny(), tmp_path)  # an older set in the same folder leaves nothing behind
    store.save_split(tiny(**changes), tmp_path)
    same(store.load_split(tmp_path), tiny(**changes))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "no temporary files stay"


def test_saving_twice_writes_the_same_bytes(tmp_path, small):
    one, two = store.save_split(small, tmp_path / "1"), store.save_split(small, tmp_path / "2")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_damaged_byte_is_noticed_and_the_file_named(tmp_path, data):
    store.save_split(tiny(), tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    path = tmp_path / data.draw(st.sampled_from(files))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged = content[:at]
    else:
        damaged = content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
    path.write_bytes(damaged)
    try:
        loaded = store.load_split(tmp_path)
    except DataError as error:
        assert Path(str(error.file)) == path
        assert "data prepare" in error.remedy
    else:  # white space of the JSON file may change without a change of meaning
        assert path.name == store.MANIFEST and json.loads(damaged) == json.loads(content)
        same(loaded, tiny())


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(DataError, match="no prepared data here"):
        store.load_split(tmp_path)
    store.save_split(tiny(), tmp_path)
    (tmp_path / "events.parquet").unlink()
    with pytest.raises(DataError, match=r"events\.parquet: missing"):
        store.load_split(tmp_path)


def test_a_crash_while_writing_never_gives_a_mixture(tmp_path, monkeypatch):
    store.save_split(tiny(), tmp_path)
    other = tiny(tags=[], name="other")
    moved: list[str] = []
    replace_file = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if len(moved) == 5:  # all tables are there, the JSON file is still the old one
            raise KeyboardInterrupt
        moved.append(target.name)
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            store.save_split(other, tmp_path)
    assert store.MANIFEST not in moved, "it is written last"
    with pytest.raises(DataError, match=r"tags\.parquet: damaged or changed"):
        store.load_split(tmp_path)
    store.save_split(other, tmp_path)
    same(store.load_split(tmp_path), other)


def test_statistics_of_a_set_counted_by_hand():
    got = store.statistics(tiny())
    assert (got["users"], got["items"], got["interactions"], got["density"]) == (2, 4, 4, 0.5)
    assert (
        got["history_length"]["min"] == 1 and got["history_length"]["max"] == 3 and got["history_length"]["mean"] == 2
    )
    assert got["events"] == {"train": 2, "valid": 1, "test": 1}
    assert got["items_per_split"] == {"train": 1, "valid": 1, "test": 1}
    assert got["tied_last_timestamp"] == 0.5, "u's two newest events share a second"
    assert got["cold_items"] == 3 and got["popularity_gini"] == pytest.approx(0.75)
    assert got["rating_mean"] == pytest.approx(8 / 3)
    assert got["title_language"] == "en" and got["tags"] == 1
    assert json.loads(json.dumps(got)) == got


def test_gini():
    assert store.gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert store.gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    assert store.gini(np.zeros(3)) == 0
    x = np.array([1.0, 4, 2, 9])
    assert store.gini(x) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()))


def test_share_of_tied_last_timestamps_of_ml_100k():
    data = split(sources.read(table_config(shared_data("ml-100k")), "ml-100k"), SplitConfig())
    assert store.statistics(data)["tied_last_timestamp"] == pytest.approx(0.44, abs=0.01)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("events", [1, 25, 10_000])
def test_parts_of_a_stored_split_are_those_of_the_loaded_one(tmp_path, monkeypatch, rows, events):
    monkeypatch.setattr(store, "_GROUP_ROWS", rows)
    data = small_split()
    data = replace(data, offsets=np.insert(data.offsets, 5, data.offsets[5]), user_ids=["nobody", *data.user_ids])
    store.save_split(data, tmp_path)
    stored = store.StoredSplit(tmp_path)
    same(
        replace(stored.frame, rating=None), replace(data.part(0, 0), tags=data.tags, steps=(), rating=None, users=None)
    )
    read, expected = list(stored.parts(events)), list(store.load_split(tmp_path).parts(events))
    assert len(read) == len(expected) and (len(read) > 1) == (events < 10_000)
    for a, b in zip(read, expected):
        assert a.first_user == b.first_user
        same(a, replace(b, steps=()))
    assert sum(part.num_users for part in read) == data.num_users

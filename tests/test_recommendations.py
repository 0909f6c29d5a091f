"""Recommendation files: reading, order rule, what is reported, errors with place and remedy, writing."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrec_jax.data.schema import TEST, VALID, Catalogue, SplitData
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.evaluation import metrics
from instructrec_jax.evaluation.recommendations import evaluate_lists, read_recommendations, write_recommendations


def toy(histories=((0, 1, 2, 3), (4, 5, 0, 1), (2, 3, 4, 5)), items=8, test=1) -> SplitData:
    """Users u0, u1, ... and items i0, i1, ...; the last ``test`` events are test, the one before valid."""
    ids = [f"i{i}" for i in range(items)]
    labels = [[0] * (len(h) - 1 - test) + [VALID] + [TEST] * test for h in histories]
    return SplitData(
        name="toy",
        user_ids=[f"u{u}" for u in range(len(histories))],
        catalogue=Catalogue(ids, [f"Item {i}" for i in ids], pa.table({"item_id": ids})),
        offsets=np.cumsum([0, *map(len, histories)]),
        item=np.concatenate([np.array(h) for h in histories]),
        split=np.concatenate([np.array(x) for x in labels]),
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_order_is_score_then_rank_then_place_in_the_file(tmp_path):
    text = "user_id,item_id,score,rank\nu0,i1,1,9\nu0,i2,3,9\nu0,i3,1,2\nu0,i4,1,9\nu1,i7,-2.5e0,1\n"
    found = read_recommendations(write(tmp_path / "a.csv", text), toy(), k=5)
    assert found.user.tolist() == [0, 1]
    assert found.lists.tolist() == [[2, 3, 1, 4, -1], [7, -1, -1, -1, -1]]
    assert (found.name, found.rows, found.longest) == ("a", 5, 4)
    only_rank = "user_id,item_id,rank\nu0,i1,3\nu0,i2,1\nu0,i3,1\n"
    assert read_recommendations(write(tmp_path / "b.csv", only_rank), toy(), k=2).lists.tolist() == [[2, 3]]


def test_unknown_users_items_and_duplicates_are_counted_and_named(tmp_path):
    text = "user_id,item_id,score\nu0,i3,9\nu0,ghost,8\nu0,i3,7\nu0,ghost,6\nu0,other,5\nnobody,i1,1\nnobody,ghost,1\n"
    data = toy()
    found = read_recommendations(write(tmp_path / "a.csv", text), data, k=5)
    assert (found.unknown_users, found.unknown_user_examples) == (1, ("nobody",))
    assert (found.unknown_items, found.unknown_item_rows, found.unknown_item_examples) == (2, 4, ("ghost", "other"))
    assert found.duplicates == 2
    row = evaluate_lists(found, data, cutoffs=(1, 5))
    assert row.notes["users_without_list"] == 2 and row.notes["lists_without_case"] == 0
    assert row.values["hr@1"].tolist() == [1, 0, 0]
    quality = metrics.list_quality(row.lists, data.train_popularity, 5)
    np.testing.assert_allclose(quality["out_of_catalogue@5"], [3 / 5, np.nan, np.nan])
    np.testing.assert_allclose(quality["duplicate@5"], [2 / 5, np.nan, np.nan])
    np.testing.assert_allclose(quality["short@5"], [0, 1, 1])


def test_a_target_that_is_not_listed_earns_nothing_and_seen_items_are_reported(tmp_path):
    text = "user_id,item_id,score\nu0,i0,3\nu0,i3,2\nu1,i7,1\nu2,i5,1\n"
    row = evaluate_lists(read_recommendations(write(tmp_path / "a.csv", text), toy()), toy(), cutoffs=(1, 10))
    assert row.values["hr@10"].tolist() == [1, 0, 1]
    np.testing.assert_allclose(row.values["ndcg@10"], [1 / np.log2(3), 0, 1])  # the seen i0 fills place 1
    assert row.values["seen@10"].tolist() == [0.5, 0, 0]


def test_several_test_events_of_one_user_are_one_case(tmp_path):
    data = toy(((0, 1, 2, 3, 4), (5, 6, 7, 0, 1)), test=2)
    text = "user_id,item_id,score\nu0,i4,3\nu0,i7,2\nu0,i3,1\nu1,i2,1\n"
    row = evaluate_lists(read_recommendations(write(tmp_path / "a.csv", text), data), data, cutoffs=(1, 3))
    assert row.user.tolist() == [0, 1]
    assert row.values["recall@1"].tolist() == [0.5, 0] and row.values["recall@3"].tolist() == [1, 0]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([".csv", ".csv.gz", ".parquet"]))
def test_written_lists_read_back_and_score_like_the_ranks(tmp_path_factory, seed, suffix):
    rng = np.random.default_rng(seed)
    histories = [tuple(rng.permutation(12)[: rng.integers(3, 9)]) for _ in range(6)]
    data = toy(histories, items=12)
    cases = data.cases(TEST)
    seen = [data.history(int(u), int(e)) for u, e in zip(cases.user, cases.end)]
    scores = rng.permuted(np.tile(np.arange(12.0), (len(cases), 1)), axis=1)
    lists = metrics.top_lists(scores, 12, seen)
    at = np.take_along_axis(scores, np.maximum(lists, 0), 1)
    path = tmp_path_factory.mktemp("recs") / f"top{suffix}"
    assert write_recommendations(path, data, cases.user, lists, at) == path
    found = read_recommendations(path, data, k=12)
    np.testing.assert_array_equal(found.lists, lists)
    row = evaluate_lists(found, data, cutoffs=(1, 5, 10))
    ranks = metrics.metrics_at(metrics.rank_of_target(scores, cases.target, seen), (1, 5, 10))
    for name, values in ranks.items():
        np.testing.assert_allclose(row.values[name], values, err_msg=name)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_default_score_keeps_the_order(tmp_path):
    data = toy()
    path = write_recommendations(tmp_path / "sub" / "r.csv", data, np.array([1, 0]), np.array([[5, 2, -1], [7, 0, 3]]))
    found = read_recommendations(path, data, k=3)
    assert found.lists.tolist() == [[7, 0, 3], [5, 2, -1]]
    assert "u1" in path.read_text() and "rank" in path.read_text()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    data, path = toy(), tmp_path / "r.parquet"
    write_recommendations(path, data, np.array([0]), np.array([[1]]))
    before = path.read_bytes()

    def fail(*_args, **_rest):
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_recommendations(path, data, np.array([0]), np.array([[2]]))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written(tmp_path):
    data, user = toy(), np.array([0])
    for path, lists, scores, message in (
        ("r.txt", [[1]], None, "one of .csv"),
        ("r.csv", [[-3]], None, "list 0 holds item -3, the catalogue has 8"),
        ("r.csv", [[8]], None, "item 8"),
        ("r.csv", [[1]], [[np.nan]], "NaN"),
        ("r.csv", [[1], [2]], None, "do not match"),
    ):
        with pytest.raises(UserError, match=message):
            write_recommendations(
                tmp_path / path, data, user, np.array(lists), None if scores is None else np.array(scores)
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv: the file is empty"),
        (b"user_id,item_id,score\n", "only a header"),
        (b"user,item_id,score\nu0,i1,1\n", r"column 'user_id': no such column \(did you mean 'user'\?\)"),
        (b"user_id,item_id\nu0,i1\n", "needs a score or a rank column"),
        (b"user_id,item_id,score\nu0,i1,1\nu0,i2,high\n", r"row 3, column 'score': 'high' is not a finite number"),
        (b"user_id,item_id,score\nu0,i1,1\nu0,i2,\n", r"row 3, column 'score': '' is not"),
        (b"user_id,item_id,score\nu0,i1,nan\n", "row 2, column 'score'"),
        (b"user_id,item_id,score\n\nu0,i1,1\n,i2,1\n", r"row 4, column 'user_id': empty id"),
        (b"user_id,item_id,score\nu0,i1,1\nu0,i2\n", "row 3: 2 fields instead of 3"),
        (b"user_id,item_id,score\nu0,\xff\xfe,1\n", "row 2.*not UTF-8"),
        (b"user_id,item_id,score\n9,i1,1\n8,i1,1\n", r"none of its 2 users is in toy \(3 users\), e.g. '9'.*'u0'"),
    ],
)
def test_bad_files_name_the_place(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_recommendations(path, toy())
    assert "remedy" in str(error.value)


def test_other_bad_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_recommendations(tmp_path / "none.csv", toy())
    with pytest.raises(UserError, match="cannot tell the format"):
        read_recommendations(write(tmp_path / "a.json", "{}"), toy())
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"user_id,item_id,score\n" + b"u0,i1,1\n" * 5000)[:-20])
    with pytest.raises(DataError, match="truncated"):
        read_recommendations(cut, toy())
    with pytest.raises(DataError, match="Parquet"):
        read_recommendations(write(tmp_path / "a.parquet", "not parquet at all"), toy())


def test_columns_by_mapping_and_numeric_ids(tmp_path):
    data = toy()
    numbers = SplitData(**{**vars_of(data), "user_ids": ["7", "8", "9"]})
    table = pa.table({"uid": [7, 9], "iid": ["i1", "i2"], "s": pa.array([1, 2], pa.int32())})
    pq.write_table(table, tmp_path / "a.parquet")
    mapping = {"user_id": "uid", "item_id": "iid", "score": "s"}
    found = read_recommendations(tmp_path / "a.parquet", numbers, columns=mapping, name="mine", k=1)
    assert found.user.tolist() == [0, 2] and found.lists.tolist() == [[1], [2]] and found.name == "mine"
    with pytest.raises(DataError, match="column 'sc'"):
        read_recommendations(tmp_path / "a.parquet", numbers, columns={**mapping, "score": "sc"})
    with pytest.raises(UserError, match="rating"):
        read_recommendations(tmp_path / "a.parquet", numbers, columns={"rating": "s"})


def vars_of(data: SplitData) -> dict:
    names = ("name", "user_ids", "catalogue", "offsets", "item", "split")
    return {name: getattr(data, name) for name in names}


def test_cutoffs_must_fit_the_lists_and_the_split_must_have_cases(tmp_path):
    found = read_recommendations(write(tmp_path / "a.csv", "user_id,item_id,score\nu0,i1,1\n"), toy(), k=5)
    with pytest.raises(UserError, match="cutoff 10"):
        evaluate_lists(found, toy(), cutoffs=(10,))
    with pytest.raises(UserError, match="no test cases"):
        evaluate_lists(found, toy(test=0), cutoffs=(1,))

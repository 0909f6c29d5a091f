"""Reading: every source gives the same tables, every kind of bad input is named exactly or dropped and counted."""

from __future__ import annotations

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructrec_jax.config import CleanConfig, DataConfig
from instructrec_jax.data import sources
from instructrec_jax.data.sources import embedded
from instructrec_jax.data.sources.values import as_times
from instructrec_jax.errors import DataError
from tests.datasets import NO_RULES, shared_data, table_config, write_csv, write_set

DROP = replace(NO_RULES, bad_row="drop")


def failure(config: DataConfig) -> DataError:
    with pytest.raises(DataError) as caught:
        sources.read(config, "test")
    assert caught.value.remedy
    return caught.value


# ------------------------------------------------------------------------------------------------------- good input


def test_embedded_set_has_the_published_counts():
    raw = sources.read(DataConfig(), "ml-latest-small")
    assert raw.interactions.num_rows == 100_836
    assert raw.items.num_rows == 9_742
    assert raw.tags is not None and raw.tags.num_rows == 3_683
    assert len(set(raw.interactions["user_id"].to_pylist())) == 610
    assert raw.interactions.schema.field("timestamp").type == pa.int64()
    assert raw.items.schema.field("genres").type == pa.list_(pa.string())
    assert raw.items["imdb_id"][0].as_py() == "0114709", "an identifier keeps its leading zeros"
    assert (embedded.ROOT / "ml-latest-small" / "LICENSE-README.txt").is_file()


def test_embedded_file_that_changed_is_named_with_both_sums(tmp_path, monkeypatch):
    folder = tmp_path / "ml-latest-small"
    shutil.copytree(embedded.ROOT / "ml-latest-small", folder)
    content = bytearray((folder / "items.csv.gz").read_bytes())
    content[1000] ^= 1
    (folder / "items.csv.gz").write_bytes(content)
    monkeypatch.setattr(embedded, "ROOT", tmp_path)
    error = failure(DataConfig())
    assert Path(str(error.file)).name == "items.csv.gz"
    assert "3d20f29b5dfe83ab" in str(error) and str(error).count("sha256") == 1


def test_unknown_embedded_set():
    assert "did you mean 'ml-latest-small'" in str(failure(DataConfig(path="ml-latest-smal")))


def test_types_and_lists(tmp_path):
    raw = sources.read(table_config(write_set(tmp_path, users="user_id,age,zip_code\n1,24,02139\n2,,94043\n")), "x")
    assert raw.items["genres"].to_pylist() == [["Horror", "Sci-Fi"], [], []]
    assert raw.interactions["rating"].to_pylist() == [4.0, 3.5, 5.0, 1.0]
    assert raw.users is not None
    assert raw.users["age"].to_pylist() == [24.0, None]
    assert raw.users["zip_code"].to_pylist() == ["02139", "94043"]


def test_parquet_equals_csv(tmp_path):
    csv_raw = sources.read(table_config(write_set(tmp_path / "csv")), "x")
    folder = tmp_path / "parquet"
    folder.mkdir()
    log = pa.table(
        {
            "user_id": pa.array([1, 1, 2, 2], pa.int32()),
            "item_id": pa.array(["a", "b", "a", "c"]).dictionary_encode(),
            "rating": pa.array([4.0, 3.5, 5.0, 1.0], pa.float32()),
            "timestamp": pa.array([10, 20, 15, 25], pa.timestamp("s")),
        }
    )
    items = pa.table(
        {
            "item_id": ["a", "b", "c"],
            "title": ["Alien (1979)", "Brazil (1985)", "Clue (1985)"],
            "genres": [["Horror", "Sci-Fi"], [], None],
        }
    )
    pq.write_table(log, folder / "interactions.parquet")
    pq.write_table(items, folder / "items.parquet")
    raw = sources.read(table_config(folder), "x")
    assert raw.interactions.equals(csv_raw.interactions)
    assert raw.items.equals(csv_raw.items)


def test_column_mapping(tmp_path):
    folder = write_set(
        tmp_path,
        interactions="uid,asin,when\nu1,a,2018-05-01\nu1,b,2018-05-02T00:00:01Z\n",
        items="item_id,title,name\na,x,Alien\nb,y,Brazil\n",
    )
    mapping = {"user_id": "uid", "interactions.item_id": "asin", "timestamp": "when", "title": "name"}
    raw = sources.read(table_config(folder, columns=mapping), "x")
    assert raw.items["title"].to_pylist() == ["Alien", "Brazil"]
    assert raw.interactions["timestamp"].to_pylist() == [1525132800, 1525132800 + 86401]
    error = failure(table_config(folder, columns={**mapping, "brand": "nam"}))
    assert "did you mean 'name'" in str(error)


@pytest.mark.parametrize(
    ("cells", "seconds", "nanos", "unit"),
    [
        (["1525132800", "5"], [1525132800, 5], [0, 0], "seconds"),
        (["1525132800.5", "1.525e9"], [1525132800, 1525000000], [500_000_000, 0], "seconds"),
        (["1525132800123", "1525132801000"], [1525132800, 1525132801], [123_000_000, 0], "milliseconds"),
        (["1970-01-01", "1969-12-31T23:59:59.5+00:00"], [0, -1], [0, 500_000_000], "seconds"),
    ],
)
def test_times(cells, seconds, nanos, unit):
    got = as_times(pa.array(cells))
    assert (got[0].tolist(), got[1].tolist(), got[2].any(), got[3]) == (seconds, nanos, False, unit)


# Text that breaks naive readers; no NUL and no lone surrogates, which UTF-8 files cannot or should not hold.
_odd = st.one_of(
    st.sampled_from(
        ["NA", "null", "nan", 'say "hi"', "a,b", "two\nlines", "\r\n x", "电影", "فيلم", "x" * 300, "007", "'", '"']
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12),
).map(lambda text: "t" + text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(_odd, min_size=1, max_size=8, unique=True), titles=st.lists(_odd, min_size=8, max_size=8))
def test_csv_round_trip_of_odd_text(tmp_path, ids, titles):
    write_csv(tmp_path / "items.csv", ["item_id", "title"], [(i, t) for i, t in zip(ids, titles)])
    write_csv(tmp_path / "interactions.csv", ["user_id", "item_id", "position"], [(i, i, 1) for i in ids])
    raw = sources.read(table_config(tmp_path), "x")
    assert raw.items["item_id"].to_pylist() == ids
    assert raw.items["title"].to_pylist() == titles[: len(ids)]
    assert raw.interactions["user_id"].to_pylist() == ids


# -------------------------------------------------------------------------------------------------------- bad input

HEAD = "user_id,item_id,rating,timestamp\n"
BAD = {
    "missing column": ({"interactions": "userid,item_id,timestamp\n1,a,1\n"}, 1, "user_id", "did you mean 'userid'"),
    "no title column": ({"items": "item_id,titel\na,x\n"}, 1, "title", "did you mean 'titel'"),
    "wrong separator": ({"items": "item_id;title\na;x\n"}, 1, "item_id", "separated by ';'"),
    "unknown item": ({"interactions": HEAD + "1,a,1,1\n1,zz,1,2\n"}, 3, "item_id", "'zz'"),
    "unparsable rating": ({"interactions": HEAD + "1,a,1,1\n1,b,good,2\n"}, 3, "rating", "'good' is not a number"),
    "infinite rating": ({"interactions": HEAD + "1,a,inf,1\n"}, 2, "rating", "not a number"),
    "unparsable time": ({"interactions": HEAD + "1,a,1,1\n\n1,b,2,soon\n"}, 4, "timestamp", "'soon' is not a time"),
    "hexadecimal time": ({"interactions": HEAD + "1,a,1,0x1F\n"}, 2, "timestamp", "'0x1F' is not a time"),
    "empty time": ({"interactions": HEAD + "1,a,1,\n"}, 2, "timestamp", "not a time"),
    "empty user": ({"interactions": HEAD + "1,a,1,1\n ,b,1,2\n"}, 3, "user_id", "empty"),
    "empty item": ({"interactions": HEAD + "1,,1,1\n"}, 2, "item_id", "empty"),
    "empty title": ({"items": "item_id,title\na,A\nb,\nc,C\n"}, 3, "title", "empty"),
    "invisible title": ({"items": "item_id,title\na,A\nb,\ufffc\nc,C\n"}, 3, "title", "empty"),
    "after a quoted newline": ({"items": 'item_id,title\na,"A\nB"\nb,\nc,C\n'}, 3, "title", "empty"),
    "duplicate item": ({"items": "item_id,title\na,A\nb,B\nc,C\na,D\n"}, 5, "item_id", "row 2 and again in row 5"),
    "duplicate user": ({"users": "user_id,age\n1,2\n1,3\n"}, 3, "user_id", "row 2 and again in row 3"),
    "not UTF-8": ({"items": "item_id,title\na,A\nb,Amélie\n".encode("latin-1")}, 3, None, "0xe9 at offset 22"),
    "UTF-16": ({"items": "item_id,title\na,A\n".encode("utf-16")}, 1, None, "offset 0"),
    "0 bytes": ({"items": b""}, None, None, "0 bytes"),
    "header only": ({"interactions": HEAD}, None, None, "only a header"),
    "header twice": ({"items": "item_id,title,title\na,A,B\n"}, 1, "title", "fields 2 and 3"),
    "no order": ({"interactions": "user_id,item_id\n1,a\n"}, 1, "timestamp", "neither timestamp nor position"),
    "too few fields": ({"interactions": HEAD + "1,a,1,1\n1,b\n"}, 3, None, "2 fields instead of 4"),
    "open quote": ({"items": 'item_id,title\na,A\nb,"B\nc,C\n'}, 3, None, "line 3 is never closed"),
    "open quote in the middle": (
        {"items": 'item_id,title,x\na,A,1\nb,"B,2\nc,C,3\n'},
        3,
        None,
        "line 3 is never closed",
    ),
    "position twice": (
        {"interactions": "user_id,item_id,position\n1,a,1\n2,a,1\n1,b,1\n"},
        2,
        "position",
        "position 1: rows 2 and 4",
    ),
    "fractional position": ({"interactions": "user_id,item_id,position\n1,a,1.5\n"}, 2, "position", "whole number"),
    "empty tag": ({"tags": "user_id,item_id,tag\n1,a,fun\n1,a,\n"}, 3, "tag", "empty"),
    "tag of an unknown item": ({"tags": "user_id,item_id,tag\n1,zz,fun\n"}, 2, "item_id", "'zz'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(tmp_path, case):
    texts, row, column, words = BAD[case]
    error = failure(table_config(write_set(tmp_path, **texts)))
    assert words in str(error)
    assert (error.row, error.column) == (row, column)
    assert Path(str(error.file)).parent == tmp_path


DROPPED = {
    "two reasons": (
        {"interactions": HEAD + ",a,1,1\n1,b,2,2\n2,c,bad,4\n"},
        (3, 1),
        "rating not a number (first: row 4)",
    ),
    "rating": (
        {"interactions": HEAD + "1,a,1,1\n1,b,good,2\n2,c,1,4\n"},
        (3, 2),
        "1 dropped: rating not a number (first: row 3)",
    ),
    "fields": ({"interactions": HEAD + "1,a\n1,b,1,2\n"}, (2, 1), "1 dropped: wrong number of fields (first: row 2)"),
    "after fields": (
        {"interactions": HEAD + "1\n1,b,1,2\n1,,1,2\n"},
        (3, 1),
        "1 dropped: empty item_id (first: row 4)",
    ),
    "positions": (
        {"interactions": "user_id,item_id,position\n1,a,1\n1,b,2\n1,c,2\n"},
        (3, 1),
        "2 dropped: position not unique (first: row 3)",
    ),
    "item twice": (
        {"items": "item_id,title\na,A\nb,B\nc,C\na,D\n"},
        (4, 4),
        "items: 1 dropped: duplicate item_id (first: row 5)",
    ),
}


@pytest.mark.parametrize("case", DROPPED)
def test_bad_rows_are_dropped_and_counted_where_the_config_says_so(tmp_path, case):
    texts, counts, note = DROPPED[case]
    raw = sources.read(table_config(write_set(tmp_path, **texts), clean=DROP), "x")
    assert raw.steps[0].interactions == counts
    assert note in raw.steps[0].detail
    assert raw.interactions.num_rows == counts[1]


def test_dropping_every_row_is_an_error(tmp_path):
    error = failure(table_config(write_set(tmp_path, interactions=HEAD + "1,a,1,x\n"), clean=DROP))
    assert "no usable row" in str(error) and "timestamp not a time" in str(error)


def test_unknown_items_dropped_or_added(tmp_path):
    folder = write_set(tmp_path, interactions=HEAD + "1,zz,1,1\n1,a,1,2\n2,yy,1,3\n2,zz,1,3\n")
    dropped = sources.read(table_config(folder, clean=replace(NO_RULES, unknown_item="drop")), "x")
    assert dropped.steps[-1].interactions == (4, 1) and dropped.steps[-1].users == (2, 1)
    assert "3 interactions with 2 items" in dropped.steps[-1].detail
    added = sources.read(table_config(folder, clean=replace(NO_RULES, unknown_item="title-less")), "x")
    assert added.interactions.num_rows == 4
    assert added.items["title"].to_pylist()[3:] == ["yy", "zz"]
    assert added.items["genres"].to_pylist()[3:] == [[], []]
    assert added.steps[-1].items == (3, 5)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"item_id,title\n" + b"".join(b"%d,title %d\n" % (i, i * i) for i in range(500)))
    for content, words in (
        (whole[:-300], "truncated"),
        (whole[:40] + b"\0\0\0" + whole[43:], "damaged"),
        (b"a,b\n", "not gzip"),
    ):
        folder = write_set(tmp_path)
        (folder / "items.csv").unlink(missing_ok=True)
        (folder / "items.csv.gz").write_bytes(content)
        error = failure(table_config(folder))
        assert words in str(error) and str(error.file).endswith("items.csv.gz")


def test_missing_files_and_folders_list_what_is_there(tmp_path):
    folder = write_set(tmp_path / "set")
    assert "holds set/" in str(failure(table_config(tmp_path / "st")))
    assert "did you mean 'items.csv'" in str(failure(table_config(folder, items="item.csv")))
    (folder / "items.csv").rename(folder / "products.csv")
    assert "interactions.csv, products.csv" in str(failure(table_config(folder)))
    assert "is a file" in str(failure(table_config(folder / "products.csv")))
    (folder / "interactions.parquet").write_bytes(b"x")
    assert "more than one file" in str(failure(table_config(folder)))
    (folder / "interactions.csv").unlink()
    (folder / "products.csv").rename(folder / "items.csv")
    assert "not a readable Parquet" in str(failure(table_config(folder)))


# ------------------------------------------------------------------------------------------------------ other formats


def recbole_set(folder: Path) -> Path:
    folder.mkdir()
    (folder / f"{folder.name}.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\ta\t4\t10\n1\tb\t3.5\t20.0\n2\ta\t5\t15\n2\tc\t1\t25\n"
    )
    (folder / f"{folder.name}.item").write_text(
        "item_id:token\tmovie_title:token_seq\tclass:token_seq\n"
        'a\tAlien "8" (1979)\tHorror Sci-Fi\nb\tBrazil\t\nc\tClue\tComedy\n'
    )
    (folder / f"{folder.name}.user").write_text("user_id:token\tage:float\n1\t24\n2\t30\n")
    return folder


def test_recbole(tmp_path):
    folder = recbole_set(tmp_path / "films")
    config = DataConfig(source="recbole", path=str(folder), clean=NO_RULES)
    raw = sources.read(config, "x")
    assert raw.items["title"].to_pylist() == ['Alien "8" (1979)', "Brazil", "Clue"]
    assert raw.items["genres"].to_pylist() == [["Horror", "Sci-Fi"], [], ["Comedy"]]
    assert raw.interactions["timestamp"].to_pylist() == [10, 20, 15, 25]
    assert raw.users is not None and raw.users["age"].to_pylist() == [24.0, 30.0]
    mapped = sources.read(replace(config, columns={"title": "item_id"}), "x")
    assert mapped.items["title"].to_pylist() == ["a", "b", "c"]
    (folder / "films.user").write_text("user_id:token\tage\n1\t24\n")
    assert failure(config).column == "age"
    (folder / "films.inter").rename(folder / "films.data")
    assert "no .inter file" in str(failure(config))


def test_movielens_100k(tmp_path):
    (tmp_path / "u.data").write_text("1\t2\t5\t881250949\n1\t1\t3\t881250950\n")
    flags = ["0"] * 19
    lines = []
    for i, (title, on) in enumerate((("Amélie (2001)", (5, 14)), ('The "X" (1990)', (0,))), 1):
        marked = ["1" if k in on else f for k, f in enumerate(flags)]
        lines.append("|".join([str(i), title, "01-Jan-1995", "", "http://x", *marked]))
    (tmp_path / "u.item").write_bytes("\n".join(lines).encode("latin-1"))
    (tmp_path / "u.user").write_text("1|24|M|technician|85711\n")
    config = DataConfig(source="movielens", path=str(tmp_path), clean=NO_RULES)
    raw = sources.read(config, "x")
    assert raw.items["title"].to_pylist() == ["Amélie (2001)", 'The "X" (1990)']
    assert raw.items["genres"].to_pylist() == [["Comedy", "Romance"], []]
    assert raw.interactions["item_id"].to_pylist() == ["2", "1"]
    assert raw.users is not None and raw.users["occupation"].to_pylist() == ["technician"]
    (tmp_path / "u.data").write_text("1\t2\t5\t881250949\n1\t1\tx\t881250950\n")
    assert failure(config).row == 2, "without a header the first line is row 1"


def test_movielens_1m(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::260::5::978300760\n1::1::3::978302109\n")
    (tmp_path / "movies.dat").write_bytes(
        "1::Amélie (2001)::Comedy|Romance\n260::Star Wars: IV (1977)::Sci-Fi\n".encode("latin-1")
    )
    (tmp_path / "users.dat").write_text("1::F::1::10::02139\n")
    raw = sources.read(DataConfig(source="movielens", path=str(tmp_path), clean=NO_RULES), "x")
    assert raw.items["title"].to_pylist() == ["Amélie (2001)", "Star Wars: IV (1977)"]
    assert raw.items["genres"].to_pylist() == [["Comedy", "Romance"], ["Sci-Fi"]]
    assert raw.users is not None and raw.users["occupation"].to_pylist() == ["K-12 student"]
    assert raw.users["zip_code"].to_pylist() == ["02139"]


def test_movielens_latest_equals_embedded_and_nothing_there_is_an_error(tmp_path):
    config = DataConfig(source="movielens", path=str(tmp_path), clean=NO_RULES)
    assert "none of u.data" in str(failure(config))
    there = sources.read(DataConfig(clean=NO_RULES), "x")
    columns = zip(*(there.interactions[c].to_pylist() for c in there.interactions.column_names))
    write_csv(tmp_path / "ratings.csv", ["userId", "movieId", "timestamp", "rating"], columns)
    genres = ["|".join(g) or "(no genres listed)" for g in there.items["genres"].to_pylist()]
    rows = zip(there.items["item_id"].to_pylist(), there.items["title"].to_pylist(), genres)
    write_csv(tmp_path / "movies.csv", ["movieId", "title", "genres"], rows)
    raw = sources.read(config, "x")
    assert raw.interactions.equals(there.interactions)
    assert raw.items.equals(there.items.select(["item_id", "title", "genres"]))


@pytest.mark.parametrize(
    ("name", "users", "items", "events"),
    [("ml-100k", 943, 1_682, 100_000), ("ml-1m", 6_040, 3_883, 999_611), ("amazon-industrial", 3_285, 3_686, 22_743)],
)
def test_real_sets(name, users, items, events):
    config = DataConfig(source="tables", path=str(shared_data(name)), clean=CleanConfig())
    raw = sources.read(config, name)
    assert (raw.interactions.num_rows, raw.items.num_rows) == (events, items)
    assert len(set(raw.interactions["user_id"].to_pylist())) == users

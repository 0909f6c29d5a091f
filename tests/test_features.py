"""Item and user features: what they say, and that nothing held out enters them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.config import DataConfig
from instructrec_jax.data import features, sources
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.features import content_features, cooccurrence_features, item_features, terms, user_features
from instructrec_jax.data.schema import TEST, TRAIN, VALID, Catalogue, SplitData
from instructrec_jax.data.splits import split
from tests.small_split import small_split


def catalogue(titles: list[str], **columns: pa.Array) -> Catalogue:
    ids = [str(i) for i in range(len(titles))]
    return Catalogue(ids, titles, pa.table({"item_id": ids, "title": titles, **columns}))


def data_of(items: Catalogue, histories: list[list[int]], **more) -> SplitData:
    """Each user's last event is test, the one before it valid."""
    lengths = [len(h) for h in histories]
    labels = [label for n in lengths for label in ([TRAIN] * (n - 2) + [VALID, TEST])[-n:]]
    item = np.asarray([i for h in histories for i in h], np.int32)
    names = [f"u{k}" for k in range(len(histories))]
    return SplitData("x", names, items, np.cumsum([0, *lengths]), item, np.asarray(labels, np.int8), **more)


def with_users(columns: dict[str, list], trained: int | None = None) -> SplitData:
    """One user a row; the first ``trained`` have training events, the others have only held-out ones."""
    count = len(next(iter(columns.values())))
    trained = count if trained is None else trained
    histories = [[0, 1, 0] if u < trained else [0, 1] for u in range(count)]
    users = pa.table({"user_id": [f"u{k}" for k in range(count)], **columns})
    return data_of(catalogue(["a", "b"]), histories, users=users)


def cosine(matrix: np.ndarray) -> np.ndarray:
    unit = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
    return unit @ unit.T


# ------------------------------------------------------------------------------------------------------------------ terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Matrix (1999)", ["the", "matrix", "1999"]),
        ("Sci-Fi_noir, it's", ["sci", "fi", "noir", "it", "s"]),
        ("千与千寻", ["千与", "与千", "千寻"]),
        ("看 film 电影", ["看", "film", "电影"]),
        ("となりの", ["とな", "なり", "りの"]),
        ("기생충", ["기생", "생충"]),
        ("Amélie ÉTÉ", ["amélie", "été"]),
        ("🎬 !? …", []),
        ("", []),
    ],
)
def test_terms(text, expected):
    assert terms(text) == expected


@given(st.text())
def test_terms_of_any_text_are_lower_case_and_whole(text):
    for term in terms(text):
        assert term and "_" not in term and not any(c.isspace() for c in term)
    assert terms(text) == terms(text.lower())


def test_item_terms_cover_lists_short_texts_and_tags():
    items = catalogue(
        ["Drill", "Hose"],
        categories=pa.array([["Power Tools"], None], pa.list_(pa.string())),
        brand=pa.array([None, "Acme Co"], pa.string()),
        description=pa.array(["x" * 41, ""], pa.string()),
        image_path=pa.array(["secret.png", "secret.png"], pa.string()),
        parent_id=pa.array(["secret", "secret"], pa.string()),
        price=pa.array([1.0, None], pa.float64()),
    )
    rows = features.item_terms(data_of(items, [[0, 1, 0]], tags=[(0, 1, "Very Good")]))
    assert rows[0] == ["drill", "categories=power tools", "power", "tools", "x" * 41]
    assert rows[1] == ["hose", "acme", "co", "brand=acme co", "tag=very good", "very", "good"]


def test_empty_places_in_lists_are_no_terms():
    items = catalogue(["a"], genres=pa.array([["Drama", None, ""]], pa.list_(pa.string())))
    assert features.item_terms(data_of(items, [[0, 0, 0]])) == [["a", "genres=drama", "drama"]]


# ---------------------------------------------------------------------------------------------------------------- content


@pytest.fixture(scope="module")
def embedded() -> SplitData:
    config = DataConfig()
    return split(clean(sources.read(config, "ml-latest-small"), config.clean), config.split)


def test_similar_texts_are_near_on_the_embedded_catalogue(embedded):
    matrix = content_features(embedded, 48)
    assert matrix.shape == (embedded.num_items, 48) and matrix.dtype == np.float32
    assert matrix.std() == pytest.approx(1, abs=1e-3)
    near = cosine(matrix)
    at = {title: i for i, title in enumerate(embedded.catalogue.titles)}

    def pair(a: str, b: str) -> float:
        return near[at[a], at[b]]

    for series in (
        ["Star Wars: Episode IV - A New Hope (1977)", "Star Wars: Episode V - The Empire Strikes Back (1980)"],
        ["Harry Potter and the Chamber of Secrets (2002)", "Harry Potter and the Goblet of Fire (2005)"],
        ["Toy Story (1995)", "Toy Story 2 (1999)"],
    ):
        mean = near[at[series[0]]].mean()
        assert pair(*series) > 0.5 and pair(*series) > mean + 0.3
    assert pair("Toy Story (1995)", "Toy Story 2 (1999)") > pair("Toy Story (1995)", "Saving Private Ryan (1998)") + 0.3
    genres = embedded.catalogue.lists("genres")
    r = np.random.default_rng(0)
    a, b = r.integers(0, embedded.num_items, (2, 20_000))
    same = np.asarray([genres[i] == genres[j] for i, j in zip(a, b)])
    apart = np.asarray([not set(genres[i]) & set(genres[j]) for i, j in zip(a, b)])
    other = a != b
    assert near[a[same & other], b[same & other]].mean() > near[a[apart], b[apart]].mean() + 0.3


def test_cjk_titles_that_share_words_are_near():
    matrix = content_features(
        data_of(catalogue(["星球大战一", "星球大战二", "泰坦尼克号", "泰坦尼克传"]), [[0, 1, 2]]), 8
    )
    near = cosine(matrix)
    assert min(near[0, 1], near[2, 3]) > max(near[0, 2], near[1, 3], near[0, 3]) + 0.2


def test_features_are_the_same_each_time():
    data = small_split()
    np.testing.assert_array_equal(item_features(data, 16, 16), item_features(data, 16, 16))


@pytest.mark.parametrize("titles", [["", "", ""], ["!", "?", "…"]])
def test_a_catalogue_without_words_has_no_content(titles):
    matrix = item_features(data_of(catalogue(titles), [[0, 1, 2]]), 8, 0)
    assert matrix.shape == (3, 0) and matrix.dtype == np.float32


def test_items_that_share_no_word_still_have_features():
    matrix = content_features(data_of(catalogue([f"w{i}" for i in range(60)]), [[0, 1, 2]]), 8)
    assert matrix.shape[0] == 60 and np.isfinite(matrix).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sklearn")  # its share of explained variance is 0 / 0
@pytest.mark.parametrize("width", [1, 2, 16])
@pytest.mark.parametrize("title", ["same", "same words", "all the same words"])
def test_a_constant_catalogue_has_small_finite_numbers(title, width):
    matrix = content_features(data_of(catalogue([title] * 5), [[0, 1, 2]]), width)
    assert matrix.shape[0] == 5 and np.isfinite(matrix).all()
    assert not matrix.size or np.abs(matrix).max() < 10


def test_one_item():
    assert item_features(data_of(catalogue(["alone"]), [[0, 0, 0]]), 8, 8).shape == (1, 0)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=12), st.integers(1, 8))
def test_any_titles_give_finite_rows(titles, width):
    matrix = content_features(data_of(catalogue(titles), [[0, 0, 0]]), width)
    assert len(matrix) == len(titles) and matrix.shape[1] <= width and matrix.dtype == np.float32
    assert np.isfinite(matrix).all() and (not matrix.size or np.abs(matrix).max() < 100)


# ---------------------------------------------------------------------------------------------------------- co-occurrence


def test_items_of_one_taste_are_near():
    r = np.random.default_rng(0)
    histories = [[*r.permutation(10)[:6] + 10 * (u % 2), 0, 0] for u in range(40)]
    near = cosine(cooccurrence_features(data_of(catalogue([f"t{i}" for i in range(20)]), histories), 4))
    assert near[:10, :10].mean() > 0.5 and near[10:, 10:].mean() > 0.5
    assert near[:10, 10:].mean() < 0.2


def test_events_of_two_users_do_not_meet():
    items = catalogue([f"t{i}" for i in range(6)])
    apart = data_of(items, [[0, 1, 0, 5, 5], [2, 3, 2, 5, 5]])
    near = cosine(cooccurrence_features(apart, 4))
    assert abs(near[0, 2]) < 1e-3 and abs(near[1, 3]) < 1e-3


def test_items_without_training_events_have_zero_rows():
    matrix = cooccurrence_features(data_of(catalogue(["a", "b", "c", "d"]), [[0, 1, 0, 2, 3], [0, 1, 1, 3, 2]]), 2)
    np.testing.assert_allclose(matrix[2:], 0, atol=1e-5)
    assert np.abs(matrix[:2]).max() > 0.1


def test_no_pair_of_events_means_no_columns():
    assert cooccurrence_features(data_of(catalogue(["a", "b", "c"]), [[0, 1, 2]]), 4).shape == (3, 0)


def test_blocks_stand_side_by_side():
    data = small_split()
    content, both = item_features(data, 8, 0), item_features(data, 8, 12)
    assert both.shape == (data.num_items, 20)
    np.testing.assert_array_equal(both[:, :8], content)
    np.testing.assert_array_equal(both[:, 8:], cooccurrence_features(data, 12))
    assert item_features(data, 0, 0).shape == (data.num_items, 0)


# ------------------------------------------------------------------------------------------------------------------- leaks


def shuffled_future(data: SplitData, seed: int) -> SplitData:
    """Other held-out items and ratings; the training events stay."""
    r = np.random.default_rng(seed)
    held = data.split != TRAIN
    item = np.where(held, r.integers(0, data.num_items, len(data.item)), data.item).astype(data.item.dtype)
    rating = None if data.rating is None else np.where(held, 0.5, data.rating)
    return dataclasses.replace(data, item=item, rating=rating)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_events_change_no_feature(seed):
    ages = pa.array(np.arange(12.0))
    users = pa.table({"user_id": [f"wk{u:04d}y" for u in range(12)], "age": ages, "sex": ["F", "M"] * 6})
    data = dataclasses.replace(small_split(seed=seed), users=users)
    other = shuffled_future(data, seed)
    assert (data.item != other.item).any() and (data.item == other.item)[data.split == TRAIN].all()
    np.testing.assert_array_equal(item_features(data, 16, 16), item_features(other, 16, 16))
    one, two = user_features(data), user_features(other)
    assert one.names == two.names
    np.testing.assert_array_equal(one.index, two.index)
    np.testing.assert_array_equal(one.value, two.value)


def test_training_events_do_change_them():
    data = small_split()
    item = data.item.copy()
    first = np.flatnonzero(data.split == TRAIN)[:40]
    item[first] = item[first[::-1]]
    changed = dataclasses.replace(data, item=item)
    assert not np.array_equal(cooccurrence_features(data, 16), cooccurrence_features(changed, 16))


def test_held_out_tags_change_no_item_feature():
    """From the tables on: a tag on a held-out pair, or written after the first held-out event, is not in the features."""
    config = DataConfig()
    raw = clean(sources.read(config, "ml-latest-small"), dataclasses.replace(config.clean, k_core=20))
    assert raw.tags is not None
    one = split(raw, config.split)
    held = set(zip(one.user[one.split != TRAIN].tolist(), one.item[one.split != TRAIN].tolist()))
    users = {name: k for k, name in enumerate(one.user_ids)}
    pairs = zip(raw.tags["user_id"].to_pylist(), raw.tags["item_id"].to_pylist())
    on_held = [(users.get(u, -1), one.catalogue.index.get(i, -1)) in held for u, i in pairs]
    assert any(on_held)
    words = [f"zqx{k}" if h else w for k, (h, w) in enumerate(zip(on_held, raw.tags["tag"].to_pylist()))]
    at = raw.tags.column_names.index("tag")
    secret = dataclasses.replace(raw, tags=raw.tags.set_column(at, "tag", pa.array(words, pa.string())))
    two = split(secret, config.split)
    np.testing.assert_array_equal(content_features(one, 16), content_features(two, 16))
    assert not any("zqx" in term for row in features.item_terms(two) for term in row)


# ------------------------------------------------------------------------------------------------------------------ users


def test_numbers_are_standardised_on_training_users_only():
    numbers = [1.0, 3.0, 5.0, 1000.0]
    made = user_features(with_users({"age": numbers}, trained=3))
    known = np.asarray(numbers[:3])
    assert made.names == ["age"] and made.index.tolist() == [[0]] * 4
    np.testing.assert_allclose(made.value[:, 0], (np.asarray(numbers) - known.mean()) / known.std(), rtol=1e-6)
    assert made.value.dtype == np.float32 and made.index.dtype == np.int32


def test_levels_are_those_of_training_users():
    made = user_features(with_users({"job": ["b", "a", "b", "c"]}, trained=3))
    assert made.names == ["job=a", "job=b"]
    assert made.index[:, 0].tolist() == [1, 0, 1, -1] and set(made.value[:, 0].tolist()) == {1.0}
    assert made.tokens(3) == () and [t.index for t in made.tokens(0)] == [1]


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf"), float("-inf")])
def test_a_missing_number_is_no_token(missing):
    made = user_features(with_users({"age": [1.0, missing, 3.0]}))
    assert made.index[:, 0].tolist() == [0, -1, 0]
    np.testing.assert_allclose(made.value[:, 0], [-1, 0, 1])
    assert made.tokens(1) == () and np.isfinite(made.value).all()


@pytest.mark.parametrize("missing", [None, ""])
def test_a_missing_word_is_no_token(missing):
    made = user_features(with_users({"sex": ["F", missing, "M"]}))
    assert made.names == ["sex=F", "sex=M"] and made.index[:, 0].tolist() == [0, -1, 1]


@pytest.mark.parametrize(
    "columns",
    [
        {"age": [0.1] * 6},  # the deviation of these is not exactly 0 in floating point
        {"age": [1e9 + 0.1] * 6},
        {"age": [3] * 6},
        {"age": [None] * 6},
        {"age": [float("nan")] * 6},
        {"sex": ["F"] * 6},
        {"sex": [None, *[""] * 5]},
        {"name": [f"n{k}" for k in range(features.MAX_LEVELS + 1)]},
    ],
)
def test_columns_that_say_nothing_are_left_out(columns):
    if columns.get("age") == [None] * 6:
        columns = {"age": pa.array([None] * 6, pa.float64())}
    made = user_features(with_users(columns))
    count = len(next(iter(columns.values())))
    assert made.names == [] and made.index.shape == made.value.shape == (count, 0) and made.tokens(0) == ()


def test_a_constant_column_stays_out_whatever_untrained_users_have():
    assert user_features(with_users({"age": [0.1, 0.1, 0.1, 77.0]}, trained=3)).names == []


def test_rows_of_several_columns_do_not_overlap():
    made = user_features(with_users({"age": [1, 2, 3], "sex": ["F", "M", "F"], "job": ["x", "y", "z"]}))
    assert made.names == ["age", "sex=F", "sex=M", "job=x", "job=y", "job=z"]
    assert made.index.tolist() == [[0, 1, 3], [0, 2, 4], [0, 1, 5]]
    assert [(t.index, t.value) for t in made.tokens(1)] == [(0, 0.0), (2, 1.0), (4, 1.0)]


def test_without_users_there_are_none():
    made = user_features(data_of(catalogue(["a"]), [[0, 0, 0]]))
    assert made.names == [] and made.index.shape == (1, 0)


@given(st.lists(st.one_of(st.none(), st.floats(width=32)), min_size=1, max_size=12), st.data())
def test_any_numbers(numbers, data):
    trained = data.draw(st.integers(0, len(numbers)))
    made = user_features(with_users({"x": pa.array(numbers, pa.float64())}, trained))
    assert np.isfinite(made.value).all()
    if made.names:
        real = np.asarray([n is not None and bool(np.isfinite(n)) for n in numbers])
        assert (made.index[:, 0] >= 0).tolist() == real.tolist()
        fitted = np.asarray([v for v, known in zip(made.value[:trained, 0], real) if known])
        assert abs(fitted.mean()) < 1e-3 and abs(fitted.std() - 1) < 1e-2

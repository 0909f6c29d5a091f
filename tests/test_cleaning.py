"""Cleaning: each rule does what its counts say, and text comes out plain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrec_jax.config import CleanConfig, DataConfig
from instructrec_jax.data import sources
from instructrec_jax.data.cleaning import clean, core_mask
from instructrec_jax.data.text import clean_array, clean_text, plain, split_list, unfold_list
from instructrec_jax.errors import DataError
from tests.datasets import NO_RULES, raw_data, shared_data, table_config

# ------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("<b>Big</b>ger<br/>and <i>better</i>", "Bigger and better"),
        ("<p>One</p><p>Two</p>", "One Two"),
        ("a<script>alert(1)</script>b<!-- c -->", "ab"),
        ("['a', 'b &amp; c']", "a b & c"),
        ("['the user's guide', 'two']", "the user's guide two"),
        ('["5/8\\" wide", \'x\']', '5/8" wide x'),
        ("[REC] (2007)", "[REC] (2007)"),
        ("[1, 2]", "[1, 2]"),
        ("[]", ""),
        ("I <3 you, 1 < 2 > 0", "I <3 you, 1 < 2 > 0"),
        ("vector<int> & R&D <b>now</b>", "vector<int> & R&D now"),
        ("<br>", ""),
        (" two\n\tlines\u3000and\x00more\u00a0 ", "two lines and more"),
        ("forged \ufffc slot \ufff9 here", "forged slot here"),
        ("__import__('os').system('true')", "__import__('os').system('true')"),
        ("电影 &mdash; 好", "电影 — 好"),
    ],
)
def test_clean_text(text, expected):
    assert clean_text(text) == expected


def test_lists_are_read_without_running_them():
    assert unfold_list("['a', __import__('os').getcwd()]") is None
    assert unfold_list("[" * 5000 + "'a'" + "]" * 5000) is None
    assert split_list("'Books, used', 'Fiction'", "|") == ["Books, used", "Fiction"]
    assert split_list("a| |b|(no genres listed)", "|") == ["a", "b"]


_markup = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "<b>",
                "</b>",
                "<br/>",
                "<!--",
                "-->",
                "&amp;",
                "&lt;",
                "&#60;",
                "<",
                ">",
                "&",
                "['",
                "', '",
                "']",
                "\ufffc",
            ]
        ),
        st.text(max_size=5),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(_markup)
def test_cleaning_text_is_idempotent_and_never_leaves_a_slot(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert not set("\ufffc\ufff9\n\t\x00") & set(once + plain(text))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(_markup, st.none()), min_size=1, max_size=6))
def test_the_fast_path_over_columns_skips_nothing(values):
    column, changed = clean_array(pa.array(values, pa.string()))
    expected = [None if v is None else clean_text(v) for v in values]
    assert column.to_pylist() == expected
    assert changed == sum(a != b for a, b in zip(values, expected))


def test_every_text_that_may_enter_a_prompt_is_cleaned():
    items = pa.table(
        {
            "item_id": ["a\ufffc", "b"],
            "title": ["Tom &amp; Jerry", "<b></b>"],
            "genres": pa.array([["Sci&amp;Fi", "\ufffc"], []], pa.list_(pa.string())),
        }
    )
    users = pa.table({"user_id": ["u"], "job": ["a\ufff9b"], "age": [3.0]})
    raw = raw_data(
        [{"user": "u", "item": "b", "position": 1}], tags=[("u", "b", "fun\ufffc"), ("u", "b", "\ufffc")], users=users
    )
    got = clean(replace(raw, items=items), NO_RULES)
    assert got.items.to_pylist() == [
        {"item_id": "a\ufffc", "title": "Tom & Jerry", "genres": ["Sci&Fi"]},
        {"item_id": "b", "title": "<b></b>", "genres": []},
    ], "ids are keys and stay; a title of nothing but markup keeps its characters"
    assert got.users is not None and got.users["job"].to_pylist() == ["a b"]
    assert got.tags is not None and got.tags["tag"].to_pylist() == ["fun"]
    assert "1 tags without visible text dropped" in got.steps[-1].detail
    kept = clean(replace(raw, items=items), replace(NO_RULES, html=False))
    assert kept.items["title"].to_pylist() == ["Tom &amp; Jerry", "<b></b>"]
    assert kept.items["genres"].to_pylist() == [["Sci&amp;Fi"], []]


# ------------------------------------------------------------------------------------------------------------- rows


def test_five_core_of_movielens_small():
    got = clean(sources.read(DataConfig(), "x"), CleanConfig())
    step = next(s for s in got.steps if s.name == "5-core")
    assert (step.interactions, step.users, step.items) == ((100_836, 90_274), (610, 610), (9_742, 3_650))


def test_descriptions_of_amazon_industrial_are_plain():
    folder = shared_data("amazon-industrial")
    raw = sources.read(table_config(folder), "x")
    got = clean(raw, replace(NO_RULES))
    words = got.items["description"].to_pylist()
    assert sum(w.startswith("['") for w in raw.items["description"].to_pylist()) > 3_000
    assert not any(w.startswith(("['", '["')) or "&amp;" in w or "<br" in w.lower() for w in words)
    assert got.items.num_rows == 3_686, "items without interactions stay: cold items"


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60),
    user_min=st.integers(0, 4),
    item_min=st.integers(0, 4),
)
def test_core_is_the_largest_set_that_satisfies_both_minima(pairs, user_min, item_min):
    keep, _ = core_mask(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]), user_min, item_min)
    left = list(pairs)
    while True:  # the plain definition, one removal at a time
        users, items = Counter(p[0] for p in left), Counter(p[1] for p in left)
        short = [p for p in left if users[p[0]] < user_min or items[p[1]] < item_min]
        if not short:
            break
        left.remove(short[0])
    assert sorted(p for p, k in zip(pairs, keep) if k) == sorted(left)


def test_core_takes_short_histories_along():
    rows = [
        {"user": u, "item": i, "position": n}
        for u, items in (("a", "xyz"), ("b", "xy"), ("c", "xyz"))
        for n, i in enumerate(items)
    ]
    got = clean(raw_data(rows), replace(NO_RULES, k_core=2, min_user_events=3))
    assert set(got.interactions["user_id"].to_pylist()) == {"a", "c"}
    assert min(Counter(got.interactions["item_id"].to_pylist()).values()) >= 2


def test_minimum_rating_counts_unrated():
    rows = [
        {"user": "u", "item": i, "position": n, "rating": r}
        for n, (i, r) in enumerate((("a", 5.0), ("b", 3.5), ("c", None), ("d", 4.0)))
    ]
    got = clean(raw_data(rows), replace(NO_RULES, min_rating=4.0))
    assert got.interactions["item_id"].to_pylist() == ["a", "d"], "the minimum itself is enough"
    assert got.steps[-1].interactions == (4, 2) and "1 of the dropped have no rating" in got.steps[-1].detail


@pytest.mark.parametrize(("which", "rating"), [("first", 1.0), ("last", 4.0)])
def test_duplicates_follow_time_and_not_the_order_of_rows(which, rating):
    rows = [
        {"user": "u", "item": "a", "timestamp": t, "rating": r} for t, r in ((20, 3.0), (10, 1.0), (20, 4.0), (10, 2.0))
    ]
    rows.append({"user": "u", "item": "b", "timestamp": 5, "rating": 5.0})
    for order in (rows, rows[::-1]):
        got = clean(raw_data(order), replace(NO_RULES, duplicates=which))
        assert dict(zip(got.interactions["item_id"].to_pylist(), got.interactions["rating"].to_pylist())) == {
            "a": rating,
            "b": 5.0,
        }
        assert got.steps[-1].interactions == (5, 2)


def test_users_with_one_event_are_dropped_and_counted():
    rows = [
        {"user": u, "item": i, "position": n} for u, items in (("a", "xyz"), ("b", "w")) for n, i in enumerate(items)
    ]
    got = clean(raw_data(rows), replace(NO_RULES, min_user_events=3))
    assert got.steps[-1].users == (2, 1) and got.steps[-1].items == (4, 4)
    assert "1 users dropped, 1 of them with a single event" in got.steps[-1].detail


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"k_core": 3}, ("'3-core'", "data.clean.k_core", "2 interactions of 1 users")),
        ({"min_user_events": 4}, ("at least 4 events", "longest history has 2")),
        ({"min_rating": 4.5}, ("rating at least 4.5", "highest rating is 4")),
    ],
)
def test_an_emptied_set_names_the_step_and_the_setting(rules, words):
    rows = [{"user": "u", "item": i, "position": n, "rating": 4.0} for n, i in enumerate("ab")]
    with pytest.raises(DataError) as caught:
        clean(raw_data(rows), replace(NO_RULES, **rules))
    assert all(w in str(caught.value) for w in words)


def test_minimum_rating_without_ratings():
    with pytest.raises(DataError, match="no rating column"):
        clean(raw_data([{"user": "u", "item": "a", "position": 1}]), replace(NO_RULES, min_rating=3.0))

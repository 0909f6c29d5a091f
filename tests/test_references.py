"""Wishes that name items: which ones are named, and what is asked for beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.data.schema import Catalogue
from instructrec_jax.instructions.packs import load_domain, load_phrases
from instructrec_jax.instructions.references import References
from instructrec_jax.instructions.titles import stem
from tests.small_split import small_split

TITLES = [
    "Heat (1995)", "Heat (1986)", "Godfather, The (1972)", "Matrix, The (1999)", "Fight Club (1999)", "Up (2009)", "It (1990)",
    "Like Water for Chocolate (1992)", "Water (2005)", "Star Wars: Episode IV - A New Hope (1977)", "Star Wars: Episode V (1980)",
    "Star Trek (2009)", "Star Trek: The Motion Picture (1979)", "Dumb & Dumber (1994)", "Tonight for Sure (1962)", "英雄 (2002)",
    "海上钢琴师 (1998)", "Die Hard (1988)", "The (2010)",
]  # fmt: skip
HEAT, HEAT86, GODFATHER, MATRIX, FIGHT, UP, IT, LIKE_WATER, _, HOPE, EMPIRE, TREK, _, DUMB, _, HERO, PIANIST, *_ = (
    range(len(TITLES))
)
DIE_HARD = 17


def references(titles: list[str]) -> References:
    """Over a catalogue of these titles; of two items of one name the first is the more popular."""
    data = small_split(items=max(60, len(titles)))
    table = pa.table({"item_id": [str(i) for i in range(len(titles))], "title": titles})
    catalogue = Catalogue(item_ids=[str(i) for i in range(len(titles))], titles=titles, table=table)
    return References(replace(data, catalogue=catalogue, item=np.zeros_like(data.item)), load_domain("films"))


@pytest.fixture(scope="module")
def some() -> References:
    return references(TITLES)


@pytest.mark.parametrize(
    ("wish", "rest", "items"),
    [
        ("something like Heat but funny, for tonight", "funny", (HEAT,)),
        ("like heat", "", (HEAT,)),
        ("Something like Heat (1986), please.", "", (HEAT86,)),
        ("a film similar to The Godfather", "", (GODFATHER,)),
        ("I'd like a film like “Godfather, The (1972)”", "", (GODFATHER,)),
        ("Matrix", "Matrix", ()),  # not behind a word that says so
        ("like Matrix and the film Fight Club, only slower", "slower", (MATRIX, FIGHT)),
        ("like Star Trek, The Matrix or Heat but older", "older", (TREK, MATRIX, HEAT)),
        ("like Water for Chocolate", "like Water for Chocolate", ()),  # a title that begins like the words
        ("something like Like Water for Chocolate", "", (LIKE_WATER,)),
        ("like Star Wars", "", (HOPE,)),  # what stands before the colon
        ("like Star Wars: Episode V but shorter", "shorter", (EMPIRE,)),
        ("like it", "like it", ()),
        ("something like It", "", (IT,)),
        ("like the film Up", "", (UP,)),
        ("like “up”", "", (UP,)),
        ("more like Dumb & Dumber", "", (DUMB,)),
        ("like Die Hard but with less violence and in space", "with less violence and in space", (DIE_HARD,)),
        ("I'd like an animated film", "I'd like an animated film", ()),
        ("I would like something sad for tonight.", "I would like something sad", ()),
        ("tonight for sure", "tonight for sure", ()),
        ("类似《海上钢琴师》的喜剧电影，今晚看", "喜剧电影", (PIANIST,)),
        ("想看像英雄一样的电影", "", (HERO,)),
        ("想看类似英雄的喜剧", "喜剧", (HERO,)),
        ("类似Heat和Fight Club，但是轻松的", "轻松的", (HEAT, FIGHT)),
        ("", "", ()),
        ("like", "like", ()),
        ("like the", "like the", ()),
    ],
)
def test_what_is_read(some: References, wish: str, rest: str, items: tuple[int, ...]) -> None:
    assert some.read(wish) == (rest, items)


@given(st.lists(st.sampled_from(TITLES[:18]), min_size=1, max_size=3, unique_by=stem), st.sampled_from(["en", "zh"]))
def test_every_title_is_read_in_the_frame(titles: list[str], language: str) -> None:
    """Whatever stands beside it in the catalogue, and also where the year is given."""
    some = references(titles)
    frame = load_phrases(language).one["like_item"]
    for item, title in enumerate(titles):
        assert some.read(frame.format(title=title)) == ("", (item,))
        assert some.read(frame.format(title=stem(title))).items == (item,)


WORDS = [
    "like",
    "similar to",
    "类似",
    "像",
    "and",
    "but",
    "或",
    "的",
    ",",
    "“",
    "”",
    ":",
    "the",
    "film",
    "it",
    "funny",
    "tonight",
    "1995",
    "(1995)",
]


@given(
    st.lists(st.sampled_from([*WORDS, *TITLES, *map(stem, TITLES)]) | st.text(max_size=5), max_size=12),
    st.sampled_from(["", " "]),
)
def test_any_wish_is_read(some: References, words: list[str], between: str) -> None:
    """Whatever stands in it: items are named behind a word that says so, and what names nothing stays as it is."""
    wish = between.join(words)
    read = some.read(wish)
    assert all(0 <= item < len(TITLES) for item in read.items) and len(set(read.items)) == len(read.items)
    if not any(cue in wish.lower() for cue in ("like", "similar to", "类似", "像")):
        assert not read.items
    if not read.items and "tonight" not in wish.lower():
        assert read.wish == " ".join(wish.split()).strip(" ,;，；、")


def test_a_long_wish_is_read_to_its_end(some: References) -> None:
    read = some.read("like nothing " * 5000 + "but like Heat")
    assert read.items == (HEAT,) and read.wish.startswith("like nothing like nothing")

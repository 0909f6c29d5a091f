"""Windows as records, made for many users at once, against examples that are serialised one by one."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.data import shards, sources, wire
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.features import UserFeatures
from instructrec_jax.data.frames import varints
from instructrec_jax.data.splits import split
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.example import Feature
from instructrec_jax.instructions.pauses import Pauses
from instructrec_jax.instructions.windows import num_windows, windows
from tests.small_split import small_split
from tests.test_instructions import BOTH


def one_by_one(builder: Builder, **given) -> list[tuple[str, bytes]]:
    return [(shards.aspects(e), wire.serialise(e)) for e in builder.training_examples(**given)]


def some(user: int) -> tuple[Feature, ...]:
    return tuple(Feature(n, user / 7) for n in range(user % 3))


@given(st.lists(st.integers(0, 1 << 40) | st.sampled_from([0, 127, 128, 1 << 14, (1 << 21) - 1, 1 << 63]), max_size=9))
def test_varints_are_those_of_the_numbers_one_by_one(numbers):
    made = varints(np.array(numbers, np.uint64))
    at = made.at.tolist()
    assert [made.content[a:b] for a, b in pairwise(at)] == [wire._varint(number) for number in numbers]
    everything = made.between(np.array([0]), np.array([len(numbers)]))
    assert everything == [made.content]


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 9), st.integers(0, 3))
def test_windows_show_every_event_anew_once(count, length, most):
    """As a loop over the events of each user finds them."""
    expected = []
    for user, events in enumerate(count):
        found, done = [], 0
        while done < events:
            end = min(done + max(1, length // 2) if done else length, events)
            first = max(0, end - length)
            found.append((user, first, end, done - first))
            done = end
        expected += found[-most:]
    made = windows(np.array(count, np.int64), length, most)
    assert [tuple(row) for row in np.array(made).T.tolist()] == expected
    assert num_windows(np.array(count, np.int64), length, most).sum() == len(expected)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"copies": 3},
        {"repeat_targets": True, "copies": 2},
        {"max_per_user": 2},
        {"languages": ("zh",)},
        {"seed": 5},
    ],
)
@pytest.mark.parametrize("features", [None, some])
def test_windows_give_the_records_of_their_examples(change, features):
    data = small_split(users=40, longest=50)
    config = replace(BOTH, **change)
    plain, fast = Builder(data, config, "films", features), Builder(data, config, "films", features)
    expected = one_by_one(plain)
    assert list(fast.records()) == expected
    assert (fast.written, fast.skipped) == (plain.written, plain.skipped)
    parts = Builder(data, config, "films", features)
    assert list(parts.records(lambda: (data.part(u, u + 10) for u in range(0, 40, 10)))) == expected


def test_few_examples_are_made_for_many_windows(monkeypatch):
    data = small_split(users=400, items=300, longest=50)
    builder = Builder(data, replace(BOTH, search=0, rerank=0, pointwise=0, describe=0, profile=0), "films", some)
    made, example = [], Builder.example
    monkeypatch.setattr(Builder, "example", lambda *given, **named: made.append(0) or example(*given, **named))
    count = len(list(builder.records()))
    assert count == builder.num_windows
    assert 0 < len(made) < count / 4
    list(builder.records())
    assert len(made) < count / 4, "what was met is kept"


@pytest.mark.parametrize("given", [{"items_as": "title"}, {"items_as": "both"}, {"pauses": Pauses(0)}])
def test_windows_of_other_texts_are_serialised_one_by_one(given):
    data = replace(small_split(), time=np.arange(len(small_split().item)) * 5000)
    config = replace(BOTH, time_gaps="pauses" in given)
    expected = one_by_one(Builder(data, config, "films", some, **given))
    assert list(Builder(data, config, "films", some, **given).records()) == expected


def test_no_window_is_no_record():
    data = small_split()
    nobody = replace(data.part(0, 0), tags=data.tags)
    assert list(Builder(nobody, BOTH, "films").records()) == []


def test_a_real_catalogue_gives_the_records_of_its_examples(tmp_path):
    file = Path(__file__).resolve().parents[1] / "configs" / "ml_latest_small.yaml"
    config = configs.load(str(file), ["--instructions.copies", "2"])
    data = split(clean(sources.read(config.data, config.name), config.data.clean), config.data.split)
    builder = prepare.builder_of(data, UserFeatures([], np.zeros((data.num_users, 0)), np.zeros(0)), config, tmp_path)
    expected = one_by_one(builder)
    assert len(expected) > 5000
    assert list(builder.records(lambda: data.parts(1 << 14))) == expected

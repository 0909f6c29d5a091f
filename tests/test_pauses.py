"""Time gaps of a history as feature tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax import prepare, run
from instructrec_jax.config import InstructionConfig
from instructrec_jax.data import tokenizer
from instructrec_jax.data.schema import TEST, TRAIN, SplitData
from instructrec_jax.data.tokenise import encode_example
from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, Feature
from instructrec_jax.instructions.pauses import PAUSES, Pauses, check_time_gaps, pauses_in
from tests.small_split import small_split
from tests.tiny import tiny_config, write_slice

HOUR, DAY = 3600, 86400
CONFIG = InstructionConfig(history_items=8, short_history_items=5)


def timed(seconds: list[int] | None = None) -> SplitData:
    """The small data with the gaps before every user's events given in turn."""
    data = small_split()
    gaps = seconds or [0, 59, 2 * HOUR, 10, 9 * DAY]
    return replace(data, time=np.concatenate([np.cumsum(np.resize(gaps, n)) for n in np.diff(data.offsets)]))


@given(st.lists(st.integers(0, 300 * DAY), min_size=1, max_size=12), st.none() | st.integers(0, 10 * DAY))
def test_a_pause_is_the_longest_that_has_passed(gaps: list[int], first: int | None) -> None:
    time = np.cumsum(gaps) + (first or 0)
    found = Pauses(10).before(time, first)
    waited = gaps if first is not None else [0, *gaps[1:]]
    for seconds, token in zip(waited, found, strict=True):
        reached = sum(seconds >= least for least in PAUSES.values())
        assert token == (Feature(10 + reached - 1, 1.0) if reached else None)


def test_a_history_shows_its_pauses_and_that_before_the_request() -> None:
    data = timed([0, 59, 2 * HOUR, 10, 9 * DAY])
    builder = Builder(data, CONFIG, "films", pauses=Pauses(3))
    start = int(data.offsets[4])
    short, long = Feature(3, 1.0), Feature(6, 1.0)
    prompt = builder.evaluation_prompt("sequential", 4, start + 4)  # events 0 to 3; the request comes 9 days later
    assert prompt.features == (short, long)
    assert f"{ITEM_SLOT * 2}{FEATURE_SLOT}{ITEM_SLOT * 2}{FEATURE_SLOT}" in prompt.prompt
    later = builder.evaluation_prompt("sequential", 4, start + 12)  # the newest eight: events 4 to 11
    first = np.diff(data.time[start + 3 : start + 13], prepend=data.time[start + 3])[1:]  # pyright: ignore[reportOptionalSubscript]
    assert len(later.features) == int((first >= HOUR).sum())
    assert later.prompt.count(ITEM_SLOT) == 8


def test_nobody_sees_the_time_of_what_is_to_come() -> None:
    """A training window has no pause behind its last event: that would be the time of one that is held out."""
    data = timed()
    assert data.time is not None
    late = data.time + np.where(data.split == TRAIN, 0, 400 * DAY)
    one, two = (
        list(Builder(d, CONFIG, "films", pauses=Pauses(0)).training_examples())
        for d in (data, replace(data, time=late))
    )
    assert [e for e in one if e.dense] == [e for e in two if e.dense]
    assert any(e.features for e in one if e.dense) and any(not e.features for e in one if e.dense)


def test_the_place_before_an_item_is_its_pause(tmp_path: Path) -> None:
    data = timed([0, 2 * HOUR])
    builder = Builder(data, CONFIG, "films", pauses=Pauses(0))
    example = next(e for e in builder.training_examples() if e.dense and len(e.features) > 2)

    tokenizer.train([example.prompt, *data.catalogue.titles], 300, tmp_path / "tokenizer")
    arrays = encode_example(example, tokenizer.load(tmp_path / "tokenizer"))
    at = np.flatnonzero(arrays["feature"] > 0)
    assert len(at) == len(example.features)
    followed = at[np.isin(at + 1, np.flatnonzero(arrays["item"] > 0))]
    assert len(followed) >= len(at) - 1
    assert (arrays["item_target"][followed] == arrays["item"][followed + 1]).all()


def test_what_cannot_be_shown_is_refused() -> None:
    wanted = replace(CONFIG, time_gaps=True)
    check_time_gaps(wanted, timed())
    with pytest.raises(ConfigError, match=r"(?s)positions and no timestamps.*time_gaps: false"):
        check_time_gaps(wanted, small_split())
    with pytest.raises(ConfigError, match="title has none"):
        check_time_gaps(replace(wanted, items_as="title"), timed())
    assert pauses_in(["age"]) is None and pauses_in(["age", *PAUSES]) == Pauses(1)


@pytest.mark.slow
def test_a_run_learns_with_them(tmp_path: Path) -> None:
    write_slice(tmp_path / "data")
    config = tiny_config(tmp_path)
    config = replace(config, instructions=replace(config.instructions, time_gaps=True))
    prepared = prepare.prepare(config, lambda _: None)
    assert prepared.users.names[-len(PAUSES) :] == list(PAUSES)
    finished = run.train_run(config, tmp_path / "runs" / "one", lambda _: None)
    assert finished.step == 8
    with run.trained(tmp_path / "runs" / "one") as (s, params, _):
        prompts = s.sequential_prompts(s.prepared.data.cases(TEST))
        assert any(p.features for p in prompts)
        assert np.isfinite(s.scorer(params).score_all(prompts)).all()

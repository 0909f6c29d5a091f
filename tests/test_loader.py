"""Packed batches: the same for the same seed, exact after a restore, and nothing lost or mixed between segments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.config import InstructionConfig
from instructrec_jax.data import loader, records, tokenizer
from instructrec_jax.data.loader import TokenisedRecords, training_iterator, useful_share
from instructrec_jax.data.packing import Batch, Position, Remaining, packed
from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import FIELDS
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.example import Feature
from tests.small_split import small_split

LENGTH, ROWS = 64, 4


@pytest.fixture(scope="module", autouse=True)
def _few_at_a_time() -> Iterator[None]:
    """The sets here are small, and what a reading takes would be many epochs of them. The order does not depend on it."""
    with mock.patch.object(loader, "READ", 32):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Text]:
    """Real instructions of a small data set: every family, items, features and answers in words."""
    data = small_split(users=10)
    config = InstructionConfig(history_items=12, short_history_items=6, describe=1.0, pointwise=0.5)
    builder = Builder(data, config, "films", lambda user: (Feature(user % 3, 0.5 + user),))
    folder = tmp_path_factory.mktemp("loader")
    examples = list(builder.training_examples())
    text = tokenizer.train([e.prompt for e in examples], 500, folder / "tokenizer")
    records.write(lambda: iter(examples), folder / "records", config_hash="x", seed=0, shard_records=1000)
    return folder / "records", text


def batches(made: tuple[Path, Text], seed: int = 0, rows: int = ROWS, **more):
    folder, text = made
    return training_iterator(folder, text, batch_size=rows, sequence_length=LENGTH, seed=seed, **more)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def fields(table: np.ndarray) -> dict[str, np.ndarray]:
    """An example's table by field."""
    return {key: np.ascontiguousarray(column).view(kind) for (key, kind), column in zip(FIELDS.items(), table.T)}


def as_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    return b"|".join(arrays[key].astype(dtype).tobytes() for key, dtype in FIELDS.items())


def segments(batch: Batch) -> list[bytes]:
    """Every packed example of a batch, as bytes of all its fields."""
    out = []
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == number
            out.append(as_bytes({key: batch[key][row][here] for key in FIELDS}))
    return out


def tokenised(made: tuple[Path, Text]) -> list[bytes]:
    source = TokenisedRecords(Records(made[0]), made[1], LENGTH)
    return [as_bytes(fields(source[i])) for i in range(len(source))]


# ------------------------------------------------------------------------------------------------------------- one batch


def test_shapes_types_and_padding(made):
    for batch in islice(batches(made), 10):
        assert tuple(sorted(batch)) == tuple(sorted(loader.BATCH_KEYS))
        assert {v.shape for v in batch.values()} == {(ROWS, LENGTH)}
        assert all(batch[k].dtype == FIELDS[k] for k in FIELDS)
        padding = batch["segment_ids"] == 0
        for key, values in batch.items():
            assert not values[padding].any(), key
        assert (batch["tokens"][~padding] > 0).all()
        assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding is at the end of a row"
        assert useful_share(batch) == 1 - padding.mean()


def test_segments_count_from_one_and_positions_restart(made):
    text = made[1]
    for batch in islice(batches(made), 10):
        for ids, positions, tokens in zip(batch["segment_ids"], batch["positions"], batch["tokens"]):
            used = ids[ids > 0]
            assert used[0] == 1 and set(np.diff(used)) <= {0, 1}
            starts = np.flatnonzero(np.diff(used, prepend=0))
            expected = np.arange(len(used)) - np.repeat(starts, np.diff(starts, append=len(used)))
            assert positions[: len(used)].tolist() == expected.tolist()
            assert np.flatnonzero(tokens == text.bos).tolist() == starts.tolist(), "every segment starts with <bos>"


def test_rows_hold_several_examples_and_are_well_filled(made):
    some = list(islice(batches(made, rows=16), 10))
    assert np.mean([useful_share(b) for b in some]) > 0.75
    assert np.mean([b["segment_ids"].max(1).mean() for b in some]) > 1
    waited = list(islice(batches(made, rows=16, look_ahead=16), 10))
    assert np.mean([useful_share(b) for b in waited]) > np.mean([useful_share(b) for b in some]) + 0.02


# --------------------------------------------------------------------------------------------------------------- packing


def drawn(made: tuple[Path, Text], epochs: int, **more) -> tuple[list[bytes], list[bytes]]:
    """All tokenised examples, and the segments of the first batches that hold at least ``epochs`` times as many."""
    every = tokenised(made)
    out: list[bytes] = []
    stream = batches(made, **more)
    while len(out) < epochs * len(every):
        out.extend(segments(next(stream)))
    return every, out


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("rows", [4, 8])
def test_nothing_is_lost_mixed_or_told_twice_in_an_epoch(made, rows, epochs):
    """Batches are whole groups of packed rows, so that their examples are a beginning of the stream of epochs."""
    every, out = drawn(made, epochs, rows=rows)
    once, found = Counter(every), Counter(out)
    assert set(found) == set(once), "every segment is one whole example with all its targets, and none is missing"
    full, beyond = divmod(len(out), len(every))
    assert full == epochs and beyond < len(every) / 2
    for example, times in once.items():
        assert times * full <= found[example] <= times * (full + 1), "no example comes twice before each came once"


def test_epochs_are_shuffled_anew(made):
    every, out = drawn(made, 2)
    n = len(every)
    assert out[:n] != every and out[:n] != out[n : 2 * n]


def test_long_examples_are_cut_to_the_row(made):
    folder, text = made
    source = TokenisedRecords(Records(folder), text, 24)
    sizes = [len(source[i]) for i in range(len(source))]
    assert max(sizes) == 24
    stream = training_iterator(folder, text, batch_size=4, sequence_length=24, seed=0)
    known = {as_bytes(fields(source[i])) for i in range(len(source))}
    assert all(set(segments(batch)) <= known for batch in islice(stream, 20))


def test_the_cache_changes_nothing(made):
    folder, text = made
    none, small, all_ = (TokenisedRecords(Records(folder), text, LENGTH, size) for size in (0, 5000, 1 << 30))
    for _ in range(2):
        for i in range(len(none)):
            assert none[i].tobytes() == small[i].tobytes() == all_[i].tobytes()
    assert not none._cache and 0 < len(small._cache) < len(all_._cache) == len(all_)
    assert sum(table.nbytes for table in small._cache.values()) <= 5000


# --------------------------------------------------------------------------------------------------- order and position


def test_the_same_seed_gives_the_same_batches(made):
    one, two, other = (list(islice(batches(made, seed), 30)) for seed in (3, 3, 4))
    assert all(map(equal, one, two))
    assert not any(map(equal, one, other))


def test_an_error_in_the_thread_comes_with_its_batch(made, monkeypatch):
    kept, calls = TokenisedRecords._kept, []

    def fails_later(self, index, table):
        calls.append(index)
        if len(calls) > 40:
            raise DataError("a record is damaged")
        return kept(self, index, table)

    monkeypatch.setattr(TokenisedRecords, "_kept", fails_later)
    stream = batches(made)
    with pytest.raises(DataError, match="a record is damaged"):
        for _ in range(40):
            next(stream)
    stream.close()


def test_a_position_in_other_data_is_refused(made):
    state = batches(made).get_state()
    longer = training_iterator(made[0], made[1], batch_size=ROWS, sequence_length=2 * LENGTH, seed=0)
    for go in (longer.set_state, lambda state: longer.deal([state])):
        with pytest.raises(
            DataError, match=r"position is one in TokenisedRecords.*, 64\), the prepared data is .*, 128\)"
        ):
            go(state)


def tables_of(sizes: list[int]) -> list[np.ndarray]:
    """Examples of so many tokens, each token the number of its example, from 1."""
    return [np.full((n, len(FIELDS)), i + 1, np.int32) for i, n in enumerate(sizes)]


def test_first_fit():
    """Sizes 5 4 3 6 2 into two rows of 10: 5+4, 3+6; the 2 has no room and begins the next batch."""
    tables = tables_of([5, 4, 3, 6, 2])
    batch, after, held = packed(tables.__getitem__, 0, {}, 2, 10)
    assert (after, held) == (4, {})
    assert batch["tokens"].tolist() == [[1] * 5 + [2] * 4 + [0], [3] * 3 + [4] * 6 + [0]]
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 4 + [0], [1] * 3 + [2] * 6 + [0]]
    assert batch["positions"].tolist() == [[*range(5), *range(4), 0], [*range(3), *range(6), 0]]
    assert all(batch[k].dtype == kind and batch[k].flags["C_CONTIGUOUS"] for k, kind in FIELDS.items())


def test_those_behind_fill_the_rows_while_one_waits():
    """Sizes 5 4 3 6 2 8 1 1 4 9: 2 and 8 wait, both of 1 find room, full rows end the batch; in the next 2 and 8 come first."""
    tables = tables_of([5, 4, 3, 6, 2, 8, 1, 1, 4, 9])
    batch, after, held = packed(tables.__getitem__, 0, {}, 2, 10, look_ahead=2)
    assert batch["tokens"].tolist() == [[1] * 5 + [2] * 4 + [7], [3] * 3 + [4] * 6 + [8]]
    assert (after, list(held)) == (8, [4, 5])
    batch, after, held = packed(tables.__getitem__, after, held, 2, 10, look_ahead=0)
    assert batch["tokens"].tolist() == [[5] * 2 + [6] * 8, [9] * 4 + [0] * 6]
    assert (after, held) == (9, {}), "with nothing that may wait, the 9 ends the batch"


@given(
    st.lists(st.integers(1, 20), min_size=60, max_size=60), st.integers(1, 4), st.integers(0, 5), st.integers(20, 25)
)
def test_each_example_is_packed_once_whoever_waits(sizes, rows, look_ahead, length):
    tables = tables_of([*sizes, *[length] * 200])
    place, held, seen, kept = 0, {}, [], []
    while place < len(sizes):
        batch, place, held = packed(tables.__getitem__, place, held, rows, length, look_ahead)
        assert len(held) <= look_ahead
        real = batch["segment_ids"] > 0
        seen += batch["tokens"][real].tolist()
        kept += held
    waiting = [number for at in held for number in [at + 1] * len(tables[at])]
    assert Counter(seen + waiting) == Counter(n for at in range(place) for n in [at + 1] * len(tables[at]))
    assert not kept or max(Counter(kept).values()) <= 1 + look_ahead // rows, "what waits comes first, in order"


def test_a_loader_that_is_closed_ends_its_thread(made):
    stream = batches(made)
    next(stream)
    stream.close()
    assert not stream._ahead._thread.is_alive()


def test_a_process_that_leaves_its_loader_open_ends_well(made):
    """Its thread may be inside the records' C++ code when the interpreter ends."""
    folder, _ = made
    code = f"""
from instructrec_jax.data import tokenizer
from instructrec_jax.data.loader import training_iterator
text = tokenizer.load({str(folder.parent / "tokenizer")!r})
kept = [training_iterator({str(folder)!r}, text, batch_size=400, sequence_length=64, seed=n) for n in range(6)]
print(next(kept[0])["tokens"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(400, 64)"), done.stderr


@pytest.mark.parametrize(("steps", "look_ahead"), [(0, 0), (1, 0), (7, 0), (150, 0), (7, 5)])
def test_a_restored_iterator_continues_with_the_very_next_batch(made, steps, look_ahead):
    stream = batches(made, look_ahead=look_ahead)
    before = list(islice(stream, steps))
    state = stream.get_state()
    following = list(islice(stream, 6))
    if steps == 150:
        assert sum(len(segments(b)) for b in before) > 3 * len(Records(made[0])), "several epochs"
    assert len(state["held"]) == look_ahead
    fresh = batches(made, look_ahead=look_ahead)
    fresh.set_state(state)
    assert all(map(equal, islice(fresh, 6), following))
    stream.set_state(state)
    assert all(map(equal, islice(stream, 6), following)), "an iterator can go back"
    used = batches(made, look_ahead=look_ahead)
    list(islice(used, 3))
    used.set_state(state)
    assert all(map(equal, islice(used, 6), following)), "whatever it did before"


def test_a_state_can_be_kept_as_json(made):
    stream = batches(made)
    list(islice(stream, 5))
    state = json.loads(json.dumps(stream.get_state()))
    following = next(stream)
    fresh = batches(made)
    fresh.set_state(state)
    assert equal(next(fresh), following)


# ------------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_disjoint_slices_that_are_everything(made, processes):
    """Of an epoch: each process has every n-th example of its order."""
    every = Counter(tokenised(made))
    order: list[bytes] = []  # of one process, by batches; an epoch's order within them does not matter here
    stream = batches(made, rows=1)
    while len(order) < len(Records(made[0])):
        order.extend(segments(next(stream)))
    assert Counter(order[: len(Records(made[0]))]) == every
    for index in range(processes):
        stream = batches(made, rows=4 * processes, process_index=index, process_count=processes)
        seen: list[bytes] = []
        while len(seen) < len(Records(made[0])) // processes:
            batch = next(stream)
            assert batch["tokens"].shape == (4, LENGTH)
            seen.extend(segments(batch))
        own = Counter(order[index::processes])
        assert Counter(seen) >= own if len(seen) >= sum(own.values()) else Counter(seen) <= own


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 5)), min_size=1, max_size=3))
def test_another_number_of_processes_loses_and_repeats_nothing(made, phases):
    """Any number of processes after any other, at any place of an epoch: an epoch still has each of its examples once."""
    every, out, told = tokenised(made), [], []
    states: list[dict] = []
    for count, steps in [*phases, (1, None)]:  # at the end, one process takes what is left
        streams = [batches(made, process_index=p, process_count=count, say=told.append) for p in range(count)]
        for stream, own in zip(streams, states if len(states) == count else [None] * count):
            if own:
                stream.set_state(own)
            elif states:
                stream.deal(states)
        holes = len(streams[0].get_state()["holes"])
        while streams[0].get_state()["given"] < holes + len(every) if steps is None else steps:
            out += [segment for stream in streams for segment in segments(next(stream))]
            steps = None if steps is None else steps - 1
        states = json.loads(json.dumps([stream.get_state() for stream in streams]))
        for stream in streams:
            stream.close()
    counts = [count for count, _ in [*phases, (1, None)]]
    assert len(told) == sum(after for before, after in pairwise(counts) if before != after)
    full, found = len(out) // len(every), Counter(out)
    assert full >= 1
    for example, times in Counter(every).items():
        assert times * full <= found[example] <= times * (full + 1)


def test_a_hole_beyond_what_was_given_stays_a_hole():
    left = Remaining((3, 5, 8, 9), 12)
    none, one, three, four = (Position(n) for n in (0, 1, 3, 4))
    assert left.after([one, none]) == Remaining((5, 8, 9), 12)
    assert left.after([none, three]) == Remaining((3, 8, 12, 14), 15)  # its second, fourth and sixth place: 5, 9, 13
    assert Remaining().after([four]) == Remaining((), 4)
    assert Remaining().after([three, one]) == Remaining((3, 5), 6)


def test_what_waits_was_not_given():
    assert Remaining().after([Position(4, (1, 2))]) == Remaining((1, 2), 4)
    # The first gave 8 and not 3, the second 5 and 13 and not 9.
    assert Remaining((3, 5, 8, 9), 12).after([Position(2, (0,)), Position(3, (1,))]) == Remaining((3, 9, 12, 14), 15)


positions = st.integers(0, 9).flatmap(
    lambda given: st.builds(
        Position, st.just(given), st.sets(st.integers(0, max(0, given - 1)), max_size=given).map(sorted).map(tuple)
    )
)


@given(st.lists(st.lists(positions, min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_given_and_what_remains_are_everything(phases):
    """However many processes there are in each phase, and whatever each of them holds back."""
    remaining, out = Remaining(), []
    for phase in phases:
        for process, at in enumerate(phase):
            out += [remaining[process + len(phase) * n] for n in range(at.given) if n not in at.held]
        remaining = remaining.after(phase)
    assert len(out) == sum(at.count for phase in phases for at in phase)
    assert sorted([*out, *remaining.holes]) == list(range(remaining.start))
    assert list(remaining.holes) == sorted(remaining.holes)


@pytest.mark.parametrize(("rows", "processes"), [(5, 2), (8, 3), (1, 2)])
def test_a_batch_that_does_not_divide_says_both_numbers(made, rows, processes):
    with pytest.raises(ConfigError, match=f"train.batch_size = {rows} does not divide over {processes} processes"):
        batches(made, rows=rows, process_count=processes)


def test_a_look_ahead_below_zero_is_refused(made):
    with pytest.raises(ConfigError, match=r"train\.look_ahead = -1 must be 0 or more"):
        batches(made, look_ahead=-1)


def test_fewer_records_than_processes(made):
    count = len(Records(made[0]))
    with pytest.raises(ConfigError, match=f"{count} records cannot feed {count + 1} processes"):
        batches(made, rows=count + 1, process_count=count + 1)


def test_a_damaged_shard_stops_the_loader_at_once(made, tmp_path):
    folder = tmp_path / "records"
    records.write(lambda: (Records(made[0])[i] for i in range(5)), folder, config_hash="x", seed=0, shard_records=9)
    shard = next(folder.rglob("*.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes, the manifest says"):
        batches((folder, made[1]))


def test_a_set_smaller_than_a_batch_still_gives_batches(made, tmp_path):
    folder = tmp_path / "records"
    records.write(lambda: (Records(made[0])[i] for i in range(2)), folder, config_hash="x", seed=0, shard_records=9)
    every, out = drawn((folder, made[1]), 5, rows=8)
    assert set(out) == set(every)

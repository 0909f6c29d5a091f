"""Records give back what was written; what is damaged, missing or unfinished is named before training reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrec_jax.data import records, shards, wire
from instructrec_jax.data.records import Records
from instructrec_jax.data.shards import Sorter, cuts, place
from instructrec_jax.data.wire import parse, serialise
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.files import read_json, sha256, write_atomic, write_json
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, Feature, InstructionExample

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
ITEMS = st.lists(st.integers(0, 2**31 - 2), max_size=4).map(tuple)
EXAMPLE = st.builds(
    InstructionExample,
    template=TEXT,
    language=st.sampled_from(["en", "zh"]),
    preference=st.sampled_from(["P0", "P1", "P2"]),
    intention=st.sampled_from(["I0", "I1", "I2"]),
    task=st.sampled_from(["T0", "T2", "T3"]),
    metric=st.sampled_from(["next-item", "search"]),
    user=st.integers(-1, 2**31 - 1),
    prompt=TEXT.map(lambda t: f"{ITEM_SLOT}{t}{FEATURE_SLOT}"),
    prompt_items=ITEMS,
    answer=TEXT,
    answer_items=ITEMS,
    features=st.lists(st.builds(Feature, st.integers(0, 99), st.floats(-9, 9, width=32)), max_size=3).map(tuple),
    target=st.integers(-1, 2**31 - 2),
    candidates=ITEMS,
    dense=st.booleans(),
    dense_from=st.integers(0, 99),
)


def numbered(n: int) -> InstructionExample:
    return InstructionExample("seq", "en", f"P{n % 3}", "I0", "T2", "next-item", n, f"电影 {n}", (n,), "🎬" * (n % 4))


class Numbered:
    """A stream that says how long it is, as ``prepare`` gives it."""

    def __init__(self, count: int, expected: int | None = None):
        self.count, self.expected = count, count if expected is None else expected

    def __call__(self) -> Iterator[InstructionExample]:
        return (numbered(n) for n in range(self.count))


def write(folder: Path, stream=None, shard_records: int = 1000) -> dict:
    return records.write(stream or Numbered(20), folder, config_hash="abc", seed=7, shard_records=shard_records)


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / records.NAME / records.VERSION).glob("*.array_record*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished folder of several shards, only to be read."""
    folder = tmp_path_factory.mktemp("records") / "records"
    write(folder, Numbered(50), shard_records=20)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished folder, to be damaged."""
    folder = tmp_path / "records"
    for file in (p for p in finished.rglob("*") if p.is_file()):
        write_atomic(folder / file.relative_to(finished), file.read_bytes())
    records.verify(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------- round trip


@given(EXAMPLE)
def test_any_example_survives_a_flat_record(example):
    assert parse(serialise(example)) == example


LONG = st.builds(
    lambda example, items, words: example._replace(prompt_items=items, prompt=ITEM_SLOT * len(items) + words),
    EXAMPLE,
    st.lists(st.integers(0, 2**31 - 2), min_size=60, max_size=5000).map(tuple),
    st.integers(0, 20_000).map("x".__mul__),
)


@given(EXAMPLE | LONG)
def test_a_record_is_what_protobuf_makes_of_the_example(example):
    """The bytes of ``tf.train.Example``, set field by field, in protobuf's own order."""
    record = wire.message()()
    feature = record.features.feature
    for name in shards.WORDS:
        feature[name].bytes_list.value.append(getattr(example, name).encode())
    for name in shards.ITEMS:
        feature[name].int64_list.value.extend(getattr(example, name))
    for name in shards.NUMBERS:
        feature[name].int64_list.value.append(int(getattr(example, name)))
    feature["feature_index"].int64_list.value.extend([f.index for f in example.features])
    feature["feature_value"].float_list.value.extend([f.value for f in example.features])
    for name in (*shards.ITEMS, "feature_index"):
        feature[name].int64_list.SetInParent()
    feature["feature_value"].float_list.SetInParent()
    assert serialise(example) == record.SerializeToString(deterministic=True)
    assert parse(serialise(example)) == example


@given(EXAMPLE, st.integers(0), st.sampled_from(["turned", "more", "twice", "unpacked"]))
def test_other_layouts_are_read_too(example, at, change):
    """Fields in another order, one more, one twice (the last one counts), lists that are not packed."""
    features = wire.message().FromString(serialise(example)).features.feature
    fields = []
    for name in features:
        one = wire.message()()
        one.features.feature[name].CopyFrom(features[name])
        fields.append(one.features.SerializeToString())
    at %= len(fields)
    if change == "turned":
        fields = fields[at:] + fields[:at]
    elif change == "more":
        one = wire.message()()
        one.features.feature["other"].int64_list.value.append(7)
        fields.insert(at, one.features.SerializeToString())
    elif change == "twice":
        one = wire.message()()
        one.features.feature["user"].int64_list.value.append(example.user + 1)
        fields.insert(0, one.features.SerializeToString())
    else:
        name = b"\x0a\x0cprompt_items\x12"
        values = b"".join(b"\x08" + wire._varint(n) for n in example.prompt_items)
        for size in (1, 0):
            values = (b"\x1a" if size else name) + wire._varint(len(values)) + values
        fields = [f for f in fields if name not in f] + [b"\x0a" + wire._varint(len(values)) + values]
    body = b"".join(fields)
    assert parse(b"\x0a" + wire._varint(len(body)) + body) == example


def test_places_are_those_of_tfds():
    from tensorflow_datasets.core.hashing import Hasher

    numbers = [*range(200), 10**6, 2**40]
    assert [place(n) for n in numbers] == [Hasher("train").hash_key(n).to_bytes(16, "big") for n in numbers]


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=9), st.integers(1, 1 << 20))
def test_a_bucket_is_the_upper_half_of_a_product(places, buckets):
    assert shards.buckets_of(places, buckets) == [int.from_bytes(at[:8], "big") * buckets >> 64 for at in places]


@settings(max_examples=4)
@given(st.lists(EXAMPLE, min_size=1, max_size=30))
def test_any_examples_survive_the_disk(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("any") / "records"
    write(folder, lambda: iter(examples))
    read = Records(folder)
    assert len(read) == len(examples)
    key = repr
    assert sorted((read[i] for i in range(len(read))), key=key) == sorted(examples, key=key)


def test_every_example_is_there_once_over_several_files_of(finished):
    read = Records(finished)
    assert len(files_of(finished)) == 3
    assert sorted(read[i].user for i in range(len(read))) == list(range(50))
    assert all(read[i] == numbered(read[i].user) for i in range(len(read)))


@pytest.mark.parametrize(("count", "expected"), [(3, 50), (60, 5), (20, 0)])
def test_a_wrong_expectation_only_changes_the_number_of_files_of(tmp_path, count, expected):
    manifest = write(tmp_path / "r", Numbered(count, expected), shard_records=20)
    read = Records(tmp_path / "r")
    assert manifest["records"] == len(read) == count
    assert sorted(read[i].user for i in range(count)) == list(range(count))


@pytest.mark.parametrize(
    ("size", "message"), [(1, "shard_records = 1 asks for 9 shards of 3"), (0, "shard_records = 0")]
)
def test_too_small_files_of(tmp_path, size, message):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "r", Numbered(3, 9), shard_records=size)
    assert not list(tmp_path.iterdir())


def test_the_same_examples_give_the_same_bytes(finished, tmp_path):
    write(tmp_path / "r", Numbered(50), shard_records=20)
    assert {p.name: sha256(p) for p in files_of(tmp_path / "r")} == {p.name: sha256(p) for p in files_of(finished)}


def test_the_manifest_says_what_is_there(finished):
    manifest = records.read_manifest(finished)
    assert manifest == records.verify(finished) == Records(finished).manifest
    assert manifest["records"] == 50 and manifest["seed"] == 7 and manifest["config_hash"] == "abc"
    assert manifest["records_by_aspect"] == {"P0,I0,T2": 17, "P1,I0,T2": 17, "P2,I0,T2": 16}
    assert manifest["shards"] == {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files_of(finished)}
    names = set(manifest["schema"]["featuresDict"]["features"])
    assert names == {*InstructionExample._fields, "feature_index", "feature_value"} - {"features"}


def test_repr_holds_no_address(finished):
    """The loader's saved position compares it."""
    assert repr(Records(finished)) == repr(Records(finished)) == "Records(abc, 50)"


def test_tfds_reads_the_folder_by_itself(finished):
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(finished / records.NAME / records.VERSION))
    assert builder.info.splits["train"].num_examples == 50
    source = builder.as_data_source("train")
    prompts = {source[i]["prompt"].decode() for i in range(len(source))}
    assert prompts == {numbered(n).prompt for n in range(50)}


@pytest.mark.parametrize("held, files", [(1 << 7, True), (1 << 20, False)], ids=["on disk and in memory", "in memory"])
def test_order_and_cuts_are_those_of_tfds(held, files, tmp_path, monkeypatch):
    from tensorflow_datasets.core import shuffle
    from tensorflow_datasets.core.utils import shard_utils

    shuffler, sorter = shuffle.Shuffler(tmp_path, "train"), Sorter(tmp_path, 7)
    monkeypatch.setattr(shards, "_BUFFER", held)
    monkeypatch.setattr(shards, "_HELD", held)
    for number in range(1000):
        shuffler.add(number, str(number).encode())
    for first, last in ((0, 1), (1, 1), (1, 400), (400, 990), (990, 1000)):
        numbers = range(first, last)
        sorter.add([place(number) for number in numbers], [str(number).encode() for number in numbers])
    assert sorter.records == 1000 and any(tmp_path.glob("bucket-*")) == files
    assert list(sorter) == [record for _, record in shuffler]
    assert not list(tmp_path.iterdir())
    for count, number in ((1000, 1), (1000, 7), (1001, 13), (5, 5)):
        assert cuts(count, number) == shard_utils.get_shard_boundaries(count, number)


def test_writing_and_reading_import_no_tensorflow(tmp_path):
    code = """
import sys
from pathlib import Path
from instructrec_jax.data import records, shards, wire
from tests.test_records import Numbered
records.write(Numbered(3), Path(sys.argv[1]), config_hash="x", seed=0, shard_records=2)
assert records.Records(sys.argv[1])[0].prompt
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"tensorflow", "torch", "pandas"}, loaded & {"tensorflow", "torch", "pandas"}
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_imports_nothing_in_the_thread_that_reads(finished):
    """TFDS replaces the interpreter's import while it is imported itself; JAX imports parts of itself at the same time."""
    script = """
import sys, threading
from pathlib import Path
from instructrec_jax.data.records import Records
records = Records(Path(sys.argv[1]))
before = set(sys.modules)
thread = threading.Thread(target=lambda: records.__getitems__([0, 1, 2]))
thread.start(), thread.join()
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", script, str(finished)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_shard_is_named_with_both_sizes(copy, which, keep):
    file = files_of(copy)[which]
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(DataError) as caught:
        Records(copy)
    assert caught.value.file == file and "data prepare" in caught.value.remedy
    assert f"has {len(content[:keep])} bytes, the manifest says {len(content)}" in str(caught.value)


@settings(max_examples=10)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 2))
def test_a_flipped_bit_anywhere_is_named_with_both_sums(finished, where, bit, which):
    file = files_of(finished)[which]
    content = file.read_bytes()
    at = int(where * len(content))
    before = sha256(file)
    try:
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
        with pytest.raises(DataError) as caught:
            records.verify(finished)
        assert caught.value.file == file
        assert f"sha256 {sha256(file)}, the manifest says {before}" in str(caught.value)
    finally:
        file.write_bytes(content)


def test_a_missing_shard_is_named(copy):
    file = files_of(copy)[1]
    file.unlink()
    with pytest.raises(DataError, match="the shard is missing") as caught:
        Records(copy)
    assert caught.value.file == file


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_manifest_is_named(copy, content):
    (copy / records.MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match="damaged") as caught:
        Records(copy)
    assert caught.value.file == copy / records.MANIFEST


def test_without_a_manifest_nothing_is_read(copy, tmp_path):
    (copy / records.MANIFEST).unlink()
    for folder in (copy, tmp_path / "none"):
        with pytest.raises(DataError, match="absent or incomplete"):
            Records(folder)


# ---------------------------------------------------------------------------------------------------- what is unfinished


class StopError(Exception):
    pass


def failing(error: BaseException, after: int):
    def stream() -> Iterator[InstructionExample]:
        for n in range(after):
            yield numbered(n)
        raise error

    return stream


@pytest.mark.parametrize("error", [StopError(), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 5])
def test_an_interrupted_write_leaves_nothing(tmp_path, error, after):
    with pytest.raises(type(error)):
        write(tmp_path / "records", failing(error, after))
    assert not list(tmp_path.iterdir())
    write(tmp_path / "records")
    assert len(Records(tmp_path / "records")) == 20


def test_an_interrupted_write_keeps_the_older_records(copy):
    before = records.read_manifest(copy)
    with pytest.raises(StopError):
        write(copy, failing(StopError(), 5))
    assert records.verify(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_a_kill_while_writing_leaves_no_manifest(tmp_path):
    code = """
import os, signal, sys
from instructrec_jax.data import records, shards, wire
from tests.test_records import numbered
def stream():
    for n in range(5):
        yield numbered(n)
    os.kill(os.getpid(), signal.SIGKILL)
records.write(stream, sys.argv[1], config_hash="x", seed=0, shard_records=2)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "records")], cwd=root, capture_output=True)
    assert done.returncode == -9
    assert not (tmp_path / "records").exists() and not list(tmp_path.rglob(records.MANIFEST))
    with pytest.raises(DataError, match="absent or incomplete"):
        Records(tmp_path / "records")


def test_writing_again_replaces_everything(copy):
    manifest = write(copy, Numbered(4))
    assert len(Records(copy)) == manifest["records"] == 4
    assert [p.name for p in files_of(copy)] == list(manifest["shards"])


def test_no_example_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no instruction example") as caught:
        write(tmp_path / "records", lambda: iter(()))
    assert caught.value.remedy and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------- files


def test_json_files_are_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.json"
    write_json(file, {"电": [1, None]})
    assert read_json(file, "again") == {"电": [1, None]} and "电" in file.read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_json(file, {"b": 2})
    assert json.loads(file.read_text(encoding="utf-8")) == {"电": [1, None]}


def test_every_field_of_an_example_is_recorded():
    changed = {"template": "x", "language": "zh", "preference": "P9", "intention": "I9", "task": "T9", "metric": "x",
               "user": 99, "prompt": "x", "prompt_items": (9,), "answer": "x", "answer_items": (9,), "target": 9,
               "features": (Feature(1, 0.5),), "candidates": (9,), "dense": True, "dense_from": 9}  # fmt: skip
    assert set(changed) == set(InstructionExample._fields)
    for name, value in changed.items():
        example = numbered(1)._replace(**{name: value})
        assert parse(serialise(example)) == example != numbered(1)

"""Instruction examples on disk: ArrayRecord shards that TFDS reads, written without TensorFlow and without TFDS's builder.

``write`` streams examples into ``folder/instructions/1.0.0`` and finishes with ``manifest.json`` (counts, schema, seed, config hash,
sha256 of each shard). A folder without a manifest is not complete. ``Records`` checks the shards against the manifest, so a truncated
or corrupted shard is named before training starts. The order and the cuts of the shards are of ``data/shards.py``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructrec_jax.data import shards, wire
from instructrec_jax.data.shards import NAME, VERSION
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.files import read_json, sha256, write_json
from instructrec_jax.host_memory import spare_collector
from instructrec_jax.instructions.example import InstructionExample

MANIFEST = "manifest.json"
_NO_EXAMPLES = "keep more of the data (data.clean, data.split), or more families (instructions)"
_BLOCK = 1024  # records that are given their places together
_BUCKETS = 64  # least number of files that records are sorted in


def write(
    examples: Callable[[], Iterator[InstructionExample]],
    folder: str | Path,
    *,
    config_hash: str,
    seed: int,
    shard_records: int,
) -> dict[str, Any]:
    """Write every example of ``examples()`` and return the manifest. Replaces what was in ``folder``; complete or absent.

    ``examples.expected``, if there is such a number, decides the number of shards. ``examples.records``, if there is such a function,
    gives (aspects, record) of the same examples: whoever can serialise them with less work. Memory holds one shard's records at a time.

    Raises:
        DataError: there is no example.
        ConfigError: more shards than examples.
    """
    spare_collector()
    count = num_shards(getattr(examples, "expected", 0), shard_records)
    with building(folder) as fresh:
        counts: Counter[str] = Counter()
        sorter = shards.Sorter(fresh, max(count, _BUCKETS))
        made = _serialised(examples)
        while block := list(itertools.islice(made, _BLOCK)):
            aspects, content = zip(*block, strict=True)
            counts.update(aspects)
            begun = sorter.records
            sorter.add(list(map(shards.place, range(begun, begun + len(block)))), content)
        check_count(sorter.records, count, shard_records, folder)
        data_dir = fresh / NAME / VERSION
        data_dir.mkdir(parents=True)
        records, written, begun = iter(sorter), [], 0
        for shard, end in enumerate(shards.cuts(sorter.records, count)):
            file = data_dir / shards.shard_name(shard, count)
            written.append(shards.write_shard(file, itertools.islice(records, end - begun)))
            begun = end
        return finish(fresh, written, counts, config_hash=config_hash, seed=seed)


def _serialised(examples: Callable[[], Iterator[InstructionExample]]) -> Iterator[tuple[str, bytes]]:
    if records := getattr(examples, "records", None):
        return records()
    return ((shards.aspects(example), wire.serialise(example)) for example in examples())


def num_shards(expected: int, shard_records: int) -> int:
    """Shards for so many records.

    Raises:
        ConfigError: no record fits.
    """
    if shard_records < 1:
        raise ConfigError(f"instructions.shard_records = {shard_records}", remedy="at least 1")
    return max(1, -(-expected // shard_records))


def check_count(records: int, count: int, shard_records: int, folder: str | Path) -> None:
    """Refuse empty shards."""
    if not records:
        raise DataError("there is no instruction example to write", file=folder, remedy=_NO_EXAMPLES)
    if records < count:
        raise ConfigError(
            f"instructions.shard_records = {shard_records} asks for {count} shards of {records} examples",
            remedy="use a larger number",
        )


@contextlib.contextmanager
def building(folder: str | Path) -> Iterator[Path]:
    """A fresh folder that takes the place of ``folder`` once its block has ended without an error."""
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def finish(
    fresh: Path, written: list[tuple[int, int]], counts: Counter[str], *, config_hash: str, seed: int
) -> dict[str, Any]:
    """Write what TFDS reads beside the shards, and the manifest. ``written``: records and bytes of each shard, in order."""
    data_dir = fresh / NAME / VERSION
    schema = shards.write_description(data_dir, [n for n, _ in written], sum(size for _, size in written))
    files = sorted(data_dir.glob("*.array_record*"))
    manifest = {
        "format": "tfds array_record",
        "records": sum(n for n, _ in written),
        "records_by_aspect": dict(sorted(counts.items())),
        "shards": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        "schema": schema,
        "seed": seed,
        "config_hash": config_hash,
    }
    write_json(fresh / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a records folder.

    Raises:
        DataError: there is none, which means that the folder is absent or was never finished.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise DataError(
            "no manifest: the records are absent or incomplete",
            file=file,
            remedy="run `instructrec data prepare CONFIG`",
        )
    return read_json(file, "run `instructrec data prepare CONFIG` again")


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every shard against the manifest.

    Raises:
        DataError: a shard is missing, has another size or another checksum; the message names it and gives both numbers.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["shards"].items():
        file = Path(folder) / NAME / VERSION / name
        remedy = "run `instructrec data prepare CONFIG` again"
        if not file.is_file():
            raise DataError("the shard is missing", file=file, remedy=remedy)
        if file.stat().st_size != expected["bytes"]:
            raise DataError(
                f"the shard has {file.stat().st_size} bytes, the manifest says {expected['bytes']}",
                file=file,
                remedy=remedy,
            )
        if (found := sha256(file)) != expected["sha256"]:
            raise DataError(
                f"the shard is corrupted: sha256 {found}, the manifest says {expected['sha256']}",
                file=file,
                remedy=remedy,
            )
    return manifest


class Records:
    """Random access to the verified examples: ``len`` and ``[]``, as Grain's ``MapDataset.source`` wants it."""

    def __init__(self, folder: str | Path):
        # While TFDS is imported, the interpreter's own import is another one (etils' lazy imports), for all threads. So that happens
        # here and not in the loader's thread, beside which JAX imports parts of itself.
        from array_record.python.array_record_module import ArrayRecordReader
        from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401

        spare_collector()
        self.manifest = verify(folder)
        files = [str(Path(folder) / NAME / VERSION / name) for name in sorted(self.manifest["shards"])]
        self._ends = np.asarray(shards.cuts(len(self), len(files)))
        # Opened when it is needed. ArrayRecord's own data source reads with threads and futures, which takes half as long again.
        self._reader = functools.cache(lambda shard: ArrayRecordReader(files[shard], "readahead_buffer_size:0"))

    def __len__(self) -> int:
        return self.manifest["records"]

    def __getitem__(self, index: int) -> InstructionExample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[InstructionExample]:
        """Several at once: a fifth of the time per record."""
        return [wire.parse(record) for record in self.read(indices)]

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Records as they are stored."""
        at = np.asarray(indices, np.int64)
        if len(at) and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"records {at.min()} to {at.max()} of {len(self)}")
        shard, found = np.searchsorted(self._ends, at, side="right"), [b""] * len(at)
        for number in set(shard.tolist()):
            places = np.flatnonzero(shard == number)
            begun = int(self._ends[number - 1]) if number else 0
            read = self._reader(number).read((at[places] - begun).tolist())
            for place, record in zip(places.tolist(), read, strict=True):
                found[place] = record
        return found

    def __repr__(self) -> str:
        # Grain compares the source's repr when it restores an iterator; it must not hold a memory address.
        return f"Records({self.manifest['config_hash']}, {len(self)})"

"""Serialised records in an order by hash, cut into ArrayRecord shards: the same files from any engine.

The order and the cuts are those of TFDS's own writer: a record's place is the MD5 of its number in the stream, salted with the name
of the split, and n records in s shards are cut at ``round(n i / s)``. What is in a record: ``data/wire.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from operator import add
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from instructrec_jax.instructions.example import InstructionExample

NAME, VERSION, SPLIT = "instructions", "1.0.0", "train"
WORDS = ("template", "language", "preference", "intention", "task", "metric", "prompt", "answer")
ITEMS = ("prompt_items", "answer_items", "candidates")
NUMBERS = ("user", "target", "dense", "dense_from")
_PLACE = 16  # bytes of a place
_SIZE = np.dtype("<u4")  # of a record on its way
# Of ArrayRecord's writer: a record to a chunk, so that any one is read by itself. Snappy takes a third of zstd's time to write and half of
# it to read, for files that are a tenth larger. A chunk says how it is compressed: readers take either.
_OPTIONS = "group_size:1,snappy"
_BUFFER = 1 << 16  # bytes gathered for each bucket, on average, before they are written,
_HELD = 1 << 26  # but not before there are so many: a small set never meets the disk


def aspects(example: InstructionExample) -> str:
    """What the manifest counts records by."""
    return f"{example.preference},{example.intention},{example.task}"


# ---------------------------------------------------------------------------------------------------------------- order


_salted = hashlib.md5(SPLIT.encode())


def place(number: int) -> bytes:
    """16 bytes that sort records as TFDS does (``Hasher(SPLIT)``), of a record's number in the stream."""
    at = _salted.copy()
    at.update(b"%d" % number)
    return at.digest()


def buckets_of(places: Sequence[bytes], buckets: int) -> list[int]:
    """The buckets of some places, each 0..buckets-1; buckets are in the order of places."""
    first = np.frombuffer(b"".join(places), ">u8")[::2].astype(np.uint64)
    # The upper half of a product of 128 bits, by halves of the first factor.
    upper, lower = first >> np.uint64(32), first & np.uint64((1 << 32) - 1)
    return ((upper * np.uint64(buckets) + (lower * np.uint64(buckets) >> np.uint64(32))) >> np.uint64(32)).tolist()


def cuts(records: int, shards: int) -> list[int]:
    """Where each shard ends, among ``records`` in their order."""
    return [round(records * shard / shards) for shard in range(1, shards + 1)]


class Sorter:
    """Records by place: in memory while they are few, else in files of one bucket each, of which one is sorted at a time."""

    def __init__(self, folder: Path, buckets: int):
        self._files = [folder / f"bucket-{n}" for n in range(buckets)]
        self._waiting: list[list[bytes]] = [[] for _ in range(buckets)]  # places, each with its record behind it
        self._size = self.records = 0

    def add(self, places: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Take records, many at a time."""
        waiting = self._waiting
        for number, placed in zip(buckets_of(places, len(waiting)), map(add, places, records), strict=True):
            waiting[number].append(placed)
        self.records += len(records)
        self._size += sum(map(len, records))
        if self._size > max(_BUFFER * len(waiting), _HELD):
            self._flush()

    def _flush(self) -> None:
        for path, waiting in zip(self._files, self._waiting, strict=True):
            if waiting:
                with path.open("ab") as file:
                    file.write(np.array([len(waiting), *map(len, waiting)], _SIZE).tobytes())
                    file.writelines(waiting)
                waiting.clear()
        self._size = 0

    def __iter__(self) -> Iterator[bytes]:
        """The records in order; each can be read once."""
        for file, placed in zip(self._files, self._waiting, strict=True):
            if file.exists():
                placed += _apart(file.read_bytes())
                file.unlink()
            placed.sort()
            yield from [one[_PLACE:] for one in placed]
            placed.clear()
        self._size = 0


def _apart(content: bytes) -> list[bytes]:
    """What was written into a file: again and again a number of pieces, the size of each, and the pieces."""
    found: list[bytes] = []
    at = 0
    while at < len(content):
        count = int(np.frombuffer(content, _SIZE, 1, at)[0])
        end = np.cumsum(np.frombuffer(content, _SIZE, 1 + count, at), dtype=np.int64) + (
            at + (1 + count) * _SIZE.itemsize - count
        )
        ends = end.tolist()
        found += map(content.__getitem__, map(slice, ends[:-1], ends[1:]))
        at = ends[-1]
    return found


# ---------------------------------------------------------------------------------------------------------------- files


def shard_name(shard: int, shards: int) -> str:
    """The file name of a shard, as TFDS looks for it."""
    return f"{NAME}-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}"


def write_shard(file: Path, records: Iterable[bytes]) -> tuple[int, int]:
    """Write a shard, which is there when it is complete; gives the number of records and their bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    fresh = file.with_name(f".{file.name}.{uuid4().hex}")  # workers may try the same shard at one time
    writer = ArrayRecordWriter(str(fresh), _OPTIONS)
    count = size = 0
    try:
        for record in records:
            writer.write(record)
            count, size = count + 1, size + len(record)
        writer.close()
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    return count, size


def write_description(folder: Path, lengths: list[int], size: int) -> dict[str, Any]:
    """Write what TFDS reads beside the shards: features and number of records of each; gives the features as JSON values."""
    import tensorflow_datasets as tfds
    from etils import epath

    ints = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    features: dict[str, Any] = {
        **dict.fromkeys(WORDS, tfds.features.Text()),
        **dict.fromkeys((*ITEMS, "feature_index"), ints),
        "feature_value": tfds.features.Tensor(shape=(None,), dtype=np.float32),
        **dict.fromkeys(NUMBERS, np.int32),
    }
    template: Any = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[info],
        version=VERSION,
        filename_template=template,
        check_data=False,
        description="Instruction examples rendered from logs and a catalogue.",
    )
    return json.loads((folder / "features.json").read_text())

"""Serialised records in an order by hash, cut into ArrayRecord shards: the same files from any engine.

The order and the cuts are those of TFDS's own writer: a record's place is the MD5 of its number in the stream, salted with the name
of the split, and n records in s shards are cut at ``round(n i / s)``. What is in a record: ``data/wire.py``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from instructrec_jax.instructions.example import InstructionExample

NAME, VERSION, SPLIT = "instructions", "1.0.0", "train"
WORDS = ("template", "language", "preference", "intention", "task", "metric", "prompt", "answer")
ITEMS = ("prompt_items", "answer_items", "candidates")
NUMBERS = ("user", "target", "dense", "dense_from")
_HEAD = struct.Struct("=16sI")  # of a record on its way: place, bytes
# Of ArrayRecord's writer: a record to a chunk, so that any one is read by itself. Snappy takes a third of zstd's time to write and half of
# it to read, for files that are a tenth larger. A chunk says how it is compressed: readers take either.
_OPTIONS = "group_size:1,snappy"
_BUFFER = 1 << 16  # bytes gathered for each bucket before they are written


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


def bucket(at: bytes, buckets: int) -> int:
    """The bucket of a place, 0..buckets-1; buckets are in the order of places."""
    return int.from_bytes(at[:8], "big") * buckets >> 64


def cuts(records: int, shards: int) -> list[int]:
    """Where each shard ends, among ``records`` in their order."""
    return [round(records * shard / shards) for shard in range(1, shards + 1)]


class Sorter:
    """Records by place, in files of one bucket each, one of which is sorted in memory at a time."""

    def __init__(self, folder: Path, buckets: int):
        self._files = [folder / f"bucket-{n}" for n in range(buckets)]
        self._waiting = [bytearray() for _ in range(buckets)]
        self.records = 0

    def add(self, at: bytes, record: bytes) -> None:
        """Take a record."""
        number = bucket(at, len(self._files))
        waiting = self._waiting[number]
        waiting += _HEAD.pack(at, len(record)) + record
        self.records += 1
        if len(waiting) > _BUFFER:
            self._flush(number)

    def _flush(self, number: int) -> None:
        with self._files[number].open("ab") as file:
            file.write(self._waiting[number])
        self._waiting[number].clear()

    def __iter__(self) -> Iterator[bytes]:
        """The records in order; each can be read once."""
        for number, file in enumerate(self._files):
            self._flush(number)
            content = memoryview(file.read_bytes())
            file.unlink()
            found, start = [], 0
            while start < len(content):
                at, size = _HEAD.unpack_from(content, start)
                start += _HEAD.size
                found.append((at, start, size))
                start += size
            found.sort()
            for _, start, size in found:
                yield bytes(content[start : start + size])


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

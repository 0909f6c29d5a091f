"""Batches for training: records → shuffle → tokenise → first-fit packing → ``[B, S]`` arrays, by Grain.

Deterministic in (records, seed, step), and its position is a small dictionary that the checkpoint holds: a restored loader
continues with the very next batch. Packed rows carry ``segment_ids`` (1.. per row, 0 = padding) and ``positions`` (restart at 0
in every segment).
"""

from __future__ import annotations

from pathlib import Path

import grain
import numpy as np

from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import FIELDS, encode_example, truncate
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import ConfigError

Batch = dict[str, np.ndarray]
BATCH_KEYS = (*FIELDS, "segment_ids", "positions")


class TokenisedRecords:
    """Random access to the examples as arrays of at most ``length`` tokens; arrays are kept up to ``cache_bytes``.

    Epochs read the same records again: small data sets are tokenised once, large ones stream.
    """

    def __init__(self, records: Records, text: Text, length: int, cache_bytes: int = 256 << 20):
        self._records, self._text, self._length = records, text, length
        self._cache: dict[int, dict[str, np.ndarray]] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if (kept := self._cache.get(index)) is not None:
            return kept
        arrays = truncate(encode_example(self._records[index], self._text), self._length, len(self._text.before))[0]
        size = sum(a.nbytes for a in arrays.values())
        if size <= self._room:
            self._room -= size
            self._cache[index] = arrays
        return arrays

    def __repr__(self) -> str:
        return f"TokenisedRecords({self._records!r}, {self._length})"


def _tidy(batch: dict[str, np.ndarray]) -> Batch:
    """Grain names segments and positions once per packed key; they are all the same, so one pair is kept."""
    out = {key: batch[key] for key in FIELDS}
    return {**out, "segment_ids": batch["tokens_segment_ids"], "positions": batch["tokens_positions"]}


def training_iterator(
    records: Path | str,
    text: Text,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    packing_bins: int | None = None,
    threads: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of packed batches for this process: ``batch_size // process_count`` rows each.

    Each epoch is shuffled anew (seed + epoch). ``get_state`` / ``set_state`` are exact for the same number of processes.

    Raises:
        DataError: a shard is missing or damaged.
        ConfigError: the batch does not divide over the processes, or there are fewer records than processes.
    """
    if batch_size % process_count:
        raise ConfigError(
            f"train.batch_size = {batch_size} does not divide over {process_count} processes",
            remedy=f"use a multiple of {process_count}",
        )
    source = TokenisedRecords(Records(records), text, sequence_length)
    if len(source) < process_count:
        raise ConfigError(f"{len(source)} records cannot feed {process_count} processes")
    rows = batch_size // process_count
    dataset = grain.MapDataset.source(source).seed(seed)[process_index::process_count].shuffle().repeat()
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * rows))
    stream = grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct=dict.fromkeys(FIELDS, sequence_length),
        num_packing_bins=packing_bins or rows,
        shuffle_bins=True,
    )
    stream = stream.batch(rows, drop_remainder=True).map(_tidy)
    # One batch ahead in a thread; the prefetching iterator accounts for it in its state.
    return iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=2))


def useful_share(batch: Batch) -> float:
    """Share of positions that are not padding."""
    return float((batch["segment_ids"] > 0).mean())

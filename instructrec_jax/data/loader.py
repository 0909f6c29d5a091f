"""Batches for training: records → shuffle → tokenise → first-fit packing → ``[B, S]`` arrays, by Grain.

Deterministic in (records, seed, step, processes), and its position is a small dictionary that the checkpoint holds: a restored
loader continues with the very next batch. Packed rows carry ``segment_ids`` (1.. per row, 0 = padding) and ``positions`` (restart
at 0 in every segment).

There is one order of all epochs, whatever the number of processes: epoch after epoch, each a permutation of the records. Process
p of N reads places p, p + N, ... of it. On another number of processes, what N processes have not given away yet is dealt anew, so
that every epoch still has each of its examples once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Remaining:
    """Places of the order of all epochs that were not given away: ``holes`` (ascending, all below ``start``), then all from ``start``."""

    holes: tuple[int, ...] = ()
    start: int = 0

    def __getitem__(self, index: int) -> int:
        return self.holes[index] if index < len(self.holes) else self.start + index - len(self.holes)

    def after(self, given: Sequence[int]) -> Remaining:
        """What remains once process p of ``len(given)`` has given away its first ``given[p]`` places: p, p + N, ... of these."""
        count = len(given)
        following = [p + count * n for p, n in enumerate(given)]
        beyond = max(*following, len(self.holes))
        kept = (i for i in range(min(following), beyond) if i // count >= given[i % count])
        return Remaining(tuple(self[i] for i in kept), self[beyond])


class _Dealt:
    """One process's places of what remains, as a random-access source of the examples there."""

    def __init__(self, order: grain.MapDataset, name: str, remaining: Remaining, process: int, processes: int):
        self._order, self._name, self._remaining = order, name, remaining
        self._process, self._processes = process, processes

    def __len__(self) -> int:
        return (sys.maxsize - self._remaining.start) // self._processes

    def __getitem__(self, index: int) -> Any:
        return self._order[self._remaining[self._process + self._processes * index]]

    def __repr__(self) -> str:
        # Grain compares this when it restores an iterator: another data set is noticed.
        return f"_Dealt({self._name}, {self._process} of {self._processes}, from {self._remaining.start})"


class TrainingBatches:
    """An endless iterator of packed batches of one process; make it with ``training_iterator``.

    Orbax saves it as one small file per process. Restored on as many processes it gives the very next batch; on another number it
    says so, and deals what remains of the order of all epochs.
    """

    def __init__(
        self,
        make: Callable[[Remaining], grain.DatasetIterator],
        process_index: int,
        process_count: int,
        say: Callable[[str], None],
    ):
        self._make, self._process, self._processes, self._say = make, process_index, process_count, say
        self._remaining, self._given = Remaining(), 0
        self._batches = make(self._remaining)

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        # A batch is one group of bins, and a group holds the next examples of the stream: their number says which.
        self._given += int(batch["segment_ids"].max(axis=1).sum())
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {
            "processes": self._processes,
            "given": self._given,
            "holes": list(self._remaining.holes),
            "start": self._remaining.start,
            "grain": self._batches.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that ``get_state`` gave on as many processes."""
        remaining = Remaining(tuple(state["holes"]), state["start"])
        if remaining != self._remaining:
            self._restart(remaining)
        self._batches.set_state(state["grain"])
        self._given = state["given"]

    def deal(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on after the positions of all processes, which were another number than now."""
        before = Remaining(tuple(states[0]["holes"]), states[0]["start"])
        self._restart(before.after([state["given"] for state in states]))
        self._say(
            f"the loader's position is that of {len(states)} slices of the data, there are {self._processes}: the batches differ from "
            f"those of an uninterrupted run; {sum(s['given'] for s in states):,} examples were given since the last such change, and "
            "each that is left of an epoch comes once"
        )

    def _restart(self, remaining: Remaining) -> None:
        self._batches.close()
        self._remaining, self._given = remaining, 0
        self._batches = self._make(remaining)

    async def save(self, directory: Any) -> Awaitable[None]:
        """Orbax's protocol: the position of now, written in the background."""
        state = json.dumps(self.get_state())

        async def write() -> None:
            folder = await directory.await_creation()
            await asyncio.to_thread(_state_file(folder, self._process, self._processes).write_text, state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Orbax's protocol: go to the position in a checkpoint."""

        async def read() -> None:
            await asyncio.to_thread(self._load, directory)

        return read()

    def _load(self, folder: Any) -> None:
        own = _state_file(folder, self._process, self._processes)
        if own.exists():
            self.set_state(json.loads(own.read_text()))
            return
        count = json.loads(next(folder.glob("process_0-of-*.json")).read_text())["processes"]
        self.deal([json.loads(_state_file(folder, p, count).read_text()) for p in range(count)])

    def close(self) -> None:
        """End the threads that read ahead."""
        self._batches.close()


def _state_file(folder: Any, process: int, processes: int) -> Any:
    return folder / f"process_{process}-of-{processes}.json"


def training_iterator(
    records: Path | str,
    text: Text,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> TrainingBatches:
    """An endless iterator of packed batches for this process: ``batch_size // process_count`` rows each.

    Each epoch is shuffled anew (seed + epoch). ``get_state`` / ``set_state`` are exact for the same number of processes; ``say`` is
    told where another number makes the batches differ.

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
    # (Grain derives the shuffle's seed from the chain of transformations, of which this slice is one.)
    order = grain.MapDataset.source(source).seed(seed)[:].shuffle().repeat()

    def make(remaining: Remaining) -> grain.DatasetIterator:
        dealt = grain.MapDataset.source(_Dealt(order, repr(source), remaining, process_index, process_count))
        stream = dealt.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * rows))
        stream = grain.experimental.FirstFitPackIterDataset(
            stream,
            length_struct=dict.fromkeys(FIELDS, sequence_length),
            num_packing_bins=rows,  # a group of bins is a batch: see TrainingBatches.__next__
            shuffle_bins=True,
        )
        stream = stream.batch(rows, drop_remainder=True).map(_tidy)
        # One batch ahead in a thread; the prefetching iterator accounts for it in its state.
        return iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=2))

    return TrainingBatches(make, process_index, process_count, say)


def useful_share(batch: Batch) -> float:
    """Share of positions that are not padding."""
    return float((batch["segment_ids"] > 0).mean())

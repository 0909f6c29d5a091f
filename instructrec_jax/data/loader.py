"""Batches for training: records → shuffle → tokenise → packing → ``[B, S]`` arrays.

Deterministic in (records, seed, step, processes), and its position is a small dictionary that the checkpoint holds: a restored
loader continues with the very next batch. Packed rows carry ``segment_ids`` (1.. per row, 0 = padding) and ``positions`` (restart
at 0 in every segment).

There is one order of all epochs, whatever the number of processes: epoch after epoch, each a permutation of the records. Process
p of N reads places p, p + N, ... of it. On another number of processes, what N processes have not given away yet is dealt anew, so
that every epoch still has each of its examples once.

A batch is a group of rows that the next examples of the order fill (``packing.py``): where it ends, and which examples wait for the
next one, is all that has to be known to go on.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import grain
import numpy as np
from jaxtyping import Int32

from instructrec_jax.data.blocks import encode_records
from instructrec_jax.data.curriculum import Curriculum, begins
from instructrec_jax.data.packing import Batch, Position, Remaining, packed
from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import FIELDS, fields_of, truncate
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import ConfigError, DataError

BATCH_KEYS = (*FIELDS, "segment_ids", "positions")


READ = 2048  # examples that are read at one time, which takes a third less time than 512
AHEAD = 8  # batches that are ready before they are asked for


class TokenisedRecords:
    """Random access to the examples as tables of at most ``length`` tokens; tables are kept up to ``cache_bytes``.

    Epochs read the same records again: small data sets are tokenised once, large ones stream.
    """

    def __init__(self, records: Records, text: Text, length: int, cache_bytes: int = 256 << 20):
        self._records, self._text, self._length = records, text, length
        self._cache: dict[int, np.ndarray] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Int32[np.ndarray, "tokens fields"]:
        """One row per token, one column per field of ``FIELDS``; numbers that are not whole as their bits."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Int32[np.ndarray, "tokens fields"]]:
        """Several tables at once, which is faster."""
        missing = list(dict.fromkeys(index for index in indices if index not in self._cache))
        tables = encode_records(self._records.read(missing), self._text) if missing else []
        made = {index: self._kept(index, table) for index, table in zip(missing, tables, strict=True)}
        return [made[index] if index in made else self._cache[index] for index in indices]

    def _kept(self, index: int, table: Int32[np.ndarray, "tokens fields"]) -> Int32[np.ndarray, "tokens fields"]:
        if len(table) > self._length:
            arrays = truncate(fields_of(table), self._length, len(self._text.before))[0]
            table = np.stack([array.view(np.int32) for array in arrays.values()], axis=1)
        if table.nbytes <= self._room:
            self._room -= table.nbytes
            table = table.copy()  # a part of a large array would keep all of it
            self._cache[index] = table
        return table

    def __repr__(self) -> str:
        return f"TokenisedRecords({self._records!r}, {self._length})"


class TrainingBatches:
    """An endless iterator of packed batches of one process; make it with ``training_iterator``.

    A thread works ahead, for as long as the devices compute. Orbax saves the position as one small file per process. Restored on as many
    processes it gives the very next batch; on another number it says so, and deals what remains of the order of all epochs.
    """

    def __init__(
        self,
        make: Callable[[Remaining, Position], Iterator[tuple[Batch, Position]]],
        data: str,
        process_index: int,
        process_count: int,
        say: Callable[[str], None],
    ):
        """``make``: what remains, and this process's position in it, to batches with the position after each.

        ``data`` names the examples: a position in others is refused.
        """
        self._data = data
        self._make, self._process, self._processes, self._say = make, process_index, process_count, say
        self._go_on(Remaining(), Position())

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> Batch:
        batch, self._position = next(self._ahead)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {
            "processes": self._processes,
            "given": self._position.given,
            "held": list(self._position.held),
            "holes": list(self._remaining.holes),
            "start": self._remaining.start,
            "data": self._data,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that ``get_state`` gave on as many processes.

        Raises:
            DataError: it is one in other examples.
        """
        self._check_data(state)
        self._ahead.close()
        self._go_on(Remaining(tuple(state["holes"]), state["start"]), Position.of(state))

    def deal(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on after the positions of all processes, which were another number than now."""
        self._check_data(states[0])
        before = Remaining(tuple(states[0]["holes"]), states[0]["start"])
        self._ahead.close()
        positions = [Position.of(state) for state in states]
        self._go_on(before.after(positions), Position())
        self._say(
            f"the loader's position is that of {len(states)} slices of the data, there are {self._processes}: the batches differ from "
            f"those of an uninterrupted run; {sum(at.count for at in positions):,} examples were given since the last such change, and "
            "each that is left of an epoch comes once"
        )

    def _check_data(self, state: dict[str, Any]) -> None:
        if state["data"] != self._data:
            raise DataError(
                f"the loader's position is one in {state['data']}, the prepared data is {self._data}",
                remedy="prepare the data that the run began with, or begin another run",
            )

    def _go_on(self, remaining: Remaining, position: Position) -> None:
        self._remaining, self._position = remaining, position
        self._ahead = Ahead(self._make(remaining, position))

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
        """End the thread that works ahead."""
        self._ahead.close()


class Ahead:
    """An iterator's values, up to ``AHEAD`` of them made in a thread before they are asked for; its exceptions come where they belong."""

    def __init__(self, values: Iterator[Any]):
        self._values: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(values,), daemon=True, name="loader")
        self._thread.start()
        # A thread that is inside ArrayRecord when the interpreter ends takes the process down with it.
        atexit.register(self.close)

    def _work(self, values: Iterator[Any]) -> None:
        try:
            for value in values:
                self._values.put((value, None))
                if self._closed:
                    return
        except Exception as error:
            self._values.put((None, error))

    def __next__(self) -> Any:
        value, error = self._values.get()
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the thread."""
        atexit.unregister(self.close)
        self._closed = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._values.get(timeout=0.01)  # it may wait for room


def _state_file(folder: Any, process: int, processes: int) -> Any:
    return folder / f"process_{process}-of-{processes}.json"


def training_iterator(
    records: Path | str,
    text: Text,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    curriculum: Mapping[str, float] | None = None,
    look_ahead: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> TrainingBatches:
    """An endless iterator of packed batches for this process: ``batch_size // process_count`` rows each.

    Each epoch is shuffled anew (seed + epoch); ``curriculum`` and ``look_ahead`` are as of ``TrainConfig``. ``get_state`` / ``set_state``
    are exact for the same number of processes; ``say`` is told where another number makes the batches differ.

    Raises:
        DataError: a shard is missing or damaged.
        ConfigError: the batch does not divide over the processes, there are fewer records than processes, ``look_ahead`` is negative, or
            the curriculum does not fit the records.
    """
    if batch_size % process_count:
        raise ConfigError(
            f"train.batch_size = {batch_size} does not divide over {process_count} processes",
            remedy=f"use a multiple of {process_count}",
        )
    if look_ahead < 0:
        raise ConfigError(f"train.look_ahead = {look_ahead} must be 0 or more")
    read = Records(records)
    source = TokenisedRecords(read, text, sequence_length)
    if len(source) < process_count:
        raise ConfigError(f"{len(source)} records cannot feed {process_count} processes")
    rows = batch_size // process_count
    # Of Grain: a permutation of every epoch, any place of which is computed by itself.
    order: Any = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    if curriculum:
        order = Curriculum(begins(read, curriculum), seed)

    def make(remaining: Remaining, position: Position) -> Iterator[tuple[Batch, Position]]:
        def read(places: Iterable[int]) -> dict[int, np.ndarray]:
            numbers = [cast(int, order[remaining[process_index + process_count * p]]) for p in places]
            return dict(zip(places, source.__getitems__(numbers), strict=True))

        block: dict[int, np.ndarray] = {}  # of the place asked for and those after it

        def example(place: int) -> np.ndarray:
            if place not in block:
                block.clear()
                block.update(read(range(place, place + READ)))
            return block[place]

        place, held = position.given, read(position.held)
        while True:
            batch, place, held = packed(example, place, held, rows, sequence_length, look_ahead)
            yield batch, Position(place, tuple(held))

    return TrainingBatches(make, repr(source), process_index, process_count, say)


def useful_share(batch: Batch) -> float:
    """Share of positions that are not padding."""
    return float((batch["segment_ids"] > 0).mean())

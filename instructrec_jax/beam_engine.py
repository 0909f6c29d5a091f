"""``instructrec data prepare --engine beam``: the records of a prepared folder by Apache Beam, the same bytes as the local engine writes.

A task is one stage of the stream (``Builder.plan``) over one part of the users. Every task renders alone, from the Parquet tables in
the folder; the numbers of its records follow from how many the tasks before it gave; a record's number is its place in the order. So
nothing depends on which worker does what, how often, or when. Shards are renamed into place when they are complete.

    tasks → render → number → by bucket: rank → by shard: write

Workers must see the prepared folder under the path that the launcher uses: one machine, or a shared disk.
"""

from __future__ import annotations

import functools
import itertools
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam  # pyright: ignore[reportMissingImports]
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
from apache_beam.pvalue import AsSingleton, TaggedOutput  # pyright: ignore[reportMissingImports]

from instructrec_jax import config as configs
from instructrec_jax.config import Config
from instructrec_jax.data import records, shards, wire
from instructrec_jax.data.features import UserFeatures
from instructrec_jax.data.store import StoredSplit
from instructrec_jax.files import write_json
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.targets import Plan, Stage
from instructrec_jax.instructions.teacher.texts import TaughtWords
from instructrec_jax.prepare import builder_of, expected_records

PART_EVENTS = 1 << 16  # events of a part, about
_COUNTS, _SHARDS = "counts.json", "shards.json"
_KINDS = ("records", "written", "skipped", "words", "negatives")  # of counts


class Task(NamedTuple):
    """A stage of the stream over one part of the users."""

    number: int  # in the order of the stream
    stage: Stage
    first: int  # user
    last: int  # user, exclusive


@functools.lru_cache(maxsize=1)
def _opened(folder: str, settings: str) -> tuple[StoredSplit, Builder]:
    """The data set and its builder, once in a worker process."""
    config = configs.from_dict(json.loads(settings))
    stored = StoredSplit(Path(folder) / "data")
    with np.load(Path(folder) / "user_features.npz") as arrays:
        users = UserFeatures([str(n) for n in arrays["names"]], arrays["index"], arrays["value"])
    return stored, builder_of(stored.frame, users, config, Path(folder))


class Render(beam.DoFn):
    """Task → (its number, its records); and, tagged "counts", what is counted on the way."""

    def __init__(self, folder: str, settings: str, plan: Plan):
        self._folder, self._settings, self._plan = folder, settings, plan

    def process(self, task: Task) -> Iterator[Any]:
        """As Beam calls it."""
        stored, whole = _opened(self._folder, self._settings)
        builder = whole.over(stored.part(task.first, task.last))
        builder.written, builder.skipped, builder.drawn = Counter(), Counter(), Counter()
        if isinstance(builder.words, TaughtWords):
            builder.words.counts = Counter()
        made, kinds = [], Counter()
        for example in builder.stage(task.stage, self._plan):
            kinds[shards.aspects(example)] += 1
            made.append(wire.serialise(example))
        words = builder.words.counts if isinstance(builder.words, TaughtWords) else Counter()
        counts = zip(_KINDS, (kinds, builder.written, builder.skipped, words, builder.drawn), strict=True)
        yield TaggedOutput("counts", Counter({(kind, name): n for kind, found in counts for name, n in found.items()}))
        yield task.number, made


class Number(beam.DoFn):
    """(Task number, records) → (bucket, (place, record)), given the number of each task's first record."""

    def __init__(self, buckets: int):
        self._buckets = buckets

    def process(self, element: tuple[int, list[bytes]], starts: dict[int, int]) -> Iterator[Any]:
        """As Beam calls it."""
        task, made = element
        places = [shards.place(number) for number in range(starts[task], starts[task] + len(made))]
        yield from zip(shards.buckets_of(places, self._buckets), zip(places, made))


class Rank(beam.DoFn):
    """(Bucket, its records) → (shard, (rank, record)), given the rank of each bucket's first record."""

    def __init__(self, count: int):
        self._count = count

    def process(self, element: tuple[int, Iterable], starts: dict[int, int]) -> Iterator[Any]:
        """As Beam calls it."""
        ends = shards.cuts(starts[-1], self._count)
        for rank, (_, record) in enumerate(sorted(element[1]), starts[element[0]]):
            yield bisect_right(ends, rank), (rank, record)


class Write(beam.DoFn):
    """(Shard, its records) → (shard, number of records, their bytes)."""

    def __init__(self, folder: str, count: int):
        self._folder, self._count = folder, count

    def process(self, element: tuple[int, Iterable]) -> Iterator[tuple[int, int, int]]:
        """As Beam calls it."""
        file = Path(self._folder) / shards.shard_name(element[0], self._count)
        yield element[0], *shards.write_shard(file, (record for _, record in sorted(element[1])))


def _starts(sizes: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Key → sum of the sizes of smaller keys; -1 → sum of all."""
    sizes = sorted(sizes)
    sums = [0, *itertools.accumulate(size for _, size in sizes)]
    return {**dict(zip((key for key, _ in sizes), sums)), -1: sums[-1]}


def _added(counts: Iterable[Counter]) -> Counter:
    return sum(counts, Counter())


def write(
    prepared: Path, config: Config, options: Iterable[str] = (), part_events: int = PART_EVENTS
) -> tuple[dict[str, Any], dict[str, Counter[str]]]:
    """Write ``prepared/records`` from the other files in the folder.

    Args:
        prepared: a prepared folder, but for its records.
        config: its settings.
        options: pipeline options as words, ``--runner FlinkRunner``. The default runner is Beam's own on this machine.
        part_events: events of a part of the users, about. It changes no byte.

    Returns:
        The manifest, and counts by name: ``written`` and ``skipped`` as of ``Builder``, ``words`` as of ``TaughtWords``, ``negatives``.

    Raises:
        DataError, ConfigError: as ``records.write``.
    """
    folder, settings = str(prepared.resolve()), json.dumps(configs.to_dict(config))
    stored, builder = _opened(folder, settings)
    plan = builder.plan(lambda: stored.parts(part_events))
    count = records.num_shards(expected_records(plan.windows, config), config.instructions.shard_records)
    ranges = list(stored.ranges(part_events))
    tasks = [Task(n, stage, *users) for n, (stage, users) in enumerate(itertools.product(plan.stages, ranges))]
    flags = list(options)
    if not any(flag.partition("=")[0] == "--runner" for flag in flags):
        flags += ["--runner", "FnApiRunner"]
    with records.building(prepared / "records") as fresh:
        data_dir = fresh.resolve() / records.NAME / records.VERSION
        data_dir.mkdir(parents=True)
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            _assemble(pipeline, tasks, Render(folder, settings, plan), data_dir, count)
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in _KINDS}
        for kind, name, number in json.loads((data_dir / _COUNTS).read_text("utf-8")):
            counts[kind][name] = number
        records.check_count(counts["records"].total(), count, config.instructions.shard_records, prepared / "records")
        written = [(n, size) for _, n, size in sorted(json.loads((data_dir / _SHARDS).read_text("utf-8")))]
        for name in (_COUNTS, _SHARDS):
            (data_dir / name).unlink()
        seed = config.instructions.seed
        manifest = records.finish(fresh, written, counts["records"], config_hash=config.data_hash(), seed=seed)
    return manifest, counts


def _assemble(pipeline: beam.Pipeline, tasks: list[Task], render: Render, data_dir: Path, count: int) -> None:
    rendered = (
        pipeline
        | "Tasks" >> beam.Create(tasks)
        | "Spread" >> beam.Reshuffle()
        | "Render" >> beam.ParDo(render).with_outputs("counts", main="records")
    )
    first_number = (
        rendered.records
        | "Task sizes" >> beam.Map(lambda task: (task[0], len(task[1])))
        | "All task sizes" >> beam.combiners.ToList()
        | "First numbers" >> beam.Map(_starts)
    )
    placed = rendered.records | "Number" >> beam.ParDo(Number(count), AsSingleton(first_number))
    first_rank = (
        placed
        | "Buckets" >> beam.Map(lambda record: (record[0], 1))
        | "Bucket sizes" >> beam.CombinePerKey(sum)
        | "All bucket sizes" >> beam.combiners.ToList()
        | "First ranks" >> beam.Map(_starts)
    )
    written = (
        placed
        | "By bucket" >> beam.GroupByKey()
        | "Rank" >> beam.ParDo(Rank(count), AsSingleton(first_rank))
        | "By shard" >> beam.GroupByKey()
        | "Write" >> beam.ParDo(Write(str(data_dir), count))
    )
    _ = (
        written
        | "All shards" >> beam.combiners.ToList()
        | "Note shards" >> beam.Map(lambda found, file: write_json(file, found), str(data_dir / _SHARDS))
    )
    _ = (
        rendered.counts
        | "Counts" >> beam.CombineGlobally(_added)
        | "Note counts"
        >> beam.Map(lambda found, file: write_json(file, [[*k, n] for k, n in found.items()]), str(data_dir / _COUNTS))
    )

"""Time and memory of the records of a growing number of interactions; ``data.py`` runs it, each size in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from instructrec_jax import config as configs
from instructrec_jax.data import records, store
from instructrec_jax.data.schema import SplitData
from instructrec_jax.data.store import StoredSplit
from instructrec_jax.instructions.build import Builder
from instructrec_jax.prepare import expected_records

_CHANGED = 0.2  # share of a copied history's items that are drawn anew, by popularity
_PART_EVENTS = 1 << 17


def expand(data: SplitData, interactions: int, folder: Path) -> None:
    """A stored split of about so many interactions: the users of ``data`` over and over, a fifth of their items drawn anew.

    Catalogue and titles are the real ones. Events are written copy by copy.
    """
    store.save_split(dataclasses.replace(data, users=None), folder)
    copies = max(1, round(interactions / len(data.item)))
    rng = np.random.default_rng(0)
    weight = data.train_popularity / data.train_popularity.sum()
    schema = pq.read_schema(folder / "events.parquet")
    with pq.ParquetWriter(folder / "events.parquet", schema, compression="zstd") as writer:
        for copy in range(copies):
            item = data.item.copy()
            if copy:
                drawn = rng.random(len(item)) < _CHANGED
                item[drawn] = rng.choice(len(weight), drawn.sum(), p=weight)
            columns = {"item": item, "split": data.split, "time": data.time, "rating": data.rating}
            table = pa.table({name: columns[name] for name in schema.names}, schema)
            writer.write_table(table, row_group_size=_PART_EVENTS)
    events = np.tile(np.diff(data.offsets), copies)
    ids = [f"{name}-{copy}" for copy in range(copies) for name in data.user_ids]
    pq.write_table(pa.table({"user_id": ids, "events": events}), folder / "users.parquet", compression="zstd")


def run(folder: Path, preset: str) -> dict[str, float]:
    """Write the records of a stored split, a part of the users at a time: seconds, examples and the most memory of this process."""
    config = configs.load(preset)
    begun, cpu = time.perf_counter(), time.process_time()
    stored = StoredSplit(folder)
    builder = Builder(stored.frame, config.instructions, config.data.domain)

    def parts():
        return stored.parts(_PART_EVENTS)

    windows = builder.plan(parts).windows

    class Examples:
        expected = expected_records(windows, config)

        def __call__(self):
            return builder.training_examples(parts)

    with tempfile.TemporaryDirectory(dir=folder) as out:
        manifest = records.write(
            Examples(), Path(out) / "records", config_hash="", seed=0, shard_records=config.instructions.shard_records
        )
    return {
        "interactions": int(stored.offsets[-1]),
        "examples": manifest["records"],
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gb": _most_memory(),
    }


def _most_memory() -> float:
    """GB of this process alone: ``ru_maxrss`` would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """CPU time and memory over interactions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    millions = [row["interactions"] / 1e6 for row in rows]
    left.plot(millions, [row["cpu_seconds"] for row in rows], "o-")
    left.set(xlabel="million interactions", ylabel="CPU seconds", xlim=0, ylim=0)
    right.plot(millions, [row["peak_gb"] for row in rows], "o-")
    right.axhline(4, color="grey", linestyle=":")
    right.set(xlabel="million interactions", ylabel="most memory [GB]", xlim=0, ylim=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__" and len(sys.argv) == 3:  # with none it is imported, or run by `make bench`
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2])))

"""Interactions to tokenised records: examples per second and core, Apache Beam beside the local engine, memory at 50 M interactions.

    python tools/bench/data.py [--json] [--million 5 15 50] [--plot docs/images]

ML-1M is read from $INSTRUCTREC_DATA/ml-1m (else ../shared/data/ml-1m); where it is missing, the embedded MovieLens set stands in and
is named. Rates are over CPU time of one process, medians of several passes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKERS = (1, 2, 5)
PASSES = 5  # over the same interactions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--million", type=int, nargs="*", default=[5, 15, 50], help="interactions of the memory runs")
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS, help="of Apache Beam; none = leave it out")
    parser.add_argument("--plot", type=Path, help="folder for a picture of time and memory")
    parser.add_argument("--quick", action="store_true", help="the embedded set, one worker, one million interactions")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.million, arguments.workers = [1], [1]
    if arguments.workers and importlib.util.find_spec("apache_beam") is None:
        raise SystemExit(
            "Apache Beam is not installed: pip install -e '.[beam]', or leave it out with an empty --workers"
        )
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), arguments)
    if arguments.json:
        print(json.dumps(found))


def measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures; progress is printed."""
    from instructrec_jax import config as configs
    from instructrec_jax import prepare

    data = Path(os.environ.get("INSTRUCTREC_DATA", ROOT.parent / "shared" / "data")) / "ml-1m"
    large = data.is_dir() and not arguments.quick
    preset = "ml_1m" if large else "ml_latest_small"
    words = ["--data.path", str(data)] if large else []
    file = str(ROOT / "configs" / f"{preset}.yaml")
    config = configs.load(file, [*words, "--prepared", str(scratch)])
    prepared = prepare.prepare(config, lambda _: None)
    found: dict[str, Any] = {"benchmark": "data", "data": config.name, "interactions": len(prepared.data.item)}
    print(f"{config.name}: {found['interactions']:,} interactions", flush=True)
    found["local"] = local = throughput(prepared, config)
    found["ratios"] = {"examples_per_s_per_core": local["examples"] / local["cpu_seconds"]}
    for name, seconds in local["parts"].items():
        print(f"  {name}: {1e6 * seconds / local['examples']:.1f} µs an example")
    print(
        f"interactions to tokenised records: {local['examples']:,} examples, "
        f"{found['ratios']['examples_per_s_per_core']:,.0f} a second and core (median of {PASSES} passes)",
        flush=True,
    )
    if arguments.workers:
        found["beam"] = beam(prepared, config, arguments.workers)
        found["ratios"]["beam_equals_local"] = int(all(row["equal"] for row in found["beam"]))
    found["memory"] = memory(prepared, file, scratch, arguments.million)
    for row in found["memory"]:
        if 45e6 < row["interactions"] < 55e6:
            found["ratios"]["peak_gb_at_50m"] = row["peak_gb"]
    if arguments.plot and found["memory"]:
        from data_memory import draw

        draw(found["memory"], arguments.plot / "data_scale.png")
    return found


def throughput(prepared: Any, config: Any) -> dict[str, Any]:
    """CPU seconds from split interactions to records on disk, and from these to token arrays: medians of passes.

    Every pass loads anew what was prepared, so that no text has been met before.
    """
    import tensorflow_datasets  # noqa: F401  # a second that is no example's

    from instructrec_jax import prepare
    from instructrec_jax.data.blocks import encode_records
    from instructrec_jax.data.loader import READ
    from instructrec_jax.data.records import Records

    folder = prepared.folder / "again"
    written, read = [], []
    examples = 0
    for _ in range(PASSES):
        fresh = prepare.load(config)
        begun = time.process_time()
        prepare.write_records(fresh.builder(config), config, folder, None)
        written.append(time.process_time() - begun)
        begun = time.process_time()
        source = Records(folder)
        examples = len(source)
        for first in range(0, examples, READ):
            encode_records(source.read(range(first, min(first + READ, examples))), fresh.text)  # as the loader does
        read.append(time.process_time() - begun)
    parts = {"to records on disk": statistics.median(written), "from disk to tokens": statistics.median(read)}
    return {"examples": examples, "cpu_seconds": sum(parts.values()), "parts": parts}


def beam(prepared: Any, config: Any, workers: list[int]) -> list[dict[str, Any]]:
    """Apache Beam on the same folder: seconds, and whether its shards are those of the local engine."""
    from instructrec_jax import beam_engine, prepare
    from instructrec_jax.data import records

    begun = time.perf_counter()
    prepare.write_records(prepared.builder(config), config, prepared.folder / "again", None)
    seconds = time.perf_counter() - begun
    expected = records.read_manifest(prepared.folder / "again")
    print(f"local engine: {seconds:.1f} s", flush=True)
    rows = []
    for count in workers:
        options = ["--direct_num_workers", str(count)]
        options += ["--direct_running_mode", "multi_processing"] if count > 1 else []
        begun = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            manifest, _ = beam_engine.write(prepared.folder, config, options)
        row = {
            "workers": count,
            "seconds": time.perf_counter() - begun,
            "local_seconds": seconds,
            "equal": manifest == expected,
        }
        rows.append(row)
        print(f"Beam, {count} worker(s): {row['seconds']:.1f} s, same bytes: {row['equal']}", flush=True)
    return rows


def memory(prepared: Any, preset: str, scratch: Path, millions: list[int]) -> list[dict[str, Any]]:
    """Time and memory at sizes in millions of interactions, expanded from the real ones."""
    from data_memory import expand

    rows = []
    for million in millions:
        folder = scratch / f"expanded-{million}"
        expand(prepared.data, million * 1_000_000, folder)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("data_memory.py")), str(folder), preset],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{row['interactions']:,} interactions: {row['examples']:,} examples in {row['seconds']:.0f} s "
            f"({row['cpu_seconds']:.0f} s of CPU time), {row['peak_gb']:.2f} GB at most",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()

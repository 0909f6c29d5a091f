"""The folder of a scoring command's finished shards, from which a killed command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from instructrec_jax.errors import UserError
from instructrec_jax.files import read_json, write_atomic, write_json


class Parts:
    """The folder of finished shards: ``00000.jsonl``, ``00000.errors.jsonl`` where a line was bad, and the manifest."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out.with_name(f".{out.name}.parts")
        self.errors = out.with_name(f"{out.name}.errors.jsonl")
        self._count = 0

    @classmethod
    @contextlib.contextmanager
    def opened(cls, out: Path, manifest: dict[str, Any], restart: bool) -> Iterator[Parts]:
        """The parts of a command, for this process alone; those that are there must be of the same requests, options and run.

        Raises:
            UserError: they are not, or another process is writing them.
            DataError: the manifest is damaged.
        """
        parts = cls(out)
        parts.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(parts.folder / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(f"another process is writing {out}", remedy="wait for it, or give another --out") from error
        try:
            parts._open(manifest, restart)
            yield parts
        finally:
            lock.release()

    def _open(self, manifest: dict[str, Any], restart: bool) -> None:
        file = self.folder / "manifest.json"
        if restart:
            # The last part goes first and the manifest last: a kill in between leaves the beginning of the earlier command.
            for old in sorted(self.folder.glob("[0-9]*.jsonl"), reverse=True):
                old.unlink()
            file.unlink(missing_ok=True)
        remedy = f"remove {self.folder}, or pass --restart"
        if not file.exists():
            write_json(file, manifest)
        elif differences := _differences(read_json(file, remedy), manifest):
            raise UserError(f"{self.folder} holds parts of another command: {', '.join(differences)}", remedy=remedy)
        while (self.folder / f"{self._count:05d}.jsonl").exists():
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def add(self, scored: list[str], errors: list[str]) -> None:
        """Write the next shard. Its scores come last: where they stand, the shard is complete."""
        name = self.folder / f"{self._count:05d}"
        if errors:
            write_atomic(name.with_suffix(".errors.jsonl"), _lines(errors))
        write_atomic(name.with_suffix(".jsonl"), _lines(scored))
        self._count += 1

    def finish(self) -> tuple[int, int]:
        """Put the output together, move it to its place and remove the folder; (lines with scores, lines without)."""
        scores = [self.folder / f"{n:05d}.jsonl" for n in range(self._count)]
        bad = [e for p in scores if (e := p.with_suffix(".errors.jsonl")).exists()]
        fresh, fresh_errors = self.folder / "output", self.folder / "errors"
        failed = _join(bad, fresh_errors)
        written = _join(scores, fresh)
        if written and self.out.suffix == ".parquet":
            _to_parquet(fresh, fresh := self.folder / "output.parquet")
        if failed:
            fresh_errors.replace(self.errors)
        else:
            self.errors.unlink(missing_ok=True)  # of an earlier command
        if written:
            fresh.replace(self.out)
        shutil.rmtree(self.folder)
        return written, failed


def _lines(rows: list[str]) -> str:
    return "".join(row + "\n" for row in rows)


def _join(files: list[Path], out: Path) -> int:
    """Concatenate JSON lines, down to the disk; their number."""
    count = 0
    with out.open("wb") as stream:
        for file in files:
            content = file.read_bytes()
            count += content.count(b"\n")
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return count


def _to_parquet(file: Path, out: Path) -> None:
    """JSON lines of scores as Parquet. A column has one type: ids are numbers if all of them are, else texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open(encoding="utf-8") as stream:
        whole = all(isinstance(n := json.loads(row)["id"], int) and -(2**63) <= n < 2**63 for row in stream)
    kinds = {"id": pa.int64() if whole else pa.string()}
    schema = pa.schema([*kinds.items(), ("candidates", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
    with pq.ParquetWriter(out, schema) as writer, file.open(encoding="utf-8") as stream:
        while rows := [json.loads(row) for _, row in zip(range(1000), stream)]:
            for row in rows:
                row["id"] = row["id"] if whole else str(row["id"])
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What is not the same in two manifests, in words."""
    out = []
    for part, values in new.items():
        was = old.get(part)
        was = was if isinstance(was, dict) else {}
        for key in sorted({*values, *was}):
            if was.get(key) != values.get(key) and (part, key) != ("requests", "file"):
                shown = "" if key.endswith("sha256") else f" {was.get(key)} → {values.get(key)}"
                out.append(f"other {part}" if not shown else f"{key}{shown}")
    return out

"""CSV (plain, gzip) and Parquet tables in one folder, with a column mapping."""

from __future__ import annotations

from pathlib import Path

from instructrec_jax.config import DataConfig
from instructrec_jax.data.schema import RawData
from instructrec_jax.data.sources import checks
from instructrec_jax.data.sources.files import Loaded, listing, need_folder, read_file
from instructrec_jax.data.sources.mapping import rename
from instructrec_jax.errors import DataError, did_you_mean

SUFFIXES = (".csv", ".csv.gz", ".parquet", ".tsv", ".tsv.gz")


def find(folder: Path, table: str, name: str, *, required: bool) -> Path | None:
    """The file of a table: ``name`` inside the folder, or ``table`` with one of ``SUFFIXES``.

    Raises:
        DataError: it is named or required but not there, or there are two candidates.
    """
    if name:
        file = folder / name
        if not file.is_file():
            near = did_you_mean(name, [p.name for p in folder.iterdir()])
            raise DataError(
                f"no such file{near}", file=file, remedy=f"set data.{table}; {folder} holds {listing(folder)}"
            )
        return file
    found = [folder / (table + suffix) for suffix in SUFFIXES if (folder / (table + suffix)).is_file()]
    if len(found) > 1:
        raise DataError(
            f"more than one file for {table}: {', '.join(f.name for f in found)}",
            file=folder,
            remedy=f"say which in data.{table}, or remove the others",
        )
    if not found and required:
        raise DataError(
            f"no {table} file",
            file=folder,
            remedy=f"set data.{table}, or write {table}.csv; the folder holds {listing(folder)}",
        )
    return found[0] if found else None


def load(config: DataConfig, folder: Path) -> dict[str, Loaded]:
    """The tables of a folder as they are, before mapping and checks."""
    drop = config.clean.bad_row == "drop"
    loaded = {}
    for table, required in (("interactions", True), ("items", True), ("users", False), ("tags", False)):
        file = find(folder, table, getattr(config, table), required=required)
        if file is not None:
            loaded[table] = read_file(file, drop_broken=drop)
    return loaded


def read(config: DataConfig, name: str) -> RawData:
    """Read ``config.path``. Raises ``DataError`` for anything missing or wrong (see ``checks``)."""
    folder = need_folder(config.path)
    loaded = rename(load(config, folder), config.columns)
    return checks.assemble(name, loaded, config, f"tables in {folder.name}")

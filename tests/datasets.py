"""Where tests find data, and small tables to make files from."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from instructrec_jax.config import CleanConfig, DataConfig, SplitConfig
from instructrec_jax.data.schema import RawData

NO_RULES = CleanConfig(duplicates="keep", k_core=0, min_user_events=1)


def shared_data(name: str) -> Path:
    """Folder of a real set: ``$INSTRUCTREC_DATA/name``, else ``../shared/data/name`` beside the checkout; or skip."""
    root = os.environ.get("INSTRUCTREC_DATA")
    folder = (Path(root) if root else Path(__file__).resolve().parents[2] / "shared" / "data") / name
    if not folder.is_dir():
        pytest.skip(f"no data set {name} (set INSTRUCTREC_DATA)")
    return folder


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_set(folder: Path, **texts: str | bytes) -> Path:
    """A folder of tables: a good small set, of which ``texts`` replace or add files (``interactions``, ...)."""
    good = {
        "interactions": "user_id,item_id,rating,timestamp\n1,a,4.0,10\n1,b,3.5,20\n2,a,5,15\n2,c,1,25\n",
        "items": "item_id,title,genres\na,Alien (1979),Horror|Sci-Fi\n"
        "b,Brazil (1985),(no genres listed)\nc,Clue (1985),\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for table, text in {**good, **texts}.items():
        content = text if isinstance(text, bytes) else text.encode("utf-8")
        (folder / f"{table}.csv").write_bytes(content)
    return folder


def table_config(folder: Path, *, clean: CleanConfig = NO_RULES, **fields: object) -> DataConfig:
    return replace(DataConfig(source="tables", path=str(folder), clean=clean, split=SplitConfig()), **fields)  # pyright: ignore


def raw_data(
    rows: Sequence[Mapping[str, object]],
    items: Sequence[str] | None = None,
    tags: Sequence[tuple[str, str, str]] | None = None,
    users: pa.Table | None = None,
) -> RawData:
    """``RawData`` from event dictionaries with user, item and any of timestamp, position, rating."""
    names = {"user": "user_id", "item": "item_id"}
    kinds = {"user": pa.string(), "item": pa.string(), "rating": pa.float64()}
    log = pa.table({names.get(k, k): pa.array([r[k] for r in rows], kinds.get(k, pa.int64())) for k in rows[0]})
    ids = sorted({str(r["item"]) for r in rows}) if items is None else list(items)
    catalogue = pa.table({"item_id": ids, "title": [f"Title {i}" for i in ids]})
    words = None
    if tags is not None:
        columns = zip(("user_id", "item_id", "tag"), zip(*tags))
        words = pa.table({name: pa.array(column, pa.string()) for name, column in columns})
    return RawData("test", log, catalogue, users, words)

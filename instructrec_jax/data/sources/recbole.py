"""RecBole atomic files: ``NAME.inter``, ``NAME.item`` and, if there, ``NAME.user`` in one folder.

They are tab-separated without quoting; the header gives ``name:type`` with type ``token``, ``float``, ``token_seq`` or
``float_seq`` (sequences are separated by spaces). Format: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from instructrec_jax.config import DataConfig
from instructrec_jax.data.schema import RawData
from instructrec_jax.data.sources import checks, values
from instructrec_jax.data.sources.files import Dialect, Loaded, listing, need_folder, read_text
from instructrec_jax.data.sources.mapping import rename
from instructrec_jax.errors import DataError

TYPES = ("token", "float", "token_seq", "float_seq")
_SUFFIX = {"interactions": ".inter", "items": ".item", "users": ".user"}
# Names that published atomic files give to what we call title and genres.
_TITLES = (
    "title",
    "movie_title",
    "item_name",
    "item_title",
    "book_title",
    "product_title",
    "name",
    "artist_name",
    "business_name",
)
_GENRES = ("genres", "genre", "class")
_PROSE = (*_TITLES, "description", "abstract", "text", "summary", "brand")


def read(config: DataConfig, name: str) -> RawData:
    """Read the atomic files in ``config.path``. ``config.columns`` wins over the names known here (write names without
    types).
    """
    folder = need_folder(config.path)
    drop = config.clean.bad_row == "drop"
    loaded = {}
    for table, file in _files(config, folder).items():
        one = read_text(file, Dialect(delimiter="\t", quoted=False), drop_broken=drop)
        loaded[table] = _typed(one, table, config)
    mapping = {key: theirs.partition(":")[0] for key, theirs in config.columns.items()}
    return checks.assemble(name, rename(loaded, mapping), config, f"RecBole files in {folder.name}")


def _files(config: DataConfig, folder: Path) -> dict[str, Path]:
    named = {table: getattr(config, table) for table in _SUFFIX}
    logs = [folder / named["interactions"]] if named["interactions"] else sorted(folder.glob("*.inter"))
    logs = [f for f in logs if f.name == f"{folder.name}.inter"] or logs
    if len(logs) != 1:
        found = f"{len(logs)} .inter files ({', '.join(f.name for f in logs)})" if logs else "no .inter file"
        raise DataError(
            found, file=folder, remedy=f"set data.interactions to one of them; the folder holds {listing(folder)}"
        )
    out = {"interactions": logs[0]}
    for table in ("items", "users"):
        file = folder / (named[table] or logs[0].stem + _SUFFIX[table])
        if table == "items" or named[table] or file.is_file():
            out[table] = file  # a missing items file is reported when it is opened
    return out


def _typed(one: Loaded, table: str, config: DataConfig) -> Loaded:
    """Strip the types from the header, turn sequences into lists, and give title and genres their names."""
    names, columns = [], []
    for header in one.table.column_names:
        column_name, colon, kind = header.partition(":")
        if not colon or kind not in TYPES:
            raise DataError(
                f"header {header!r} is not name:type",
                file=one.file,
                row=1,
                column=header,
                remedy=f"type is one of {', '.join(TYPES)}",
            )
        column: pa.ChunkedArray | pa.Array = one.table[header]
        if kind.endswith("_seq") and column_name not in (*_PROSE, *config.columns.values()):
            column = values.as_lists(column, " ")
        elif kind == "token" and column_name not in config.list_columns:
            column = pc.utf8_trim_whitespace(column)
        names.append(column_name)
        columns.append(column)
    if table == "items":
        _alias(names, "title", _TITLES, config.columns)
        _alias(names, "genres", _GENRES, config.columns)
        columns = [
            values.as_lists(c, " ") if n == "genres" and not pa.types.is_list(c.type) else c
            for n, c in zip(names, columns)
        ]
    return Loaded(pa.table(columns, names=names), one.origin, one.broken)


def _alias(names: list[str], ours: str, known: tuple[str, ...], mapping: Mapping[str, str]) -> None:
    if ours in mapping or f"items.{ours}" in mapping or ours in names:
        return
    for i, column in enumerate(names):
        if column in known:
            names[i] = ours
            return

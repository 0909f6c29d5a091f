"""Column mapping: from the names in the files to ours."""

from __future__ import annotations

from collections.abc import Mapping

from instructrec_jax.data.sources.files import Loaded
from instructrec_jax.errors import DataError, did_you_mean

REQUIRED = {
    "interactions": ("user_id", "item_id"),
    "items": ("item_id", "title"),
    "users": ("user_id",),
    "tags": ("user_id", "item_id", "tag"),
}
OPTIONAL = {
    "interactions": ("timestamp", "position", "rating", "event"),
    "items": (),
    "users": (),
    "tags": ("timestamp",),
}


def rename(loaded: Mapping[str, Loaded], columns: Mapping[str, str]) -> dict[str, Loaded]:
    """The tables with our column names.

    ``columns`` maps our name to the file's name, for every table that has such a column; ``"items.title"`` as a key
    maps in one table only. Where a mapped name hides another column of the same name, the hidden one is left out.

    Raises:
        DataError: an entry of ``columns`` that no table has, a required column that is missing.
    """
    out: dict[str, Loaded] = {}
    used: set[str] = set()
    for table, one in loaded.items():
        names = list(one.table.column_names)
        ours = {name: name for name in names}
        moved: dict[str, str] = {}
        for key, theirs in columns.items():
            scope, _, our_name = key.rpartition(".")
            if scope in ("", table) and theirs in names:
                moved[our_name] = theirs
                used.add(key)
            elif scope == table:
                _missing(one, our_name, theirs)
        for theirs in moved.values():
            if theirs not in REQUIRED[table]:  # a key may serve as, say, the title too
                ours.pop(theirs, None)
        for our_name, theirs in moved.items():
            ours[our_name] = theirs
        for name in REQUIRED[table]:
            if name not in ours:
                _missing(one, name, columns.get(f"{table}.{name}", columns.get(name, name)))
        order = sorted(ours, key=lambda name: names.index(ours[name]))
        out[table] = Loaded(one.table.select([ours[n] for n in order]).rename_columns(order), one.origin, one.broken)
    for key, theirs in columns.items():
        if key not in used:
            have = sorted({name for one in loaded.values() for name in one.table.column_names})
            raise DataError(
                f"data.columns maps {key!r} to {theirs!r}, a column that no file has{did_you_mean(theirs, have)}",
                file=", ".join(str(one.file) for one in loaded.values()),
                remedy=f"columns there: {', '.join(have)}",
            )
    return out


def _missing(one: Loaded, ours: str, theirs: str) -> None:
    names = one.table.column_names
    near = did_you_mean(theirs, names) or did_you_mean(
        theirs.replace("_", "").lower(), [n.replace("_", "") for n in names]
    )
    separators = [s for s in (";", "\t", "|") if len(names) == 1 and s in names[0]]
    remedy = f"name the file's column in data.columns: {{{ours}: ...}}"
    if separators:
        remedy = f"the file seems to be separated by {separators[0]!r}; write it with commas"
    raise DataError(
        f"no such column{near}; the file has {', '.join(names)}", file=one.file, row=1, column=theirs, remedy=remedy
    )

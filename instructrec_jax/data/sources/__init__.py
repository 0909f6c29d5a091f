"""Where data comes from: ``read(config, name)`` gives checked Arrow tables, whatever the source."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from instructrec_jax.config import DataConfig
from instructrec_jax.data.privacy import hashed_column, user_keys
from instructrec_jax.data.schema import RawData


def read(config: DataConfig, name: str) -> RawData:
    """Read the source that ``config.source`` names, check it against the schema and count what was left out.

    Args:
        config: source, path, column mapping, and the rules for bad rows and unknown items (``config.clean``).
        name: name of the data set, kept in the result.

    Raises:
        DataError: anything missing or wrong in the files, with file, row, column and remedy.
        ConfigError: ``config.hash_ids`` names a variable that holds no secret.
    """
    from instructrec_jax.data.sources import embedded, movielens, recbole, tables

    readers = {"embedded": embedded.read, "tables": tables.read, "recbole": recbole.read, "movielens": movielens.read}
    raw = readers[config.source](config, name)
    return _hashed(raw, config.hash_ids) if config.hash_ids else raw


def _hashed(raw: RawData, variable: str) -> RawData:
    """The data with keyed hashes in place of user ids, so that nothing behind this point holds one."""
    key = user_keys(variable)
    tables: dict[str, pa.Table | None] = {}
    for label, table in (("interactions", raw.interactions), ("users", raw.users), ("tags", raw.tags)):
        if table is not None:
            at = table.column_names.index("user_id")
            tables[label] = table.set_column(at, "user_id", hashed_column(table["user_id"], key))
    return replace(raw, **tables)

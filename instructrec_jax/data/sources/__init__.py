"""Where data comes from: ``read(config, name)`` gives checked Arrow tables, whatever the source."""

from __future__ import annotations

from instructrec_jax.config import DataConfig
from instructrec_jax.data.schema import RawData


def read(config: DataConfig, name: str) -> RawData:
    """Read the source that ``config.source`` names, check it against the schema and count what was left out.

    Args:
        config: source, path, column mapping, and the rules for bad rows and unknown items (``config.clean``).
        name: name of the data set, kept in the result.

    Raises:
        DataError: anything missing or wrong in the files, with file, row, column and remedy.
    """
    from instructrec_jax.data.sources import embedded, movielens, recbole, tables

    readers = {"embedded": embedded.read, "tables": tables.read, "recbole": recbole.read, "movielens": movielens.read}
    return readers[config.source](config, name)

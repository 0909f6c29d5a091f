"""Data sets inside the package: ``ml-latest-small`` (GroupLens; its licence text lies beside the files and travels with
them).

F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015, doi 10.1145/2827872.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from instructrec_jax.config import DataConfig
from instructrec_jax.data.schema import RawData
from instructrec_jax.data.sources import checks, tables
from instructrec_jax.data.sources.mapping import rename
from instructrec_jax.errors import DataError, did_you_mean

ROOT = Path(__file__).parent.parent / "embedded"
SUMS = "SHA256SUMS"


def names() -> list[str]:
    """Data sets that the package holds."""
    return sorted(p.parent.name for p in ROOT.glob(f"*/{SUMS}"))


def verify(folder: Path) -> None:
    """Compare every file that ``SHA256SUMS`` lists with its sum.

    Raises:
        DataError: a file is missing, or differs (the message has both sums).
    """
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        expected, file = line.split(maxsplit=1)
        path = folder / file
        if not path.is_file():
            raise DataError("missing from the installed package", file=path, remedy="install the package again")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise DataError(
                f"changed since packaging: sha256 {found}, expected {expected}",
                file=path,
                remedy="install the package again",
            )


def read(config: DataConfig, name: str) -> RawData:
    """Read the packaged set ``config.path``. File names in the config are ignored; the column mapping is not needed."""
    if config.path not in names():
        raise DataError(
            f"no embedded data set {config.path!r}{did_you_mean(config.path, names())}",
            remedy=f"data.path is one of {', '.join(names())}; for your own files set data.source: tables",
        )
    folder = ROOT / config.path
    verify(folder)
    plain = replace(config, interactions="", items="", users="", tags="")
    return checks.assemble(name, rename(tables.load(plain, folder), {}), plain, f"embedded {config.path}")

"""Files that are complete or absent, and checksums."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from instructrec_jax.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def in_bucket(path: str | Path) -> bool:
    """Whether a path is one of an object store (``gs://bucket/folder``)."""
    return "://" in str(path)


def path_of(path: str | Path) -> Path:
    """A path on a disk or in a bucket, with pathlib's methods. (``Path`` itself would make ``gs:/`` of ``gs://``.)"""
    if in_bucket(path):
        from etils import epath

        return cast(Path, epath.Path(path))
    return Path(path)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    path, content = path_of(path), content.encode() if isinstance(content, str) else content
    if in_bucket(path):  # an object appears when it is complete
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(path)


class GrowingCopy:
    """Files that grow in the folder ``local``, and are copied to a folder in a bucket; ``metrics.jsonl`` of before is there again."""

    def __init__(self, folder: Path, seconds: float = 60):
        self._folder, self._seconds, self._last = folder, seconds, time.monotonic()
        self._scratch = tempfile.TemporaryDirectory(prefix="instructrec-")
        self.local = Path(self._scratch.name)
        if (before := folder / "metrics.jsonl").exists():
            (self.local / before.name).write_bytes(before.read_bytes())

    def update(self) -> None:
        """Copy everything, if the last time was long enough ago."""
        if time.monotonic() - self._last >= self._seconds:
            self._copy()

    def _copy(self) -> None:
        for file in self.local.rglob("*"):
            if file.is_file():
                (self._folder / file.relative_to(self.local).as_posix()).write_bytes(file.read_bytes())
        self._last = time.monotonic()

    def close(self) -> None:
        """Copy everything and remove the local files."""
        self._copy()
        self._scratch.cleanup()


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that this package wrote.

    Raises:
        DataError: the file does not hold one, so it is damaged.
    """
    try:
        value = json.loads(path_of(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"the file is damaged: {error}", file=path, remedy=remedy) from error
    if not isinstance(value, dict):
        raise DataError(
            f"the file is damaged: it holds a {type(value).__name__}, not an object", file=path, remedy=remedy
        )
    return value


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """NumPy arrays by name as one compressed file, atomically."""
    import numpy as np

    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomic(path, stream.getvalue())


def read_arrays(path: str | Path, remedy: str, *, expected: str | None = None) -> dict[str, np.ndarray]:
    """What ``write_arrays`` wrote.

    Args:
        path: the file.
        remedy: what the message tells to do.
        expected: the file's SHA-256, if it is on record.

    Raises:
        DataError: the sum is another one, or the file is no such file.
    """
    import numpy as np

    path = path_of(path)
    if expected is not None and (found := sha256(path)) != expected:
        raise DataError(f"damaged or changed: sha256 {found}, on record is {expected}", file=path, remedy=remedy)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"damaged: {error}", file=path, remedy=remedy) from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with path_of(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

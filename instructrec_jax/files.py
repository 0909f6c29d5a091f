"""Files that are complete or absent, and checksums."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from instructrec_jax.errors import DataError


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    fresh.replace(path)


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that this package wrote.

    Raises:
        DataError: the file does not hold one, so it is damaged.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"the file is damaged: {error}", file=path, remedy=remedy) from error
    if not isinstance(value, dict):
        raise DataError(
            f"the file is damaged: it holds a {type(value).__name__}, not an object", file=path, remedy=remedy
        )
    return value


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

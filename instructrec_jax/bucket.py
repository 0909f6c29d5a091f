"""Prepared data in a bucket (``gs://``): written there as a whole, and read from a copy that each machine makes once.

Records are read at random and Parquet by its libraries, so that a run reads files of its own disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from instructrec_jax.errors import DataError, UserError
from instructrec_jax.files import in_bucket, path_of

MANIFESTS = (
    "manifest.json",
    "data/split.json",
    "records/manifest.json",
)  # between them they have the sums of all files


def cache_root() -> Path:
    """Where copies are kept: ``prepared`` in ``$INSTRUCTREC_CACHE`` or in ``~/.cache/instructrec_jax``."""
    return Path(os.environ.get("INSTRUCTREC_CACHE") or "~/.cache/instructrec_jax").expanduser() / "prepared"


def local_copy(folder: Path) -> Path:
    """A prepared folder of a bucket on this machine's disk: copied if the cache has none with the same manifests.

    The copy is complete or absent. Several processes may ask at one time: the first that is done has made it.

    Raises:
        DataError: the folder is not there, or was replaced while it was copied.
    """
    place, manifests = _place(folder)
    if place.exists():
        return place
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for name in _names(folder):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("rb") as source, (fresh / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
        if (
            any((fresh / name).read_bytes() != content for name, content in manifests.items())
            or _place(folder)[0] != place
        ):
            raise DataError("the prepared data was replaced while it was copied", file=folder, remedy="run it again")
        try:
            fresh.rename(place)
        except OSError:
            if not place.exists():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return place


def publish(built: Path, folder: Path) -> None:
    """Replace a prepared folder of a bucket by one that was built on the disk, which becomes this machine's copy.

    Without its manifest the folder is absent; that goes first, and comes last.
    """
    manifest, *_ = MANIFESTS
    (folder / manifest).unlink(missing_ok=True)
    names = sorted(_names(built), key=lambda name: name == manifest)
    for name in set(_names(folder)) - set(names):
        (folder / name).unlink()
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (built / name).open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 24)
    place, _ = _place(built, folder.name)
    shutil.rmtree(place, ignore_errors=True)
    built.rename(place)


def refuse(folder: Path, what: str) -> None:
    """Refuse to change prepared data in a bucket in place.

    Raises:
        UserError: the folder is in one.
    """
    if in_bucket(folder):
        raise UserError(
            f"{what} rewrites files in place, which {folder} cannot",
            remedy=f"copy it to a disk (gcloud storage cp -r {folder} .), do it there with --prepared ., and copy it back",
        )


def _place(folder: Path, name: str = "") -> tuple[Path, dict[str, bytes]]:
    """Where the copy of a folder is or will be, and the manifests that name it."""
    manifests = {}
    for file in MANIFESTS:
        if not (folder / file).exists():
            raise DataError(
                "there is no prepared data set here", file=folder / file, remedy="run `instructrec data prepare CONFIG`"
            )
        manifests[file] = (folder / file).read_bytes()
    digest = hashlib.sha256(b"\0".join(manifests.values())).hexdigest()[:16]
    return cache_root() / f"{name or folder.name}-{digest}", manifests


def _names(folder: Path, inside: str = "") -> Iterator[str]:
    """All files beneath a folder, as relative names."""
    here = path_of(folder) / inside if inside else path_of(folder)
    if not here.is_dir():
        return
    for entry in here.iterdir():
        name = f"{inside}/{entry.name}" if inside else entry.name
        if entry.is_dir():
            yield from _names(folder, name)
        else:
            yield name

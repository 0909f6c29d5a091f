"""``instructrec doctor``: look at the machine and the paths, and say what to fix."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from instructrec_jax import __version__
from instructrec_jax.errors import UserError

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "tensorflow-datasets", "transformers", "tokenizers",
    "numpy", "scipy", "scikit-learn", "pyarrow", "implicit", "bm25s",
)  # fmt: skip
EXTRAS = {"matplotlib": "report", "libtpu": "tpu", "gcsfs": "gcs", "torch": "torch-parity"}


def examine(config: str | None, say: Callable[[str], None]) -> list[str]:
    """Print what is found and return the problems, each with its remedy."""
    problems: list[str] = []
    say(
        f"instructrec_jax {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    for name in PACKAGES:
        try:
            say(f"  {name:22} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install {name}")
    for name, extra in EXTRAS.items():
        try:
            say(f"  {name:22} {importlib.metadata.version(name)} (extra {extra})")
        except importlib.metadata.PackageNotFoundError:
            say(f"  {name:22} not installed (extra {extra}: pip install 'instructrec_jax[{extra}]')")

    say(f"cores {os.cpu_count()}, memory {_memory()}")
    try:
        import jax

        devices = jax.devices()
        say(
            f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es)"
        )
        for device in devices[:1]:
            stats = device.memory_stats() or {}
            if "bytes_limit" in stats:
                free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
                say(f"  device memory: {free / 2**30:.1f} of {stats['bytes_limit'] / 2**30:.1f} GiB free")
        cache = jax.config.jax_compilation_cache_dir
        say(
            f"compilation cache: {cache or 'off (set JAX_COMPILATION_CACHE_DIR to a folder to keep compiled programs)'}"
        )
        if cache and "://" not in cache and not os.access(Path(cache).parent, os.W_OK):
            problems.append(
                f"the compilation cache folder {cache} cannot be written: set JAX_COMPILATION_CACHE_DIR to another"
            )
    except Exception as error:  # any failure to start the backend is what this command is for
        problems.append(f"JAX cannot start: {error}")
    free = shutil.disk_usage(".").free
    say(f"disk: {free / 2**30:.1f} GiB free in {Path.cwd()}")
    if free < 2 * 2**30:
        problems.append(f"only {free / 2**30:.1f} GiB of disk are free here; prepared data and checkpoints need a few")
    if config:
        problems += _examine_config(config, say)
    for problem in problems:
        say(f"FIX: {problem}")
    say(f"{len(problems)} problem(s) found" if problems else "everything needed is here")
    return problems


def _examine_config(path: str, say: Callable[[str], None]) -> list[str]:
    from instructrec_jax import config as configs

    problems = []
    try:
        config = configs.load(path)
        members = config.members() if config.mixture else [config]
    except UserError as error:
        return [str(error)]
    say(f"config {path}: {config.name}")
    for member in members:
        if member.data.source == "embedded":
            continue
        folder = Path(member.data.path)
        say(f"  data path {folder}: {'found' if folder.is_dir() else 'missing'}")
        if not folder.is_dir():
            problems.append(f"the data path {folder} does not exist: set data.path, or give --data.path")
    say(
        f"  prepared data {config.prepared_dir}: {'found' if (config.prepared_dir / 'manifest.json').is_file() else 'not yet'}"
    )
    try:
        import jax

        from instructrec_jax.models.sharding import check_divides
        from instructrec_jax.training.mesh import mesh_sizes

        sizes = mesh_sizes(config.mesh, jax.device_count())
        check_divides(config.model, sizes, config.train.batch_size // config.train.accumulate)
        say(f"  mesh {sizes}")
    except UserError as error:
        problems.append(str(error))
    return problems


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return f"{pages * size / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"

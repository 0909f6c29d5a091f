"""Weights out: safetensors in Hugging Face's names and layout, written tensor by tensor into a folder that is complete or absent.

Names, shapes and shards follow from the architecture alone and are planned first. Then one tensor at a time is brought to the host,
merged with its adapter in float32, cast once and appended to its shard: beside the model, the host holds one tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from instructrec_jax.config import AdapterConfig
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.files import write_json
from instructrec_jax.models import adapters, quantise
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.gguf import move_in
from instructrec_jax.models.hf.names import Entry, entries, inputs
from instructrec_jax.models.hf.tensors import INDEX, SINGLE
from instructrec_jax.models.language_model import Sizes, abstract_params
from instructrec_jax.models.sharding import MESH_AXES, padded

Say = Callable[[str], None]
Get = Callable[[Entry, int], np.ndarray]  # a parameter's value in its own layout, of one layer

DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
}
MANIFEST = "export.json"  # what an export wrote; only a folder that has one is replaced
_BLOCK = 1 << 22  # values that are cast at one time
_ROOM = "free some space or choose another disk; nothing was left behind"


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: its published name and shape, and the parameters that are its parts along the last axis."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Entry, ...] = ()
    layer: int = 0

    def nbytes(self, dtype: str) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[dtype][1].itemsize

    def __str__(self) -> str:
        return f"the tensor {self.name} of shape {self.shape}"


# -------------------------------------------------------------------------------------------------------------------- plan


def plan(arch: Architecture) -> list[Slot]:
    """All tensors of a published model of this architecture: tables first, then layer by layer."""
    shapes = abstract_params(arch, Sizes(padded(arch.vocab)))
    found: dict[str, tuple[tuple[int, int], list[Entry], tuple[int, ...]]] = {}
    stacks: list[str] = []
    for entry in entries(arch):
        shape = _at(shapes, entry.path).shape
        own = shape[1:] if entry.layers else shape
        if entry.layers and entry.path[0] not in stacks:
            stacks.append(entry.path[0])
        stack = stacks.index(entry.path[0]) + 1 if entry.layers else 0
        for layer in range(max(entry.layers, 1)):
            published = entry.published_shape(own, _rows(entry, arch), inputs(entry.path[-1]))
            found.setdefault(entry.published(layer), ((stack, layer), [], published))[1].append(entry)
    slots = [
        Slot(name, shape, tuple(sorted(parts, key=lambda e: e.part)), place[1])
        for name, (place, parts, shape) in sorted(found.items(), key=lambda item: item[1][0])
    ]
    for slot in slots:
        assert len(slot.parts) == slot.parts[0].part[1], slot.name
    return slots


def shards(slots: Sequence[Slot], dtype: str, most: int) -> list[list[Slot]]:
    """The slots in files of at most ``most`` bytes, in order; a tensor that is larger has a file of its own."""
    out: list[list[Slot]] = []
    room = 0
    for slot in slots:
        size = slot.nbytes(dtype)
        if not out or size > room:
            out.append([])
            room = most
        out[-1].append(slot)
        room -= size
    return out


def _rows(entry: Entry, arch: Architecture) -> int:
    """Rows that a published word table has; 0 for everything else."""
    return arch.vocab if entry.path in (("words",), ("word_head",)) else 0


# ------------------------------------------------------------------------------------------------------------------ values


def merged_weights(variables: Any, adapter: AdapterConfig | None = None) -> Get:
    """What gives the weights of one layer on the host: dequantised, and with its adapter merged in float32.

    Weights that are not quantised and have no adapter come as they are. Call what it returns inside ``jax.set_mesh``.

    Args:
        variables: {"params": ..., "lora": ...}; layers stacked or unrolled, quantised or not.
        adapter: of the collection "lora"; None = leave it out.
    """
    lora = variables.get("lora", {}) if adapter is not None and adapter.rank else {}

    def get(entry: Entry, layer: int) -> np.ndarray:
        name = entry.path[-1]
        value = of_layer(variables["params"], entry.path, entry.layers, layer)
        projection = entry.layers and entry.kind in ("linear", "conv1d")
        parts = of_layer(lora, entry.path[:-1], entry.layers, layer, f"{name}_") if projection and lora else {}
        if not isinstance(value, dict) and f"{name}_a" not in parts:
            return value
        # On one device: the merge reshapes across axes that the mesh may divide.
        with one_device():
            return np.asarray(_merge(value, parts, name, adapter or AdapterConfig()))

    return get


def one_device() -> contextlib.AbstractContextManager[Any]:
    """A mesh of this process's first device, for work on host arrays inside another mesh."""
    kinds = (jax.sharding.AxisType.Explicit,) * len(MESH_AXES)
    return jax.set_mesh(jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=kinds, devices=jax.local_devices()[:1]))


@partial(jax.jit, static_argnums=(2, 3))
def _merge(value: Any, lora: dict[str, jax.Array], name: str, adapter: AdapterConfig) -> jax.Array:
    if isinstance(value, dict):
        value = quantise.dequantise(value, inputs(name), jnp.float32)
    return adapters.merged_layer(value, lora, name, adapter)


def of_layer(tree: Any, path: tuple[str, ...], layers: int, layer: int, front: str = "") -> Any:
    """The leaf or leaves at a path, of one layer, as host arrays; of a tree only the keys that begin with ``front``."""
    stacked = layers and path[0] in tree
    if layers and not stacked:
        single = "layer" if path[0] == "layers" else path[0].removesuffix("s")
        path = (f"{single}_{layer}", *path[1:])
        if path[0] not in tree:
            return {}
    found = _at(tree, path)
    if front:
        found = {key: leaf for key, leaf in found.items() if key.startswith(front)}
    return jax.tree.map(lambda leaf: _host(_pick(leaf, layer) if stacked else leaf), found)


def _host(leaf: Any) -> np.ndarray:
    """A host copy (on a CPU a view, where one device holds all) that is gone when its user lets it go."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if len(shards) == 1:
        return np.asarray(_same(shards[0].data))
    out = np.empty(leaf.shape, leaf.dtype)
    for shard in shards:
        out[shard.index] = np.asarray(_same(shard.data))
    return out


def _same(part: jax.Array) -> jax.Array:
    # A new array over the same buffer: an array keeps the host copy that it once gave, for as long as it lives.
    return jax.make_array_from_single_device_arrays(part.shape, part.sharding, [part])


@jax.jit
def _pick(leaf: jax.Array, layer: int) -> jax.Array:
    # The layer is an argument: indexing with a constant would compile once per layer.
    return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)


def published_value(slot: Slot, get: Get, arch: Architecture) -> np.ndarray:
    """The value of a slot in the published layout."""
    parts = [e.theirs(get(e, slot.layer), _rows(e, arch), inputs(e.path[-1])) for e in slot.parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


# ------------------------------------------------------------------------------------------------------------------- files


def save_params(
    get: Get,
    arch: Architecture,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    say: Say = lambda line: None,
) -> int:
    """Write all weights of a model: ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Args:
        get: gives a parameter, see ``merged_weights``.
        arch: decides names and shapes.
        folder: that exists; see ``new_folder``.
        dtype: of all tensors: "bfloat16", "float16" or "float32".
        max_shard_bytes: size of a file, but for a single larger tensor.
        say: takes a line per file.

    Returns:
        Bytes of all tensors.

    Raises:
        UserError: too little room or a failed write, with tensor, shape and bytes. DataError: a tensor with another shape than the
            architecture says, or with values that are not finite or beyond ``dtype``.
    """
    slots = plan(arch)
    total = check_room(folder, slots, dtype)
    groups = shards(slots, dtype, max_shard_bytes)
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    )
    written = 0
    for file, group in zip(names, groups):
        write_safetensors(folder / file, group, lambda slot: published_value(slot, get, arch), dtype, total - written)
        written += sum(slot.nbytes(dtype) for slot in group)
        say(f"  {file}: {len(group)} tensors, {written / 1e9:.2f} of {total / 1e9:.2f} GB")
    if len(groups) > 1:
        parameters = total // DTYPES[dtype][1].itemsize
        weight_map = {slot.name: file for file, group in zip(names, groups) for slot in group}
        write_json(
            folder / INDEX,
            {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map},
        )
    return total


def check_room(folder: Path, slots: Sequence[Slot], dtype: str) -> int:
    """Bytes of the slots, if the disk has room for them.

    Raises:
        UserError: naming the first tensor that does not fit, with both numbers.
    """
    total = sum(slot.nbytes(dtype) for slot in slots)
    free = shutil.disk_usage(folder).free
    at = 0
    for slot in slots:
        at += slot.nbytes(dtype)
        if at > free:
            raise UserError(
                f"too little room in {folder.parent}: {slot} ({slot.nbytes(dtype):,} bytes as {dtype}) does not fit; "
                f"{free:,} bytes are free, the weights need {total:,}",
                remedy=_ROOM,
            )
    return total


def write_safetensors(
    file: Path, slots: Sequence[Slot], value: Callable[[Slot], np.ndarray], dtype: str, left: int | None = None
) -> None:
    """One safetensors file, in one pass, one tensor in memory at a time (its library wants all of them).

    Args:
        file: to write.
        slots: names and shapes, in the file's order.
        value: gives a slot's values.
        dtype: to cast them to.
        left: bytes that are still to be written, for the message when the disk is full; None = this file's.

    Raises:
        UserError: a write failed. DataError: a value with another shape, or that is not finite in ``dtype``.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for slot in slots:
        end = at + slot.nbytes(dtype)
        header[slot.name] = {"dtype": DTYPES[dtype][0], "shape": list(slot.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes, as the format asks
    left = at if left is None else left
    slot = slots[0]
    try:
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for slot in slots:
                for block in _blocks(slot, value(slot), dtype):
                    stream.write(block)
                left -= slot.nbytes(dtype)
            stream.flush()
            os.fsync(stream.fileno())  # on network disks it is here that a full one shows
    except OSError as error:
        free = shutil.disk_usage(file.parent).free
        raise UserError(
            f"cannot write {slot} ({slot.nbytes(dtype):,} bytes as {dtype}) to {file.name}: {error.strerror or error}; "
            f"{free:,} bytes are free, {max(left, slot.nbytes(dtype)):,} are still to be written",
            remedy=_ROOM,
        ) from error


def _blocks(slot: Slot, value: np.ndarray, dtype: str) -> Iterator[memoryview]:
    if value.shape != slot.shape:
        raise DataError(
            f"{slot} has a value of shape {value.shape}", remedy="the parameters are of another model than the config"
        )
    kind = DTYPES[dtype][1]
    step = max(1, _BLOCK // max(1, int(np.prod(value.shape[1:]))))
    for start in range(0, len(value), step):
        block = value[start : start + step]
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(block.astype(kind))
        if not np.isfinite(cast).all():
            finite = np.isfinite(block).all()
            raise DataError(
                f"{slot} holds values {f'beyond {dtype}' if finite else 'that are not finite'}",
                remedy="choose --dtype bfloat16 or float32"
                if finite
                else "the run has diverged: export an earlier one",
            )
        yield cast.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False, about: dict[str, Any] | None = None) -> Iterator[Path]:
    """A folder to fill, that is moved to ``out`` as a whole at the end. If anything fails, it is removed and ``out`` is as before.

    Args:
        out: where it will be.
        overwrite: replace an earlier export.
        about: what ``export.json`` says beside the files and their sizes.

    Raises:
        UserError: ``out`` is there and not empty (with ``overwrite``: and an export did not write all that is in it), or a write
            failed.
    """
    place = check_replaceable(out, overwrite)
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        sizes = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
        write_json(fresh / MANIFEST, {**(about or {}), "files": sizes})
        move_in(fresh, place)
    except OSError as error:
        raise UserError(f"the export to {place} stopped: {error}", remedy=_ROOM) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(out: str | Path, overwrite: bool) -> Path:
    """The absolute path of a folder that may be made or replaced.

    Raises:
        UserError: as ``new_folder``.
    """
    place = Path(out).expanduser().resolve()
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file", remedy="name a folder")
    there = {path.name for path in place.iterdir()} if place.exists() else set()
    if not there:
        return place
    if not overwrite:
        raise UserError(f"{place} is not empty", remedy="choose another folder, or replace it with --overwrite")
    try:
        ours = {MANIFEST, *json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if strange := sorted(there - ours):
        raise UserError(
            f"{place} holds {strange[0]}, which no export wrote: it is not replaced", remedy="choose another folder"
        )
    return place


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree

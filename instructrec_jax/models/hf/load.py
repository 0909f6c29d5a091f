"""Weights in: a Hugging Face folder, streamed tensor by tensor into sharded arrays.

A tensor of a layer is read from the mapped file straight into the shards of the devices (each reads its slice), and put in its place
in the stacked parameter, which is updated in place. Beside the model itself, the host holds one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from instructrec_jax.config import ModelConfig
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.models import quantise
from instructrec_jax.models.adapters import TARGETS
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.configs import from_hf
from instructrec_jax.models.hf.names import Entry, entries, inputs, redundant, spellings
from instructrec_jax.models.hf.tensors import INDEX, SINGLE, Tensor, find, open_folder
from instructrec_jax.models.language_model import PLAIN, LanguageModel, Sizes, abstract_params
from instructrec_jax.models.sharding import padded

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pretrained:
    """A published model on the current mesh."""

    folder: Path
    arch: Architecture
    params: Any

    def model(self, options: ModelConfig = PLAIN) -> LanguageModel:
        """The module that runs the parameters as a plain language model."""
        return LanguageModel(self.arch, None, options)


def read_config(folder: str | Path) -> Architecture:
    """The architecture of a model folder.

    Raises:
        DataError: no readable config.json. ConfigError: an unknown architecture.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise DataError("no config.json", file=folder, remedy="give the folder of a published model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"config.json is damaged: {error}", file=file) from error
    return _with_own_head(from_hf(config), Path(folder))


def _with_own_head(arch: Architecture, folder: Path) -> Architecture:
    """The architecture as the file has it: transformers 5 saves T5 v1.1 and mT5 as tied beside an output matrix of their own."""
    if not arch.tied_head or arch.kind == "encoder" or not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return arch
    tensors = open_folder(folder)
    head = tensors.get("lm_head.weight")
    name = next(e.name for e in entries(arch) if e.path == ("words",))
    table = next((tensors[n] for n in spellings(arch.family, name) if n in tensors), None)
    if head is None or table is None or (head.shape == table.shape and np.array_equal(head.read(), table.read())):
        return arch
    return replace(arch, tied_head=False)


def check_tokenizer(tokens: int, arch: Architecture, folder: str | Path) -> None:
    """Refuse a tokeniser whose ids do not fit the word table. A larger table is usual: publishers round it up.

    Raises:
        ConfigError: with both numbers.
    """
    if tokens > arch.vocab:
        raise ConfigError(
            f"{folder}: the tokeniser has {tokens:,} tokens, the word table (words, "
            f"shape {(arch.vocab, arch.width)}) {arch.vocab:,} rows",
            remedy="tokeniser and weights are of two models",
        )


def from_pretrained(path_or_id: str | Path, *, dtype: str = "float32", quantised: str = "none") -> Pretrained:
    """Load a published model: a folder, a known name or a hub id (see ``instructrec model list``). Call inside ``jax.set_mesh``.

    Raises:
        DataError: a missing, cut or misshapen tensor, by name. ConfigError: an unknown architecture.
    """
    from instructrec_jax.models.hf.fetch import resolve

    folder = resolve(path_or_id)
    arch = read_config(folder)
    return Pretrained(folder, arch, load_params(folder, arch, dtype, quantised=quantised))


def load_params(
    folder: str | Path,
    arch: Architecture,
    dtype: str = "float32",
    *,
    quantised: str = "none",
    sizes: Sizes | None = None,
) -> Any:
    """The collection ``params`` of a model, stored as ``models/sharding.py`` says. Call inside ``jax.set_mesh``.

    Args:
        folder: with config.json and safetensors.
        arch: its architecture.
        dtype: of the tables and layers; norms and biases are float32.
        quantised: "none", "int8" or "nf4": the projections of the layers.
        sizes: for the padding of the word table; None = as a plain language model.

    Raises:
        DataError: a tensor is missing, cut off, misshapen, or belongs to no part of this architecture.
    """
    folder = Path(folder)
    tensors = open_folder(folder)
    sizes = Sizes(sizes.vocab if sizes else padded(arch.vocab))
    shapes = abstract_params(arch, sizes)
    params: dict[str, Any] = {}
    read: set[str] = set()
    for entry in entries(arch):
        target = _at(shapes, entry.path)
        spec = target.sharding.spec
        kind = quantised if entry.path[-1] in TARGETS else "none"
        kept = "float32" if entry.kind == "vector" else dtype
        _put(params, entry.path, _load(entry, tensors, read, target.shape, spec, kept, kind, arch, folder))
    for name in tensors:
        if name not in read and not redundant(arch.family, name):
            raise DataError(
                f"tensor {name} of shape {tensors[name].shape} belongs to no part of this {arch.family} model",
                file=tensors[name].file,
                remedy="config.json describes another model, or one with a part that is not supported",
            )
    return params


def _load(
    entry: Entry,
    tensors: dict[str, Tensor],
    read: set[str],
    shape: tuple[int, ...],
    spec: jax.P,
    dtype: str,
    kind: str,
    arch: Architecture,
    folder: Path,
) -> Any:
    """One parameter: the stacked one is filled layer by layer."""
    own_shape = shape[1:] if entry.layers else shape
    own_spec = jax.P(*spec[1:]) if entry.layers else spec
    n_in = inputs(entry.path[-1])
    vocab = arch.vocab if entry.path in (("words",), ("word_head",)) else 0
    expected = entry.published_shape(own_shape, vocab, n_in)

    def one(layer: int) -> Any:
        name, tensor = find(tensors, spellings(arch.family, entry.published(layer)), Path(folder), expected)
        read.add(name)
        value = entry.ours(tensor.read(), own_shape, n_in)
        array = _sharded(value, own_shape, own_spec, "float32" if kind != "none" else dtype)
        return array if kind == "none" else quantise.quantise(array, cast(Any, kind), n_in)

    if not entry.layers:
        return one(0)
    stacked = None
    for layer in range(entry.layers):
        part = one(layer)
        if stacked is None:
            stacked = jax.tree.map(lambda p: _empty((entry.layers, *p.shape), p), part)
        stacked = jax.tree.map(lambda whole, p, at=layer: _fill(whole, p, at), stacked, part)
    return stacked


def _sharded(value: np.ndarray, shape: tuple[int, ...], spec: jax.P, dtype: str) -> jax.Array:
    """A host view as a sharded array; rows beyond the view (padding of a table) are zero."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        piece = np.asarray(value[index]).astype(dtype)
        rows = range(*index[0].indices(shape[0]))
        if len(rows) > piece.shape[0]:
            padding = [(0, len(rows) - piece.shape[0])] + [(0, 0)] * (piece.ndim - 1)
            piece = np.pad(piece, padding)
        return np.ascontiguousarray(piece)

    return jax.make_array_from_callback(shape, sharding, cast(Any, part))


def _empty(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    spec = jax.P(None, *jax.typeof(like).sharding.spec)
    return jnp.zeros(shape, like.dtype, out_sharding=spec)


@partial(jax.jit, donate_argnums=0)
def _fill(whole: jax.Array, part: jax.Array, at: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, at, 0)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value

"""Where each dimension lives on the mesh ``("replica", "fsdp", "tensor")``.

Explicit sharding: every parameter is born with its ``jax.P`` and every contraction names its result's. A parameter is *stored*
sharded over ``fsdp`` and ``tensor``; ``gathered`` brings it to its *used* layout (no ``fsdp``) just before the contraction, and
the gradient flows back through the same reshard as a reduce-scatter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax import P
from jax.experimental import multihost_utils

from instructrec_jax.errors import ConfigError

MESH_AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")


class Shape(Protocol):
    """What a plan depends on: an ``Architecture``."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def mlp_width(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Rules:
    """Partition specs by role. Letters as in the package docstring; ``kg`` splits the N query heads as K groups of G."""

    # Parameters as stored.
    table_vd: P = P("tensor", "fsdp")  # word and item tables
    project_fd: P = P(None, "fsdp")  # content features to model width
    query_dkgh: P = P("fsdp", "tensor", None, None)
    key_dkh: P = P("fsdp", "tensor", None)
    output_kghd: P = P("tensor", None, None, "fsdp")
    mlp_in_df: P = P("fsdp", "tensor")
    mlp_out_fd: P = P("tensor", "fsdp")
    vector_d: P = P(None)
    vector_v: P = P("tensor")
    positions_td: P = P(None, "fsdp")  # learned positions, token types
    relative_rkg: P = P(None, "tensor", None)  # T5's bias per distance bucket and head
    # Activations.
    ids_bs: P = P(BATCH, None)
    act_bsd: P = P(BATCH, None, None)
    heads_bskgh: P = P(BATCH, None, "tensor", None, None)
    heads_bskh: P = P(BATCH, None, "tensor", None)
    scores_bksgt: P = P(BATCH, "tensor", None, None, None)
    mlp_bsf: P = P(BATCH, None, "tensor")
    logits_bsv: P = P(BATCH, None, "tensor")
    candidates_bscd: P = P(BATCH, None, None, None)
    table_used: P = P("tensor", None)


RULES = Rules()


def put(value: np.ndarray, sharding: jax.NamedSharding) -> jax.Array:
    """A host array that every process has, on the mesh. (Between processes ``jax.device_put`` would compare their copies each time.)"""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: Any) -> np.ndarray:
    """The whole of an array on the mesh, on the host of every process; all of them call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def gathered(w: jax.Array, stored: P) -> jax.Array:
    """``w`` without its ``fsdp`` sharding: what a contraction over it needs."""
    return jax.reshard(w, P(*(None if axis == "fsdp" else axis for axis in stored)))


def lookup(table: jax.Array, ids: jax.Array, out: P = RULES.act_bsd) -> jax.Array:
    """Rows ``[B, S, D]`` of a table ``[V, D]`` (indexing a sharded table must name its result's sharding)."""
    return table.at[ids].get(out_sharding=out)


def lookup_stored(table: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows ``[B, S, D]``, in ``dtype``, of a table ``[V, D]`` as it is stored: the table is never gathered.

    Every device looks up its part of D for the ids of all devices along ``fsdp``, and the parts change places (an all-to-all): what
    is moved is the rows alone. Their gradient comes back the same way, and is added up in the table's type.
    """
    replica, fsdp = "replica", "fsdp"
    everywhere = jax.reshard(ids, P(replica, None))
    part = table.at[everywhere].get(out_sharding=P(replica, None, fsdp)).astype(dtype)
    return jax.reshard(part, RULES.act_bsd)


def rows_by_index(x: jax.Array, order: jax.Array) -> jax.Array:
    """``x[b, order[b]]`` for each row: ``[B, S, ...]`` reordered along S, local to every shard of the batch."""
    return jax.vmap(lambda row, index: row.at[index].get())(x, order)


def check_divides(
    model: Shape, sizes: Mapping[str, int], batch_size: int, tables: Mapping[str, int] | None = None
) -> None:
    """Refuse a plan that does not divide, naming axis, number and the nearest that works: a size of the axis, or a number of rows.

    Args:
        model: its dimensions.
        sizes: of the mesh's axes.
        batch_size: rows of a micro-batch.
        tables: rows of the tables of words, items and user features, by name.

    Raises:
        ConfigError: a model dimension, a table or the batch does not divide by the mesh axis that shards it.
    """
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    demands = [
        ("model.width", model.width, "fsdp", fsdp),
        ("model.kv_heads", model.kv_heads, "tensor", tensor),
        ("model.mlp_width", model.mlp_width, "tensor", tensor),
        *((f"the table of {name}", rows, "tensor", tensor) for name, rows in (tables or {}).items()),
        ("train.batch_size (per micro-batch)", batch_size, "replica x fsdp", sizes["replica"] * fsdp),
    ]
    for name, number, axis, size in demands:
        if number % size:
            if name.startswith("train."):  # other rows are easier to have than other devices
                remedy = f"the nearest number that does is {max(1, round(number / size)) * size}"
            else:  # what also divides the axis leaves the other devices a place on another one
                remedy = f"the nearest {axis} size that divides {number} is {math.gcd(number, size)}"
            raise ConfigError(f"{name} = {number} does not divide by the mesh axis {axis} = {size}", remedy=remedy)


def padded(count: int, multiple: int = 128) -> int:
    """``count`` rounded up, so that tables divide over the mesh and catalogues of one size class share a compilation."""
    return max(multiple, -(-count // multiple) * multiple)

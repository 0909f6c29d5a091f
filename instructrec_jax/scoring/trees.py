"""Trees of tokens as the device reads them: hidden states of nodes in, the log probability of every leaf out.

Logits over the vocabulary exist for the nodes that have children, ``CHUNK`` of them at a time; a leaf or a child is scored by its own
row of the word table.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.models import attention
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.heads import Memory, Output, chosen_logits, word_logits
from instructrec_jax.models.sharding import BATCH, rows_by_index

CHUNK = 64  # nodes whose logits [B, CHUNK, V] exist at one time


class Tree(NamedTuple):
    """What is read from the nodes of rows; an index of S (or M) is the root, whose path is empty."""

    tokens: Int[Array, "B S"]
    until: Int[Array, "B S"]
    parent_read: Int[Array, "B S"]  # read of each node's parent; M = the node is not scored
    leaf_node: Int[Array, "B E"]  # node whose path leads to the leaf
    leaf_read: Int[Array, "B E"]
    leaf_token: Int[Array, "B E"]


class Read(NamedTuple):
    """A batch of prompts that were read."""

    hidden: Float[Array, "B 1 D"]
    memory: Memory
    total: Float[Array, "B 1"]  # log Σ exp of the first token's logits
    logits: Float[Array, "B 1 V"] | None = None


def leaf_scores(
    hidden: Float[Array, "B M D"],
    count: jax.Array,
    tree: Tree,
    out: Output,
    arch: Architecture,
    raw: bool,
    root_total: Float[Array, "B 1"] | None = None,
) -> Float[Array, "B E"]:
    """Log P of every leaf's path from where scoring starts, float32; ``raw``: the leaf's own logit alone.

    Args:
        hidden: states of the nodes that have children.
        count: how many of them are real in the fullest row.
        tree: what to read.
        out: the heads.
        arch: the model.
        raw: no softmax: for labels that are compared with each other alone.
        root_total: the last of ``hidden`` is a root whose log normaliser is this; ``count`` leaves it out.
    """
    leaf = chosen_logits(rows_by_index(hidden, tree.leaf_read), tree.leaf_token, out, arch)
    if raw:
        return leaf
    if root_total is None:
        total = _log_normalisers(hidden, count, out, arch)
    else:
        total = jnp.concatenate([_log_normalisers(hidden[:, :-1], count, out, arch), root_total], axis=1)
    reads = hidden.shape[1]
    scored = tree.parent_read < reads
    parent = jnp.minimum(tree.parent_read, reads - 1)
    node = chosen_logits(rows_by_index(hidden, parent), tree.tokens, out, arch) - rows_by_index(total, parent)
    node = jnp.where(scored, node, 0.0)
    ancestors = attention.tree_mask(tree.until).astype(jnp.float32)
    # In full float32: a path is a sum of up to a hundred terms, and a TPU would round each to bfloat16.
    path = jnp.einsum("bst,bt->bs", ancestors, node, precision=jax.lax.Precision.HIGHEST)
    path = jnp.pad(path, ((0, 0), (0, 1)))  # the root
    return rows_by_index(path, tree.leaf_node) + leaf - rows_by_index(total, tree.leaf_read)


def _log_normalisers(
    hidden: Float[Array, "B M D"], count: jax.Array, out: Output, arch: Architecture
) -> Float[Array, "B M"]:
    """log Σ exp of the word logits of the first ``count`` nodes (0 behind them), a chunk at a time."""
    size = hidden.shape[1]
    chunk = min(CHUNK, size)
    room = -size % chunk
    padded = jnp.pad(hidden, ((0, 0), (0, room), (0, 0)))

    def body(number: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, number * chunk, chunk, axis=1)
        found = jax.nn.logsumexp(word_logits(part, out, arch), axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(total, found, number * chunk, axis=1)

    start = jnp.sum(jnp.zeros_like(padded, jnp.float32), axis=-1)
    chunks = jnp.minimum((count + chunk - 1) // chunk, (size + room) // chunk)
    return jax.lax.fori_loop(0, chunks, body, start)[:, :size]


def spread(x: Float[Array, "B ..."], rows: int) -> Float[Array, "R ..."]:
    """Each of B rows R / B times, side by side, laid out like rows of a batch."""
    count = x.shape[0]
    if count == rows:
        return x
    spec = tuple(jax.typeof(x).sharding.spec)
    wide = jnp.broadcast_to(x[:, None], (count, rows // count, *x.shape[1:]), out_sharding=P(spec[0], None, *spec[1:]))
    wide = jnp.reshape(wide, (rows, *x.shape[1:]), out_sharding=P(*spec))
    return wide if spec[0] is not None else jax.reshard(wide, P(BATCH, *spec[1:]))

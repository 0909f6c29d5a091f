"""Attention of packed rows and trees where no kernel is at hand: a block of queries at a time, with a backward pass of its own.

A block of queries reads the keys up to its own end and no others, which leaves out nearly half of the products of long rows. For the
backward pass a row keeps what it read and the logarithm of its softmax's sum; Σ_t weights · ∂weights, which the softmax's gradient needs,
is then the product of what was read and its gradient (Dao et al. 2022, arXiv 2205.14135, appendix B.4), a sum over H and not over T.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

_SMALLEST = 64  # queries of a block
_BLOCKS = 8  # of a row at most: each is compiled by itself


def causal_attention(
    q: Float[Array, "B S K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], until: Int[Array, "B S"]
) -> Float[Array, "B S K G H"]:
    """softmax(q·k) v in float32 over the keys j of ``attention.tree_mask``: j <= i < until[j].

    Queries are scaled already. A row that may read nothing returns the mean of some values, and must carry no loss. Rows and heads may be
    sharded, positions may not (see ``splits``).
    """
    specs = tuple(jax.typeof(x).sharding.spec for x in (q, k, v, until))
    # Each device has whole rows and heads of its own, and nothing to tell the others.
    return jax.shard_map(_attend, in_specs=specs, out_specs=specs[0], check_vma=False)(q, k, v, until)


def splits(q: Float[Array, "B S K G H"]) -> bool:
    """Whether a device has only some of a row's positions."""
    spec = P(*jax.typeof(q).sharding.spec)
    return len(spec) > 1 and spec[1] is not None


def _blocks(length: int) -> list[tuple[int, int]]:
    """First query and end of each block; the end is that of its keys as well."""
    size = max(_SMALLEST, -(-length // _BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _mask(until: jax.Array, first: int, end: int, groups: int) -> Bool[Array, "B 1 Q T"]:
    query, key = jnp.arange(first, end)[:, None], jnp.arange(end)
    reads = (key <= query) & (query < until[:, None, :end])
    return jnp.repeat(reads, groups, axis=1)[:, None]


def _heads(x: jax.Array) -> Float[Array, "B K SG H"]:
    """The queries of a key's heads as one long row, [B, S, K, G, H] to [B, K, S·G, H]: plain batched products, no key is repeated."""
    batch, length, heads, groups, size = x.shape
    return jnp.transpose(x, (0, 2, 1, 3, 4)).reshape(batch, heads, length * groups, size)


def _rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of ``_heads``."""
    batch, length, heads, groups, size = like.shape
    return jnp.transpose(x.reshape(batch, heads, length, groups, size), (0, 2, 1, 3, 4)).astype(like.dtype)


def _keys(x: jax.Array) -> Float[Array, "B K S H"]:
    return jnp.transpose(x, (0, 2, 1, 3))


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """In the inputs' type, summed in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array) -> jax.Array:
    return _forward(q, k, v, until)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array) -> tuple[jax.Array, tuple]:
    groups = q.shape[3]
    queries, keys, values = _heads(q), _keys(k), _keys(v)
    read, logs = [], []
    for first, end in _blocks(q.shape[1]):
        part = slice(first * groups, end * groups)
        scores = _product("bkqh,bkth->bkqt", queries[:, :, part], keys[:, :, :end])
        scores = jnp.where(_mask(until, first, end, groups), scores, -1e30)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        read.append(_product("bkqt,bkth->bkqh", weights.astype(v.dtype), values[:, :, :end]) / total)
        logs.append(highest + jnp.log(total))
    result = _rows(jnp.concatenate(read, axis=2), q)
    return result, (q, k, v, until, result, jnp.concatenate(logs, axis=2))


def _backward(kept: tuple, change: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, until, result, logs = kept
    groups = q.shape[3]
    queries, changes, keys, values = _heads(q), _heads(change), _keys(k), _keys(v)
    wide = change.astype(jnp.float32) * result.astype(jnp.float32)
    inner = _heads(jnp.sum(wide, axis=-1, keepdims=True))
    by_q = []
    by_k, by_v = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for first, end in _blocks(q.shape[1]):
        part = slice(first * groups, end * groups)
        scores = _product("bkqh,bkth->bkqt", queries[:, :, part], keys[:, :, :end])
        weights = jnp.where(_mask(until, first, end, groups), jnp.exp(scores - logs[:, :, part]), 0.0)
        by_weights = _product("bkqh,bkth->bkqt", changes[:, :, part], values[:, :, :end])
        by_scores = (weights * (by_weights - inner[:, :, part])).astype(q.dtype)
        by_q.append(_product("bkqt,bkth->bkqh", by_scores, keys[:, :, :end]))
        by_k = by_k.at[:, :, :end].add(_product("bkqt,bkqh->bkth", by_scores, queries[:, :, part]))
        by_v = by_v.at[:, :, :end].add(_product("bkqt,bkqh->bkth", weights.astype(v.dtype), changes[:, :, part]))
    return _rows(jnp.concatenate(by_q, axis=2), q), _keys(by_k).astype(k.dtype), _keys(by_v).astype(v.dtype), None


_attend.defvjp(_forward, _backward)

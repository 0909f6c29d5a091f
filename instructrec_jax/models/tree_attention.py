"""Attention over trees in one kernel, whose scores never leave the chip (Pallas, for TPUs).

FlashAttention (Dao 2023, arXiv 2307.08691): a block of queries passes over the blocks of keys with a running softmax; the backward pass
computes the weights again, from the log-sum-exp that the forward pass kept. Query i reads key j if ``j <= i < until[j]``, so a block of
keys is skipped where it lies behind the queries, and where all its descendants end before them.

Query heads that share a key/value head read its one copy. Products take the inputs' type, sums are float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

BLOCKS = (512, 256, 128)  # queries and keys at a time, the largest that divides; 128 = the lanes of a TPU
HIDDEN = -1e30
EVER = np.iinfo(np.int32).max  # ``until`` of a key that all queries behind it read


class Plan(NamedTuple):
    """What a call is compiled for."""

    groups: int  # G
    offset: int  # index of the first query, where the first key's is 0
    queries: int  # in a block
    keys: int  # in a block
    interpret: bool  # run the kernel's operations one by one on any device, which is slow


def fits(queries: int, keys: int) -> bool:
    """Whether the kernel takes these lengths."""
    return queries % BLOCKS[-1] == 0 and keys % BLOCKS[-1] == 0


def tree_attention(
    q: Float[Array, "B S K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    until: Int[Array, "B T"],
    *,
    offset: int = 0,
    interpret: bool = False,
) -> tuple[Float[Array, "B S K G H"], Float[Array, "B S K G"]]:
    """softmax(q·k) v over the keys ``j <= offset + i < until[j]`` of query i; arrays of one device, whose lengths ``fits`` accepts.

    Returns:
        What was read, and the float32 log-sum-exp of the scores. A query that may read nothing gets 0 and -1e30.
    """
    batch, length, kv_heads, groups, size = q.shape
    queries, keys = (next(b for b in BLOCKS if n % b == 0) for n in (length, k.shape[1]))
    plan = Plan(groups, offset, queries, keys, interpret)
    heads_first = jnp.transpose(q.reshape(batch, length, kv_heads * groups, size), (0, 2, 1, 3))
    read, total = _attention(plan, heads_first, *(jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v)), until)
    return jnp.transpose(read, (0, 2, 1, 3)).reshape(q.shape), jnp.transpose(total, (0, 2, 1)).reshape(q.shape[:-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array
) -> tuple[Float[Array, "B N S H"], Float[Array, "B N S"]]:
    return _forward(plan, q, k, v, until)[0]


def _forward(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array) -> tuple[Any, Any]:
    batch, heads, length, size = q.shape
    query = lambda b, n, i, j, _: (b, n, i, 0)  # noqa: E731
    # A block that is skipped because it lies behind the queries is not fetched: the index stays.
    key = lambda b, n, i, j, _: (b, n // plan.groups, jnp.minimum(j, _last_key(plan, i)), 0)  # noqa: E731
    read, total = pl.pallas_call(
        partial(_forward_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // plan.queries, k.shape[2] // plan.keys),
            in_specs=[
                pl.BlockSpec((1, 1, plan.queries, size), query),
                pl.BlockSpec((1, 1, plan.keys, size), key),
                pl.BlockSpec((1, 1, plan.keys, size), key),
                pl.BlockSpec((1, 1, plan.keys), lambda b, n, i, j, _: (b, 0, j)),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, plan.queries, size), query),
                pl.BlockSpec((1, 1, 1, plan.queries), lambda b, n, i, j, _: (b, n, 0, i)),
            ],
            scratch_shapes=[pltpu.VMEM((plan.queries, n), jnp.float32) for n in (1, 1, size)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=_order(3, 1),
        interpret=plan.interpret,
        name="tree_attention",
    )(_ends(plan, until), q, k, v, until[:, None, :])
    out = (read, total[:, :, 0])
    return out, (q, k, v, until, *out)


def _backward(
    plan: Plan, kept: Any, given: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, until, read, total = kept
    batch, heads, length, size = q.shape
    d_read, d_total = given
    # Of the softmax: dS = P ⊙ (dP − Σ dO ⊙ O), and the log-sum-exp's own gradient is P.
    base = jnp.sum(d_read.astype(jnp.float32) * read.astype(jnp.float32), axis=-1) - d_total
    arguments = (_ends(plan, until), q, k, v, d_read, total[:, :, None], base[:, :, None], until[:, None, :])
    blocks = (length // plan.queries, k.shape[2] // plan.keys)

    def specs(place: Any) -> list[pl.BlockSpec]:
        """Of the arguments, where ``place`` says (row, query head, block of queries, block of keys) of a step of the grid."""

        def spec(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *at: index(*place(*at[:-1])))

        query = spec((1, 1, plan.queries, size), lambda b, n, i, j: (b, n, i, 0))
        key = spec((1, 1, plan.keys, size), lambda b, n, i, j: (b, n // plan.groups, j, 0))
        row = spec((1, 1, 1, plan.queries), lambda b, n, i, j: (b, n, 0, i))
        return [query, key, key, query, row, row, spec((1, 1, plan.keys), lambda b, n, i, j: (b, 0, j))]

    by_query = lambda b, n, i, j: (b, n, i, jnp.minimum(j, _last_key(plan, i)))  # noqa: E731
    dq = pl.pallas_call(
        partial(_query_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, *blocks),
            in_specs=specs(by_query),
            out_specs=pl.BlockSpec((1, 1, plan.queries, size), lambda b, n, i, j, _: (b, n, i, 0)),
            scratch_shapes=[pltpu.VMEM((plan.queries, size), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_order(3, 1),
        interpret=plan.interpret,
        name="tree_attention_dq",
    )(*arguments)

    def by_key(b: Any, h: Any, j: Any, g: Any, i: Any) -> tuple[Any, ...]:
        return b, h * plan.groups + g, jnp.maximum(i, _first_query(plan, j)), j

    key = pl.BlockSpec((1, 1, plan.keys, size), lambda b, h, j, g, i, _: (b, h, j, 0))
    dk, dv = pl.pallas_call(
        partial(_key_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, k.shape[1], blocks[1], plan.groups, blocks[0]),
            in_specs=specs(by_key),
            out_specs=[key, key],
            scratch_shapes=[pltpu.VMEM((plan.keys, size), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_order(3, 2),
        interpret=plan.interpret,
        name="tree_attention_dkv",
    )(*arguments)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _ends(plan: Plan, until: jax.Array) -> jax.Array:
    """Where the descendants of each block of keys end, ``[B, T / keys]``."""
    return jnp.max(until.reshape(until.shape[0], -1, plan.keys), axis=-1)


def _last_key(plan: Plan, i: Any) -> Any:
    """The last block of keys that begins before block i of the queries ends."""
    return (plan.offset + (i + 1) * plan.queries - 1) // plan.keys


def _first_query(plan: Plan, j: Any) -> Any:
    """The first block of queries that ends behind the beginning of block j of the keys."""
    return jnp.maximum(j * plan.keys - plan.offset, 0) // plan.queries


def _order(parallel: int, sequential: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential)


# ----------------------------------------------------------------------------------------------------------- the kernels


def _product(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Float32 product of two matrices over an axis of each."""
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


def _needed(plan: Plan, ends: Any, b: Any, i: Any, j: Any) -> jax.Array:
    """Whether a query of block i may read a key of block j."""
    return (j <= _last_key(plan, i)) & (ends[b, j] > plan.offset + i * plan.queries)


def _readable(plan: Plan, i: Any, j: Any, until: jax.Array, axis: int) -> jax.Array:
    """The mask of a block of scores, whose queries are along ``axis``; ``until`` lies along the other one."""
    shape = (plan.queries, plan.keys) if axis == 0 else (plan.keys, plan.queries)
    query = plan.offset + i * plan.queries + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    key = j * plan.keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
    return (key <= query) & (query < until)


def _forward_kernel(
    plan: Plan,
    ends: Any,
    q: Any,
    k: Any,
    v: Any,
    until: Any,
    read: Any,
    total: Any,
    highest: Any,
    summed: Any,
    acc: Any,
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _start() -> None:
        highest[...] = jnp.full_like(highest, HIDDEN)
        summed[...] = jnp.zeros_like(summed)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(_needed(plan, ends, b, i, j))
    def _block() -> None:
        values = v[0, 0]
        scores = jnp.where(_readable(plan, i, j, until[0], 0), _product(q[0, 0], k[0, 0], 1, 1), HIDDEN)
        top = jnp.maximum(highest[...], jnp.max(scores, axis=-1, keepdims=True))
        # Where all is hidden so far, the weights are wrong and the first score that is not wipes them out.
        weights, before = jnp.exp(scores - top), jnp.exp(highest[...] - top)
        summed[...] = summed[...] * before + jnp.sum(weights, axis=-1, keepdims=True)
        acc[...] = acc[...] * before + _product(weights.astype(values.dtype), values, 1, 0)
        highest[...] = top

    @pl.when(j == pl.num_programs(3) - 1)
    def _end() -> None:
        some = highest[...] > HIDDEN
        denominator = jnp.where(some, summed[...], 1.0)
        read[0, 0] = jnp.where(some, acc[...] / denominator, 0.0).astype(read.dtype)
        total[0, 0] = jnp.transpose(highest[...] + jnp.log(denominator))


def _gradients(
    plan: Plan, i: Any, j: Any, q: Any, k: Any, v: Any, d_read: Any, total: Any, base: Any, until: Any
) -> tuple[jax.Array, jax.Array]:
    """Weights of a block and the gradient of its scores, ``[keys, queries]``: what is one per query lies along the lanes."""
    readable = _readable(plan, i, j, jnp.transpose(until[0]), 1)
    weights = jnp.where(readable, jnp.exp(_product(k[0, 0], q[0, 0], 1, 1) - total[0, 0]), 0.0)
    return weights, weights * (_product(v[0, 0], d_read[0, 0], 1, 1) - base[0, 0])


def _query_kernel(plan: Plan, ends: Any, q: Any, k: Any, *rest: Any) -> None:
    *others, dq, acc = rest
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _start() -> None:
        acc[...] = jnp.zeros_like(acc)

    @pl.when(_needed(plan, ends, b, i, j))
    def _block() -> None:
        _, d_scores = _gradients(plan, i, j, q, k, *others)
        acc[...] += _product(d_scores.astype(k.dtype), k[0, 0], 0, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def _end() -> None:
        dq[0, 0] = acc[...].astype(dq.dtype)


def _key_kernel(plan: Plan, ends: Any, q: Any, k: Any, v: Any, d_read: Any, *rest: Any) -> None:
    *others, dk, dv, acc_k, acc_v = rest
    b, j, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)

    @pl.when((g == 0) & (i == 0))
    def _start() -> None:
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    @pl.when(_needed(plan, ends, b, i, j))
    def _block() -> None:
        weights, d_scores = _gradients(plan, i, j, q, k, v, d_read, *others)
        acc_v[...] += _product(weights.astype(v.dtype), d_read[0, 0], 1, 0)
        acc_k[...] += _product(d_scores.astype(q.dtype), q[0, 0], 1, 0)

    @pl.when((g == plan.groups - 1) & (i == pl.num_programs(4) - 1))
    def _end() -> None:
        dk[0, 0] = acc_k[...].astype(dk.dtype)
        dv[0, 0] = acc_v[...].astype(dv.dtype)

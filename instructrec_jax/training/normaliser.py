"""log Σ exp of all words for every position at once: three products with the table and four passes over the logits.

What JAX derives for ``logsumexp`` of a product reads and writes logits ``[B, S, V]`` twice more, and transposes them for the table's
gradient. Here the weights exp(logit − highest) of the forward pass are kept as they are, with the table's rows first, and what a position's
gradient is multiplied with is multiplied into vectors ``[D]``, before one product and after the other:

    n = max + log s,  s = Σ_v e_v,   ∂/∂h = (g / s) Σ_v e_v w_v,   ∂/∂w_v = Σ_bs e_v (g / s) h

For as many positions as have room; ``training/tiles.py`` never has more than a chunk's logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float

from instructrec_jax.models.sharding import BATCH, RULES

_ROWS_FIRST = P("tensor", BATCH, None)


@jax.custom_vjp
def log_normaliser(
    hidden: Float[Array, "B S D"], table: Float[Array, "V D"], shift: Float[Array, " V"] | None
) -> Float[Array, "B S"]:
    """log Σ_v exp(w_v · h + shift_v), float32.

    Args:
        hidden: in the compute type, in which the products are taken; their sums are float32.
        table: w, one row per word, in its used layout (``RULES.table_used``).
        shift: bias of the logits; None = none.
    """
    return _forward(hidden, table, shift)[0]


def _forward(hidden: jax.Array, table: jax.Array, shift: jax.Array | None) -> tuple[jax.Array, tuple]:
    dtype = hidden.dtype
    logits = jnp.einsum(
        "vd,bsd->vbs", table.astype(dtype), hidden, out_sharding=_ROWS_FIRST, preferred_element_type=jnp.float32
    )
    if shift is not None:
        logits = logits + shift.astype(jnp.float32)[:, None, None]
    highest = jnp.max(logits, axis=0)
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=0)
    return highest + jnp.log(total), (hidden, table, shift, weights.astype(dtype), total)


def _backward(kept: tuple, change: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    hidden, table, shift, weights, total = kept
    dtype, wide = hidden.dtype, jnp.float32
    share = change / total
    # Turned: a product with few columns is slow where V is summed over the rows of both sides.
    by_hidden = jnp.einsum("vd,vbs->dbs", table.astype(dtype), weights, out_sharding=P(None, BATCH, None))
    by_hidden = jnp.moveaxis(jax.lax.optimization_barrier(by_hidden), 0, -1) * share[..., None]
    scaled = (hidden.astype(wide) * share[..., None]).astype(dtype)
    by_table = jnp.einsum("vbs,bsd->vd", weights, scaled, out_sharding=RULES.table_used)
    by_shift = None
    if shift is not None:
        by_shift = jnp.einsum("vbs,bs->v", weights.astype(wide), share, out_sharding=RULES.vector_v).astype(shift.dtype)
    return by_hidden.astype(dtype), by_table.astype(table.dtype), by_shift


log_normaliser.defvjp(_forward, _backward)

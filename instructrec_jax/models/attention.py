"""Grouped-query attention with segment, causal and prefix masks; the reference path that runs everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.models.sharding import RULES


def rotary(x: Float[Array, "B S *heads H"], positions: Int[Array, "B S"], theta: float) -> Float[Array, "B S *heads H"]:
    """Rotary position embedding, half-split layout (Su et al. 2021, arXiv 2104.09864). Angles are float32 at any compute dtype."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def causal_segment_mask(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where query s may read key t: same segment (0 = padding reads nothing), t not after s."""
    same = segments[:, :, None] == segments[:, None, :]
    length = segments.shape[1]
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    return same & (segments[:, :, None] > 0) & causal[None]


def with_prefix(
    mask: Bool[Array, "B S S"], segments: Int[Array, "B S"], prefix_mask: Bool[Array, "B P"]
) -> Bool[Array, "B S PS"]:
    """Extend a mask over a cached prefix that every segment of the row may read: ``[B, S, P + S]``."""
    prefix = prefix_mask[:, None, :] & (segments[:, :, None] > 0)
    return jnp.concatenate([prefix, mask], axis=2)


def attend(
    q: Float[Array, "B S K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B S T"],
) -> Float[Array, "B S K G H"]:
    """softmax(q·k / sqrt(H)) v with float32 softmax. Rows that may read nothing return the mean of v, and carry no loss."""
    scores = jnp.einsum("bskgh,btkh->bksgt", q, k, out_sharding=RULES.scores_bksgt).astype(jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    scores = jnp.where(mask[:, None, :, None, :], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bksgt,btkh->bskgh", weights, v, out_sharding=RULES.heads_bskgh)

"""Positions, masks and grouped-query attention; the reference path that runs everywhere."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.models.architecture import Rope
from instructrec_jax.models.sharding import RULES

Angles = tuple[Float[Array, "B S H2"], Float[Array, "B S H2"]]  # cos, sin; H2 = H / 2


def frequencies(rope: Rope, head_size: int) -> Float[Array, " H2"]:
    """Angle per position of every pair of a head, float32.

    ``llama3`` stretches long wave lengths by ``factor`` (Llama 3.1: the context grows from 8,192 to 131,072 positions).
    """
    half = head_size // 2
    frequency = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        keep = (rope.original_positions / wavelength - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * frequency + (1 - keep) * frequency / rope.factor
    return frequency


def angles(positions: Int[Array, "B S"], rope: Rope, head_size: int) -> Angles:
    """Cosine and sine of every position and pair. Float32 at any compute dtype: bfloat16 cannot hold the position 257."""
    angle = positions.astype(jnp.float32)[..., None] * frequencies(rope, head_size)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B S *heads H"], table: Angles) -> Float[Array, "B S *heads H"]:
    """Rotary position embedding, half-split layout (Su et al. 2021, arXiv 2104.09864)."""
    cos, sin = (t.reshape(*t.shape[:2], *(1,) * (x.ndim - 3), t.shape[-1]) for t in table)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def rotary(x: Float[Array, "B S *heads H"], positions: Int[Array, "B S"], theta: float) -> Float[Array, "B S *heads H"]:
    """``rotate`` by plain angles of ``theta``."""
    return rotate(x, angles(positions, Rope(theta), x.shape[-1]))


def segment_mask(segments: Int[Array, "B S"], causal: bool) -> Bool[Array, "B S S"]:
    """True where query s may read key t: same segment (0 = padding reads nothing) and, if causal, t not after s."""
    mask = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    if not causal:
        return mask
    length = segments.shape[1]
    return mask & (jnp.arange(length)[:, None] >= jnp.arange(length)[None, :])[None]


def causal_segment_mask(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """``segment_mask`` of a decoder."""
    return segment_mask(segments, causal=True)


def memory_mask(segments: Int[Array, "B S"], real: Bool[Array, "B P"]) -> Bool[Array, "B S P"]:
    """A cached prompt is read by every segment of its row."""
    return real[:, None, :] & (segments[:, :, None] > 0)


def within_window(query: Int[Array, "B S"], key: Int[Array, "B T"], window: int) -> Bool[Array, "B S T"]:
    """True where the key's position is less than ``window`` before the query's."""
    return query[:, :, None] - key[:, None, :] < window


def relative_bucket(distance: Int[Array, "*B"], buckets: int, furthest: int, bidirectional: bool) -> Int[Array, "*B"]:
    """T5's bucket of a distance key − query (Raffel et al. 2020, arXiv 1910.10683, section 2.1).

    Half of the buckets count exactly, the other half grow logarithmically up to ``furthest``; a bidirectional encoder uses
    one set for each direction, a decoder sees only the past.
    """
    start = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        start = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    far = exact + (
        jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(furthest / exact) * (buckets - exact)
    ).astype(jnp.int32)
    return start + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def attend(
    q: Float[Array, "B S K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B S PT"],
    *,
    past: tuple[Float[Array, "B P K H"], Float[Array, "B P K H"]] | None = None,
    bias: Float[Array, "B K S G PT"] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Float[Array, "B S K G H"]:
    """softmax(scale · q·k + bias) v with float32 softmax; ``scale`` None = H^-1/2.

    ``past`` are the keys and values of a cached prompt, which stand before the new ones in ``mask`` and ``bias``. They are
    contracted on their own, so a cache is never copied. Rows that may read nothing return the mean of v, and carry no loss.
    The backward pass computes the weights again: they are [B, K, S, G, T], and storing them for all layers costs more time (and far
    more memory) than the product of q and k.
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    return jax.checkpoint(partial(_attend, softcap=softcap), prevent_cse=False)(q, k, v, mask, past, bias)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    past: tuple[jax.Array, jax.Array] | None,
    bias: jax.Array | None,
    *,
    softcap: float,
) -> jax.Array:
    parts = [(k, v)] if past is None else [past, (k, v)]
    # q comes to [B, K, S·G, H] inside: one plain batched matrix multiply per key/value head, keys are not repeated.
    scores = [jnp.einsum("bskgh,btkh->bksgt", q, key, out_sharding=RULES.scores_bksgt) for key, _ in parts]
    scores = (scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)).astype(jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None, :, None, :], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if past is None:
        return jnp.einsum("bksgt,btkh->bskgh", weights, v, out_sharding=RULES.heads_bskgh)
    border = past[0].shape[1]
    split = (weights[..., :border], weights[..., border:])
    read = [
        jnp.einsum("bksgt,btkh->bskgh", w, value, out_sharding=RULES.heads_bskgh) for w, (_, value) in zip(split, parts)
    ]
    return read[0] + read[1]

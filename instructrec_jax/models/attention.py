"""Positions, masks and grouped-query attention: the reference that runs everywhere, and before it the kernel of ``tree_attention.py`` on
TPUs and cuDNN's on NVIDIA GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.models.architecture import Rope
from instructrec_jax.models.causal_attention import causal_attention, splits
from instructrec_jax.models.sharding import RULES
from instructrec_jax.models.tree_attention import EVER, fits, tree_attention

Angles = tuple[Float[Array, "B S H2"], Float[Array, "B S H2"]]  # cos, sin; H2 = H / 2
# Who may read whom, in one of three forms: True where query s reads key t; trees' ``until`` (see ``tree_mask``), where queries and keys
# are the same nodes; or True for keys that every query reads. The kernel takes the last two, whose dense form nobody builds for it.
Mask = Bool[Array, "B S T"] | Int[Array, "B T"] | Bool[Array, "B T"]
Path = Literal["auto", "reference", "fused"]


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


def tree_mask(until: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Nodes of trees in depth-first order read themselves and their ancestors: j is one of i's if j <= i < until[j].

    ``until`` is where the node's descendants end. A chain is a causal row; 0 is padding, which reads nothing of the row.
    """
    index = jnp.arange(until.shape[1], dtype=until.dtype)
    return (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < until[:, None, :])


def segment_ends(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """``until`` of a decoder's packed rows: where the segment of each position ends, 0 for padding (segment 0).

    A segment is one run of positions; then ``tree_mask`` of this is the causal ``segment_mask``.
    """
    length = segments.shape[1]
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends = jnp.where(segments != following, jnp.arange(1, length + 1, dtype=jnp.int32), length)
    return jnp.where(segments > 0, jax.lax.cummin(ends, axis=1, reverse=True), 0)


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


class Past(NamedTuple):
    """Cached keys and values beside an attention's own ones, with what may be read of them.

    The cache has B rows and the queries R, where R is a multiple of B: rows ``r * R / B`` on continue row r of the cache, which is never
    copied for them. ``mask`` and ``bias`` see the queries as the cache does: ``[B, R/B * S]``.
    """

    keys: Float[Array, "B P K H"]
    values: Float[Array, "B P K H"]
    mask: Bool[Array, "B RS P"] | Bool[Array, "B P"]
    bias: Float[Array, "B K RS G P"] | None = None


def fuses(path: Path) -> bool:
    """Whether the kernel is used on the current mesh where it fits: "auto" = on TPUs; "fused" = elsewhere too, interpreted and slow."""
    return path == "fused" or (path == "auto" and _platform() == "tpu")


def attend(
    q: Float[Array, "B S K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    *,
    past: Sequence[Past] = (),
    bias: Float[Array, "B K S G T"] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    path: Path = "reference",
) -> Float[Array, "B S K G H"]:
    """softmax(scale · q·k + bias) v with float32 softmax; ``scale`` None = H^-1/2.

    Each ``past`` stands beside the own keys: all are read apart and their softmaxes merged, so a cache is neither copied nor repeated.
    Rows that may read nothing return the mean of v (0 from the kernel), and carry no loss.

    ``path`` (see ``fuses``) may choose the kernel. It leaves to the reference, silently and for each part of a call by itself: dense
    masks (encoders, windows, cross-attention), a bias, a softcap, and lengths that are no multiples of 128 (decoding token by token).
    cuDNN's (see ``by_cudnn``) leaves to it the same, and calls with a ``past``.
    The reference has weights ``[B, K, S, G, T]``; its backward pass computes them again: storing them for all layers costs more time (and
    far more memory) than the product of q and k. Packed rows and trees it takes in blocks (``causal_attention.py``).
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    if not past:
        if _fits(path, q, k, mask, bias, softcap):
            return _fused(q, k, v, mask).read
        if by_cudnn(path, q, mask, bias, softcap):
            return _cudnn(q, k, v, mask)
        if mask.ndim == 2 and mask.dtype != bool and bias is None and not softcap and not splits(q):
            return causal_attention(q, k, v, mask)
        return jax.checkpoint(partial(_attend, softcap=softcap), prevent_cse=False)(q, k, v, mask, bias)
    parts = [_part(q, k, v, mask, bias, softcap, path)]
    for p in past:
        part = _part(together(q, p.keys), p.keys, p.values, p.mask, p.bias, softcap, path)
        parts.append(jax.tree.map(lambda x: apart(x, q.shape[0]), part))
    highest = parts[0].highest
    for part in parts[1:]:
        highest = jnp.maximum(highest, part.highest)
    weights = [jnp.exp(part.highest - highest) for part in parts]
    total = sum(w * part.total for w, part in zip(weights, parts))
    read = sum((w / total)[..., None].astype(v.dtype) * part.read for w, part in zip(weights, parts))
    return cast(jax.Array, read)


def attend_memory(
    q: Float[Array, "R S K G H"], k: Float[Array, "B P K H"], v: Float[Array, "B P K H"], mask: Bool[Array, "B RS P"],
    *, scale: float | None = None,
) -> Float[Array, "R S K G H"]:  # fmt: skip
    """Attention to a memory alone (cross-attention), whose rows serve R/B rows of queries each; see ``Past``."""
    return apart(attend(together(q, k), k, v, mask, scale=scale), q.shape[0])


def together(x: Float[Array, "R S ..."], memory: Float[Array, "B ..."]) -> Float[Array, "B RS ..."]:
    """Rows that continue the same row of a memory as one long row.

    With as many rows of the memory as the mesh needs, both are sharded over it; a memory of fewer rows is on every device, and the
    long rows are sharded along their length.
    """
    rows, count = memory.shape[0], x.shape[0]
    if rows == count:
        return x
    spec = tuple(jax.typeof(x).sharding.spec)
    mine = next(iter(jax.typeof(memory).sharding.spec))
    first = (mine, None) if mine else (None, spec[0])
    x = jnp.reshape(x, (rows, count // rows, *x.shape[1:]), out_sharding=P(*first, *spec[1:]))
    return jnp.reshape(
        x, (rows, x.shape[1] * x.shape[2], *x.shape[3:]), out_sharding=P(first[0], first[1] or spec[1], *spec[2:])
    )


def apart(x: Float[Array, "B RS ..."], count: int) -> Float[Array, "R S ..."]:
    """The inverse of ``together``."""
    rows = x.shape[0]
    if rows == count:
        return x
    spec = tuple(jax.typeof(x).sharding.spec)
    split = (rows, count // rows, x.shape[1] * rows // count, *x.shape[2:])
    x = jnp.reshape(x, split, out_sharding=P(spec[0], spec[1], None, *spec[2:]))
    return jnp.reshape(x, (count, *split[2:]), out_sharding=P(spec[0] or spec[1], None, *spec[2:]))


class _Part(NamedTuple):
    """Attention to some of the keys: unnormalised values, and the softmax's largest score and sum."""

    read: Float[Array, "B S K G H"]
    highest: Float[Array, "B S K G"]
    total: Float[Array, "B S K G"]


# --------------------------------------------------------------------------------------------------------- the reference


def _dense(mask: jax.Array) -> jax.Array:
    """Any form of a mask as ``[B, S, T]``, or ``[B, 1, T]`` where queries do not differ."""
    if mask.ndim == 3:
        return mask
    return mask[:, None, :] if mask.dtype == bool else tree_mask(mask)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, bias: jax.Array | None, softcap: float) -> jax.Array:
    # q comes to [B, K, S·G, H] inside: one plain batched matrix multiply per key/value head, keys are not repeated.
    batch, length = tuple(jax.typeof(q).sharding.spec)[:2]
    out = P(batch, RULES.scores_bksgt[1], length, None, None)
    scores = jnp.einsum("bskgh,btkh->bksgt", q, k, out_sharding=out).astype(jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    return jnp.where(_dense(mask)[:, None, :, None, :], scores, -1e30)


def _read(weights: jax.Array, v: jax.Array) -> jax.Array:
    batch, heads, length = tuple(jax.typeof(weights).sharding.spec)[:3]
    return jnp.einsum("bksgt,btkh->bskgh", weights, v, out_sharding=P(batch, length, heads, None, None))


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, bias: jax.Array | None, *, softcap: float
) -> jax.Array:
    return _read(jax.nn.softmax(_scores(q, k, mask, bias, softcap), axis=-1).astype(v.dtype), v)


def _part(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, bias: jax.Array | None, softcap: float, path: Path
) -> _Part:
    if _fits(path, q, k, mask, bias, softcap):
        return _fused(q, k, v, mask)
    scores = _scores(q, k, mask, bias, softcap)
    highest = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - highest[..., None])
    total = jnp.sum(weights, axis=-1)
    front = lambda x: jnp.transpose(x, (0, 2, 1, 3))  # noqa: E731
    return _Part(_read(weights.astype(v.dtype), v), front(highest), front(total))


# ------------------------------------------------------------------------------------------------------------ the kernel


def _platform() -> str | None:
    """Of the current mesh's devices; None if it has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def _fits(path: Path, q: jax.Array, k: jax.Array, mask: jax.Array, bias: jax.Array | None, softcap: float) -> bool:
    if not fuses(path) or mask.ndim == 3 or bias is not None or softcap:
        return False
    return fits(jax.typeof(q).sharding.shard_shape(q.shape)[1], k.shape[1])


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> _Part:
    memory = mask.dtype == bool
    until = jnp.where(mask, EVER, 0) if memory else mask
    # Keys of a memory stand before all queries.
    kernel = partial(tree_attention, offset=k.shape[1] if memory else 0, interpret=_platform() != "tpu")
    specs = tuple(jax.typeof(x).sharding.spec for x in (q, k, v, until))
    # Each device has whole rows and heads of its own, and nothing to tell the others.
    read, highest = jax.shard_map(
        kernel, in_specs=specs, out_specs=(specs[0], P(*specs[0][:4])), check_vma=False
    )(q, k, v, until)  # fmt: skip
    return _Part(read, highest, jnp.ones_like(highest))


# ----------------------------------------------------------------------------------------------------------------- cuDNN

HALF = ("bfloat16", "float16")
_WIDEST_HEAD = 128  # 256 from Hopper on
_AMPERE = 8.0  # compute capability: cuDNN's flash attention starts with it


def by_cudnn(path: Path, q: jax.Array, mask: jax.Array, bias: jax.Array | None, softcap: float) -> bool:
    """Whether cuDNN's attention is taken: "auto" on an NVIDIA GPU from Ampere on, for packed rows and trees of an even length, in half
    precision, with heads of a multiple of 8 up to 128. What it cannot do goes the reference's way (see ``attend``).
    """
    if path != "auto" or not _cuda() or mask.ndim != 2 or mask.dtype == bool or bias is not None or softcap:
        return False
    length, size = q.shape[1], q.shape[-1]
    return q.dtype.name in HALF and length % 2 == 0 and size % 8 == 0 and size <= _WIDEST_HEAD


def _cuda() -> bool:
    if _platform() not in ("gpu", "cuda"):
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", None)  # like "9.0"; "gfx942" on AMD's
    try:
        return float(capability or 0) >= _AMPERE
    except ValueError:
        return False


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array) -> jax.Array:
    """cuDNN takes [B, S, heads, H], and the mask as numbers to add, [B, 1, S, S] in the compute type, the same for all heads.

    (Its own form of packed rows is for Hopper alone, takes a fixed number of segments, and knows chains but no trees.)
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array) -> jax.Array:
        rows, length, kv_heads, groups, size = q.shape
        # Causal besides: blocks of the mask's upper half are not visited.
        read = jax.nn.dot_product_attention(
            q.reshape(rows, length, kv_heads * groups, size), k, v,
            mask=tree_mask(until)[:, None], scale=1.0, is_causal=True, implementation="cudnn",
        )  # fmt: skip
        return read.reshape(q.shape)

    # What cuDNN gives is kept for the backward pass; its mask, the largest thing here, is made again.
    local = jax.checkpoint(local, prevent_cse=False, policy=lambda primitive, *_, **__: "attention" in primitive.name)
    specs = tuple(jax.typeof(x).sharding.spec for x in (q, k, v, until))
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(q, k, v, until)

"""Weights in 8 and 4 bits, dequantised in the contraction.

A weight has its contracted dimensions first. Quantised, it is a dictionary of two arrays:

    int8   {"int8": i8, w's shape;               "scale": f32, the output shape}          w ≈ int8 · scale
    nf4    {"nf4": u8, last input dimension / 2;  "scale": f32, last input dimension / g}  w ≈ CODE_BOOK[code] · scale

int8 has one scale per output channel, so that it is applied after the contraction. NF4 (Dettmers et al. 2023, arXiv 2305.14314,
section 3) has one scale per group of g neighbours along the last input dimension: 4 + 32/g bits per weight.

Both parts keep the weight's dimensions in their order, so they shard as it does, and neighbours that share a byte or a scale are on
one device. Where a dimension does not divide by its mesh axis a part is whole along it, and every device slices what it needs: no
layout costs communication in ``dequantise``. Bring the parts, not the floats, to their used layout: they are 4 and 7 times smaller.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from instructrec_jax.errors import ConfigError

Kind = Literal["int8", "nf4"]
KINDS = ("int8", "nf4")
GROUP = 64  # of QLoRA

# NF4: quantiles of the normal distribution, scaled to [-1, 1], with an exact 0 (arXiv 2305.14314, appendix E).
CODE_BOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BOUNDARIES = tuple((low + high) / 2 for low, high in pairwise(CODE_BOOK))

# Scales are never below the smallest normal float32: all-zero groups divide by it, and processors that flush subnormals do not
# turn a scale into 0.
_TINY = float(np.finfo(np.float32).tiny)


# ---------------------------------------------------------------------------------------------------------- what is stored


def group_size(dim: int, group: int = GROUP) -> int:
    """Weights per scale: the largest divisor of ``dim`` that is at most ``group``.

    Example:
        ``group_size(576) == 64``, ``group_size(100) == 50``, ``group_size(8) == 8``
    """
    return next(g for g in range(min(group, dim), 0, -1) if dim % g == 0)


def _last_input(kind: str, ndim: int, n_in: int, stacked: bool, group: int) -> int:
    """The axis of the last input dimension.

    Raises:
        ConfigError: an unknown kind, no room for ``n_in`` input dimensions, or a group below 1.
    """
    if kind not in KINDS:
        raise ConfigError(f"weights cannot be quantised as {kind!r}", remedy=f"use one of {', '.join(KINDS)}")
    if not 1 <= n_in <= ndim - stacked:
        raise ConfigError(
            f"a weight of {ndim} dimensions{' (the first one layers)' if stacked else ''} cannot have {n_in} input dimensions",
            remedy=f"n_in is from 1 to {ndim - stacked}",
        )
    if group < 1:
        raise ConfigError(f"groups of {group} weights", remedy=f"use 1 or more; the usual size is {GROUP}")
    return stacked + n_in - 1


def shapes(
    kind: Kind, shape: tuple[int, ...], n_in: int, group: int = GROUP, *, stacked: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the parts, for abstract trees.

    Args:
        kind: "int8" or "nf4".
        shape: of the weight: (layers if ``stacked``,) ``n_in`` input dimensions, output dimensions.
        n_in: number of input dimensions.
        group: weights per NF4 scale at most, see ``group_size``.
        stacked: the first axis is the layer.

    Raises:
        ConfigError: an unknown kind or an ``n_in`` that does not fit.
    """
    axis = _last_input(kind, len(shape), n_in, stacked, group)
    if kind == "int8":
        scale = (*shape[: int(stacked)], *shape[axis + 1 :])
        return {"int8": jax.ShapeDtypeStruct(shape, jnp.int8), "scale": jax.ShapeDtypeStruct(scale, jnp.float32)}
    dim = shape[axis]
    # An odd dimension is not packed: one code per byte, and the signed type says so.
    count, dtype = (dim, jnp.int8) if dim % 2 else (dim // 2, jnp.uint8)
    groups = dim // group_size(dim, group)
    return {
        "nf4": jax.ShapeDtypeStruct(_replaced(shape, axis, count), dtype),
        "scale": jax.ShapeDtypeStruct(_replaced(shape, axis, groups), jnp.float32),
    }


def specs(
    kind: Kind, spec: P, n_in: int, stacked: bool = False, *, shape: tuple[int, ...] | None = None, group: int = GROUP
) -> dict[str, P]:
    """How the parts are stored.

    Args:
        kind: "int8" or "nf4".
        spec: the weight's own spec, with an entry for the layers if ``stacked``.
        n_in: number of input dimensions.
        stacked: the first axis is the layer.
        shape: of the weight. With it, and on a mesh, a part is sharded wherever its dimension divides by the mesh axes. Without it
            the NF4 scales are whole along their groups, which is right for every shape but takes more memory.
        group: weights per NF4 scale at most.

    Raises:
        ConfigError: an unknown kind or an ``n_in`` that does not fit.
    """
    entries = _entries(spec, stacked + n_in if shape is None else len(shape))
    axis = _last_input(kind, len(entries), n_in, stacked, group)
    if kind == "int8":
        return {"int8": spec, "scale": P(*entries[: int(stacked)], *entries[axis + 1 :])}
    if shape is None:
        return {"nf4": spec, "scale": P(*_replaced(entries, axis, None))}
    parts = shapes(kind, shape, n_in, group, stacked=stacked)
    codes = _dividing(parts["nf4"].shape[axis], entries[axis])
    scale = _dividing(parts["scale"].shape[axis], codes)  # never finer than the codes that it belongs to
    return {"nf4": P(*_replaced(entries, axis, codes)), "scale": P(*_replaced(entries, axis, scale))}


def is_quantised(leaf: Any) -> bool:
    """Whether this is a quantised weight: a dictionary of its two parts (arrays, abstract shapes or specs)."""
    return isinstance(leaf, dict) and "scale" in leaf and len(leaf) == 2 and any(kind in leaf for kind in KINDS)


def nbytes(q: dict[str, Any]) -> int:
    """Bytes of all parts together, over all devices once; also of ``shapes``."""
    return sum(math.prod(part.shape) * np.dtype(part.dtype).itemsize for part in q.values())


# ------------------------------------------------------------------------------------------------------------- there and back


def quantise(
    w: Float[Array, "*W"], kind: Kind, n_in: int, group: int = GROUP, stacked: bool = False
) -> dict[str, Array]:
    """Round a weight to 8 or 4 bits.

    int8 is symmetric: scale = max|w| / 127 over the inputs of an output channel, |w - int8 · scale| <= scale / 2. NF4 takes the
    nearest entry of the code book for w / scale with scale = max|w| of the group. A weight that is not finite makes the scale,
    and so all that depends on it, not finite.

    Args:
        w: (layers if ``stacked``,) ``n_in`` input dimensions, output dimensions; any float type.
        kind: "int8" or "nf4".
        n_in: number of input dimensions.
        group: weights per NF4 scale at most, see ``group_size``.
        stacked: the first axis is the layer.

    Returns:
        Parts of the shapes that ``shapes`` tells, in the layout that ``specs`` tells for the weight's own spec and its shape.

    Raises:
        ConfigError: an unknown kind or an ``n_in`` that does not fit.
    """
    axis = _last_input(kind, w.ndim, n_in, stacked, group)
    if kind == "int8":
        return _to_int8(w, tuple(range(int(stacked), axis + 1)))
    return _to_nf4(w, axis, group_size(w.shape[axis], group))


@partial(jax.jit, static_argnums=1)
def _to_int8(w: jax.Array, inputs: tuple[int, ...]) -> dict[str, Array]:
    wide = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=inputs) / 127, _TINY)
    rounded = jnp.round(wide / jnp.expand_dims(scale, inputs))
    return {"int8": jnp.clip(rounded, -127, 127).astype(jnp.int8), "scale": scale}


@partial(jax.jit, static_argnums=(1, 2))
def _to_nf4(w: jax.Array, axis: int, group: int) -> dict[str, Array]:
    dim = w.shape[axis]
    spec = _spec(w)
    layouts: dict[str, P] = {}
    if spec is not None:
        layouts = specs("nf4", spec, axis + 1, shape=w.shape, group=group)
        w = jax.reshard(w, layouts["scale"])  # weights that share a scale must be on one device
    wide = _split(w.astype(jnp.float32), axis, group)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=axis + 1), _TINY)
    ratio = wide / jnp.expand_dims(scale, axis + 1)
    # The nearest code is the number of midpoints below. Fifteen comparisons fuse into one pass; a search would gather.
    codes = sum(((ratio > boundary).astype(jnp.uint8) for boundary in _BOUNDARIES), jnp.zeros_like(ratio, jnp.uint8))
    codes = _merge(codes, axis)
    parts = {"nf4": codes.astype(jnp.int8) if dim % 2 else _pack(codes, axis), "scale": scale}
    # The codes may divide where the groups do not.
    return {name: jax.reshard(part, layouts[name]) for name, part in parts.items()} if layouts else parts


def _pack(codes: jax.Array, axis: int) -> jax.Array:
    """Two codes per byte, the first one in the high bits."""
    pairs = _split(codes, axis, 2)
    high, low = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return (high << 4) | low


def _unpack(packed: jax.Array, axis: int) -> jax.Array:
    return _merge(jnp.stack([packed >> 4, packed & 15], axis + 1), axis)


def _decode(codes: jax.Array) -> jax.Array:
    """``CODE_BOOK[codes]`` as selects over the four bits: they keep any layout and fuse, where a lookup would be a gather."""
    level: list[Any] = [jnp.float32(value) for value in CODE_BOOK]
    for bit in range(4):
        one = (codes >> bit) & 1 == 1
        level = [jnp.where(one, high, low) for low, high in zip(level[::2], level[1::2])]
    return level[0]


def dequantise(
    q: dict[str, Array], n_in: int, dtype: DTypeLike, spec: P | None = None, *, stacked: bool = False
) -> Float[Array, "*W"]:
    """The weight that the parts stand for; no gradient flows to them.

    Args:
        q: parts of ``quantise``.
        n_in: number of input dimensions.
        dtype: of the result; the product with the scale is rounded once, from float32.
        spec: layout of the result; None = that of the codes.
        stacked: the first axis is the layer.
    """
    scale = jax.lax.stop_gradient(q["scale"])
    axis = int(stacked) + n_in - 1
    if "int8" in q:
        values = q["int8"].astype(jnp.float32)
        factors = jnp.expand_dims(scale, tuple(range(int(stacked), axis + 1)))
    else:
        codes = q["nf4"]
        values = _decode(codes if codes.dtype == jnp.int8 else _unpack(codes, axis))
        # The group's size is not stored: it follows from the number of scales.
        shape = (*scale.shape[: axis + 1], values.shape[axis] // scale.shape[axis], *scale.shape[axis + 1 :])
        factors = _merge(jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), shape), axis)
    spec = _spec(values) if spec is None else spec
    if spec is not None:
        # Before the product: each part goes its own way to the layout, and whole parts are only sliced.
        values = jax.reshard(values, spec)
        own = _entries(spec, values.ndim)
        factors = jax.reshard(factors, P(*(entry if n > 1 else None for entry, n in zip(own, factors.shape))))
    return (values * factors).astype(dtype)


# --------------------------------------------------------------------------------------------------------- the contraction


def contract(
    equation: str, x: Float[Array, "*X"], q: dict[str, Array], *, n_in: int, out_sharding: P | None, dtype: DTypeLike
) -> Float[Array, "*Y"]:
    """``einsum(equation, x, w)`` with a quantised w.

    int8: the integers, which are exact in ``dtype``, are contracted with float32 results, and the scales come after it. NF4: the
    weight exists in ``dtype`` just for the contraction. Differentiable (reverse mode) in x, not in q. The backward pass
    dequantises again: only the parts are kept for it, also without rematerialisation.

    Args:
        equation: of x and w, like ``"bsd,dkgh->bskgh"``; w's first ``n_in`` letters are x's.
        x: input.
        q: parts of ``quantise`` in their used layout, without a layer axis.
        n_in: number of input dimensions.
        out_sharding: layout of the result; None without a mesh.
        dtype: of the contraction and of the result.

    Raises:
        ConfigError: the equation does not contract exactly the weight's input dimensions.
    """
    x = x.astype(dtype)
    plan = _Plan(*_letters(equation, n_in), n_in, _spec(x), out_sharding, jnp.dtype(dtype))
    return _contract(plan, x, q)


class _Plan(NamedTuple):
    """What is static in a contraction."""

    left: str  # letters of x
    right: str  # of w
    result: str
    n_in: int
    x_spec: P | None
    out_spec: P | None
    dtype: np.dtype

    def along(self, letter: str) -> Any:
        """The mesh axes of a dimension of w, from x or from the result."""
        letters, spec = (self.left, self.x_spec) if letter in self.left else (self.result, self.out_spec)
        return None if spec is None else _entries(spec, len(letters))[letters.index(letter)]

    def w_spec(self) -> P | None:
        """The layout in which w meets x: a part that is whole where x is sharded is sliced first."""
        return None if self.x_spec is None else P(*map(self.along, self.right))


def _letters(equation: str, n_in: int) -> tuple[str, str, str]:
    """The letters of x, w and the result."""
    operands, _, result = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    inputs, outputs = set(right[:n_in]), set(right[n_in:])
    plain = (left + right + result).isalpha() and all(len(set(part)) == len(part) for part in (left, right, result))
    if not plain or not inputs <= set(left) or set(result) != (set(left) - inputs) | outputs or outputs & set(left):
        raise ConfigError(
            f"{equation!r} does not contract the first {n_in} dimensions of a quantised weight, and only those",
            remedy="write x,w->result in single letters, w's input dimensions first, like 'bsd,dkgh->bskgh' with n_in = 1",
        )
    return left, right, result


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(plan: _Plan, x: jax.Array, q: dict[str, Array]) -> jax.Array:
    equation = f"{plan.left},{plan.right}->{plan.result}"
    contraction = partial(jnp.einsum, equation, x, _floats(plan, q), out_sharding=plan.out_spec)
    if "nf4" in q:
        return contraction()
    return (contraction(preferred_element_type=jnp.float32) * _scale_of_result(plan, q)).astype(plan.dtype)


def _contract_forward(plan: _Plan, x: jax.Array, q: dict[str, Array]) -> tuple[jax.Array, dict[str, Array]]:
    return _contract(plan, x, q), q


def _contract_backward(plan: _Plan, q: dict[str, Array], dy: jax.Array) -> tuple[jax.Array, None]:
    if "int8" in q:
        dy = (dy.astype(jnp.float32) * _scale_of_result(plan, q)).astype(plan.dtype)
    equation = f"{plan.result},{plan.right}->{plan.left}"
    return jnp.einsum(equation, dy, _floats(plan, q), out_sharding=plan.x_spec), None


_contract.defvjp(_contract_forward, _contract_backward)


def _floats(plan: _Plan, q: dict[str, Array]) -> jax.Array:
    """What is contracted with x: the integers of int8, the dequantised weight of NF4."""
    spec = plan.w_spec()
    if "nf4" in q:
        return dequantise(q, plan.n_in, plan.dtype, spec)
    return (q["int8"] if spec is None else jax.reshard(q["int8"], spec)).astype(plan.dtype)


def _scale_of_result(plan: _Plan, q: dict[str, Array]) -> jax.Array:
    """The scales of int8, shaped and laid out to multiply the result."""
    outputs = plan.right[plan.n_in :]
    inside = [letter for letter in plan.result if letter in outputs]
    scale = jnp.transpose(q["scale"], [outputs.index(letter) for letter in inside])
    scale = jnp.expand_dims(scale, [i for i, letter in enumerate(plan.result) if letter not in outputs])
    if plan.out_spec is None:
        return scale
    return jax.reshard(scale, P(*(plan.along(letter) if letter in outputs else None for letter in plan.result)))


# ------------------------------------------------------------------------------------------------------ dimensions and layouts


def _replaced(values: tuple[Any, ...], axis: int, value: Any) -> tuple[Any, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def _split(x: jax.Array, axis: int, inner: int) -> jax.Array:
    """[..., n, ...] as [..., n / inner, inner, ...]."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // inner, inner, *x.shape[axis + 1 :])


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """[..., m, inner, ...] as [..., m · inner, ...]."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _entries(spec: P, ndim: int) -> tuple[Any, ...]:
    """A spec's entries, one for each of at least ``ndim`` dimensions."""
    return (*spec, *(None,) * (ndim - len(spec)))


def _spec(x: jax.Array) -> P | None:
    """The layout of an array by its type, None without a mesh of explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.typeof(x).sharding.spec if not mesh.empty and mesh.are_all_axes_explicit else None


def _dividing(dim: int, entry: Any) -> Any:
    """The mesh axes of a dimension if it divides by them, else None."""
    sizes = jax.sharding.get_abstract_mesh().shape
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return entry if dim % math.prod(sizes.get(name, 1) for name in names) == 0 else None

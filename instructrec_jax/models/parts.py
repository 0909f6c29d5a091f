"""What all models are built from: parameters that are born sharded, projections with adapters and quantised weights, norms, dropout.

A projection is ``y = x W (+ b) (+ s · (x A) B)``. W lies in the collection ``params``, the adapter's A and B in ``lora``: two trees,
so that gradients, optimiser state and checkpoints exist for the small one alone. W may be quantised (``models/quantise.py``).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float

from instructrec_jax.config import AdapterConfig
from instructrec_jax.models import quantise
from instructrec_jax.models.sharding import RULES, gathered


def param(
    module: nn.Module, name: str, std: float, shape: tuple[int, ...], rule: P, dtype: str = "float32"
) -> jax.Array:
    """A parameter that is born with its sharding, returned in its used layout (no ``fsdp``)."""
    return gathered(module.param(name, lambda key: normal(key, std, shape, rule, dtype)), rule)


def normal(key: jax.Array, std: float, shape: tuple[int, ...], spec: P, dtype: str = "float32") -> jax.Array:
    """Normal values (zeros for ``std`` 0) that are born with their sharding."""
    if std == 0.0:
        return jnp.zeros(shape, dtype, out_sharding=spec)
    return jax.nn.initializers.normal(std)(key, shape, jnp.dtype(dtype), spec)


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Inverted dropout; the identity outside training."""
    if not train or rate == 0.0:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467); ``plus_one``: · (1 + scale)."""

    eps: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis."""
        start = jnp.zeros if self.plus_one else jnp.ones
        scale = self.param("scale", lambda _: start((x.shape[-1],), jnp.float32, out_sharding=RULES.vector_d))
        scale = scale.astype(jnp.float32)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * (1 + scale if self.plus_one else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / std · scale + bias over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis."""
        scale = self.param("scale", lambda _: jnp.ones((x.shape[-1],), jnp.float32, out_sharding=RULES.vector_d))
        bias = self.param("bias", lambda _: jnp.zeros((x.shape[-1],), jnp.float32, out_sharding=RULES.vector_d))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def norm(kind: str, eps: float, name: str) -> nn.Module:
    """The norm of an architecture."""
    return LayerNorm(eps, name=name) if kind == "layer" else RMSNorm(eps, kind == "rms_plus_one", name=name)


def used(rule: P) -> P:
    """A parameter's layout while it is used: as stored, without ``fsdp``."""
    return P(*(None if axis == "fsdp" else axis for axis in rule))


def project(
    module: nn.Module,
    name: str,
    x: jax.Array,
    equation: str,
    shape: tuple[int, ...],
    rule: P,
    out: P,
    *,
    std: float,
    bias: bool = False,
    n_in: int = 1,
    weights: Literal["none", "int8", "nf4"] = "none",
    param_dtype: str = "float32",
    adapter: AdapterConfig | None = None,
    train: bool = False,
) -> jax.Array:
    """x·W (+ b) (+ adapter), the one contraction that all layers use.

    Args:
        module: the Linen module that owns the parameters ``name``, ``name_bias`` and, in ``lora``, ``name_a``, ``name_b``.
        name: of the weight.
        x: input; its last ``n_in`` axes are contracted.
        equation: einsum of x and W, like ``"bsd,dkgh->bskgh"``.
        shape: of W, contracted axes first.
        rule: W's partition spec as stored.
        out: the result's partition spec.
        std: of the initial weights; 0 = zeros.
        bias: whether there is one, of W's output shape.
        n_in: number of contracted axes.
        weights: "none" (as is), "int8" or "nf4".
        param_dtype: type of an unquantised W.
        adapter: what to add; None, or a target list that lacks ``name`` = nothing.
        train: adapter dropout is on.
    """
    dtype = x.dtype
    if weights == "none":
        stored = param(module, name, std, shape, rule, param_dtype)
        y = product(equation, out, x, stored.astype(dtype))
    else:
        specs = quantise.specs(weights, rule, n_in, shape=shape)
        stored = module.param(
            name,
            lambda key: {
                part: jax.reshard(v, specs[part])
                for part, v in quantise.quantise(normal(key, std, shape, used(rule)), weights, n_in).items()
            },
        )
        stored = {part: gathered(v, specs[part]) for part, v in stored.items()}
        y = quantise.contract(equation, x, stored, n_in=n_in, out_sharding=out, dtype=dtype)
    out_rule = used(P(*rule[n_in:]))
    if adapter is not None and adapter.rank and name in adapter.targets:
        y = y + _low_rank(module, name, x, y, equation, shape, rule, out, n_in, stored, adapter, train)
    if bias:
        y = y + param(module, f"{name}_bias", 0.0, shape[n_in:], out_rule).astype(dtype)
    return y


def adapter_scale(adapter: AdapterConfig) -> float:
    """alpha / r (LoRA, Hu et al. 2021, arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.kind == "rslora" else adapter.rank)


def _low_rank(
    module: nn.Module,
    name: str,
    x: jax.Array,
    base: jax.Array,
    equation: str,
    shape: tuple[int, ...],
    rule: P,
    out: P,
    n_in: int,
    stored: Any,
    adapter: AdapterConfig,
    train: bool,
) -> jax.Array:
    """What the adapter adds to ``base`` = x·W: s·(xA)B, and for DoRA the change of W's column norms to the learned magnitudes."""
    dtype = x.dtype
    left, right = equation.split("->")[0].split(",")
    result = equation.split("->")[1]
    inputs, outputs = right[:n_in], right[n_in:]
    batch = "".join(c for c in left if c not in inputs)
    # A keeps the weight's input layout and B its output layout; the rank axis is never sharded.
    rule_a, rule_b = P(*rule[:n_in], None), P(None, *rule[n_in:])
    fan_in = math.prod(shape[:n_in])

    def init_a(key: jax.Array) -> jax.Array:
        # Uniform in ±1/sqrt(fan in), as PEFT does (kaiming_uniform with a = sqrt 5).
        bound = fan_in**-0.5
        return jax.random.uniform(key, (*shape[:n_in], adapter.rank), jnp.float32, -bound, bound, out_sharding=rule_a)

    a = gathered(module.variable("lora", f"{name}_a", lambda: init_a(module.make_rng("params"))).value, rule_a)
    b = gathered(
        module.variable(
            "lora", f"{name}_b", lambda: jnp.zeros((adapter.rank, *shape[n_in:]), jnp.float32, out_sharding=rule_b)
        ).value,
        rule_b,
    )
    scale = adapter_scale(adapter)
    dropped = dropout(module, x, adapter.dropout, train)
    narrow_out = P(*out[: len(batch)], None)
    narrow = product(f"{left},{inputs}r->{batch}r", narrow_out, dropped, a.astype(dtype))
    change = product(f"{batch}r,r{outputs}->{result}", out, narrow, (b * scale).astype(dtype))
    if adapter.kind != "dora":
        return change

    # DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): W' = m · (W + sBA) / |W + sBA|, norms over the inputs; the norm is a
    # constant in the backward pass (section 4.3).
    wide = weight_values(stored, n_in, used(rule))
    rule_out = P(*rule[n_in:])
    magnitude = module.variable("lora", f"{name}_magnitude", lambda: jax.reshard(norms(wide, n_in), rule_out)).value
    delta = jnp.einsum(f"{inputs}r,r{outputs}->{right}", a, b * scale, out_sharding=used(rule))
    whole = jax.lax.stop_gradient(norms(wide + delta, n_in))
    ratio = (gathered(magnitude, rule_out) / whole).astype(dtype)
    return (base + change) * ratio - base


_FEW = 32  # columns


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, out: P, x: jax.Array, w: jax.Array) -> jax.Array:
    """x·W by einsum. The gradient by W has x first, so that it comes out in W's layout.

    The transpose that JAX derives has the incoming gradient first: on a CPU it is transposed in memory for that, and W's gradient
    after it, which takes about as long as the product itself where one side is narrow. Where W itself has few columns (an adapter's A)
    the gradient comes first after all: a product with 8 columns takes three times as long as one with 8 rows.
    """
    return jnp.einsum(equation, x, w, out_sharding=out)


def _product_forward(equation: str, out: P, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple]:
    # Not by ``product``: remat's policies know the results of products, not of functions with their own gradient.
    return jnp.einsum(equation, x, w, out_sharding=out), (x, w)


def _product_backward(equation: str, out: P, kept: tuple, change: jax.Array) -> tuple[jax.Array, jax.Array]:
    del out
    x, w = kept
    operands, result = equation.split("->")
    left, right = operands.split(",")
    inputs, column = right[:-1], right[-1]
    x_spec, spec = (jax.typeof(side).sharding.spec for side in (x, w))
    turn = w.shape[-1] <= _FEW and not set(inputs) & set(result)
    if jax.sharding.get_abstract_mesh().size == 1 and not turn:
        # Two matrices, of which XLA turns none in memory. Over several devices a merged axis would need its own sharding.
        rows = math.prod(x.shape[: sum(axis not in right for axis in left)])
        flat_x, by = (jnp.reshape(side, (rows, -1), out_sharding=P(None, None)) for side in (x, change))
        flat_w = jnp.reshape(w, (-1, by.shape[1]), out_sharding=P(None, None))
        by_x, by_w = jnp.einsum("no,io->ni", by, flat_w), jnp.einsum("ni,no->io", flat_x, by)
        return jnp.reshape(by_x, x.shape, out_sharding=x_spec), jnp.reshape(by_w, w.shape, out_sharding=spec)
    by_x = jnp.einsum(f"{result},{right}->{left}", change, w, out_sharding=x_spec)
    if turn:
        turned = jnp.einsum(f"{result},{left}->{column}{inputs}", change, x, out_sharding=P(spec[-1], *spec[:-1]))
        # Without the barrier XLA takes turning the result into the product, which then has few columns again.
        return by_x, jnp.moveaxis(jax.lax.optimization_barrier(turned), 0, -1)
    by_w = jnp.einsum(f"{left},{result}->{right}", x, change, out_sharding=spec)
    return by_x, by_w


product.defvjp(_product_forward, _product_backward)


def weight_values(stored: Any, n_in: int, spec: P | None = None) -> jax.Array:
    """A weight of one layer in float32, dequantised if it is quantised."""
    if quantise.is_quantised(stored):
        return quantise.dequantise(stored, n_in, jnp.float32, spec)
    return stored.astype(jnp.float32)


def norms(w: Float[Array, "*W"], n_in: int) -> Float[Array, "*out"]:
    """The length of a weight's columns: over its ``n_in`` inputs, for every output."""
    return jnp.sqrt(jnp.sum(w * w, axis=tuple(range(n_in))))

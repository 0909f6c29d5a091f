"""What learns and what is frozen, and how an adapter is added to the weights it stands beside.

``variables`` = {"params": ..., "lora": ...}. ``split`` cuts it into a trained and a frozen tree of the same two collections; the
optimiser, the gradients and the checkpoints see the trained one alone. ``join`` puts them together again.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from instructrec_jax.config import PROJECTIONS, AdapterConfig, ModelConfig
from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.models import quantise
from instructrec_jax.models.hf.names import inputs
from instructrec_jax.models.parts import adapter_scale, norms, weight_values

Tree = dict[str, Any]

GROUPS = ("all", "adapter", "items", "embeddings")
ITEM_PARAMS = (
    "item_bias", "item_content", "item_id", "unknown_item", "feature_table", "feature_offset", "rerank_direction", "rerank_bias",
)  # fmt: skip
_EMBEDDINGS = ("words", "word_head", "word_bias", "positions")
# Projections that may have an adapter, and that a quantised base holds in few bits.
TARGETS = (*PROJECTIONS, *(f"cross_{name}" for name in PROJECTIONS[:4]))


def check(config: ModelConfig) -> None:
    """Refuse settings of adapter, quantisation and ``trainable`` that do not fit together.

    Raises:
        ConfigError: naming the setting and a remedy.
    """
    for group in config.trainable:
        if group not in GROUPS:
            raise ConfigError(
                f"model.trainable names {group!r}{did_you_mean(group, GROUPS)}", remedy=f"any of {', '.join(GROUPS)}"
            )
    if not config.trainable:
        raise ConfigError("model.trainable is empty: nothing would learn", remedy=f"any of {', '.join(GROUPS)}")
    if "adapter" in config.trainable and not config.adapter.rank:
        raise ConfigError("model.trainable names the adapter, but model.adapter.rank is 0", remedy="e.g. rank 8")
    if config.adapter.rank and not ("adapter" in config.trainable or "all" in config.trainable):
        raise ConfigError("model.adapter.rank is set, but model.trainable leaves the adapter out")
    if config.quantise != "none" and "all" in config.trainable:
        raise ConfigError(
            f"model.quantise = {config.quantise}: quantised weights cannot be trained",
            remedy="model.trainable: [adapter], with model.adapter.rank 8",
        )
    if config.quantise != "none" and not config.pretrained:
        raise ConfigError("model.quantise needs a pretrained model: weights that start from scratch must be trained")
    if not config.pretrained and config.trainable != ("all",):
        raise ConfigError("model.trainable other than all needs model.pretrained: the rest would stay random")
    _check_numbers(config.adapter)
    for target in config.adapter.targets:
        if target not in TARGETS:
            raise ConfigError(
                f"model.adapter.targets names {target!r}{did_you_mean(target, TARGETS)}",
                remedy=f"any of {', '.join(PROJECTIONS)}; cross_query, ... for an encoder-decoder",
            )


def _check_numbers(adapter: AdapterConfig) -> None:
    for name, number, wanted, good in (
        ("rank", adapter.rank, "0 (no adapter) or more", adapter.rank >= 0),
        ("alpha", adapter.alpha, "more than 0", adapter.alpha > 0),
        ("dropout", adapter.dropout, "from 0 to below 1", 0 <= adapter.dropout < 1),
    ):
        if not good:
            raise ConfigError(f"model.adapter.{name} = {number}", remedy=f"a number {wanted}")
    if adapter.rank and not adapter.targets:
        raise ConfigError("model.adapter.targets is empty", remedy=f"any of {', '.join(PROJECTIONS)}")


def _learns(path: tuple[str, ...], trainable: tuple[str, ...]) -> bool:
    if "all" in trainable:
        return True
    if path[0] == "lora":
        return "adapter" in trainable
    return ("items" in trainable and path[1] in ITEM_PARAMS) or ("embeddings" in trainable and path[1] in _EMBEDDINGS)


def split(variables: Tree, trainable: tuple[str, ...]) -> tuple[Tree, Tree]:
    """(trained, frozen): two trees that have no leaf in common and ``join`` to the whole. What is trained becomes float32.

    Raises:
        ConfigError: nothing is trained, because the adapter's targets name no projection of this model.
    """
    trained: Tree = {}
    frozen: Tree = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, dict) and not quantise.is_quantised(node):
            for key, child in node.items():
                walk(child, (*path, key))
            return
        learns = _learns(path, trainable)
        target = trained if learns else frozen
        for key in path[:-1]:
            target = target.setdefault(key, {})
        # Steps are smaller than what bfloat16 resolves.
        target[path[-1]] = jnp.asarray(node, jnp.float32) if learns else node

    walk(variables, ())
    if not trained:
        raise ConfigError(
            f"nothing would learn: this model has no part that model.trainable ({', '.join(trainable)}) or the adapter's targets name",
            remedy="see model.adapter.targets; a model without a gate has query, key, value, output, up, down",
        )
    return trained, frozen


def join(first: Tree, second: Tree) -> Tree:
    """The union of two trees without common leaves."""
    out = dict(first)
    for key, value in second.items():
        out[key] = join(out[key], value) if key in out else value
    return out


def change(lora: Tree, name: str, n_in: int, adapter: AdapterConfig) -> jax.Array | None:
    """s · A B of one projection, float32, in the weight's shape (with a leading layer axis if it has one)."""
    if f"{name}_a" not in lora:
        return None
    a, b = (lora[f"{name}_{part}"].astype(jnp.float32) for part in ("a", "b"))
    stacked = a.ndim - n_in - 1  # 1 with a layer axis
    inner, outer = a.shape[stacked:-1], b.shape[stacked + 1 :]
    flat_a = a.reshape(*a.shape[:stacked], math.prod(inner), a.shape[-1])
    flat_b = b.reshape(*b.shape[:stacked], a.shape[-1], math.prod(outer))
    product = jnp.matmul(flat_a, flat_b, precision="highest") * adapter_scale(adapter)
    return product.reshape(*a.shape[:stacked], *inner, *outer)


def merged_layer(weight: Any, lora: Tree, name: str, adapter: AdapterConfig) -> jax.Array:
    """W + s·AB of one layer in float32, or DoRA's m · (W + s·AB) / |W + s·AB|. W may be quantised.

    A weight without an adapter comes back as it is.
    """
    n_in = inputs(name)
    delta = change(lora, name, n_in, adapter)
    if delta is None:
        return weight
    whole = weight_values(weight, n_in) + delta
    if adapter.kind != "dora":
        return whole
    return whole * (lora[f"{name}_magnitude"] / norms(whole, n_in))


def with_magnitudes(variables: Tree, adapter: AdapterConfig) -> Tree:
    """The variables with DoRA's magnitudes m = |W| of the weights that are there now (arXiv 2402.09353, equation 2).

    A fresh adapter measures the weights that it is initialised beside. Where those are replaced by published ones, call this:
    without it the first step would start from a model whose columns have the length of random ones.
    """
    if adapter.kind != "dora" or "lora" not in variables:
        return variables

    def walk(lora: Tree, params: Tree) -> Tree:
        out = {}
        for key, leaf in lora.items():
            name = key.removesuffix("_magnitude")
            if isinstance(leaf, dict):
                out[key] = walk(leaf, params[key])
            elif name == key:
                out[key] = leaf
            else:
                n_in = inputs(name)
                stacked = lora[f"{name}_a"].ndim == n_in + 2
                out[key] = _magnitude(leaf, params[name], n_in, stacked)
        return out

    return {**variables, "lora": walk(variables["lora"], variables["params"])}


@partial(jax.jit, static_argnums=(2, 3))
def _magnitude(old: jax.Array, weight: Any, n_in: int, stacked: bool) -> jax.Array:
    """|W| in the layout of ``old``; a layer at a time, so that no more than one is ever dequantised."""

    def one(layer: Any) -> jax.Array:
        return norms(weight_values(layer, n_in), n_in)

    new = jax.lax.map(one, weight) if stacked else one(weight)
    return jax.reshard(new, jax.typeof(old).sharding.spec)

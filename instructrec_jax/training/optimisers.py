"""Optimisers and schedules by name, each under explicit sharding: the state of a parameter lies where the parameter does."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import P
from jaxtyping import Array, Float

from instructrec_jax.config import TrainConfig
from instructrec_jax.models.adapters import TARGETS
from instructrec_jax.models.hf.names import inputs
from instructrec_jax.models.sharding import MESH_AXES

Path = tuple[Any, ...]  # of jax.tree_util keys
# Newton-Schulz coefficients and steps of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
# Muon's updates get the size of AdamW's, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982, equation 4).
MUON_RMS = 0.2


def schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate of every step: linear warm-up, then what ``train.schedule`` says; defined for any number of steps."""
    warmup = min(config.warmup_steps, max(config.steps // 2, 1))
    peak, final = config.learning_rate, config.learning_rate * config.final_lr_fraction
    rest = max(config.steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_lr_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":
        decay = max(min(round(config.decay_fraction * config.steps), rest), 1)
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then ``train.optimizer``; norms, biases, single vectors and DoRA's magnitudes do not decay.

    Sources: AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), whose second
    moments are one row and one column per matrix; Lion (Chen et al. 2023, arXiv 2302.06675), which wants a learning rate 3 to 10 times
    smaller; Muon for the layers' matrices, with AdamW for all other parameters.
    """
    rate, decay = schedule(config), config.weight_decay
    b1, b2 = config.beta1, config.beta2
    if config.optimizer == "adafactor":
        # The rate is absolute, as for the others, and decay is scaled by it, which optax.adafactor leaves out.
        chosen = optax.chain(
            matrices(optax.scale_by_factored_rms()),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay, mask=decayed),
            optax.scale_by_learning_rate(rate),
        )
    elif config.optimizer == "lion":
        chosen = optax.lion(rate, b1, b2, weight_decay=decay, mask=decayed)
    elif config.optimizer == "muon":
        muon = optax.chain(
            optax.trace(config.momentum, nesterov=True),
            orthogonal_updates(),
            optax.add_decayed_weights(decay, mask=decayed),
            optax.scale_by_learning_rate(rate),
        )
        rest = optax.adamw(rate, b1, b2, weight_decay=decay, mask=decayed)
        chosen = optax.partition({"muon": muon, "adamw": rest}, _muon_labels)
    else:
        chosen = optax.adamw(rate, b1, b2, weight_decay=decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay shrinks."""

    def leaf(path: Path, x: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return not any(part in name for part in ("norm", "bias", "unknown_item", "magnitude", "direction"))

    return jax.tree_util.tree_map_with_path(leaf, params)


# ------------------------------------------------------------------------------------------------------------ matrices


def matrix_axes(path: Path, ndim: int) -> tuple[int, int] | None:
    """(leading layer axes, input axes) of a projection's weight or adapter; None for everything that is no layer's matrix."""
    name = str(getattr(path[-1], "key", path[-1]))
    target, _, part = name.rpartition("_") if name.endswith(("_a", "_b")) else (name, "", "")
    if target not in TARGETS:
        return None
    n_in = 1 if part == "b" else inputs(target)
    stacked = any(str(getattr(key, "key", key)).endswith("layers") for key in path)
    return int(stacked), n_in


def _muon_labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: "adamw" if matrix_axes(path, x.ndim) is None else "muon", params
    )


def _as_matrix(path: Path, x: jax.Array) -> jax.Array:
    """``[L, inputs..., outputs...]`` as ``[L, in, out]``; what is no layer's matrix as it is."""
    axes = matrix_axes(path, x.ndim)
    if axes is None:
        return x
    stacked, n_in = axes
    split = stacked + n_in
    return x.reshape(*x.shape[:stacked], math.prod(x.shape[stacked:split]), math.prod(x.shape[split:]))


def matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on the layers' weights as matrices: heads and their sizes are one axis, as in published models."""

    def flat(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(_as_matrix, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(flat(updates), state, flat(params))
        return jax.tree.map(
            lambda x, like: jax.lax.reshape(x, like.shape, out_sharding=_sharding(like)), new, updates
        ), state

    return optax.GradientTransformation(lambda params: inner.init(flat(params)), update)


def orthogonal_updates() -> optax.GradientTransformation:
    """Every layer's matrix U S Vᵀ becomes about U Vᵀ, of root mean square ``MUON_RMS`` at most (Muon).

    A stack of layers is spread over all devices, a device having whole matrices: one exchange there and one back, and no product
    crosses devices. A matrix that is alone is computed on all of them.
    """

    def leaf(path: Path, x: jax.Array) -> jax.Array:
        matrix = _as_matrix(path, x)
        alone = matrix.ndim == 2
        stack = matrix[None] if alone else matrix
        stored = _sharding(stack)
        layers, rows, columns = stack.shape
        spread = P(None if alone else MESH_AXES, None, None)
        if not alone:
            devices = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
            stack = jnp.pad(stack, ((0, -layers % devices), (0, 0), (0, 0)))
        stack = orthogonalised(jax.reshard(stack, spread)) * (MUON_RMS * math.sqrt(max(rows, columns)))
        stack = jax.reshard(stack, stored)[:layers]
        return jax.lax.reshape(stack, x.shape, out_sharding=_sharding(x))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree_util.tree_map_with_path(leaf, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def orthogonalised(stack: Float[Array, "L A B"]) -> Float[Array, "L A B"]:
    """U Vᵀ of every matrix U S Vᵀ, roughly (singular values from 0.7 to 1.2), by Newton-Schulz iterations; zeros stay zeros."""
    tall = stack.shape[1] > stack.shape[2]
    x = jnp.swapaxes(stack, 1, 2) if tall else stack
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True)) + 1e-8)
    for a, b, c in NEWTON_SCHULZ:
        gram = jnp.einsum("lab,lcb->lac", x, x)
        x = a * x + jnp.einsum("lac,lcb->lab", b * gram + c * jnp.einsum("lab,lbc->lac", gram, gram), x)
    return jnp.swapaxes(x, 1, 2) if tall else x


def _sharding(x: jax.Array) -> P:
    return jax.typeof(x).sharding.spec

"""Losses on sampled negatives, for catalogues too large for the softmax over all of them.

Every step draws N items that serve as negatives of all its positions. With s_i = f_i · g + θ_i, target t and proposal q

* ``sampled``: −s_t + log(exp s_t + 1/N Σ_{j≠t} exp(s_j) / q_j), where the sum is an unbiased estimate of the softmax's normaliser
  without the target (importance sampling: Bengio and Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural
  Probabilistic Language Model", 2008; the log-Q correction of sampled-softmax retrieval);
* ``gbce``: β softplus(−s_t) + Σ_{j≠t} softplus(s_j) with β = α (c (1 − 1/α) + 1/α), α = N / (I − 1) and calibration c: it takes back
  the overconfidence that comes of seeing few negatives (gSASRec: Petrov and Macdonald, RecSys 2023, arXiv 2308.07192).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from instructrec_jax.config import TrainConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models.heads import Output
from instructrec_jax.models.sharding import lookup
from instructrec_jax.training.loss import Sums, in_chunks, zero_sums


class Proposal(NamedTuple):
    """How negatives are drawn: q, over the real items."""

    log_q: Float[np.ndarray, " I"]
    upto: Float[np.ndarray, " I"]  # Σ q of the items up to each


def proposal(config: TrainConfig, count: int, popularity: Int[np.ndarray, " I"] | None) -> Proposal:
    """The proposal of a config: uniform, or by training events (plus one, so that every item may come).

    Raises:
        ConfigError: ``popularity`` is asked for and not given, or label smoothing, which needs the whole catalogue.
    """
    if config.label_smoothing:
        raise ConfigError(
            f"train.label_smoothing = {config.label_smoothing} spreads over the whole catalogue, which train.item_loss = "
            f"{config.item_loss} does not see",
            remedy="set train.label_smoothing: 0",
        )
    if config.item_negatives_by == "popularity":
        if popularity is None:
            raise ConfigError("train.item_negatives_by = popularity needs the items' training events")
        weight = popularity[:count].astype(np.float64) + 1
    else:
        weight = np.ones(count)
    q = weight / weight.sum()
    return Proposal(np.log(q).astype(np.float32), np.cumsum(q).astype(np.float32))


def drawn(given: Proposal, n: int, key: Array) -> Int[Array, " N"]:
    """N items, with replacement."""
    at = jnp.searchsorted(jnp.asarray(given.upto), jax.random.uniform(key, (n,)))
    return jnp.minimum(at, len(given.upto) - 1)


def sampled_item_loss(
    out: Output,
    batch: dict[str, jax.Array],
    negatives: Int[Array, " N"],
    given: Proposal,
    config: TrainConfig,
) -> Sums:
    """The loss of every position with an ``item_target`` against the same negatives, summed.

    Args:
        out: hidden states and heads.
        batch: with ``item_target`` (index + 1; 0 = none) and ``task``.
        negatives: as ``drawn``; one that is a position's target does not count there.
        given: what they were drawn from.
        config: ``item_loss``, ``gbce_calibration`` and ``logits_chunk``.
    """
    if out.item_vectors is None or out.item_bias is None:
        return zero_sums()
    vectors, bias = out.item_vectors, out.item_bias
    rivals = vectors.at[negatives].get(out_sharding=jax.P(None, None))
    rival_bias = bias.at[negatives].get(out_sharding=jax.P(None))
    n = negatives.shape[0]
    correction = jnp.asarray(given.log_q)[negatives] + jnp.log(float(n))
    alpha = n / (len(given.log_q) - 1)
    beta = alpha * (config.gbce_calibration * (1 - 1 / alpha) + 1 / alpha)

    @jax.checkpoint
    def nll(hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jnp.maximum(target - 1, 0)
        own = jnp.sum(hidden * lookup(vectors, index), axis=-1) + lookup(bias[:, None], index)[..., 0]
        others = jnp.einsum("bsd,nd->bsn", hidden, rivals) + rival_bias
        is_own = negatives == index[..., None]
        if config.item_loss == "gbce":
            against = jnp.sum(jnp.where(is_own, 0.0, jax.nn.softplus(others)), axis=-1)
            return beta * jax.nn.softplus(-own) + against, jnp.zeros_like(own)
        logits = jnp.where(is_own, -1e30, others - correction)
        normaliser = jax.nn.logsumexp(jnp.concatenate([own[..., None], logits], axis=-1), axis=-1)
        return normaliser - own, normaliser

    return in_chunks(nll, out.hidden.astype(jnp.float32), batch, config.logits_chunk)

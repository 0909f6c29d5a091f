"""Chunked cross-entropy on answer words and on every predicted item: logits never exist for more than a chunk of positions.

Both heads work alike. In every row the positions that predict something are moved to the front, so that trailing chunks without
targets are skipped at run time; the others hold ``[B, chunk, V]`` or ``[B, chunk, I]`` logits, recomputed in the backward pass.
Losses are *sums* with their weights: whoever combines micro-batches or devices divides once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.heads import Output, chosen_logits, item_logits, rerank_logits, word_logits
from instructrec_jax.models.sharding import BATCH, lookup, rows_by_index

NUM_TASKS = 8  # task numbers are 1-based and small; 0 is padding


class Sums(NamedTuple):
    """Summed loss, squared log normaliser (for the z-loss) and number of targets; loss and number also by task."""

    loss: Float[Array, ""]
    z: Float[Array, ""]
    count: Float[Array, ""]
    task_loss: Float[Array, " tasks"]
    task_count: Float[Array, " tasks"]


def word_loss(out: Output, batch: dict[str, jax.Array], chunk: int, arch: Architecture) -> Sums:
    """−log softmax(words)[target], summed over positions with a ``text_target`` (token id + 1; 0 = none)."""

    def nll(hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        normaliser = jax.nn.logsumexp(word_logits(hidden, out, arch), axis=-1)
        return normaliser - chosen_logits(hidden, jnp.maximum(target - 1, 0), out, arch), normaliser

    return _chunked(out.hidden, batch["text_target"], batch["task"], nll, chunk)


def item_loss(out: Output, batch: dict[str, jax.Array], count: int, smoothing: float, chunk: int) -> Sums:
    """Full-catalogue softmax cross-entropy −log R_target, summed over positions with an ``item_target``.

    With smoothing ε the target distribution is (1 − ε) on the target and ε spread evenly over the ``count`` real items.
    """
    if out.item_vectors is None or out.item_bias is None:
        return zero_sums()
    vectors, bias = out.item_vectors, out.item_bias
    real = (jnp.arange(vectors.shape[0]) < count)[:, None]
    mean_vector = jnp.sum(jnp.where(real, vectors, 0), axis=0) / count
    mean_bias = jnp.sum(jnp.where(real[:, 0], bias, 0)) / count

    def nll(hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = hidden.astype(jnp.float32)
        index = jnp.maximum(target - 1, 0)
        normaliser = jax.nn.logsumexp(item_logits(hidden, out, count), axis=-1)
        chosen = jnp.sum(wide * lookup(vectors, index), axis=-1)
        chosen = chosen + lookup(bias[:, None], index)[..., 0]
        average = jnp.einsum("bsd,d->bs", wide, mean_vector) + mean_bias
        return normaliser - (1 - smoothing) * chosen - smoothing * average, normaliser

    return _chunked(out.hidden, batch["item_target"], batch["task"], nll, chunk)


def rerank_loss(
    out: Output, batch: dict[str, jax.Array], count: int, candidates: int, teacher: float, chunk: int
) -> Sums:
    """−Σ_i R_i log P_i of the re-ranking head, summed over positions with an ``item_target``.

    The candidates are the target and the items that the matching head ranks highest beside it, so that the head learns on what it will
    be given. R is 1 on the target, or for the share ``teacher`` the matching head's softmax over the candidates, which does not learn
    from it.
    """
    if out.rerank_direction is None:
        return zero_sums()

    def nll(hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jnp.maximum(target - 1, 0)[..., None]
        matching = jax.lax.stop_gradient(item_logits(hidden, out, count))
        matching = jax.reshard(matching, jax.P(BATCH, None, None))  # top_k needs the catalogue together
        own = jnp.arange(matching.shape[-1]) == index
        others, rivals = jax.lax.top_k(jnp.where(own, -jnp.inf, matching), min(candidates, count) - 1)
        listed = jnp.concatenate([jnp.sum(jnp.where(own, matching, 0), axis=-1, keepdims=True), others], axis=-1)
        logits = rerank_logits(hidden, jnp.concatenate([index, rivals], axis=-1), out)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        log_prob = logits - normaliser[..., None]
        taught = jnp.sum(jax.nn.softmax(listed, axis=-1) * log_prob, axis=-1) if teacher else 0.0
        return -(1 - teacher) * log_prob[..., 0] - teacher * taught, normaliser

    return _chunked(out.hidden, batch["item_target"], batch["task"], nll, chunk)


def _chunked(
    hidden: Float[Array, "B S D"],
    target: Int[Array, "B S"],
    task: Int[Array, "B S"],
    nll: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    chunk: int,
) -> Sums:
    """Sum ``nll``'s (loss, log normaliser) over positions whose target is not 0, ``chunk`` positions of every row at a time."""
    batch, length = target.shape
    chunk = min(chunk, length)
    if length % chunk:
        raise ValueError(f"train.sequence_length = {length} must be a multiple of train.logits_chunk = {chunk}")

    def compute(hidden: jax.Array, target: jax.Array, task: jax.Array) -> Sums:
        weight = (target > 0).astype(jnp.float32)
        loss, normaliser = nll(hidden, target)
        loss = loss * weight
        by_task = (task[..., None] == jnp.arange(NUM_TASKS)).astype(jnp.float32)
        return Sums(
            loss.sum(),
            jnp.sum(normaliser**2 * weight),
            weight.sum(),
            jnp.einsum("bs,bst->t", loss, by_task, out_sharding=jax.P(None)),
            jnp.einsum("bs,bst->t", weight, by_task, out_sharding=jax.P(None)),
        )

    if chunk == length:  # one chunk: nothing to skip, and the logits may as well be kept for the backward pass
        return compute(hidden, target, task)

    order = jnp.argsort(target == 0, axis=1, stable=True)
    parts = [rows_by_index(x, order) for x in (hidden, target, task)]
    # Chunk axis first, for the scan.
    parts = [jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0) for x in parts]

    def nothing(hidden: jax.Array, target: jax.Array, task: jax.Array) -> Sums:
        del hidden, target, task
        return zero_sums()

    @jax.checkpoint
    def step(total: Sums, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, None]:
        sums = jax.lax.cond(jnp.any(part[1] > 0), compute, nothing, *part)
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(step, zero_sums(), tuple(parts))[0]


def zero_sums() -> Sums:
    """Nothing lost on nothing."""
    return Sums(jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.zeros(NUM_TASKS), jnp.zeros(NUM_TASKS))

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
from instructrec_jax.models.language_model import Output, item_logits
from instructrec_jax.models.sharding import lookup, rows_by_index
from instructrec_jax.training.tiles import table_scores

NUM_TASKS = 8  # task numbers are 1-based and small; 0 is padding


class Sums(NamedTuple):
    """Summed loss and number of targets, in total and by task."""

    loss: Float[Array, ""]
    count: Float[Array, ""]
    task_loss: Float[Array, " tasks"]
    task_count: Float[Array, " tasks"]


def word_loss(
    out: Output, batch: dict[str, jax.Array], chunk: int, arch: Architecture, *, tiles: int = 1, learns: bool = True
) -> Sums:
    """−log softmax(words)[target], summed over positions with a ``text_target`` (token id + 1; 0 = none).

    ``tiles`` and ``learns`` (the word head does): see ``training/tiles.py``.
    """
    hidden, target, task = _in_front(out.hidden, batch["text_target"], batch["task"])
    scores = table_scores(
        hidden, target, out.word_head, out.word_bias,
        count=arch.vocab, softcap=arch.final_softcap, tiles=tiles, chunk=chunk, learns=learns,
    )  # fmt: skip
    return _sums(scores.normaliser - scores.chosen, target, task)


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

    def nll(hidden: jax.Array, target: jax.Array) -> jax.Array:
        wide = hidden.astype(jnp.float32)
        index = jnp.maximum(target - 1, 0)
        normaliser = jax.nn.logsumexp(item_logits(hidden, out, count), axis=-1)
        chosen = jnp.sum(wide * lookup(vectors, index), axis=-1)
        chosen = chosen + lookup(bias[:, None], index)[..., 0]
        average = jnp.einsum("bsd,d->bs", wide, mean_vector) + mean_bias
        return normaliser - (1 - smoothing) * chosen - smoothing * average

    return _chunked(out.hidden, batch["item_target"], batch["task"], nll, chunk)


def _chunked(
    hidden: Float[Array, "B S D"],
    target: Int[Array, "B S"],
    task: Int[Array, "B S"],
    nll: Callable[[jax.Array, jax.Array], jax.Array],
    chunk: int,
) -> Sums:
    """Sum ``nll`` over positions whose target is not 0, ``chunk`` positions of every row at a time."""
    batch, length = target.shape
    chunk = min(chunk, length)
    if length % chunk:
        raise ValueError(f"train.sequence_length = {length} must be a multiple of train.logits_chunk = {chunk}")

    def compute(hidden: jax.Array, target: jax.Array, task: jax.Array) -> Sums:
        return _sums(nll(hidden, target), target, task)

    if chunk == length:  # one chunk: nothing to skip, and the logits may as well be kept for the backward pass
        return compute(hidden, target, task)

    parts = _in_front(hidden, target, task)
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


def _in_front(hidden: jax.Array, target: jax.Array, task: jax.Array) -> list[jax.Array]:
    """The positions of every row with those that have a target first."""
    order = jnp.argsort(target == 0, axis=1, stable=True)
    return [rows_by_index(x, order) for x in (hidden, target, task)]


def _sums(nll: Float[Array, "B S"], target: Int[Array, "B S"], task: Int[Array, "B S"]) -> Sums:
    weight = (target > 0).astype(jnp.float32)
    loss = nll * weight
    by_task = (task[..., None] == jnp.arange(NUM_TASKS)).astype(jnp.float32)
    return Sums(
        loss.sum(),
        weight.sum(),
        jnp.einsum("bs,bst->t", loss, by_task, out_sharding=jax.P(None)),
        jnp.einsum("bs,bst->t", weight, by_task, out_sharding=jax.P(None)),
    )


def zero_sums() -> Sums:
    """Nothing lost on nothing."""
    return Sums(jnp.float32(0), jnp.float32(0), jnp.zeros(NUM_TASKS), jnp.zeros(NUM_TASKS))

"""Cross-entropy on answer words and on every predicted item: logits never exist for more than a chunk of positions.

Both heads work alike: the positions that predict something are brought together, and no others are computed (``training/tiles.py``).
Losses are *sums* with their weights: whoever combines micro-batches or devices divides once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.heads import Output, chosen_logits, item_logits, rerank_logits, spaces_of, word_logits
from instructrec_jax.models.sharding import BATCH, RULES, gathered, lookup, rows_by_index
from instructrec_jax.training.normaliser import log_normaliser
from instructrec_jax.training.tiles import Scores, table_scores

_NOBODY = -1e30  # the logit of an item that is not a candidate
NUM_TASKS = 8  # task numbers are 1-based and small; 0 is padding


class Sums(NamedTuple):
    """Summed loss, squared log normaliser (for the z-loss) and number of targets; loss and number also by task."""

    loss: Float[Array, ""]
    z: Float[Array, ""]
    count: Float[Array, ""]
    task_loss: Float[Array, " tasks"]
    task_count: Float[Array, " tasks"]


def word_loss(
    out: Output, batch: dict[str, jax.Array], chunk: int, arch: Architecture, *, tiles: int = 1, learns: bool = True
) -> Sums:
    """−log softmax(words)[target], summed over positions with a ``text_target`` (token id + 1; 0 = none).

    Args:
        out: hidden states and heads.
        batch: with ``text_target`` and ``task``.
        chunk: positions of every row, on average, whose logits exist at one time.
        arch: the model.
        tiles: parts of the word table, of which one is gathered at a time.
        learns: whether the word table does.
    """
    hidden, target, task = out.hidden, batch["text_target"], batch["task"]
    if chunk >= target.shape[1] and tiles == 1 and learns:
        index = jnp.maximum(target - 1, 0)
        normaliser = _word_normaliser(hidden, out, arch)
        return sums_of(normaliser - chosen_logits(hidden, index, out, arch), normaliser, target, task)
    scores = table_scores(
        hidden, target, out.word_head, out.word_bias,
        count=arch.vocab, softcap=arch.final_softcap, tiles=tiles, chunk=chunk, learns=learns,
    )  # fmt: skip
    return sums_of(scores.normaliser - scores.chosen, scores.normaliser, target, task)


def _word_normaliser(hidden: Float[Array, "B S D"], out: Output, arch: Architecture) -> Float[Array, "B S"]:
    """log Σ exp of all words, of every position at once."""
    if arch.final_softcap:
        return jax.nn.logsumexp(word_logits(hidden, out, arch), axis=-1)
    table, shift = gathered(out.word_head, RULES.table_vd), out.word_bias
    if table.shape[0] > arch.vocab:  # rows that only pad the table have no probability
        closed = jnp.where(jnp.arange(table.shape[0]) < arch.vocab, 0.0, _NOBODY)
        shift = closed if shift is None else shift + closed
    return log_normaliser(hidden, table, shift)


def item_loss(
    out: Output,
    batch: dict[str, jax.Array],
    count: int,
    smoothing: float,
    chunk: int,
    spaces: tuple[int, ...] = (),
) -> Sums:
    """Full-catalogue softmax cross-entropy −log R_target, summed over positions with an ``item_target``.

    With smoothing ε the target distribution is (1 − ε) on the target and ε spread evenly over the ``count`` real items. With ``spaces``
    (``Sizes``) the catalogue is the target's own.
    """
    if out.item_vectors is None or out.item_bias is None:
        return zero_sums()
    vectors, bias = out.item_vectors, out.item_bias
    hidden, target, task = out.hidden.astype(jnp.float32), batch["item_target"], batch["task"]
    if chunk >= target.shape[1]:
        index = jnp.maximum(target - 1, 0)
        chosen = jnp.sum(hidden * lookup(vectors, index), axis=-1) + lookup(bias[:, None], index)[..., 0]
        scores = Scores(chosen, jax.nn.logsumexp(_own(item_logits(hidden, out, count), index, spaces), axis=-1))
    else:
        scores = table_scores(
            hidden, target, vectors, bias, count=count, softcap=0.0, tiles=1, chunk=chunk, learns=True, spaces=spaces
        )  # fmt: skip
    nll = scores.normaliser - (1 - smoothing) * scores.chosen
    if smoothing:
        nll = nll - smoothing * _average_logit(hidden, target, vectors, bias, spaces or (count,))
    return sums_of(nll, scores.normaliser, target, task)


def rerank_loss(
    out: Output,
    batch: dict[str, jax.Array],
    count: int,
    candidates: int,
    teacher: float,
    chunk: int,
    spaces: tuple[int, ...] = (),
) -> Sums:
    """−Σ_i R_i log P_i of the re-ranking head, summed over positions with an ``item_target``.

    The candidates are the target and the items that the matching head ranks highest beside it, so that the head learns on what it will
    be given. R is 1 on the target, or for the share ``teacher`` the matching head's softmax over the candidates, which does not learn
    from it.
    """
    if out.rerank_direction is None:
        return zero_sums()

    @jax.checkpoint
    def nll(hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jnp.maximum(target - 1, 0)[..., None]
        matching = jax.lax.stop_gradient(_own(item_logits(hidden, out, count), index[..., 0], spaces))
        matching = jax.reshard(matching, jax.P(BATCH, None, None))  # top_k needs the catalogue together
        own = jnp.arange(matching.shape[-1]) == index
        others, rivals = jax.lax.top_k(jnp.where(own, -jnp.inf, matching), min(candidates, count) - 1)
        listed = jnp.concatenate([jnp.sum(jnp.where(own, matching, 0), axis=-1, keepdims=True), others], axis=-1)
        logits = rerank_logits(hidden, jnp.concatenate([index, rivals], axis=-1), out)
        if spaces:  # one that is smaller than the list has nobody to fill it with
            logits = jnp.where(listed > _NOBODY, logits, _NOBODY)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        log_prob = logits - normaliser[..., None]
        taught = jnp.sum(jax.nn.softmax(listed, axis=-1) * log_prob, axis=-1) if teacher else 0.0
        return -(1 - teacher) * log_prob[..., 0] - teacher * taught, normaliser

    return in_chunks(nll, out.hidden, batch, chunk)


def _average_logit(
    hidden: Float[Array, "B S D"],
    target: Int[Array, "B S"],
    vectors: Float[Array, "I D"],
    bias: Float[Array, " I"],
    ends: tuple[int, ...],
) -> Float[Array, "B S"]:
    """The mean logit over the items of the target's catalogue; catalogues end at ``ends``."""
    average, begun = None, 0
    for end in ends:
        number = jnp.arange(vectors.shape[0])
        real = ((number >= begun) & (number < end))[:, None]
        mean_vector = jnp.sum(jnp.where(real, vectors, 0), axis=0) / (end - begun)
        mean_bias = jnp.sum(jnp.where(real[:, 0], bias, 0)) / (end - begun)
        logit = jnp.einsum("bsd,d->bs", hidden, mean_vector) + mean_bias
        # The catalogues come in their order.
        average = logit if average is None else jnp.where(target > begun, logit, average)
        begun = end
    assert average is not None
    return average


def _own(logits: Float[Array, "B S I"], index: Int[Array, "B S"], spaces: tuple[int, ...]) -> Float[Array, "B S I"]:
    """The logits of the catalogue that a position's item is in; the others have no probability."""
    if not spaces:
        return logits
    first, last = spaces_of(index[..., None], spaces)
    number = jnp.arange(logits.shape[-1])
    return jnp.where((number >= first) & (number < last), logits, _NOBODY)


def in_chunks(
    nll: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    hidden: Float[Array, "B S D"],
    batch: dict[str, jax.Array],
    chunk: int,
) -> Sums:
    """Sums over the item targets of ``nll(hidden, target)``, (−log probability, log normaliser), ``chunk`` positions at a time."""
    hidden, target, task = in_front(hidden, batch["item_target"], batch["task"])
    total = zero_sums()
    for first in range(0, target.shape[1], chunk):
        part = slice(first, first + chunk)

        def some(part: slice = part) -> Sums:
            found, normaliser = nll(hidden[:, part], target[:, part])
            return sums_of(found, normaliser, target[:, part], task[:, part])

        # The chunks behind all targets are skipped.
        total = jax.tree.map(jnp.add, total, jax.lax.cond(jnp.any(target[:, part] > 0), some, zero_sums))
    return total


def in_front(hidden: jax.Array, target: jax.Array, task: jax.Array) -> list[jax.Array]:
    """The positions of every row with those that have a target first."""
    order = jnp.argsort(target == 0, axis=1, stable=True)
    return [rows_by_index(x, order) for x in (hidden, target, task)]


def sums_of(
    nll: Float[Array, "B S"], normaliser: Float[Array, "B S"], target: Int[Array, "B S"], task: Int[Array, "B S"]
) -> Sums:
    """Sums over the positions whose target is not 0."""
    weight = (target > 0).astype(jnp.float32)
    loss = nll * weight
    by_task = (task[..., None] == jnp.arange(NUM_TASKS)).astype(jnp.float32)
    return Sums(
        loss.sum(),
        jnp.sum(normaliser**2 * weight),
        weight.sum(),
        jnp.einsum("bs,bst->t", loss, by_task, out_sharding=jax.P(None)),
        jnp.einsum("bs,bst->t", weight, by_task, out_sharding=jax.P(None)),
    )


def zero_sums() -> Sums:
    """Nothing lost on nothing."""
    return Sums(jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.zeros(NUM_TASKS), jnp.zeros(NUM_TASKS))

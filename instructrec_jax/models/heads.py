"""What a model gives and what is read from it: hidden states to words, to items, to one vector of a text."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.block import KeysValues
from instructrec_jax.models.sharding import RULES, gathered, lookup


class Sizes(NamedTuple):
    """Table sizes that come from the data, not from the config. All but ``content`` are padded to divide over the mesh."""

    vocab: int  # V
    items: int = 0  # I; 0 = a plain language model
    features: int = 0  # user-feature rows
    content: int = 0  # width of the item features
    # Of several catalogues in one table: where each ends. A target is predicted among the items of its own; () = there is one.
    spaces: tuple[int, ...] = ()

    @property
    def tables(self) -> dict[str, int]:
        """Rows of the tables, by name; all are sharded over ``tensor``."""
        return {"words": self.vocab, "items": self.items, "user features": self.features}


class Memory(NamedTuple):
    """What a model keeps of a prompt that it has read; every segment of a continuing row reads it.

    R rows may continue B prompts, R a multiple of B: row r continues prompt ``r * B // R``. A memory whose prompts do not divide over
    the mesh is on every device.
    """

    past: KeysValues  # [L, B, P, K, H]
    mask: Bool[Array, "B P"]  # which are real
    positions: Int[Array, "B P"]
    following: Int[Array, " B"]  # position of the first continuing token
    cross: KeysValues | None = None  # of the encoder's output
    cross_mask: Bool[Array, "B E"] | None = None
    recent: KeysValues | None = None  # [L, R, N, K, H], what each of the R rows has itself read since
    recent_mask: Bool[Array, "R N"] | None = None
    recent_positions: Int[Array, "R N"] | None = None


class Output(NamedTuple):
    """What the heads need. No logits: those exist only for the positions and candidates that someone asks for."""

    hidden: Float[Array, "B S D"]
    word_head: Float[Array, "V D"]
    word_bias: Float[Array, " V"] | None
    item_vectors: Float[Array, "I D"] | None
    item_bias: Float[Array, " I"] | None
    cache: KeysValues
    cross: KeysValues | None = None
    rerank_direction: Float[Array, " D"] | None = None  # θ of the re-ranking head
    rerank_bias: Float[Array, " I"] | None = None  # its β


def item_logits(hidden: Float[Array, "B S D"], out: Output, count: int) -> Float[Array, "B S I"]:
    """f_i · g + θ_i for all items, float32; rows beyond the ``count`` real items are -1e30 (never ranked, no probability)."""
    assert out.item_bias is not None, "the model has no items"
    logits = jnp.einsum("bsd,id->bsi", hidden.astype(jnp.float32), out.item_vectors, out_sharding=RULES.logits_bsv)
    logits = logits + out.item_bias
    return jnp.where(jnp.arange(logits.shape[-1]) < count, logits, -1e30)


def spaces_of(index: Int[Array, "B S"], spaces: tuple[int, ...]) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """First item of the catalogue that an item is in, and the one behind its last."""
    starts, number = (0, *spaces[:-1]), jnp.zeros_like(index)
    first, last = number, number + spaces[0]
    for start, end in zip(starts[1:], spaces[1:]):
        first, last = (jnp.where(index >= start, new, old) for new, old in ((start, first), (end, last)))
    return first, last


def rerank_logits(hidden: Float[Array, "B S D"], candidates: Int[Array, "B S C"], out: Output) -> Float[Array, "B S C"]:
    """θᵀσ(f_i + g) + β_i of every position's own candidates, float32. ``candidates`` are rows of the item table."""
    assert out.item_vectors is not None and out.rerank_direction is not None and out.rerank_bias is not None
    vectors = lookup(out.item_vectors, candidates, RULES.candidates_bscd)
    together = jax.nn.sigmoid(vectors + hidden.astype(jnp.float32)[:, :, None])
    bias = lookup(out.rerank_bias[:, None], candidates, RULES.candidates_bscd)[..., 0]
    return jnp.einsum("bscd,d->bsc", together, out.rerank_direction) + bias


def word_logits(hidden: Float[Array, "B S D"], out: Output, arch: Architecture) -> Float[Array, "B S V"]:
    """Logits over the vocabulary, float32; rows that only pad the table are -1e30."""
    head = gathered(out.word_head, RULES.table_vd).astype(jnp.float32)
    logits = jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), head, out_sharding=RULES.logits_bsv)
    logits = _finish(logits, out.word_bias, arch)
    if logits.shape[-1] == arch.vocab:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < arch.vocab, logits, -1e30)


def chosen_logits(
    hidden: Float[Array, "B S D"], token: Int[Array, "B S"], out: Output, arch: Architecture
) -> Float[Array, "B S"]:
    """The logit of one word per position, float32, from the word's own row: nothing is picked from [B, S, V]."""
    row = lookup(gathered(out.word_head, RULES.table_vd), token).astype(jnp.float32)
    bias = None if out.word_bias is None else lookup(out.word_bias[:, None], token)[..., 0]
    return _finish(jnp.sum(hidden.astype(jnp.float32) * row, axis=-1), bias, arch)


def word_log_prob(
    hidden: Float[Array, "B S D"], target: Int[Array, "B S"], out: Output, arch: Architecture
) -> Float[Array, "B S"]:
    """log softmax(words)[target], float32."""
    return chosen_logits(hidden, target, out, arch) - jax.nn.logsumexp(word_logits(hidden, out, arch), axis=-1)


def _finish(logits: jax.Array, bias: jax.Array | None, arch: Architecture) -> jax.Array:
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    return arch.final_softcap * jnp.tanh(logits / arch.final_softcap) if arch.final_softcap else logits


def pooled(hidden: Float[Array, "B S D"], real: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """Mean over the real tokens, scaled to length 1: an encoder's feature of a text (Sentence-BERT, arXiv 1908.10084)."""
    weight = real.astype(jnp.float32)[..., None]
    mean = jnp.sum(hidden.astype(jnp.float32) * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)

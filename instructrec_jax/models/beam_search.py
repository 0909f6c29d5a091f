"""Beam search over the loop of ``models/generate.py``: K hypotheses of every row, side by side.

The beams of a row are rows of the model's batch, R = B·K, on the device of their row. They share the prompt, so that only the keys and
values of new tokens move when a beam goes on from another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.models.block import KeysValues
from instructrec_jax.models.language_model import Memory
from instructrec_jax.models.sharding import rows_by_index

if TYPE_CHECKING:
    from instructrec_jax.models.generate import Decoding, Loop

NEVER = -1e9  # score of what must not be chosen


class Hypotheses(NamedTuple):
    """Some of every row, the best first."""

    tokens: Int[Array, "B K N"]
    length: Int[Array, "B K"]  # without the stop token
    log_prob: Float[Array, "B K"]
    score: Float[Array, "B K"]  # log_prob / tokens ** length_penalty; NEVER = not finished


class State(NamedTuple):
    """Between two steps."""

    token: Int[Array, "B K"]  # newest token of every running hypothesis
    parent: Int[Array, "B K"]  # the beam that it went on from
    running: Hypotheses
    finished: Hypotheses
    open: Bool[Array, " B"]  # whether the row may still find a better one


def kept(kind: Decoding) -> int:
    """Continuations looked at per step: so many that ``beams`` are left even if every beam stops in every way it can."""
    return max(2, 1 + len(kind.stop)) * kind.beams


def search(
    loop: Loop, kind: Decoding, logits: Float[Array, "B V"], live: Bool[Array, " B"], length_penalty: jax.Array
) -> tuple[Int[Array, "B N"], Int[Array, " B"], Float[Array, " B"]]:
    """The best hypothesis of every row: tokens, length, log probability. As transformers' ``generate(num_beams=K)``.

    A hypothesis finishes if it stops among the K best continuations of its step, or is among them when ``max_new`` is reached. A row is
    done when K have finished and the best running one, scored at its present length, is not better than the worst of them.

    Args:
        loop: over rows of beams (see ``of_beams``).
        kind: its ``max_new``, ``beams``, ``stop`` and ``pad``.
        logits: of the first token, of rows.
        live: rows that want an answer.
        length_penalty: see ``Decoding``.
    """
    n, width, vocab = kind.max_new, kind.beams, logits.shape[-1]
    stop_tokens = jnp.asarray(kind.stop, jnp.int32)

    def take(state: State, logits: jax.Array, step: jax.Array) -> State:
        """The K best continuations by token number ``step``, and what has finished."""
        # logits: [B, K, V] or, at first, [B, 1, V] for beams that differ in nothing but their score.
        total = jax.nn.log_softmax(logits, axis=-1) + state.running.log_prob[..., None]
        best, index = jax.lax.top_k(total.reshape(total.shape[0], -1), kept(kind))
        parent, token = index // vocab, index % vocab
        tokens = rows_by_index(state.running.tokens, parent)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None], step, axis=2)
        stops = jnp.any(token[..., None] == stop_tokens, axis=-1)
        ends = stops | (step + 1 == n)
        penalty = (step + 1).astype(jnp.float32) ** length_penalty
        finishes = ends & (jnp.arange(kept(kind)) < width) & state.open[:, None]
        lengths = (step + 1 - stops).astype(jnp.int32)
        found = Hypotheses(tokens, lengths, best, jnp.where(finishes, best / penalty, NEVER))

        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, found)
        _, order = jax.lax.top_k(both.score, width)
        finished = jax.tree.map(lambda x: rows_by_index(x, order), both)

        _, order = jax.lax.top_k(jnp.where(ends, best + NEVER, best), width)
        token, parent, running = jax.tree.map(lambda x: rows_by_index(x, order), (token, parent, found))
        better = running.log_prob[:, 0] / penalty > jnp.min(finished.score, axis=1)
        return State(token, parent, running, finished, state.open & better)

    def body(carry: Any) -> Any:
        step, state, cache = carry
        cache = reordered(cache, state.parent, loop.border)
        logits, cache = loop.advance(cache, _fold(state.token, 0), step)
        return step + 1, take(state, _unfold(logits, 0, width), step + 1), cache

    def goes_on(carry: Any) -> jax.Array:
        step, state, _ = carry
        return (step + 1 < n) & jnp.any(state.open)

    none = jnp.zeros_like(live, jnp.float32)[:, None] + jnp.full((width,), NEVER)
    tokens = jnp.zeros_like(live, jnp.int32)[:, None, None] + jnp.full((width, n), kind.pad, jnp.int32)
    zero = jnp.zeros_like(none, jnp.int32)
    finished = Hypotheses(tokens, zero, none, none)
    # All beams are the same at first: only one of them may go on.
    running = finished._replace(log_prob=jnp.where(jnp.arange(width) == 0, 0.0, none))
    start = jnp.int32(0)
    state = take(State(zero, zero, running, finished, live), logits[:, None], start)
    _, state, _ = jax.lax.while_loop(goes_on, body, (start, state, loop.cache))

    lengths = jnp.where(live, state.finished.length[:, 0], 0)
    tokens = jnp.where(jnp.arange(n) < lengths[:, None], state.finished.tokens[:, 0], kind.pad)
    return tokens, lengths, jnp.where(live, state.finished.log_prob[:, 0], 0.0)


def of_beams(memory: Memory, width: int) -> Memory:
    """Every row ``width`` times, side by side."""

    def repeated(x: jax.Array, axis: int) -> jax.Array:
        return jnp.repeat(x, width, axis=axis, total_repeat_length=x.shape[axis] * width, out_sharding=P(*_spec(x)))

    rows_at = {name: int(name in ("past", "cross", "recent")) for name in Memory._fields}
    return Memory(
        **{n: jax.tree.map(lambda x, at=at: repeated(x, at), getattr(memory, n)) for n, at in rows_at.items()}
    )


def reordered(cache: KeysValues, parent: Int[Array, "B K"], border: int) -> KeysValues:
    """Each beam with its parent's keys and values behind the prompt, which ends at ``border``."""

    def one(whole: jax.Array) -> jax.Array:
        new = _unfold(jax.lax.slice_in_dim(whole, border, whole.shape[2], axis=2), 1, parent.shape[1])
        moved = jax.vmap(lambda row, at: row.at[:, at].get(), in_axes=(1, 0), out_axes=1)(new, parent)
        return jax.lax.dynamic_update_slice_in_dim(whole, _fold(moved, 1), border, axis=2)

    return jax.tree.map(one, cache)


def _spec(x: jax.Array) -> tuple:
    return tuple(jax.typeof(x).sharding.spec)


def _fold(x: jax.Array, axis: int) -> jax.Array:
    """``[..., B, K, ...]`` as ``[..., R, ...]``, local to every shard of the batch."""
    spec = _spec(x)
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jnp.reshape(x, shape, out_sharding=P(*spec[: axis + 1], *spec[axis + 2 :]))


def _unfold(x: jax.Array, axis: int, width: int) -> jax.Array:
    """The inverse of ``_fold``."""
    spec = _spec(x)
    shape = (*x.shape[:axis], x.shape[axis] // width, width, *x.shape[axis + 1 :])
    return jnp.reshape(x, shape, out_sharding=P(*spec[: axis + 1], None, *spec[axis + 1 :]))

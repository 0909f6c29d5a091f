"""Beam search that can only produce catalogue items: for catalogues that are too large to score whole.

At every step the W likeliest beams of each request go on along the edges of the catalogue's trie; an edge is open if an allowed item lies
behind it. The trie is arrays of a size class, and allow sets are an argument: neither items that come and go nor another request's
set compiles again. All beams of a request continue its prompt's keys and values, which are neither copied nor moved.

A score is the item's exact log P(text | prompt). What a search may miss is an item whose beginning fell out of the W beams; with as
many beams as the trie is wide, the result is that of ``trie``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.models.block import KeysValues
from instructrec_jax.models.language_model import LanguageModel, apply, word_logits
from instructrec_jax.models.sharding import BATCH, rows_by_index
from instructrec_jax.scoring.buckets import bucket
from instructrec_jax.scoring.forest import Forest
from instructrec_jax.scoring.trees import Read, spread

NEVER = -1e30  # score of a beam that does not exist


class Edges(NamedTuple):
    """A trie as edges in the order of their parents; node 0 is the root. Padded to size classes."""

    token: Int[Array, " edges"]
    child: Int[Array, " edges"]  # node; -1 = the edge ends an item
    leaf: Int[Array, " edges"]  # the leaf that the edge ends in, else 0
    low: Int[Array, " edges"]  # leaves behind the edge: [low, high)
    high: Int[Array, " edges"]
    start: Int[Array, " nodes"]  # a node's edges: [start, start + count)
    count: Int[Array, " nodes"]
    leaf_of: Int[Array, " items"]  # leaf of every item; -1 = no such item


class Widths(NamedTuple):
    """What is compiled for: powers of two that hold a catalogue."""

    root: int  # edges of the root
    inner: int  # most edges of another node
    depth: int  # most tokens of an item


def edges(forest: Forest, items: int) -> tuple[Edges, Widths]:
    """The edges of a catalogue's forest on the host, for ``items`` places of items."""
    n, leaves = len(forest), len(forest.leaf_token)
    bounds = np.searchsorted(forest.leaf_parent, np.arange(n + 1))  # leaves of nodes [i, ...) start at bounds[i]
    parent = np.concatenate([forest.parent, forest.leaf_parent]) + 1 if n + leaves else np.zeros(0, np.int64)
    order = np.argsort(parent, kind="stable")
    none, ends = np.zeros(leaves, np.int64), np.arange(leaves)
    columns = {
        "token": np.concatenate([forest.tokens, forest.leaf_token]),
        "child": np.concatenate([np.arange(1, n + 1), none - 1]),
        "leaf": np.concatenate([np.zeros(n, np.int64), ends]),
        "low": np.concatenate([bounds[:n], ends]),
        "high": np.concatenate([bounds[forest.until] if n else bounds[:0], ends + 1]),
    }
    count = np.bincount(parent, minlength=n + 1)
    start = np.concatenate([[0], np.cumsum(count)[:-1]])
    room, nodes = bucket(n + leaves, steps=1), bucket(n + 1, steps=1)
    leaf_of = np.full(items, -1, np.int32)
    leaf_of[: len(forest.leaf_of)] = forest.leaf_of
    depth = int(forest.depth.max(initial=-1)) + 2
    widths = Widths(*(bucket(most, steps=1) for most in (int(count[0]), int(count[1:].max(initial=1)), depth)))
    padded = {k: np.pad(v[order], (0, room - n - leaves)).astype(np.int32) for k, v in columns.items()}
    tables = {k: np.pad(v, (0, nodes - n - 1)).astype(np.int32) for k, v in (("start", start), ("count", count))}
    columns = {**padded, **tables, "leaf_of": leaf_of}
    return Edges(**cast(dict[str, Any], columns)), widths


class State(NamedTuple):
    """Between two steps: running beams, and the best items so far."""

    node: Int[Array, "B W"]
    token: Int[Array, "B W"]
    parent: Int[Array, "B W"]  # the beam that each went on from
    score: Float[Array, "B W"]  # NEVER = no beam
    leaf: Int[Array, "B W"]
    found: Float[Array, "B W"]  # NEVER = fewer items were found


def beam_search(model: LanguageModel) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The search of a model, to be jitted (``widths`` and ``beams`` are static).

    ``(variables, read, trie, allowed [B, items], content, widths=, beams=)`` gives log probabilities and leaves ``[B, W]``, best first;
    where fewer items are allowed, or were found, ``NEVER`` and -1. ``read`` has its ``logits``.
    """
    arch = model.arch

    def search(
        variables: Any, read: Read, trie: Edges, allowed: jax.Array, content: jax.Array, *, widths: Widths, beams: int
    ) -> tuple[jax.Array, jax.Array]:
        prompts, rows = read.hidden.shape[0], read.hidden.shape[0] * beams
        first = jax.typeof(read.hidden).sharding.spec[0]
        open_before = _open_before(trie, allowed)

        def of(table: jax.Array, index: jax.Array) -> jax.Array:
            """Entries of a table that lies on every device, laid out as the requests are."""
            return table.at[index].get(out_sharding=P(first, *(None,) * (index.ndim - 1)))

        def flat_of(x: jax.Array) -> jax.Array:
            return jnp.reshape(x, (prompts, -1), out_sharding=P(first, None))

        def expand(state: State, logits: Float[Array, "B K V"], width: int) -> State:
            """The best ways on from K beams, each along at most ``width`` edges."""
            log_prob = jax.nn.log_softmax(logits, axis=-1)
            offset = jnp.arange(width)
            edge = jnp.minimum(of(trie.start, state.node)[..., None] + offset, trie.token.shape[0] - 1)
            gained = jax.vmap(jax.vmap(lambda row, at: row.at[at].get()))(log_prob, of(trie.token, edge))
            flat = flat_of(edge)
            behind = rows_by_index(open_before, of(trie.high, flat)) - rows_by_index(open_before, of(trie.low, flat))
            real = (offset < of(trie.count, state.node)[..., None]) & (state.score > NEVER)[..., None]
            real = flat_of(real) & (behind > 0)
            score = jnp.where(real, flat_of(state.score[..., None] + gained), NEVER)

            ends = of(trie.child, flat) < 0
            running, at = _best(jnp.where(ends, NEVER, score), beams)
            done, which = _best(jnp.where(ends, score, NEVER), beams)
            found, order = jax.lax.top_k(jnp.concatenate([state.found, done], axis=1), beams)
            leaves = jnp.concatenate([state.leaf, of(trie.leaf, rows_by_index(flat, which))], axis=1)
            chosen = rows_by_index(flat, at)
            return State(
                of(trie.child, chosen),
                of(trie.token, chosen),
                at // width,
                running,
                rows_by_index(leaves, order),
                found,
            )

        def advance(state: State, cache: KeysValues, step: jax.Array) -> tuple[Float[Array, "B W V"], KeysValues]:
            """Read every beam's newest token, number ``step`` of its item."""
            token = jnp.reshape(state.token, (rows, 1), out_sharding=P(first or BATCH, None))
            following = spread(read.memory.following, rows)[:, None]
            places = jnp.zeros_like(following) + jnp.arange(widths.depth, dtype=jnp.int32)
            memory = read.memory._replace(recent=cache, recent_mask=places < step, recent_positions=following + places)
            batch = {"tokens": token, "segment_ids": jnp.ones_like(token), "positions": following + step}
            out = apply(model, variables, batch, content, memory)
            write = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, step, axis=2)  # noqa: E731
            logits = jax.reshard(word_logits(out.hidden, out, arch), P(first or BATCH, None, None))
            if first is None:
                logits = jax.reshard(logits, P(None, None, None))
            wide = jnp.reshape(logits, (prompts, beams, logits.shape[-1]), out_sharding=P(first, None, None))
            return wide, jax.tree.map(write, cache, out.cache)

        def body(carry: tuple[jax.Array, State, KeysValues]) -> tuple[jax.Array, State, KeysValues]:
            step, state, cache = carry
            cache = jax.tree.map(lambda x: _moved(x, state.parent), cache)
            logits, cache = advance(state, cache, step)
            return step + 1, expand(state, logits, widths.inner), cache

        def goes_on(carry: tuple[jax.Array, State, KeysValues]) -> jax.Array:
            step, state, _ = carry
            # Scores only fall: a beam below the worst of W found items cannot become one of them.
            return (step < widths.depth) & jnp.any(state.score[:, 0] > state.found[:, -1])

        zero = jax.reshard(jnp.zeros((prompts, beams), jnp.int32), P(first, None))
        never = zero.astype(jnp.float32) + NEVER
        root = State(zero[:, :1], zero[:, :1], zero[:, :1], zero[:, :1].astype(jnp.float32), zero, never)
        state = expand(root, cast(jax.Array, read.logits), widths.root)
        cache = _empty_cache(read, rows, widths.depth, first)
        # The first beams come from one root: nothing of theirs is in the cache yet, so their parent may be any.
        state = state._replace(parent=jnp.zeros_like(state.parent))
        _, state, _ = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, cache))
        return state.found, jnp.where(state.found > NEVER, state.leaf, -1)

    return search


def _open_before(trie: Edges, allowed: Bool[Array, "B items"]) -> Int[Array, "B leaves1"]:
    """Number of leaves before each that an allowed item ends in."""
    room = trie.token.shape[0]
    real = allowed & (trie.leaf_of >= 0)
    leaf = jnp.where(trie.leaf_of >= 0, trie.leaf_of, room)
    hits = jax.vmap(lambda row: jnp.zeros((room + 1,), jnp.int32).at[leaf].max(row.astype(jnp.int32)))(real)
    return jnp.pad(jnp.cumsum(hits[:, :room], axis=1), ((0, 0), (1, 0)))


def _best(score: Float[Array, "B M"], count: int) -> tuple[Float[Array, "B W"], Int[Array, "B W"]]:
    """The ``count`` largest; where there are fewer, ``NEVER``."""
    short = max(0, count - score.shape[1])
    return jax.lax.top_k(jnp.pad(score, ((0, 0), (0, short)), constant_values=NEVER), count)


def _moved(cache: Float[Array, "L R N K H"], parent: Int[Array, "B W"]) -> Float[Array, "L R N K H"]:
    """Each beam with its parent's keys or values."""
    spec = tuple(jax.typeof(cache).sharding.spec)
    prompts, beams = parent.shape
    shape = cache.shape
    rows = jax.typeof(parent).sharding.spec[0]
    if rows is None:  # one prompt, whose beams lie over the mesh: they may go on from one on another device
        whole = jax.reshard(cache, P(spec[0], None, *spec[2:]))
        return jax.reshard(whole.at[:, parent[0]].get(), P(*spec))
    wide = jnp.reshape(cache, (shape[0], prompts, beams, *shape[2:]), out_sharding=P(spec[0], spec[1], None, *spec[2:]))
    moved = jax.vmap(lambda row, at: row.at[:, at].get(), in_axes=(1, 0), out_axes=1)(wide, parent)
    return jnp.reshape(moved, shape, out_sharding=P(*spec))


def _empty_cache(read: Read, rows: int, depth: int, first: Any) -> KeysValues:
    def one(x: jax.Array) -> jax.Array:
        spec = tuple(jax.typeof(x).sharding.spec)
        shape = (x.shape[0], rows, depth, *x.shape[3:])
        return jax.reshard(jnp.zeros(shape, x.dtype), P(spec[0], first or BATCH, None, *spec[3:]))

    return jax.tree.map(one, read.memory.past)

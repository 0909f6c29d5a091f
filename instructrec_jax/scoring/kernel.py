"""The jitted part of scoring: hidden states of trees of tokens, and the log probability of every leaf.

Two layouts of the same trees. *Packed*: a row holds prompts and their candidates, one forward pass. *Batched*: a prompt is read once,
and rows of candidates (a block of their forest each) continue its keys and values, which are contracted as they lie, not repeated.
Logits over the vocabulary exist for the nodes that have children, ``CHUNK`` of them at a time; a leaf or a child is scored by its own
row of the word table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.config import ModelConfig
from instructrec_jax.models import attention
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.heads import chosen_logits
from instructrec_jax.models.language_model import (
    LanguageModel,
    Memory,
    Output,
    Sizes,
    apply,
    item_logits,
    read_prompt,
    word_logits,
)
from instructrec_jax.models.sharding import BATCH, rows_by_index

CHUNK = 64  # nodes whose logits [B, CHUNK, V] exist at one time


class Tree(NamedTuple):
    """What is read from the nodes of rows; an index of S (or M) is the root, whose path is empty."""

    tokens: Int[Array, "B S"]
    until: Int[Array, "B S"]
    parent_read: Int[Array, "B S"]  # read of each node's parent; M = the node is not scored
    leaf_node: Int[Array, "B E"]  # node whose path leads to the leaf
    leaf_read: Int[Array, "B E"]
    leaf_token: Int[Array, "B E"]


class Read(NamedTuple):
    """A batch of prompts that were read."""

    hidden: Float[Array, "B 1 D"]
    memory: Memory
    total: Float[Array, "B 1"]  # log Σ exp of the first token's logits
    logits: Float[Array, "B 1 V"] | None = None


def leaf_scores(
    hidden: Float[Array, "B M D"],
    count: jax.Array,
    tree: Tree,
    out: Output,
    arch: Architecture,
    raw: bool,
    root_total: Float[Array, "B 1"] | None = None,
) -> Float[Array, "B E"]:
    """Log P of every leaf's path from where scoring starts, float32; ``raw``: the leaf's own logit alone.

    Args:
        hidden: states of the nodes that have children.
        count: how many of them are real in the fullest row.
        tree: what to read.
        out: the heads.
        arch: the model.
        raw: no softmax: for labels that are compared with each other alone.
        root_total: the last of ``hidden`` is a root whose log normaliser is this; ``count`` leaves it out.
    """
    leaf = chosen_logits(rows_by_index(hidden, tree.leaf_read), tree.leaf_token, out, arch)
    if raw:
        return leaf
    if root_total is None:
        total = _log_normalisers(hidden, count, out, arch)
    else:
        total = jnp.concatenate([_log_normalisers(hidden[:, :-1], count, out, arch), root_total], axis=1)
    reads = hidden.shape[1]
    scored = tree.parent_read < reads
    parent = jnp.minimum(tree.parent_read, reads - 1)
    node = chosen_logits(rows_by_index(hidden, parent), tree.tokens, out, arch) - rows_by_index(total, parent)
    node = jnp.where(scored, node, 0.0)
    ancestors = attention.tree_mask(tree.until).astype(jnp.float32)
    # In full float32: a path is a sum of up to a hundred terms, and a TPU would round each to bfloat16.
    path = jnp.einsum("bst,bt->bs", ancestors, node, precision=jax.lax.Precision.HIGHEST)
    path = jnp.pad(path, ((0, 0), (0, 1)))  # the root
    return rows_by_index(path, tree.leaf_node) + leaf - rows_by_index(total, tree.leaf_read)


def _log_normalisers(
    hidden: Float[Array, "B M D"], count: jax.Array, out: Output, arch: Architecture
) -> Float[Array, "B M"]:
    """log Σ exp of the word logits of the first ``count`` nodes (0 behind them), a chunk at a time."""
    size = hidden.shape[1]
    chunk = min(CHUNK, size)
    room = -size % chunk
    padded = jnp.pad(hidden, ((0, 0), (0, room), (0, 0)))

    def body(number: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, number * chunk, chunk, axis=1)
        found = jax.nn.logsumexp(word_logits(part, out, arch), axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(total, found, number * chunk, axis=1)

    start = jnp.sum(jnp.zeros_like(padded, jnp.float32), axis=-1)
    chunks = jnp.minimum((count + chunk - 1) // chunk, (size + room) // chunk)
    return jax.lax.fori_loop(0, chunks, body, start)[:, :size]


class Kernel:
    """The jitted functions of one model. All arrays of a call are on the mesh; shapes are the caller's choice."""

    def __init__(self, config: ModelConfig, arch: Architecture, sizes: Sizes, num_items: int):
        model = LanguageModel(arch, sizes, config)
        self.items = jax.jit(_items(model, num_items))
        self.packed = jax.jit(_packed(model), static_argnames="raw")
        self.read = jax.jit(_read(model), static_argnames=("alone", "logits"))
        self.blocks = jax.jit(_blocks(model), static_argnames=("group", "raw"))
        self.every = jax.jit(_every(model), static_argnames=("group", "rank"))

    def compilations(self) -> dict[str, int]:
        """How often each function was compiled so far."""
        names = ("items", "packed", "read", "blocks", "every")
        return {name: getattr(self, name)._cache_size() for name in names}


def _items(model: LanguageModel, num_items: int) -> Callable[..., jax.Array]:
    def step(variables: Any, batch: dict[str, jax.Array], last: jax.Array, content: jax.Array) -> jax.Array:
        """log softmax over the catalogue, ``[B, I]``, of padded prompts."""
        hidden, _, out = read_prompt(model, variables, batch, last, content)
        return jax.nn.log_softmax(item_logits(hidden, out, num_items)[:, 0], axis=-1)

    return step


def _packed(model: LanguageModel) -> Callable[..., jax.Array]:
    def step(
        variables: Any,
        batch: dict[str, jax.Array],
        tree: dict[str, jax.Array],
        count: jax.Array,
        content: jax.Array,
        *,
        raw: bool,
    ) -> jax.Array:
        """Leaf scores ``[B, E]`` of packed rows (``rows.Packed``)."""
        out = apply(model, variables, batch, content)
        size = batch["tokens"].shape[1]
        read_of = jnp.pad(tree["read_of"], ((0, 0), (0, 1)), constant_values=size)
        what = Tree(
            batch["tokens"], batch["until"], rows_by_index(read_of, tree["parent"]),
            tree["leaf_node"], rows_by_index(read_of, tree["leaf_node"]), tree["leaf_token"],
        )  # fmt: skip
        return leaf_scores(rows_by_index(out.hidden, tree["reads"]), count, what, out, model.arch, raw)

    return step


def _read(model: LanguageModel) -> Callable[..., Read]:
    def step(
        variables: Any, batch: dict[str, jax.Array], last: jax.Array, content: jax.Array, *, alone: bool, logits: bool
    ) -> Read:
        """Prompts, one per row; ``alone``: the first row only, on every device."""
        hidden, memory, out = read_prompt(model, variables, batch, last, content)
        words = jax.reshard(word_logits(hidden, out, model.arch), P(BATCH, None, None))
        total = jax.nn.logsumexp(words, axis=-1)
        if not alone:
            return Read(hidden, memory, total, words if logits else None)

        def first(x: jax.Array, axis: int) -> jax.Array:
            spec = list(jax.typeof(x).sharding.spec)
            spec[axis] = None
            return jax.lax.slice_in_dim(jax.reshard(x, P(*spec)), 0, 1, axis=axis)

        rows_at = {name: int(name in ("past", "cross", "recent")) for name in Memory._fields}
        kept = {n: jax.tree.map(lambda x, at=at: first(x, at), getattr(memory, n)) for n, at in rows_at.items()}
        return Read(first(hidden, 0), Memory(**kept), first(total, 0), first(words, 0) if logits else None)

    return step


def _continue(
    model: LanguageModel,
    variables: Any,
    read: Read,
    blocks: dict[str, jax.Array],
    content: jax.Array,
    raw: bool,
) -> Float[Array, "R E"]:
    """Leaf scores of R blocks, R / B for each of the B prompts."""
    rows, size = blocks["tokens"].shape
    real = blocks["until"] > 0
    batch = {
        "tokens": blocks["tokens"],
        "until": blocks["until"],
        "segment_ids": real.astype(jnp.int32),
        "positions": blocks["depth"] + spread(read.memory.following, rows)[:, None],
    }
    out = apply(model, variables, batch, content, read.memory)
    hidden = jnp.concatenate([out.hidden, spread(read.hidden, rows)], axis=1)
    # The root is the last read: a block that is not full reads padding before it.
    tree = Tree(
        blocks["tokens"], blocks["until"], jnp.where(real, blocks["parent"], size + 1),
        blocks["leaf_parent"], blocks["leaf_parent"], blocks["leaf_token"],
    )  # fmt: skip
    return leaf_scores(hidden, jnp.int32(size), tree, out, model.arch, raw, spread(read.total, rows))


def _blocks(model: LanguageModel) -> Callable[..., jax.Array]:
    def step(
        variables: Any,
        read: Read,
        blocks: dict[str, jax.Array],
        number: jax.Array,
        content: jax.Array,
        *,
        group: int,
        raw: bool,
    ) -> jax.Array:
        """Leaf scores ``[B, n * E]`` of each request's own blocks.

        Args:
            variables, read, content: the model and what it has read.
            blocks: ``[B, n, S]`` and ``[B, n, E]``.
            number: how many of the n are real in the fullest row, filled up to a multiple of ``group``.
            group: blocks of a request at a time.
            raw: see ``leaf_scores``.
        """

        def part(at: jax.Array) -> dict[str, jax.Array]:
            cut = {k: jax.lax.dynamic_slice_in_dim(v, at * group, group, axis=1) for k, v in blocks.items()}
            return {k: _folded(v) for k, v in cut.items()}

        n, leaves = blocks["leaf_token"].shape[1:]
        return _stream(model, variables, read, part, number // group, group, n * leaves, content, raw)

    return step


def _every(model: LanguageModel) -> Callable[..., Any]:
    def step(
        variables: Any,
        read: Read,
        blocks: dict[str, jax.Array],
        number: jax.Array,
        slots: Int[Array, " I"],
        content: jax.Array,
        allowed: jax.Array | None,
        *,
        group: int,
        rank: int,
    ) -> Any:
        """Scores of the whole catalogue for B prompts: ``[B, I]``, or with ``rank`` the best items' (scores, indices).

        Args:
            variables, read, content: the model and what it has read.
            blocks: of the catalogue's trie, ``[n, S]`` each, on every device.
            number: how many of the n blocks are real, a multiple of ``group``.
            slots: place of every item's leaf in the flattened ``[n, E]``; -1 = no such item.
            allowed: ``[B, I]``, which items may be ranked; None = all.
            group: blocks at a time.
            rank: how many of the best; 0 = all scores.
        """
        prompts = read.hidden.shape[0]
        n, leaves = blocks["leaf_token"].shape

        def part(at: jax.Array) -> dict[str, jax.Array]:
            cut = {k: jax.lax.dynamic_slice_in_dim(v, at * group, group) for k, v in blocks.items()}
            return {k: jax.reshard(_tiled(v, prompts), P(BATCH, None)) for k, v in cut.items()}

        scores = _stream(model, variables, read, part, number // group, group, n * leaves, content, False)
        of_item = scores.at[:, jnp.maximum(slots, 0)].get(out_sharding=P(_first_axis(read.hidden), None))
        of_item = jnp.where(slots >= 0, of_item, -jnp.inf)
        if allowed is not None:
            of_item = jnp.where(allowed, of_item, -jnp.inf)
        return jax.lax.top_k(of_item, rank) if rank else of_item

    return step


def _stream(
    model: LanguageModel,
    variables: Any,
    read: Read,
    part: Callable[[jax.Array], dict[str, jax.Array]],
    rounds: jax.Array,
    group: int,
    width: int,
    content: jax.Array,
    raw: bool,
) -> Float[Array, "B W"]:
    """Leaf scores of B prompts' blocks, ``group`` blocks of every prompt in a round; as many rounds as there are, not as there is room."""
    prompts, rows = read.hidden.shape[0], _first_axis(read.hidden)

    def body(at: jax.Array, scores: jax.Array) -> jax.Array:
        blocks = part(at)
        found = _continue(model, variables, read, blocks, content, raw)
        if rows is None:  # one prompt on every device, its blocks over the mesh
            found = jax.reshard(found, P(None, None))
        found = jnp.reshape(found, (prompts, group * found.shape[1]), out_sharding=P(rows, None))
        return jax.lax.dynamic_update_slice_in_dim(scores, found, at * found.shape[1], axis=1)

    empty = jax.reshard(jnp.zeros((prompts, width), jnp.float32), P(rows, None))
    return jax.lax.fori_loop(0, rounds, body, empty)


def _folded(x: jax.Array) -> jax.Array:
    """``[B, group, ...]`` as rows of a batch."""
    first = jax.typeof(x).sharding.spec[0]
    flat = jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=P(first, None))
    return flat if first is not None else jax.reshard(flat, P(BATCH, None))


def _first_axis(x: jax.Array) -> Any:
    return jax.typeof(x).sharding.spec[0]


def _tiled(x: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(x[None], (count, *x.shape)).reshape(count * x.shape[0], *x.shape[1:])


def spread(x: Float[Array, "B ..."], rows: int) -> Float[Array, "R ..."]:
    """Each of B rows R / B times, side by side, laid out like rows of a batch."""
    count = x.shape[0]
    if count == rows:
        return x
    spec = tuple(jax.typeof(x).sharding.spec)
    wide = jnp.broadcast_to(x[:, None], (count, rows // count, *x.shape[1:]), out_sharding=P(spec[0], None, *spec[1:]))
    wide = jnp.reshape(wide, (rows, *x.shape[1:]), out_sharding=P(*spec))
    return wide if spec[0] is not None else jax.reshard(wide, P(BATCH, *spec[1:]))

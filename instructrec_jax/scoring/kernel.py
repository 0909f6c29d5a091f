"""The jitted functions of scoring.

Two layouts of the same trees. *Packed*: a row holds prompts and their candidates, one forward pass. *Batched*: a prompt is read once,
and rows of candidates (a block of their forest each) continue its keys and values, which are contracted as they lie, not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.config import ModelConfig
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import (
    LanguageModel,
    Memory,
    Sizes,
    apply,
    item_logits,
    read_prompt,
    rerank_logits,
    word_logits,
)
from instructrec_jax.models.sharding import BATCH, rows_by_index
from instructrec_jax.scoring.buckets import bucket
from instructrec_jax.scoring.constrained import beam_search
from instructrec_jax.scoring.trees import Read, Tree, leaf_scores, spread

RERANKED = 128  # candidates of a prompt whose sums f + g exist at a time
ROOMY = 256  # places of a memory at least, and then powers of two: what continues it compiles once per size


class Kernel:
    """The jitted functions of one model. All arrays of a call are on the mesh; shapes are the caller's choice."""

    def __init__(self, config: ModelConfig, arch: Architecture, sizes: Sizes, num_items: int):
        model = LanguageModel(arch, sizes, config)
        self.items = jax.jit(_items(model, num_items))
        self.rerank = jax.jit(_rerank(model))
        self.packed = jax.jit(_packed(model), static_argnames="raw")
        self.read = jax.jit(_read(model), static_argnames=("alone", "logits"))
        self.blocks = jax.jit(_blocks(model), static_argnames=("group", "raw"))
        self.every = jax.jit(_every(model), static_argnames=("group", "rank"))
        self.beams = jax.jit(beam_search(model), static_argnames=("widths", "beams"))

    def compilations(self) -> dict[str, int]:
        """How often each function was compiled so far."""
        names = ("items", "rerank", "packed", "read", "blocks", "every", "beams")
        return {name: getattr(self, name)._cache_size() for name in names}


def _items(model: LanguageModel, num_items: int) -> Callable[..., jax.Array]:
    def step(variables: Any, batch: dict[str, jax.Array], last: jax.Array, content: jax.Array) -> jax.Array:
        """log softmax over the catalogue, ``[B, I]``, of padded prompts."""
        hidden, _, out = read_prompt(model, variables, batch, last, content)
        return jax.nn.log_softmax(item_logits(hidden, out, num_items)[:, 0], axis=-1)

    return step


def _rerank(model: LanguageModel) -> Callable[..., jax.Array]:
    def step(
        variables: Any, batch: dict[str, jax.Array], last: jax.Array, candidates: Int[Array, "B C"], content: jax.Array
    ) -> Float[Array, "B C"]:
        """Re-ranking logits of padded prompts' candidates, ``RERANKED`` of every prompt at a time: [B, C, D] never exists."""
        hidden, _, out = read_prompt(model, variables, batch, last, content)
        rows, count = candidates.shape
        parts = jnp.moveaxis(candidates.reshape(rows, count // RERANKED, 1, RERANKED), 1, 0)
        found = jax.lax.map(lambda part: rerank_logits(hidden, part, out), parts)
        return jnp.moveaxis(found, 0, 1).reshape(rows, count)

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
        memory = _roomy(memory)
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


def _roomy(memory: Memory) -> Memory:
    """The prompt's part of a memory padded to a size class; what pads it is masked."""

    def padded(x: Any, axis: int) -> Any:
        room = bucket(x.shape[axis], ROOMY, steps=1) - x.shape[axis]
        return jnp.pad(x, [(0, room if at == axis else 0) for at in range(x.ndim)])

    if memory.cross is not None:  # the encoder's output; the decoder's own past is its start token
        cross = jax.tree.map(lambda x: padded(x, 2), memory.cross)
        return memory._replace(cross=cross, cross_mask=padded(memory.cross_mask, 1))
    return memory._replace(
        past=jax.tree.map(lambda x: padded(x, 2), memory.past),
        mask=padded(memory.mask, 1),
        positions=padded(memory.positions, 1),
    )


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

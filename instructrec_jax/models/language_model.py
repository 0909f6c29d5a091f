"""A language model that reads words, items and user features, answers in words, and ranks the whole catalogue.

Item i has the vector f_i = W c_i + e_i (content projection + learned part) and the bias θ_i. It enters the text as the soft token
f_i, and the *matching head* scores it against the hidden state g of the position that reads the instruction:

    R_i = softmax_i(f_i · g + θ_i)                              over the whole catalogue

and, if the config asks for one, the *re-ranking head* scores it beside the other candidates of a request:

    P_i = softmax_i(θᵀσ(f_i + g) + β_i)                         over candidates

A new item needs only its content c_i. Words are predicted by the word table (tied or not) from the same hidden states.

A model *reads* a prompt (``read``) and *continues* it (``memory``); a decoder keeps the prompt's keys and values, an encoder-decoder
the encoder's output and its first decoder position. Who scores or generates need not know which it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.config import ModelConfig
from instructrec_jax.models import attention
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.block import stack
from instructrec_jax.models.heads import (
    Memory,
    Output,
    Sizes,
    item_logits,
    pooled,
    rerank_logits,
    word_log_prob,
    word_logits,
)
from instructrec_jax.models.parts import dropout, norm, normal, param
from instructrec_jax.models.rows import Batch, plain_batch, split_rows, start_row
from instructrec_jax.models.sharding import MESH_AXES, RULES, gathered, lookup, lookup_stored, padded

PLAIN = ModelConfig(dropout=0.0, item_dropout=0.0)

__all__ = [
    "PLAIN", "LanguageModel", "Memory", "Output", "Sizes", "abstract_params", "apply", "count_parameters", "init_variables",
    "item_logits", "plain_batch", "pooled", "read_prompt", "rerank_logits", "word_log_prob", "word_logits",
]  # fmt: skip


class LanguageModel(nn.Module):
    """The whole model. ``init`` and ``apply`` are pure; parameters are a plain dictionary."""

    arch: Architecture
    sizes: Sizes | None = None  # None = the published vocabulary, no items
    options: ModelConfig = PLAIN
    train: bool = False

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        content: Float[Array, "I Fc"] | None = None,
        memory: Memory | None = None,
        *,
        read: bool = False,
    ) -> Output:
        """Read rows of tokens.

        Args:
            batch: ``tokens, positions, segment_ids`` and, where there are items, ``item, feature, feature_value``, each ``[B, S]``
                (see ``data/tokenise.py``). Segment 0 is padding. An encoder-decoder also takes pairs: ``source_tokens,
                source_segment_ids, source_positions [B, E]`` for the encoder, and the decoder's inputs as ``tokens``, ...
            content: item features, one row per catalogue item, zero rows for padding.
            memory: of a prompt that all segments continue.
            read: encoder-decoder: encode the rows as prompts and decode the start token alone. Without it the rows are training
                rows, whose targets say where the prompt ends and the answer begins.

        Returns:
            Hidden states (of every position; of the start token if an encoder-decoder reads), the head tables, and the keys and
            values of the new positions.
        """
        a, o = self.arch, self.options
        s = self.sizes or Sizes(padded(a.vocab))
        dtype = jnp.dtype(o.dtype)
        words = self._word_table("words", s)
        head = words if a.tied_head else self._word_table("word_head", s)
        head_bias = param(self, "word_bias", 0.0, (s.vocab,), RULES.vector_v) if a.head_bias else None
        item_bias = vectors = direction = rerank_bias = None
        if s.items:
            item_bias = param(self, "item_bias", 0.0, (s.items,), RULES.vector_v)
            vectors = self._item_vectors(content, s)
            if o.rerank_head:
                direction = param(self, "rerank_direction", a.width**-0.5, (a.width,), RULES.vector_d)
                rerank_bias = param(self, "rerank_bias", 0.0, (s.items,), RULES.vector_v)

        def embedded(part: Batch) -> jax.Array:
            x = self._embed(part, words, vectors, s)
            if a.input_norm:
                x = norm(a.norm, a.norm_eps, "input_norm")(x)
            return dropout(self, x.astype(dtype), o.residual_dropout, self.train)

        if a.kind == "encoder-decoder":
            x, kept, cross = self._encode_decode(batch, memory, read, embedded)
        else:
            x, kept = self._decode(embedded(batch), batch, memory, {})
            cross = None
        if a.final_norm:
            x = norm(a.norm, a.norm_eps, "final_norm")(x)
        if a.head_scale != 1.0:
            x = x * a.head_scale
        return Output(x, head, head_bias, vectors, item_bias, kept, cross, direction, rerank_bias)

    def word_logits(self, out: Output) -> Float[Array, "B S V"]:
        """Logits of every position over the published vocabulary. For long rows prefer ``word_log_prob`` on chunks."""
        logits = word_logits(out.hidden, out, self.arch)
        # A sharded axis cannot be cut: the vocabulary comes together first.
        return jax.reshard(logits, jax.P(*jax.typeof(logits).sharding.spec[:2], None))[..., : self.arch.vocab]

    # ------------------------------------------------------------------------------------------------------- embeddings

    def _word_table(self, name: str, s: Sizes) -> jax.Array:
        """[V, D]: in training as it is stored, for its rows and the loss take it so; else gathered, once for all that is read from it."""
        o, shape, rule = self.options, (s.vocab, self.arch.width), RULES.table_vd
        table = self.param(name, lambda key: normal(key, 0.02, shape, rule, o.param_dtype))
        return table if self.train else gathered(table, rule)

    def _item_vectors(self, content: jax.Array | None, s: Sizes) -> jax.Array:
        """f_i = W c_i + e_i, [I, D]."""
        a, o = self.arch, self.options
        keep = None  # which items show what was learnt of them, beside what is written about them
        if self.train and o.item_id_dropout:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - o.item_id_dropout, (s.items, 1))
        vectors = jnp.zeros((s.items, a.width), jnp.float32, out_sharding=RULES.table_used)
        if s.content:
            assert content is not None
            # Beside word vectors, what is written about an item only adds what is learnt of it.
            std = 0.0 if o.item_start == "titles" else 0.2 * s.content**-0.5
            project = param(self, "item_content", std, (s.content, a.width), RULES.project_fd)
            if keep is not None:  # co-occurrence, in the last columns, is nothing that a new item has
                written = jnp.arange(s.content) < s.content - o.cooccurrence_features
                content = jnp.where(keep | written, content, 0)
            vectors = vectors + jnp.einsum("if,fd->id", content, project, out_sharding=RULES.table_used)
        if o.item_id_embedding:
            std = 0.02 if s.content else a.width**-0.5
            learned = param(self, "item_id", std, (s.items, a.width), RULES.table_vd)
            vectors = vectors + (learned if keep is None else jnp.where(keep, learned, 0))
        return vectors

    def _embed(self, batch: Batch, words: jax.Array, vectors: jax.Array | None, s: Sizes) -> jax.Array:
        """Word, item and feature tokens (and learned positions) as vectors [B, S, D]."""
        a = self.arch
        x = lookup_stored(words, batch["tokens"], self.options.dtype) if self.train else lookup(words, batch["tokens"])
        if a.embed_scale != 1.0:
            x = x * jnp.asarray(a.embed_scale, x.dtype)
        if vectors is not None and "item" in batch:
            x = self._soft_tokens(x, batch, vectors, s)
        if a.positions == "learned":
            table = param(self, "positions", 0.02, (a.max_positions, a.width), RULES.positions_td)
            x = x + lookup(table, batch["positions"])
        if a.token_types:
            table = param(self, "token_types", 0.02, (a.token_types, a.width), RULES.positions_td)
            x = x + lookup(table, batch.get("token_types", jnp.zeros_like(batch["tokens"])))
        return x

    def _soft_tokens(self, x: jax.Array, batch: Batch, vectors: jax.Array, s: Sizes) -> jax.Array:
        o, a = self.options, self.arch
        is_item = batch["item"] > 0
        item = lookup(vectors, jnp.maximum(batch["item"] - 1, 0))
        unknown = self.param(
            "unknown_item", lambda key: jax.nn.initializers.normal(0.05)(key, (a.width,), jnp.float32, RULES.vector_d)
        )
        if self.train and o.item_dropout:
            drop = jax.random.bernoulli(self.make_rng("dropout"), o.item_dropout, is_item.shape)
            item = jnp.where(drop[..., None], unknown, item)
        x = jnp.where(is_item[..., None], item, x)
        if s.features:
            table = param(self, "feature_table", 0.02, (s.features, a.width), RULES.table_vd)
            offset = param(self, "feature_offset", 0.02, (s.features, a.width), RULES.table_vd)
            row = jnp.maximum(batch["feature"] - 1, 0)
            feature = lookup(table, row) * batch["feature_value"][..., None] + lookup(offset, row)
            x = jnp.where((batch["feature"] > 0)[..., None], feature, x)
        return x

    # ----------------------------------------------------------------------------------------------------------- layers

    def _decode(
        self, x: jax.Array, batch: Batch, memory: Memory | None, cross: dict[str, Any]
    ) -> tuple[jax.Array, Any]:
        """The decoder's (or the only encoder's) layers; with cross-attention returns both kinds of keys and values."""
        a, o = self.arch, self.options
        segments, positions = batch["segment_ids"], batch["positions"]
        shared: dict[str, Any] = {"mask": self._mask(batch)}
        own: dict[str, Any] = {}
        bias = self._relative("relative", bidirectional=not a.causal) if a.positions == "relative" else None
        if bias is not None:
            shared["bias"] = bias(positions, positions)
        if a.window:
            shared["local_mask"] = shared["mask"] & attention.within_window(positions, positions, a.window)
            if a.local_layers and not all(a.local_layers):
                own["local"] = jnp.asarray(a.local_layers)
        if a.positions == "rotary":
            shared["angles"] = attention.angles(positions, a.rope, a.head_size)
            if a.window and a.local_rope is not None:
                shared["local_angles"] = attention.angles(positions, a.local_rope, a.head_size)

        def remember(name: str, real: jax.Array, at: jax.Array) -> None:
            query = attention.together(positions, at)
            shared[f"{name}_mask"] = real
            shared[f"{name}_bias"] = None if bias is None else bias(query, at)
            if a.window:
                everyone = attention.memory_mask(attention.together(segments, real), real)
                shared[f"{name}_mask"] = everyone
                shared[f"local_{name}_mask"] = everyone & attention.within_window(query, at, a.window)

        if memory is not None:
            own["past"] = memory.past
            if memory.cross is not None:
                own["cross"] = memory.cross
            remember("past", memory.mask, memory.positions)
            if memory.recent is not None:
                own["recent"] = memory.recent
                remember("recent", cast(jax.Array, memory.recent_mask), cast(jax.Array, memory.recent_positions))
        x, kept = stack(a, o, self.train, a.layers, x, own, {**shared, **cross})
        return x, (kept["self"] if not cross else kept)

    def _mask(self, batch: Batch) -> attention.Mask:
        """A row is one chain of tokens per segment, or trees of them (scoring); dense where the kernel cannot do what is asked."""
        a = self.arch
        if "until" not in batch and a.kind != "decoder":  # an encoder-decoder's answers have gaps: their prompts
            return attention.segment_mask(batch["segment_ids"], a.causal)
        until = batch["until"] if "until" in batch else attention.segment_ends(batch["segment_ids"])
        return attention.tree_mask(until) if a.window else until

    def _relative(
        self, name: str, *, bidirectional: bool
    ) -> Callable[[Int[Array, "B S"], Int[Array, "B T"]], Float[Array, "B K S G T"]]:
        """T5's learned bias by bucket of distance, one table for all layers, as a function of query and key positions."""
        a = self.arch
        table = param(self, name, 0.1, (a.relative_buckets, a.kv_heads, a.groups), RULES.relative_rkg)

        def bias(query: jax.Array, key: jax.Array) -> jax.Array:
            distance = key[:, None, :] - query[:, :, None]
            bucket = attention.relative_bucket(distance, a.relative_buckets, a.relative_distance, bidirectional)
            batch, length, _ = jax.typeof(bucket).sharding.spec
            out = P(batch, length, None, RULES.relative_rkg[1], None)
            return jnp.transpose(table.at[bucket].get(out_sharding=out), (0, 3, 1, 4, 2)).astype(jnp.float32)

        return bias

    def _encode(self, x: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        a = self.arch
        shared = {
            "mask": attention.segment_mask(segments, causal=False),
            "bias": self._relative("encoder_relative", bidirectional=True)(positions, positions),
        }
        x, _ = stack(a, self.options, self.train, a.encoder_layers, x, {}, shared, decoder=False, name="encoder_layers")
        return norm(a.norm, a.norm_eps, "encoder_norm")(x)

    def _encode_decode(
        self, batch: Batch, memory: Memory | None, read: bool, embedded: Any
    ) -> tuple[jax.Array, Any, Any]:
        """Encoder and decoder, in one of three ways: training rows, reading prompts, continuing what was read."""
        segments = batch["segment_ids"]
        if memory is not None:
            real = cast(jax.Array, memory.cross_mask)
            cross = {"cross_mask": attention.memory_mask(attention.together(segments, real), real)}
            x, kept = self._decode(embedded(batch), batch, memory, cross)
            return x, kept["self"], kept["cross"]
        if read:
            prompt, answer = batch, start_row(batch, self.arch.decoder_start)
            cross_mask = attention.memory_mask(answer["segment_ids"], segments > 0)
        else:
            if "source_tokens" in batch:
                prefix = "source_"
                prompt = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
                answer = {k: v for k, v in batch.items() if not k.startswith(prefix)}
            else:
                prompt, answer = split_rows(batch, self.arch.decoder_start)
            same = answer["segment_ids"][:, :, None] == prompt["segment_ids"][:, None, :]
            cross_mask = same & (answer["segment_ids"][:, :, None] > 0)
        encoded = self._encode(embedded(prompt), prompt["segment_ids"], prompt["positions"])
        shared = {"encoded": encoded, "cross_mask": cross_mask}
        x, kept = self._decode(embedded(answer), answer, None, shared)
        return x, kept["self"], kept["cross"]


def apply(model: LanguageModel, variables: Any, *args: Any, **options: Any) -> Output:
    """``model.apply`` with the type that it returns. ``variables`` = {"params": ..., "lora": ...}."""
    return cast(Output, model.apply(variables, *args, **options))


def read_prompt(
    model: LanguageModel,
    variables: Any,
    batch: Batch,
    last: Int[Array, " B"],
    content: jax.Array | None = None,
) -> tuple[Float[Array, "B 1 D"], Memory, Output]:
    """Read prompts: the hidden state that predicts what follows, and the memory to continue from.

    Args:
        model, variables: the model.
        batch: prompts, one per row.
        last: index of each row's last real token.
        content: item features.
    """
    out = apply(model, variables, batch, content, read=True)
    if model.arch.kind == "encoder-decoder":
        positions = batch["positions"]
        # A cut of one row may lose its layout; what continues the memory goes by it.
        one = jax.reshard(jnp.zeros_like(positions[:, :1]), P(*jax.typeof(positions).sharding.spec))
        memory = Memory(out.cache, one == 0, one, one[:, 0] + 1, out.cross, batch["segment_ids"] > 0)
        return out.hidden, memory, out
    at = last[:, None]
    hidden = jax.vmap(lambda row, index: row.at[index].get())(out.hidden, at)
    following = jax.vmap(lambda row, index: row.at[index].get())(batch["positions"], at)[:, 0] + 1
    return hidden, Memory(out.cache, batch["segment_ids"] > 0, batch["positions"], following), out


def count_parameters(arch: Architecture, sizes: Sizes | None = None, options: ModelConfig = PLAIN) -> int:
    """Number of parameters, from the shapes alone (no memory is used); the padding of tables is not counted in a plain model.

    Raises:
        ConfigError: the architecture is inconsistent.
    """
    exact = sizes or Sizes(arch.vocab)
    tree = abstract_params(arch, exact, options)
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract_params(arch: Architecture, sizes: Sizes, options: ModelConfig = PLAIN) -> Any:
    """The collection ``params`` as shapes, types and (on the current mesh, or without one on a mesh of one) shardings."""
    mesh = jax.sharding.get_abstract_mesh()
    with contextlib.ExitStack() as stacked:
        if mesh.empty:
            mesh = jax.sharding.AbstractMesh((1, 1, 1), MESH_AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
            stacked.enter_context(jax.sharding.use_abstract_mesh(mesh))
        return jax.eval_shape(lambda: init_variables(arch, sizes, options, jax.random.key(0)))["params"]


def init_variables(
    arch: Architecture, sizes: Sizes, options: ModelConfig, key: jax.Array, content: jax.Array | None = None
) -> Any:
    """All collections with fresh values, every leaf born with its sharding. Trace it (``jax.jit``, ``jax.eval_shape``)."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    ints = ("tokens", "segment_ids", "positions", "text_target", "item_target", "item", "feature")
    batch = {name: jnp.zeros((rows, 8), jnp.int32, out_sharding=RULES.ids_bs) for name in ints}
    batch["feature_value"] = jnp.zeros((rows, 8), jnp.float32, out_sharding=RULES.ids_bs)
    if content is None and sizes.items:
        content = jnp.zeros((sizes.items, sizes.content), jnp.float32, out_sharding=RULES.table_used)
    return LanguageModel(arch, sizes, options).init(key, batch, content)

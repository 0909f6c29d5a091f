"""A Llama-shaped decoder that reads words, items and user features, and ranks the whole catalogue.

Item i has the vector f_i = W c_i + e_i (content projection + learned part) and the bias θ_i. It enters the text as the soft token
f_i, and the *matching head* scores it against the hidden state g of the position that reads the instruction:

    R_i = softmax_i(f_i · g + θ_i)                              over the whole catalogue

A new item needs only its content c_i. Words are predicted by the (tied) word table from the same hidden states.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instructrec_jax.config import ModelConfig
from instructrec_jax.models import attention
from instructrec_jax.models.sharding import RULES, gathered, lookup

Cache = tuple[Float[Array, "L B T K H"], Float[Array, "L B T K H"]]


class Sizes(NamedTuple):
    """Table sizes that come from the data, not from the config. All but ``content`` are padded to divide over the mesh."""

    vocab: int  # V
    items: int  # I
    features: int  # user-feature rows
    content: int  # width of the item features


class Output(NamedTuple):
    """What the heads need. No logits: those exist only for the positions and candidates that someone asks for."""

    hidden: Float[Array, "B S D"]
    word_head: Float[Array, "V D"]
    item_vectors: Float[Array, "I D"]
    item_bias: Float[Array, " I"]
    cache: Cache


def _param(module: nn.Module, name: str, std: float, shape: tuple[int, ...], rule: jax.P) -> jax.Array:
    """A float32 parameter that is born with its sharding, returned in its used layout."""

    def init(key: jax.Array) -> jax.Array:
        if std == 0.0:
            return jnp.zeros(shape, jnp.float32, out_sharding=rule)
        return jax.nn.initializers.normal(std)(key, shape, jnp.float32, rule)

    return gathered(module.param(name, init), rule)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Normalise the last axis."""
        scale = self.param("scale", lambda _: jnp.ones((x.shape[-1],), jnp.float32, out_sharding=RULES.vector_d))
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps) * scale).astype(x.dtype)


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Inverted dropout; the identity outside training."""
    if not train or rate == 0.0:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and gated MLP."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        prefix: Cache | None,
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S T"],
    ) -> tuple[Float[Array, "B S D"], tuple[jax.Array, jax.Array]]:
        """One layer; returns the residual stream and this layer's keys and values ``[B, S, K, H]`` of the new positions."""
        c = self.config
        D, K, G, H, F = c.width, c.kv_heads, c.heads // c.kv_heads, c.head_size, c.mlp_width
        residual_std = D**-0.5 / (2 * c.layers) ** 0.5
        dtype = x.dtype

        with jax.named_scope("attention"):
            y = RMSNorm(c.norm_eps, name="attention_norm")(x)
            wq = _param(self, "query", D**-0.5, (D, K, G, H), RULES.query_dkgh).astype(dtype)
            wk = _param(self, "key", D**-0.5, (D, K, H), RULES.key_dkh).astype(dtype)
            wv = _param(self, "value", D**-0.5, (D, K, H), RULES.key_dkh).astype(dtype)
            wo = _param(self, "output", residual_std, (K, G, H, D), RULES.output_kghd).astype(dtype)
            q = jnp.einsum("bsd,dkgh->bskgh", y, wq, out_sharding=RULES.heads_bskgh)
            k = jnp.einsum("bsd,dkh->bskh", y, wk, out_sharding=RULES.heads_bskh)
            v = jnp.einsum("bsd,dkh->bskh", y, wv, out_sharding=RULES.heads_bskh)
            q = attention.rotary(q, positions, c.rope_theta)
            k = attention.rotary(k, positions, c.rope_theta)
            keys, values = (k, v) if prefix is None else (jnp.concatenate([p, n], 1) for p, n in zip(prefix, (k, v)))
            heads = attention.attend(q, keys, values, mask)
            out = jnp.einsum("bskgh,kghd->bsd", heads, wo, out_sharding=RULES.act_bsd)
            x = x + dropout(self, out, c.dropout, self.train)

        with jax.named_scope("mlp"):
            y = RMSNorm(c.norm_eps, name="mlp_norm")(x)
            w_gate = _param(self, "gate", D**-0.5, (D, F), RULES.mlp_in_df).astype(dtype)
            w_up = _param(self, "up", D**-0.5, (D, F), RULES.mlp_in_df).astype(dtype)
            w_down = _param(self, "down", F**-0.5 / (2 * c.layers) ** 0.5, (F, D), RULES.mlp_out_fd).astype(dtype)
            gate = jnp.einsum("bsd,df->bsf", y, w_gate, out_sharding=RULES.mlp_bsf)
            up = jnp.einsum("bsd,df->bsf", y, w_up, out_sharding=RULES.mlp_bsf)
            out = jnp.einsum("bsf,fd->bsd", jax.nn.silu(gate) * up, w_down, out_sharding=RULES.act_bsd)
            x = x + dropout(self, out, c.dropout, self.train)
        return x, (k, v)


_REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
    """The whole model. ``init`` and ``apply`` are pure; parameters are a plain dictionary."""

    config: ModelConfig
    sizes: Sizes
    train: bool = False

    @nn.compact
    def __call__(
        self,
        batch: dict[str, jax.Array],
        content: Float[Array, "I Fc"],
        prefix: tuple[Cache, Bool[Array, "B P"]] | None = None,
    ) -> Output:
        """Read packed rows.

        Args:
            batch: ``tokens, item, feature, feature_value, positions, segment_ids``, each ``[B, S]`` (see ``data/tokenise.py``).
            content: item features, one row per catalogue item, zero rows for padding.
            prefix: cached keys and values of a prompt of P tokens that every segment may read, and which of them are real.

        Returns:
            Hidden states of every position, the head tables, and the keys and values of the new positions.
        """
        c, s = self.config, self.sizes
        dtype = jnp.dtype(c.dtype)
        words = _param(self, "words", 0.02, (s.vocab, c.width), RULES.table_vd)
        head = words if c.tied_head else _param(self, "word_head", 0.02, (s.vocab, c.width), RULES.table_vd)
        bias = self.param("item_bias", lambda _: jnp.zeros((s.items,), jnp.float32, out_sharding=RULES.vector_v))
        vectors = self._item_vectors(content)
        x = self._embed(batch, words, vectors)
        x = RMSNorm(c.norm_eps, name="input_norm")(x).astype(dtype)  # words, items and features on one scale
        x = dropout(self, x, c.dropout, self.train)

        mask = attention.causal_segment_mask(batch["segment_ids"])
        cache, prefix_mask = prefix if prefix is not None else (None, None)
        if prefix_mask is not None:
            mask = attention.with_prefix(mask, batch["segment_ids"], prefix_mask)
        x, new_cache = self._layers(x, cache, batch["positions"], mask)
        hidden = RMSNorm(c.norm_eps, name="final_norm")(x)
        return Output(hidden, head, vectors, bias, new_cache)

    def _item_vectors(self, content: jax.Array) -> jax.Array:
        """f_i = W c_i + e_i, [I, D]."""
        c, s = self.config, self.sizes
        vectors = jnp.zeros((s.items, c.width), jnp.float32, out_sharding=RULES.table_used)
        if s.content:
            project = _param(self, "item_content", 0.2 * s.content**-0.5, (s.content, c.width), RULES.project_fd)
            vectors = vectors + jnp.einsum("if,fd->id", content, project, out_sharding=RULES.table_used)
        if c.item_id_embedding:
            std = 0.02 if s.content else c.width**-0.5
            vectors = vectors + _param(self, "item_id", std, (s.items, c.width), RULES.table_vd)
        return vectors

    def _embed(self, batch: dict[str, jax.Array], words: jax.Array, vectors: jax.Array) -> jax.Array:
        """Word, item and feature tokens as vectors [B, S, D]."""
        c, s = self.config, self.sizes
        x = lookup(words, batch["tokens"])
        is_item = batch["item"] > 0
        item = lookup(vectors, jnp.maximum(batch["item"] - 1, 0))
        unknown = self.param(
            "unknown_item", lambda key: jax.nn.initializers.normal(0.05)(key, (c.width,), jnp.float32, RULES.vector_d)
        )
        if self.train and c.item_dropout:
            drop = jax.random.bernoulli(self.make_rng("dropout"), c.item_dropout, is_item.shape)
            item = jnp.where(drop[..., None], unknown, item)
        x = jnp.where(is_item[..., None], item, x)
        if s.features:
            table = _param(self, "feature_table", 0.02, (s.features, c.width), RULES.table_vd)
            offset = _param(self, "feature_offset", 0.02, (s.features, c.width), RULES.table_vd)
            row = jnp.maximum(batch["feature"] - 1, 0)
            feature = lookup(table, row) * batch["feature_value"][..., None] + lookup(offset, row)
            x = jnp.where((batch["feature"] > 0)[..., None], feature, x)
        return x

    def _layers(
        self, x: jax.Array, cache: Cache | None, positions: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """All blocks, scanned or unrolled; the parameter tree is stacked either way only when scanned."""
        c = self.config
        block = Block if c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=_REMAT[c.remat])
        if c.scan_layers:
            # One entry per argument after the carry: the cache has a layer axis, the rest is the same for all layers.
            axes: Any = (0 if cache is not None else nn.broadcast, nn.broadcast, nn.broadcast)
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=axes,
                length=c.layers,
            )
            return stack(c, self.train, name="layers")(x, cache, positions, mask)
        caches = []
        for layer in range(c.layers):
            own = None if cache is None else (cache[0][layer], cache[1][layer])
            x, kv = block(c, self.train, name=f"layer_{layer}")(x, own, positions, mask)
            caches.append(kv)
        return x, (jnp.stack([k for k, _ in caches]), jnp.stack([v for _, v in caches]))


def apply(
    model: Decoder, params: Any, batch: dict[str, jax.Array], content: jax.Array, *rest: Any, **options: Any
) -> Output:
    """``model.apply`` on bare parameters, with the type that it returns."""
    return cast(Output, model.apply({"params": params}, batch, content, *rest, **options))


def item_logits(hidden: Float[Array, "B S D"], out: Output, count: int) -> Float[Array, "B S I"]:
    """f_i · g + θ_i for all items, float32; rows beyond the ``count`` real items are -1e30 (never ranked, no probability)."""
    logits = jnp.einsum("bsd,id->bsi", hidden.astype(jnp.float32), out.item_vectors, out_sharding=RULES.logits_bsv)
    logits = logits + out.item_bias
    return jnp.where(jnp.arange(logits.shape[-1]) < count, logits, -1e30)


def word_logits(hidden: Float[Array, "B S D"], out: Output) -> Float[Array, "B S V"]:
    """Logits over the vocabulary, float32."""
    return jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), out.word_head, out_sharding=RULES.logits_bsv)


def count_parameters(config: ModelConfig, sizes: Sizes) -> int:
    """Number of parameters, from the shapes alone (no memory is used).

    Example:
        ``count_parameters(config, Sizes(32_000, 128, 0, 0))``
    """
    c, s = config, sizes
    layer = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_size + 3 * c.width * c.mlp_width + 2 * c.width
    tables = s.vocab * c.width * (1 if c.tied_head else 2) + s.items
    items = s.content * c.width + (s.items * c.width if c.item_id_embedding else 0) + c.width
    return c.layers * layer + tables + items + 2 * s.features * c.width + 2 * c.width

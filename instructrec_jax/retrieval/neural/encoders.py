"""SASRec and GRU4Rec as Linen modules, their loss, and their compiled steps. Every contraction names its result's layout."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.config import TrainConfig
from instructrec_jax.models.heads import Output, item_logits
from instructrec_jax.models.parts import LayerNorm, dropout, param, project
from instructrec_jax.models.sharding import BATCH, RULES, lookup
from instructrec_jax.training.loss import item_loss
from instructrec_jax.training.optimisers import optimizer

_SCORES = P(BATCH, "tensor", None, None)
_LOGITS = 1 << 25  # most scores [B, chunk, I] that exist at one time


class Encoder(nn.Module):
    """What both models share: item vectors that are read and predicted with, and a bias per item.

    Row i of the table is item i; 0 among the inputs, which hold item + 1, is padding.
    """

    items: int  # I, padded
    width: int  # D
    layers: int
    heads: int
    length: int  # S
    dropout: float
    train: bool = False

    @nn.compact
    def __call__(self, ids: Int[Array, "B S"]) -> Output:
        """Hidden states that predict the item that follows each place."""
        table = param(self, "items", self.width**-0.5, (self.items, self.width), RULES.table_vd)
        bias = param(self, "item_bias", 0.0, (self.items,), RULES.vector_v)
        real = ids > 0
        x = lookup(table, jnp.maximum(ids - 1, 0)) * math.sqrt(self.width)
        hidden = self.encode(jnp.where(real[..., None], x, 0), real)
        return Output(hidden, table, None, table, bias, ())  # pyright: ignore[reportArgumentType]

    def encode(self, x: Float[Array, "B S D"], real: Array) -> Float[Array, "B S D"]:
        """Read the item vectors."""
        raise NotImplementedError


class SASRecEncoder(Encoder):
    """Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018 (arXiv 1808.09781), section III: learned positions,
    normed queries, ReLU feed-forward of width D, residuals with dropout.
    """

    def encode(self, x: Float[Array, "B S D"], real: Array) -> Float[Array, "B S D"]:
        """Attend to what came before."""
        places = param(self, "positions", 0.02, (self.length, self.width), RULES.positions_td)
        x = dropout(self, x + places, self.dropout, self.train)
        causal = jnp.tril(jnp.ones((self.length, self.length), bool))
        # Padding sees itself, so that its rows are numbers; nothing else sees it.
        visible = causal & (real[:, None, None, :] | jnp.eye(self.length, dtype=bool))
        for number in range(self.layers):
            x = x + self._attention(number, LayerNorm(1e-6, name=f"norm_{number}")(x), x, visible)
            x = x + self._feed_forward(number, LayerNorm(1e-6, name=f"mlp_norm_{number}")(x))
        return LayerNorm(1e-6, name="last_norm")(x)

    def _attention(self, number: int, queries: jax.Array, x: jax.Array, visible: jax.Array) -> jax.Array:
        size = self.width // self.heads
        shape, std = (self.width, self.heads, size), self.width**-0.5

        def to_heads(name: str, source: jax.Array) -> jax.Array:
            return project(
                self, f"{name}_{number}", source, "bsd,dkh->bskh", shape, RULES.key_dkh, RULES.heads_bskh, std=std
            )

        query, key, value = to_heads("query", queries), to_heads("key", x), to_heads("value", x)
        scores = jnp.einsum("bskh,btkh->bkst", query, key, out_sharding=_SCORES) / math.sqrt(size)
        weights = dropout(self, jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1), self.dropout, self.train)
        mixed = jnp.einsum("bkst,btkh->bskh", weights, value, out_sharding=RULES.heads_bskh)
        out = project(
            self, f"output_{number}", mixed, "bskh,khd->bsd", (self.heads, size, self.width),
            P("tensor", None, "fsdp"), RULES.act_bsd, std=std, n_in=2,
        )  # fmt: skip
        return dropout(self, out, self.dropout, self.train)

    def _feed_forward(self, number: int, x: jax.Array) -> jax.Array:
        shape, std = (self.width, self.width), self.width**-0.5
        wide = project(
            self, f"up_{number}", x, "bsd,df->bsf", shape, RULES.mlp_in_df, RULES.mlp_bsf, std=std, bias=True
        )
        wide = dropout(self, jax.nn.relu(wide), self.dropout, self.train)
        out = project(
            self, f"down_{number}", wide, "bsf,fd->bsd", shape, RULES.mlp_out_fd, RULES.act_bsd, std=std, bias=True
        )
        return dropout(self, out, self.dropout, self.train)


class GRU4RecEncoder(Encoder):
    """Gated recurrent units (Hidasi et al., "Session-based recommendations with recurrent neural networks", ICLR 2016), here over
    all places of a window and with the softmax over the catalogue; dropout on the items and between the layers.
    """

    def encode(self, x: Float[Array, "B S D"], real: Array) -> Float[Array, "B S D"]:
        """Read from left to right; padding leaves the state as it is."""
        std = self.width**-0.5
        for number in range(self.layers):
            x = dropout(self, x, self.dropout, self.train)
            inputs = project(
                self, f"input_{number}", x, "bsd,dgh->bsgh", (self.width, 3, self.width),
                P("fsdp", None, None), P(BATCH, None, None, None), std=std, bias=True,
            )  # fmt: skip
            weights = param(self, f"recurrent_{number}", std, (self.width, 3, self.width), P("fsdp", None, None))
            state_bias = param(self, f"state_bias_{number}", 0.0, (self.width,), RULES.vector_d)

            def step(
                state: jax.Array, now: tuple, weights: jax.Array = weights, bias: jax.Array = state_bias
            ) -> tuple[jax.Array, jax.Array]:
                given, is_real = now
                own = jnp.einsum("bd,dgh->bgh", state, weights, out_sharding=P(BATCH, None, None))
                reset = jax.nn.sigmoid(given[:, 0] + own[:, 0])
                update = jax.nn.sigmoid(given[:, 1] + own[:, 1])
                fresh = jnp.tanh(given[:, 2] + reset * (own[:, 2] + bias))
                state = jnp.where(is_real[:, None], (1 - update) * fresh + update * state, state)
                return state, state

            zero = jnp.zeros_like(x[:, 0])
            _, states = jax.lax.scan(step, zero, (jnp.moveaxis(inputs, 1, 0), jnp.moveaxis(real, 1, 0)))
            x = jnp.moveaxis(states, 0, 1)
        x = dropout(self, x, self.dropout, self.train)
        return project(
            self, "last", x, "bsd,de->bse", (self.width, self.width), P("fsdp", None), RULES.act_bsd, std=std, bias=True
        )


def loss(out: Output, targets: Int[Array, "B S"], count: int) -> Float[Array, ""]:
    """Mean over all real places of −log softmax over the catalogue at the item that follows; ``targets`` hold item + 1.

    With this loss in place of sampled negatives SASRec is among the strongest (Klenitskiy and Vasilev, "Turning dross into gold loss:
    is BERT4Rec really better than SASRec?", RecSys 2023).
    """
    rows, length = targets.shape
    assert out.item_vectors is not None
    most = max(_LOGITS // (rows * out.item_vectors.shape[0]), 1)
    chunk = max(size for size in range(1, length + 1) if length % size == 0 and (size <= most or size == 1))
    batch = {"item_target": targets, "task": jnp.ones_like(targets)}
    sums = item_loss(out, batch, count, 0.0, chunk)
    return sums.loss / jnp.maximum(sums.count, 1)


@partial(jax.jit, static_argnames=("model", "config"))
def start(model: Encoder, config: TrainConfig, key: Array) -> tuple[Any, Any]:
    """(parameters, optimiser state) before the first step."""
    blank = jnp.zeros((1, model.length), jnp.int32)
    params = model.init(key, blank)["params"]
    return params, optimizer(config).init(params)


@partial(jax.jit, static_argnames=("model", "config", "count"), donate_argnames=("params", "state"))
def step(
    model: Encoder, config: TrainConfig, count: int, params: Any, state: Any, key: Array, inputs: Array, targets: Array
) -> tuple[Any, Any, Float[Array, ""]]:
    """One optimiser step on a batch of windows ``[B, S]``: new parameters, new state, loss."""

    def batch_loss(params: Any) -> Array:
        return loss(model.apply({"params": params}, inputs, rngs={"dropout": key}), targets, count)  # pyright: ignore

    value, gradients = jax.value_and_grad(batch_loss)(params)
    updates, state = optimizer(config).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


@partial(jax.jit, static_argnames=("model", "count"))
def last_logits(model: Encoder, count: int, params: Any, inputs: Int[Array, "B S"]) -> Float[Array, "B I"]:
    """Scores of the catalogue after the last place of every window."""
    out: Any = model.apply({"params": params}, inputs)
    return item_logits(out.hidden[:, -1:], out, count)[:, 0, :count]

"""GMF, MLP and NeuMF as a Linen module, their loss, and their compiled steps (He et al., "Neural collaborative filtering", WWW
2017, arXiv 1708.05031).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.config import TrainConfig
from instructrec_jax.models.parts import param
from instructrec_jax.models.sharding import BATCH, RULES
from instructrec_jax.training.optimisers import optimizer

_ROWS = P(BATCH, None)
_STD = 0.01  # of the tables, as in the paper's section 4.1


class Towers(nn.Module):
    """score = h . [p_u * q_i ; MLP(p'_u, q'_i)]: equations 9 (GMF), 10 (MLP) and 12 (NeuMF, from scratch)."""

    users: int  # U
    items: int  # I
    factors: int  # D: width of the product, and of the last layer
    gmf: bool
    layers: int  # of the MLP, each half as wide as the one before; 0 = none

    @property
    def widths(self) -> list[int]:
        """Outputs of the MLP's layers."""
        return [self.factors << (self.layers - 1 - number) for number in range(self.layers)]

    @property
    def vectors(self) -> list[tuple[str, int]]:
        """(name, width) of the vectors that users and items have each."""
        wide = [("mlp", self.widths[0])] if self.layers else []
        return ([("gmf", self.factors)] if self.gmf else []) + wide

    def setup(self) -> None:
        """All parameters, by name."""
        self.tables = {
            f"{name}_{kind}": param(self, f"{name}_{kind}", _STD, (rows, width), RULES.table_vd)
            for name, width in self.vectors
            for kind, rows in (("user", self.users), ("item", self.items))
        }
        # The first layer reads two vectors of its own width, every other one twice as much as it gives.
        self.weights = [
            param(self, f"mlp_{n}", (2 * width) ** -0.5, (2 * width, width), P("fsdp", None))
            for n, width in enumerate(self.widths)
        ]
        self.biases = [param(self, f"mlp_bias_{n}", 0.0, (w,), RULES.vector_d) for n, w in enumerate(self.widths)]
        whole = self.factors * (int(self.gmf) + int(self.layers > 0))
        self.head = param(self, "head", whole**-0.5, (whole,), RULES.vector_d)
        self.head_bias = param(self, "head_bias", 0.0, (1,), RULES.vector_d)

    def __call__(self, user: Int[Array, " B"], item: Int[Array, " B"]) -> Float[Array, " B"]:
        """Logits of pairs."""
        u = {name: self.tables[f"{name}_user"].at[user].get(out_sharding=_ROWS) for name, _ in self.vectors}
        i = {name: self.tables[f"{name}_item"].at[item].get(out_sharding=_ROWS) for name, _ in self.vectors}
        parts = [u["gmf"] * i["gmf"]] if self.gmf else []
        if self.layers:
            wide = jnp.concatenate([u["mlp"], i["mlp"]], axis=-1)
            hidden = jnp.einsum("bd,de->be", wide, self.weights[0], out_sharding=_ROWS)
            parts.append(self._rest(hidden, "bd,de->be", _ROWS))
        both = jnp.concatenate(parts, axis=-1)
        return jnp.einsum("bd,d->b", both, self.head, out_sharding=P(BATCH)) + self.head_bias

    def catalogue(self, taste: dict[str, Float[Array, "B D"]]) -> Float[Array, "B I"]:
        """Logits of all items for users' vectors by name. The MLP's first layer is a sum of a user's and an item's part."""
        out, done = P(BATCH, None), 0
        scores: Any = self.head_bias
        if self.gmf:
            head, done = self.head[: self.factors], self.factors
            scores = scores + jnp.einsum("bd,id->bi", taste["gmf"] * head, self.tables["gmf_item"], out_sharding=out)
        if self.layers:
            width = self.widths[0]
            of_user = jnp.einsum("bd,de->be", taste["mlp"], self.weights[0][:width], out_sharding=out)
            of_item = jnp.einsum(
                "id,de->ie", self.tables["mlp_item"], self.weights[0][width:], out_sharding=P(None, None)
            )
            cube = P(BATCH, None, None)
            hidden = self._rest(of_user[:, None] + of_item[None], "bid,de->bie", cube)
            scores = scores + jnp.einsum("bid,d->bi", hidden, self.head[done:], out_sharding=out)
        return scores

    def _rest(self, x: Array, equation: str, out: P) -> Array:
        """What follows the first layer's product."""
        x = jax.nn.relu(x + self.biases[0])
        for weight, bias in zip(self.weights[1:], self.biases[1:]):
            x = jax.nn.relu(jnp.einsum(equation, x, weight, out_sharding=out) + bias)
        return x


@partial(jax.jit, static_argnames=("model", "config"))
def start(model: Towers, config: TrainConfig, key: Array) -> tuple[Any, Any]:
    """(parameters, optimiser state) before the first step."""
    one = jnp.zeros((1,), jnp.int32)
    params = model.init(key, one, one)["params"]
    return params, optimizer(config).init(params)


@partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("params", "state"))
def step(
    model: Towers, config: TrainConfig, params: Any, state: Any, user: Array, item: Array, label: Array
) -> tuple[Any, Any, Float[Array, ""]]:
    """One step on pairs with labels 1 (event), 0 (drawn) or -1 (padding): binary cross-entropy, equation 7."""

    def loss(params: Any) -> Array:
        logits: Any = model.apply({"params": params}, user, item)
        weight = (label >= 0).astype(jnp.float32)
        losses = optax.sigmoid_binary_cross_entropy(logits, (label > 0).astype(jnp.float32))
        return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer(config).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


@partial(jax.jit, static_argnames=("model",))
def catalogue(model: Towers, params: Any, taste: dict[str, Float[Array, "B D"]]) -> Float[Array, "B I"]:
    """See ``Towers.catalogue``."""
    scores: Any = model.apply({"params": params}, taste, method=Towers.catalogue)
    return scores

"""One layer of any model: attention, cross-attention where there is an encoder, MLP; and the stack of layers, scanned."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instructrec_jax.config import ModelConfig
from instructrec_jax.models import attention
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.parts import dropout, norm, project
from instructrec_jax.models.remat import named, rematerialised
from instructrec_jax.models.sharding import RULES

KeysValues = tuple[Float[Array, "*L B T K H"], Float[Array, "*L B T K H"]]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Block(nn.Module):
    """A layer. ``decoder`` False is the encoder of an encoder-decoder, which has no cross-attention."""

    arch: Architecture
    options: ModelConfig
    train: bool
    decoder: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], own: dict[str, Any], shared: dict[str, Any]
    ) -> tuple[Float[Array, "B S D"], dict[str, KeysValues]]:
        """One layer.

        Args:
            x: the residual stream.
            own: this layer's part of what differs by layer: ``past`` (cached keys and values), ``recent`` (further ones, of each
                row's own), ``cross`` (the same of the encoder's output) and ``local`` (whether the layer has the window), each optional.
            shared: what all layers read: ``mask``, ``bias``, ``angles``, ``past_mask``, ``past_bias``, with ``local_mask``,
                ``local_angles`` and ``local_past_mask`` for layers with the window (masks as ``attention.Mask``); ``encoded`` and
                ``cross_mask`` for cross-attention.

        Returns:
            The residual stream, and keys and values ``[B, S, K, H]`` of the new positions (``self``) and of the encoder (``cross``).
        """
        a = self.arch
        # Computed again by itself, attention is not held while the MLP's gradients are.
        attend = nn.remat(Block._attention) if self.options.remat == "least" else Block._attention
        x, keys_values = attend(self, x, own, shared)
        kept = {"self": keys_values}
        if a.kind == "encoder-decoder" and self.decoder:
            with jax.named_scope("cross_attention"):
                y = self._norm("cross_norm", x)
                q = self._project(
                    "cross_query", y, "bsd,dkgh->bskgh", self._q_shape, RULES.query_dkgh, RULES.heads_bskgh
                )
                kept["cross"] = own["cross"] if "cross" in own else self._cross(shared["encoded"])
                k, v = kept["cross"]
                heads = attention.attend_memory(q, k, v, shared["cross_mask"], scale=a.query_scale)
                x = x + dropout(self, self._out(heads, "cross_output"), self.options.residual_dropout, self.train)
        with jax.named_scope("mlp"):
            y = self._norm("mlp_norm", x) if a.placement != "post" else x
            x = self._add(x, self._mlp(y), "mlp")
        return x, kept

    # -------------------------------------------------------------------------------------------------------- the parts

    def _attention(self, x: jax.Array, own: dict[str, Any], shared: dict[str, Any]) -> tuple[jax.Array, KeysValues]:
        """The residual sum with self-attention, and its keys and values."""
        a = self.arch
        with jax.named_scope("attention"):
            y = self._norm("attention_norm", x) if a.placement != "post" else x
            q, k, v = self._heads(y, own, shared)
            past = []
            for name in ("past", "recent"):
                if name in own:
                    keys, values = own[name]
                    mask = self._of_layer(f"{name}_mask", own, shared)
                    past.append(attention.Past(keys, values, mask, shared[f"{name}_bias"]))
            heads = attention.attend(
                q,
                k,
                v,
                self._of_layer("mask", own, shared),
                past=past,
                bias=shared.get("bias"),
                scale=a.query_scale,
                softcap=a.attention_softcap,
                path=self.options.attention,
            )
            return self._add(x, self._out(named("context", heads), "output"), "attention"), (k, v)

    @property
    def _q_shape(self) -> tuple[int, ...]:
        a = self.arch
        return (a.width, a.kv_heads, a.groups, a.head_size)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return norm(self.arch.norm, self.arch.norm_eps, name)(x)

    def _project(
        self, name: str, x: jax.Array, equation: str, shape: tuple, rule: Any, out: Any, **how: Any
    ) -> jax.Array:
        o = self.options
        how = {"std": self.arch.width**-0.5, **how}
        return project(
            self, name, x, equation, shape, rule, out,
            weights=o.quantise, param_dtype=o.param_dtype, adapter=o.adapter, train=self.train, **how,
        )  # fmt: skip

    def _heads(self, y: jax.Array, own: dict, shared: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, S, K, G, H], keys and values [B, S, K, H], normed and turned by their positions."""
        a = self.arch
        bias = a.qkv_bias
        kv_shape = (a.width, a.kv_heads, a.head_size)
        q = self._project("query", y, "bsd,dkgh->bskgh", self._q_shape, RULES.query_dkgh, RULES.heads_bskgh, bias=bias)
        k = self._project("key", y, "bsd,dkh->bskh", kv_shape, RULES.key_dkh, RULES.heads_bskh, bias=bias)
        v = self._project("value", y, "bsd,dkh->bskh", kv_shape, RULES.key_dkh, RULES.heads_bskh, bias=bias)
        if a.qk_norm:
            q, k = self._norm("query_norm", q), self._norm("key_norm", k)
        if a.positions == "rotary":
            table = self._of_layer("angles", own, shared)
            q, k = attention.rotate(q, table), attention.rotate(k, table)
        return named("qkv", q, k, v)

    def _cross(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = self.arch
        shape = (a.width, a.kv_heads, a.head_size)
        k = self._project("cross_key", encoded, "bsd,dkh->bskh", shape, RULES.key_dkh, RULES.heads_bskh)
        v = self._project("cross_value", encoded, "bsd,dkh->bskh", shape, RULES.key_dkh, RULES.heads_bskh)
        return k, v

    def _out(self, heads: jax.Array, name: str) -> jax.Array:
        a = self.arch
        return self._project(
            name, heads, "bskgh,kghd->bsd", (a.kv_heads, a.groups, a.head_size, a.width), RULES.output_kghd, RULES.act_bsd,
            std=a.width**-0.5 / (2 * a.layers) ** 0.5, n_in=3, bias=a.output_bias,
        )  # fmt: skip

    def _mlp(self, y: jax.Array) -> jax.Array:
        a = self.arch
        act = ACTIVATIONS[a.activation]
        shape, b = (a.width, a.mlp_width), a.mlp_bias
        gate = None
        if a.gated:
            gate = self._project("gate", y, "bsd,df->bsf", shape, RULES.mlp_in_df, RULES.mlp_bsf, bias=b)
        up = self._project("up", y, "bsd,df->bsf", shape, RULES.mlp_in_df, RULES.mlp_bsf, bias=b)
        inner = act(up) if gate is None else act(gate) * up
        std = a.mlp_width**-0.5 / (2 * a.layers) ** 0.5
        return self._project(
            "down", inner, "bsf,fd->bsd", shape[::-1], RULES.mlp_out_fd, RULES.act_bsd, std=std, bias=b
        )

    def _add(self, x: jax.Array, branch: jax.Array, name: str) -> jax.Array:
        """The residual sum, with the norm where the architecture has it."""
        a = self.arch
        if a.placement == "sandwich":
            branch = self._norm(f"{name}_out_norm", branch)
        x = x + dropout(self, branch, self.options.residual_dropout, self.train)
        return self._norm(f"{name}_norm", x) if a.placement == "post" else x

    def _of_layer(self, name: str, own: dict, shared: dict) -> Any:
        """The mask or angles of this layer: those of the window if it has one."""
        local = shared.get(f"local_{name}")
        if local is None:
            return shared[name]
        if "local" not in own:  # all layers have the window
            return local
        return jax.tree.map(lambda there, here: jnp.where(own["local"], there, here), local, shared[name])


def stack(
    arch: Architecture,
    options: ModelConfig,
    train: bool,
    layers: int,
    x: jax.Array,
    own: dict[str, Any],
    shared: dict[str, Any],
    *,
    decoder: bool = True,
    name: str = "layers",
) -> tuple[jax.Array, dict[str, KeysValues]]:
    """All layers, scanned or unrolled; parameters are stacked [L, ...] only when scanned. ``own`` has a leading layer axis.

    Call it inside a compact method: the layers become children ``name`` (scanned) or ``layer_0``, ``layer_1``, ... of that module.
    """
    block = rematerialised(Block, options.remat)
    if options.scan_layers and train and options.layer_group > 1:
        return _grouped(arch, options, layers, decoder, name, x, own, shared)
    if options.scan_layers:
        return _scanned(block, layers)(arch, options, train, decoder, name=name)(x, own, shared)
    kept = []
    single = "layer" if name == "layers" else name.removesuffix("s")
    for layer in range(layers):
        mine = jax.tree.map(lambda leaf, at=layer: leaf[at], own)
        x, new = block(arch, options, train, decoder, name=f"{single}_{layer}")(x, mine, shared)
        kept.append(new)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def _scanned(module: Any, length: int) -> Any:
    axes: Any = (0, nn.broadcast)
    return nn.scan(
        module,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=axes,
        length=length,
    )


class _Group(nn.Module):
    """Some layers one after the other, of which a training step keeps the first one's input alone."""

    arch: Architecture
    options: ModelConfig
    decoder: bool

    @nn.compact
    def __call__(self, x: jax.Array, own: dict[str, Any], shared: dict[str, Any]) -> tuple[jax.Array, Any]:
        layers = _scanned(rematerialised(Block, self.options.remat), self.options.layer_group)
        return layers(self.arch, self.options, True, self.decoder, name="layers")(x, own, shared)


def _grouped(
    arch: Architecture,
    options: ModelConfig,
    layers: int,
    decoder: bool,
    name: str,
    x: jax.Array,
    own: dict[str, Any],
    shared: dict[str, Any],
) -> tuple[jax.Array, dict[str, KeysValues]]:
    """The scanned layers in groups. Their parameters are stacked [L, ...] as without."""
    size = options.layer_group
    groups = layers // size

    def split(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        return jnp.reshape(leaf, (groups, size, *leaf.shape[1:]), out_sharding=jax.P(None, *spec))

    def merge(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        return jnp.reshape(leaf, (layers, *leaf.shape[2:]), out_sharding=jax.P(*spec[1:]))

    def inside(variables: dict[str, Any]) -> dict[str, Any]:
        return {kind: {"layers": jax.tree.map(split, tree)} for kind, tree in variables.items() if tree}

    def outside(variables: dict[str, Any]) -> dict[str, Any]:
        return {kind: jax.tree.map(merge, tree["layers"]) for kind, tree in variables.items() if tree}

    group = _scanned(nn.remat(_Group, prevent_cse=False), groups)
    mapped = nn.map_variables(group, ("params", "lora"), inside, outside, init=True, mutable=True)
    x, kept = mapped(arch, options, decoder, name=name)(x, jax.tree.map(split, own), shared)
    return x, jax.tree.map(merge, kept)

"""Which tensor of a published model is which parameter, both ways: one table per naming scheme, no code per model.

A parameter of the layers is stacked here, [L, ...], and one tensor per layer there. Linear layers are [out, in] there and
[in..., out...] with heads apart here; GPT-2's are [in, out], and its query, key and value are one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from instructrec_jax.models.architecture import Architecture

Kind = Literal["table", "vector", "linear", "conv1d"]


@dataclass(frozen=True)
class Entry:
    """One parameter and its published tensor."""

    path: tuple[str, ...]  # in the collection params
    name: str  # published, with {} for the layer
    kind: Kind
    layers: int = 0  # 0 = not stacked
    part: tuple[int, int] = (0, 1)  # this is part i of n along the published tensor's last axis

    def published(self, layer: int = 0) -> str:
        """The tensor's name."""
        return self.name.format(layer) if self.layers else self.name

    def published_shape(self, shape: tuple[int, ...], vocab: int, n_in: int) -> tuple[int, ...]:
        """Shape of the published tensor (of all its parts), from the parameter's own shape without the layer axis."""
        if self.kind == "table":
            return (min(shape[0], vocab), *shape[1:]) if vocab else shape
        if self.kind == "vector":
            return (int(np.prod(shape)) * self.part[1],)
        inner, outer = int(np.prod(shape[:n_in])), int(np.prod(shape[n_in:])) * self.part[1]
        return (outer, inner) if self.kind == "linear" else (inner, outer)

    def ours(self, tensor: np.ndarray, shape: tuple[int, ...], n_in: int) -> np.ndarray:
        """The parameter's value (a view where possible; tables are not padded here)."""
        if self.part[1] > 1:
            width = tensor.shape[-1] // self.part[1]
            tensor = tensor[..., self.part[0] * width : (self.part[0] + 1) * width]
        if self.kind == "table":
            return tensor
        if self.kind == "linear":
            # Reshape before transposing: it stays a view of the mapped file.
            outer = tensor.reshape(*shape[n_in:], *shape[:n_in])
            order = [*range(len(shape) - n_in, len(shape)), *range(len(shape) - n_in)]
            return outer.transpose(order)
        return tensor.reshape(shape)

    def theirs(self, value: np.ndarray, vocab: int, n_in: int) -> np.ndarray:
        """The published tensor's part of a parameter's value (one layer)."""
        if self.kind == "table":
            return value[:vocab] if vocab else value
        if self.kind == "vector":
            return value.reshape(-1)
        inner = int(np.prod(value.shape[:n_in]))
        flat = value.reshape(inner, -1)
        return flat.T if self.kind == "linear" else flat


# Tensors that hold nothing that a model here computes with: buffers, heads of other tasks, other modalities.
IGNORED = (
    "rotary_emb.inv_freq",
    ".attn.bias",  # GPT-2's causal mask
    ".attn.masked_bias",
    "embeddings.position_ids",
    "pooler.",
    "cls.",
    "vision_tower.",
    "vision_model.",
    "multi_modal_projector.",
    "EncDecAttention.relative_attention_bias",
)

# Alternative spellings of the front of a name, tried in this order.
PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt2": (("transformer.", ""),),
    "bert": (("bert.", ""),),
    "gemma3_text": (("model.", "language_model.model."), ("model.", "model.language_model.")),
}
# Of the rest of a name.
SPELLINGS = ((".weight", ".gamma"), (".bias", ".beta"))


def inputs(name: str) -> int:
    """How many leading axes of a projection are contracted."""
    return 3 if name in ("output", "cross_output") else 1


def entries(arch: Architecture) -> list[Entry]:
    """All parameters of a model with their published names."""
    if arch.family == "gpt2":
        return _gpt2(arch)
    if arch.kind == "encoder-decoder":
        return _t5(arch)
    if arch.kind == "encoder":
        return _bert(arch)
    return _llama(arch)


def _layer(layers: int, stack: str, kind: Kind, pairs: dict[str, str]) -> list[Entry]:
    out = []
    for own, published in pairs.items():
        path = (stack, *own.split("/"))
        out.append(Entry(path, published, "vector" if kind == "vector" else kind, layers))
    return out


def _llama(a: Architecture) -> list[Entry]:
    at = "model.layers.{}."
    linear = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    norms = {"attention_norm/scale": "input_layernorm", "mlp_norm/scale": "post_attention_layernorm"}
    if a.placement == "sandwich":
        norms = {
            "attention_norm/scale": "input_layernorm",
            "attention_out_norm/scale": "post_attention_layernorm",
            "mlp_norm/scale": "pre_feedforward_layernorm",
            "mlp_out_norm/scale": "post_feedforward_layernorm",
        }
    if a.qk_norm:
        norms |= {"query_norm/scale": "self_attn.q_norm", "key_norm/scale": "self_attn.k_norm"}
    biased = (["query", "key", "value"] if a.qkv_bias else []) + (["output"] if a.output_bias else [])
    biased += ["gate", "up", "down"] if a.mlp_bias else []
    out = [
        Entry(("words",), "model.embed_tokens.weight", "table"),
        Entry(("final_norm", "scale"), "model.norm.weight", "vector"),
    ]
    if not a.tied_head:
        out.append(Entry(("word_head",), "lm_head.weight", "table"))
    out += _layer(a.layers, "layers", "linear", {k: f"{at}{v}.weight" for k, v in linear.items()})
    out += _layer(a.layers, "layers", "vector", {f"{k}_bias": f"{at}{linear[k]}.bias" for k in biased})
    return out + _layer(a.layers, "layers", "vector", {k: f"{at}{v}.weight" for k, v in norms.items()})


def _gpt2(a: Architecture) -> list[Entry]:
    at = "transformer.h.{}."
    out = [
        Entry(("words",), "transformer.wte.weight", "table"),
        Entry(("positions",), "transformer.wpe.weight", "table"),
        Entry(("final_norm", "scale"), "transformer.ln_f.weight", "vector"),
        Entry(("final_norm", "bias"), "transformer.ln_f.bias", "vector"),
    ]
    if not a.tied_head:
        out.append(Entry(("word_head",), "lm_head.weight", "table"))
    fused = [("query", (0, 3)), ("key", (1, 3)), ("value", (2, 3))]
    whole = {"output": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    linear = _layer(a.layers, "layers", "conv1d", {k: f"{at}{v}.weight" for k, v in whole.items()})
    bias = _layer(a.layers, "layers", "vector", {f"{k}_bias": f"{at}{v}.bias" for k, v in whole.items()})
    for own, part in fused:
        linear.append(Entry(("layers", own), f"{at}attn.c_attn.weight", "conv1d", a.layers, part))
        bias.append(Entry(("layers", f"{own}_bias"), f"{at}attn.c_attn.bias", "vector", a.layers, part))
    norms = {}
    for own, there in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
        norms |= {f"{own}/scale": f"{at}{there}.weight", f"{own}/bias": f"{at}{there}.bias"}
    return out + linear + bias + _layer(a.layers, "layers", "vector", norms)


def _t5(a: Architecture) -> list[Entry]:
    out = [
        Entry(("words",), "shared.weight", "table"),
        Entry(("encoder_norm", "scale"), "encoder.final_layer_norm.weight", "vector"),
        Entry(("final_norm", "scale"), "decoder.final_layer_norm.weight", "vector"),
    ]
    if not a.tied_head:
        out.append(Entry(("word_head",), "lm_head.weight", "table"))
    for stack, side, layers, mlp in (
        ("encoder_layers", "encoder", a.encoder_layers, 1),
        ("layers", "decoder", a.layers, 2),
    ):
        at = f"{side}.block.{{}}.layer."
        own = "encoder_relative" if side == "encoder" else "relative"
        # A table [buckets, heads]: a bias of every head, learned in the first layer and used in all.
        out.append(Entry((own,), f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "conv1d"))
        linear = {
            "query": "0.SelfAttention.q",
            "key": "0.SelfAttention.k",
            "value": "0.SelfAttention.v",
            "output": "0.SelfAttention.o",
        }
        norms = {"attention_norm/scale": "0.layer_norm", "mlp_norm/scale": f"{mlp}.layer_norm"}
        if side == "decoder":
            linear |= {
                f"cross_{k}": f"1.EncDecAttention.{v}" for k, v in zip(("query", "key", "value", "output"), "qkvo")
            }
            norms |= {"cross_norm/scale": "1.layer_norm"}
        gated = {"gate": f"{mlp}.DenseReluDense.wi_0", "up": f"{mlp}.DenseReluDense.wi_1"}
        linear |= gated if a.gated else {"up": f"{mlp}.DenseReluDense.wi"}
        linear |= {"down": f"{mlp}.DenseReluDense.wo"}
        out += _layer(layers, stack, "linear", {k: f"{at}{v}.weight" for k, v in linear.items()})
        out += _layer(layers, stack, "vector", {k: f"{at}{v}.weight" for k, v in norms.items()})
    return out


def _bert(a: Architecture) -> list[Entry]:
    at = "bert.encoder.layer.{}."
    emb = "bert.embeddings."
    out = [
        Entry(("words",), f"{emb}word_embeddings.weight", "table"),
        Entry(("positions",), f"{emb}position_embeddings.weight", "table"),
        Entry(("token_types",), f"{emb}token_type_embeddings.weight", "table"),
        Entry(("input_norm", "scale"), f"{emb}LayerNorm.weight", "vector"),
        Entry(("input_norm", "bias"), f"{emb}LayerNorm.bias", "vector"),
    ]
    linear = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    norms = {}
    for own, there in (("attention_norm", "attention.output.LayerNorm"), ("mlp_norm", "output.LayerNorm")):
        norms |= {f"{own}/scale": f"{at}{there}.weight", f"{own}/bias": f"{at}{there}.bias"}
    out += _layer(a.layers, "layers", "linear", {k: f"{at}{v}.weight" for k, v in linear.items()})
    out += _layer(a.layers, "layers", "vector", {f"{k}_bias": f"{at}{v}.bias" for k, v in linear.items()})
    return out + _layer(a.layers, "layers", "vector", norms)


def spellings(family: str, name: str) -> list[str]:
    """All names under which published files may hold a tensor, the usual one first."""
    fronts = [name] + [name.replace(a, b, 1) for a, b in PREFIXES.get(family, ()) if name.startswith(a)]
    out = list(fronts)
    for old, new in SPELLINGS:
        out += [n.removesuffix(old) + new for n in fronts if n.endswith(old)]
    if name == "shared.weight":
        out += ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    return out


def redundant(family: str, name: str) -> bool:
    """Whether a tensor may stand in a file without being read: an unused buffer, or a copy of a tied table."""
    copies = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight")
    return (
        any(part in name for part in IGNORED) or name.endswith(copies) or (family == "bert" and "predictions" in name)
    )

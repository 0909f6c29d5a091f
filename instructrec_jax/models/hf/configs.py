"""``config.json`` of a published model to ``Architecture``, and back.

Both spellings are read: as published (``rope_theta``, ``rope_scaling``, ``sliding_window_pattern``) and as transformers 5 saves it
(``rope_parameters``, ``layer_types``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.models.architecture import Architecture, Rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# What the files of models with pictures leave out where it is the default of their architecture.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}


def from_hf(config: dict[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Raises:
        ConfigError: an unknown ``model_type``, a switch that is not supported, or a missing number; with the nearest known one.
    """
    family = config.get("model_type", "")
    if family == "gemma3" and "text_config" in config:  # words and pictures: the language model is inside
        return from_hf({**_GEMMA3_DEFAULTS, **config["text_config"], "model_type": "gemma3_text"})
    if family not in _READERS:
        raise ConfigError(
            f"unknown architecture {family!r}{did_you_mean(family, _READERS)}", remedy=f"known: {', '.join(_READERS)}"
        )
    try:
        return _READERS[family](config)
    except KeyError as missing:
        raise ConfigError(f"config.json of a {family} model lacks {missing}") from missing


def _activation(name: str) -> Any:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}", remedy=f"known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rope(parameters: dict[str, Any] | None, theta: float) -> Rope:
    """From a ``rope_scaling`` or ``rope_parameters`` mapping."""
    p = parameters or {}
    kind = p.get("rope_type", p.get("type", "default"))
    theta = float(p.get("rope_theta", theta))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", float(p["factor"]))
    if kind == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        return Rope(theta, "llama3", float(p["factor"]), low, high, int(p["original_max_position_embeddings"]))
    raise ConfigError(f"rope type {kind!r} is not supported", remedy="default, linear and llama3 are")


def _llama_like(c: dict[str, Any]) -> Architecture:
    family = c["model_type"]
    heads = c["num_attention_heads"]
    layers = c["num_hidden_layers"]
    gemma = family in ("gemma2", "gemma3_text")
    parameters = c.get("rope_parameters")
    scaling = parameters if parameters and "rope_theta" in parameters else c.get("rope_scaling")
    theta = c.get("rope_theta", 1_000_000.0 if family == "gemma3_text" else 10_000.0)
    rope, local_rope = _rope(scaling, theta), None
    if family == "gemma3_text":
        if parameters and "full_attention" in parameters:
            rope = _rope(parameters["full_attention"], 1_000_000.0)
            local_rope = _rope(parameters["sliding_attention"], 10_000.0)
        else:
            local_rope = Rope(float(c.get("rope_local_base_freq", 10_000.0)))
    window, local = _windows(c, layers)
    qkv_bias = {"qwen2": True}.get(family, bool(c.get("attention_bias", False)))
    return Architecture(
        family=family,
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_size=c.get("head_dim") or (256 if gemma else c["hidden_size"] // heads),
        mlp_width=c["intermediate_size"],
        max_positions=c.get("max_position_embeddings", 0),
        norm="rms_plus_one" if gemma else "rms",
        norm_eps=c.get("rms_norm_eps", 1e-6),
        placement="sandwich" if gemma else "pre",
        rope=rope,
        local_rope=local_rope,
        window=window,
        local_layers=local,
        query_scale=c.get("query_pre_attn_scalar", 256) ** -0.5 if gemma else None,
        attention_softcap=(c.get("attn_logit_softcapping") or 0.0) if gemma else 0.0,
        final_softcap=(c.get("final_logit_softcapping") or 0.0) if gemma else 0.0,
        qk_norm=family in ("qwen3", "gemma3_text"),
        activation=_activation(
            (c.get("hidden_activation") or c.get("hidden_act") or "gelu_pytorch_tanh") if gemma else c["hidden_act"]
        ),
        qkv_bias=qkv_bias,
        output_bias=family != "qwen2" and bool(c.get("attention_bias", False)),
        mlp_bias=bool(c.get("mlp_bias", False)),
        tied_head=c.get("tie_word_embeddings", gemma),
        embed_scale=math.sqrt(c["hidden_size"]) if gemma else 1.0,
    )


def _windows(c: dict[str, Any], layers: int) -> tuple[int, tuple[bool, ...]]:
    """Size of the window and the layers that have it; (0, ()) without."""
    family = c["model_type"]
    window = c.get("sliding_window") or 0
    if family in ("llama",) or (family in ("qwen2", "qwen3") and not c.get("use_sliding_window", False)):
        return 0, ()
    if not window:
        return 0, ()
    if c.get("layer_types"):
        local = tuple(kind == "sliding_attention" for kind in c["layer_types"])
    elif family == "gemma2":
        local = tuple(layer % 2 == 0 for layer in range(layers))
    elif family == "gemma3_text":
        pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
        local = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    elif family in ("qwen2", "qwen3"):
        local = tuple(layer >= c.get("max_window_layers", 28) for layer in range(layers))
    else:
        local = (True,) * layers
    if not any(local):
        return 0, ()
    return window, () if all(local) else local


def _gpt2(c: dict[str, Any]) -> Architecture:
    for switch in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if c.get(switch):
            raise ConfigError(f"gpt2: {switch} is not supported")
    width, heads = c["n_embd"], c["n_head"]
    return Architecture(
        family="gpt2",
        vocab=c["vocab_size"],
        width=width,
        layers=c["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        mlp_width=c.get("n_inner") or 4 * width,
        max_positions=c.get("n_positions", 1024),
        norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=_activation(c.get("activation_function", "gelu_new")),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_head=c.get("tie_word_embeddings", True),
    )


def _t5(c: dict[str, Any]) -> Architecture:
    feed_forward = c.get("feed_forward_proj", "relu")
    gated = feed_forward.startswith("gated-")
    activation = feed_forward.removeprefix("gated-")
    # T5 v1.1 and Flan-T5 say "gated-gelu" and mean the tanh form.
    activation = "gelu_new" if feed_forward == "gated-gelu" else activation
    tied = c.get("tie_word_embeddings", c["model_type"] == "t5")
    return Architecture(
        family=c["model_type"],
        kind="encoder-decoder",
        vocab=c["vocab_size"],
        width=c["d_model"],
        layers=c.get("num_decoder_layers") or c["num_layers"],
        encoder_layers=c["num_layers"],
        heads=c["num_heads"],
        kv_heads=c["num_heads"],
        head_size=c["d_kv"],
        mlp_width=c["d_ff"],
        norm_eps=c.get("layer_norm_epsilon", 1e-6),
        positions="relative",
        relative_buckets=c.get("relative_attention_num_buckets", 32),
        relative_distance=c.get("relative_attention_max_distance", 128),
        query_scale=1.0,
        activation=_activation(activation),
        gated=gated,
        tied_head=tied,
        # transformers 5 has a switch of its own; before, tied embeddings meant scaled ones.
        head_scale=c["d_model"] ** -0.5 if c["model_type"] == "t5" and c.get("scale_decoder_outputs", tied) else 1.0,
        decoder_start=c.get("decoder_start_token_id") or 0,
    )


def _bert(c: dict[str, Any]) -> Architecture:
    if c.get("position_embedding_type", "absolute") != "absolute":
        raise ConfigError(f"bert: position_embedding_type {c['position_embedding_type']!r} is not supported")
    width, heads = c["hidden_size"], c["num_attention_heads"]
    return Architecture(
        family="bert",
        kind="encoder",
        vocab=c["vocab_size"],
        width=width,
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        mlp_width=c["intermediate_size"],
        max_positions=c["max_position_embeddings"],
        norm="layer",
        norm_eps=c.get("layer_norm_eps", 1e-12),
        placement="post",
        input_norm=True,
        final_norm=False,
        positions="learned",
        activation=_activation(c.get("hidden_act", "gelu")),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        token_types=c.get("type_vocab_size", 2),
    )


_READERS: dict[str, Callable[[dict[str, Any]], Architecture]] = {
    "gpt2": _gpt2,
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma2": _llama_like,
    "gemma3_text": _llama_like,
    "t5": _t5,
    "mt5": _t5,
    "bert": _bert,
}


def to_hf(arch: Architecture) -> dict[str, Any]:
    """A stock ``config.json`` of a decoder of the Llama shape. Published models keep their own file; this is for models made here.

    Raises:
        ConfigError: no published architecture has this combination.
    """
    plain = Architecture(
        family=arch.family, vocab=arch.vocab, width=arch.width, layers=arch.layers, heads=arch.heads, kv_heads=arch.kv_heads,
        head_size=arch.head_size, mlp_width=arch.mlp_width, max_positions=arch.max_positions, norm_eps=arch.norm_eps,
        rope=arch.rope, tied_head=arch.tied_head,
    )  # fmt: skip
    if arch != plain or arch.family != "llama" or arch.rope.scaling != "none":
        raise ConfigError("only a plain Llama shape is described from its numbers; keep the published config.json")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.vocab,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_size,
        "intermediate_size": arch.mlp_width,
        "max_position_embeddings": arch.max_positions or 2048,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": arch.tied_head,
    }

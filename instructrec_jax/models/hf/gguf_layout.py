"""What a GGUF file's settings and tensors are in the Hugging Face layout: ``config.json`` and one ``Slot`` per tensor.

The names and the meaning of the settings are those of llama.cpp's ``convert_hf_to_gguf.py``, read backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from instructrec_jax.errors import DataError

Edit = Literal["", "pairs", "minus_one", "transpose"]


@dataclass(frozen=True)
class Slot:
    """One tensor: its name there, its name here, the shape it must have in the GGUF file (outermost first), and what changes."""

    source: str
    name: str
    shape: tuple[int, ...]
    edit: Edit = ""
    heads: int = 0  # of the edit "pairs"

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Shape in the Hugging Face layout."""
        return self.shape[::-1] if self.edit == "transpose" else self.shape


def edited(values: np.ndarray, slot: Slot) -> np.ndarray:
    """A tensor's float32 values in the Hugging Face layout.

    ``pairs`` undoes llama.cpp's reordering of query and key rows of the Llama architecture: there, the two rows that rotate
    together (Su et al. 2021, RoFormer, eq. 34) lie side by side; here, half a head apart.
    ``minus_one`` undoes the 1 that is added there to Gemma's norm weights, because here the model adds it.
    ``transpose`` is for GPT-2, whose linear layers are [in, out] here.
    """
    match slot.edit:
        case "pairs":
            return unpair(values, slot.heads)
        case "minus_one":
            return values - np.float32(1)
        case "transpose":
            return np.ascontiguousarray(values.T)
        case _:
            return values


def unpair(rows: Float[np.ndarray, "out *in"], heads: int) -> Float[np.ndarray, "out *in"]:
    """Rows of each head from order (0, h, 1, h + 1, ...), h = half the head's size, to order (0, 1, 2, ...)."""
    inner = rows.shape[1:]
    return rows.reshape(heads, -1, 2, *inner).swapaxes(1, 2).reshape(rows.shape)


class Settings:
    """The key-value part of a GGUF file, without the arrays of the tokenizer.

    Args:
        values: by key, e.g. ``llama.block_count``.
        file: for messages.
    """

    def __init__(self, values: dict[str, Any], file: str):
        self.values, self.file = values, file
        self.architecture = str(values.get("general.architecture", ""))
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture, e.g. ``block_count``.

        Raises:
            DataError: it differs from layer to layer, which no configuration here can say.
        """
        full = f"{self.architecture}.{key}"
        self.read.add(full)
        value = self.values.get(full, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise DataError(f"{full} differs between layers: {value[:8]}", file=self.file, remedy=_OTHER_FILE)
            value = value[0]
        return value

    def need(self, key: str) -> Any:
        """As ``get``.

        Raises:
            DataError: the file does not hold it.
        """
        if (value := self.get(key)) is None:
            raise DataError(f"the setting {self.architecture}.{key} is missing", file=self.file, remedy=_OTHER_FILE)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            DataError: missing (without a default), or not one.
        """
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{self.architecture}.{key} must be a positive number, not {value!r}", file=self.file)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number as it was written before it became a float32: 1e-05, not 9.999999747378752e-06."""
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{self.architecture}.{key} must be a number, not {value!r}", file=self.file)
        return float(str(np.float32(value)))

    def unread(self) -> dict[str, Any]:
        """Settings of the architecture that nothing here asked for."""
        mine = f"{self.architecture}."
        known = self.read | {mine + key for key in _NO_EFFECT}
        return {k: v for k, v in self.values.items() if k.startswith(mine) and k not in known}


_OTHER_FILE = "convert another file of the model, or take its safetensors release"


# Said by the tensors' shapes, or of no effect on the computation.
_NO_EFFECT = ("vocab_size", "attention.value_length", "rope.scaling.finetuned", "rope.scaling.original_context_length")


def layout(
    settings: Settings, tensors: dict[str, tuple[int, ...]], rope_factors: np.ndarray | None = None
) -> tuple[dict[str, Any], list[Slot]]:
    """``config.json`` (without the token ids) and the slots of a GGUF file, in the order of the layers.

    Args:
        settings: its key-value part.
        tensors: shapes by name, outermost axis first.
        rope_factors: values of ``rope_freqs.weight`` where the file has it.

    Raises:
        DataError: an unknown architecture; a setting that is missing or that stock models do not have; a tensor that is missing,
            has another shape than the settings say, or is not part of the architecture.
    """
    reader = _READERS.get(settings.architecture)
    if reader is None:
        raise DataError(
            f"architecture {settings.architecture!r} is not supported",
            file=settings.file,
            remedy=f"supported: {', '.join(_READERS)}",
        )
    if settings.get("expert_count", 0):
        raise DataError("a mixture of experts is not supported", file=settings.file, remedy=_OTHER_FILE)
    if settings.size("block_count") > len(tensors):  # before a list is made for a number that is nonsense
        raise DataError(
            f"{len(tensors)} tensors cannot be {settings.size('block_count'):,} layers",
            file=settings.file,
            remedy="download the file again",
        )
    if len(tensors.get("token_embd.weight", ())) != 2:
        raise DataError(
            "tensor token_embd.weight is missing or no matrix", file=settings.file, remedy="download the file again"
        )
    config, slots = reader(settings, tensors, rope_factors)
    _check(settings.file, slots, tensors)
    return config, slots


def _check(file: str, slots: list[Slot], tensors: dict[str, tuple[int, ...]]) -> None:
    for slot in slots:
        if slot.source not in tensors:
            raise DataError(
                f"tensor {slot.source} of shape {slot.shape} is missing", file=file, remedy="download the file again"
            )
        if tensors[slot.source] != slot.shape:
            raise DataError(
                f"tensor {slot.source} has the shape {tensors[slot.source]}, the settings say {slot.shape}",
                file=file,
                remedy="the file is damaged or of a variant that is not supported",
            )
    if unknown := sorted(set(tensors) - {s.source for s in slots} - {"rope_freqs.weight"}):
        raise DataError(
            f"tensor {unknown[0]} has no place in the architecture ({len(unknown)} such tensors)",
            file=file,
            remedy=_OTHER_FILE,
        )


def _llama_like(
    settings: Settings, tensors: dict[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> tuple[dict[str, Any], list[Slot]]:
    family = settings.architecture
    width, layers, inner = (settings.size(k) for k in ("embedding_length", "block_count", "feed_forward_length"))
    heads = settings.size("attention.head_count")
    kv_heads = settings.size("attention.head_count_kv", heads)
    vocab = tensors["token_embd.weight"][0]
    head = settings.size("attention.key_length", max(1, width // heads))
    if (rotated := settings.size("rope.dimension_count", head)) != head or head % 2:
        raise DataError(
            f"{rotated} of {head} dimensions of a head are rotated; all must be, and their number even",
            file=settings.file,
            remedy=_OTHER_FILE,
        )
    gemma = family == "gemma3"
    qkv_bias = "blk.0.attn_q.bias" in tensors
    all_bias = qkv_bias and family != "qwen2"
    mlp_bias = family == "llama" and "blk.0.ffn_up.bias" in tensors
    norm: Edit = "minus_one" if gemma else ""
    pairs: Edit = "pairs" if family == "llama" else ""

    slots = [Slot("token_embd.weight", "model.embed_tokens.weight", (vocab, width))]

    def linear(there: str, here: str, out: int, into: int, bias: bool, edit: Edit = "", n: int = 0) -> None:
        slots.append(Slot(f"{there}.weight", f"{here}.weight", (out, into), edit, n))
        if bias:
            slots.append(Slot(f"{there}.bias", f"{here}.bias", (out,), edit, n))

    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if gemma:
        norms |= {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    for layer in range(layers):
        there, here = f"blk.{layer}.", f"model.layers.{layer}."
        linear(there + "attn_q", here + "self_attn.q_proj", heads * head, width, qkv_bias, pairs, heads)
        linear(there + "attn_k", here + "self_attn.k_proj", kv_heads * head, width, qkv_bias, pairs, kv_heads)
        linear(there + "attn_v", here + "self_attn.v_proj", kv_heads * head, width, qkv_bias)
        linear(there + "attn_output", here + "self_attn.o_proj", width, heads * head, all_bias)
        linear(there + "ffn_gate", here + "mlp.gate_proj", inner, width, mlp_bias)
        linear(there + "ffn_up", here + "mlp.up_proj", inner, width, mlp_bias)
        linear(there + "ffn_down", here + "mlp.down_proj", width, inner, mlp_bias)
        for name, ours in norms.items():
            slots.append(Slot(f"{there}{name}.weight", f"{here}{ours}.weight", (width,), norm))
        if family in ("qwen3", "gemma3"):
            for part in "qk":
                source = f"{there}attn_{part}_norm.weight"
                slots.append(Slot(source, f"{here}self_attn.{part}_norm.weight", (head,), norm))
    slots.append(Slot("output_norm.weight", "model.norm.weight", (width,), norm))
    tied = "output.weight" not in tensors
    if not tied:
        slots.append(Slot("output.weight", "lm_head.weight", (vocab, width)))

    rope = _rope(settings, head, rope_factors)
    config = {
        "architectures": [_CLASSES[family]],
        "model_type": "gemma3_text" if gemma else family,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "max_position_embeddings": settings.size("context_length"),
        "rms_norm_eps": settings.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": tied,
        "rope_parameters": rope,
    }
    if gemma:
        window = settings.size("attention.sliding_window")
        pattern = settings.size("attention.sliding_window_pattern", 6)
        local = {"rope_type": "default", "rope_theta": settings.real("rope.freq_base_swa", 10_000.0)}
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": qkv_bias,
            # llama.cpp knows the 27B model, the only one that scales by the width of its heads' share, by its layers too.
            "query_pre_attn_scalar": width // heads if layers == 62 else head,
            "sliding_window": window,
            "layer_types": [
                "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
            ],
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        }
    else:
        config["hidden_act"] = "silu"
        if family != "qwen2":
            config["attention_bias"] = qkv_bias
        if family == "llama":
            config["mlp_bias"] = mlp_bias
    return config, slots


def _rope(settings: Settings, head: int, factors: np.ndarray | None) -> dict[str, Any]:
    theta = settings.real("rope.freq_base", 10_000.0)
    kind = settings.get("rope.scaling.type", "none")
    if factors is not None:
        return _llama3(settings, head, theta, factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": settings.real("rope.scaling.factor")}
    raise DataError(f"RoPE scaling {kind!r} is not supported", file=settings.file, remedy="none, linear and llama3 are")


def _llama3(settings: Settings, head: int, theta: float, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling, which GGUF keeps only as one divisor per frequency: guessed, and accepted where it gives those divisors."""
    factor, low, high, context = float(factors.max()), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise DataError(
            "tensor rope_freqs.weight does not hold the scaling of Llama 3 with 8,192 original positions",
            file=settings.file,
            remedy=_OTHER_FILE,
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _gpt2(
    settings: Settings, tensors: dict[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> tuple[dict[str, Any], list[Slot]]:
    width, layers, inner = (settings.size(k) for k in ("embedding_length", "block_count", "feed_forward_length"))
    heads, positions = settings.size("attention.head_count"), settings.size("context_length")
    vocab = tensors["token_embd.weight"][0]
    slots = [
        Slot("token_embd.weight", "transformer.wte.weight", (vocab, width)),
        Slot("position_embd.weight", "transformer.wpe.weight", (positions, width)),
    ]

    def affine(there: str, here: str, shape: tuple[int, ...]) -> None:
        slots.append(Slot(f"{there}.weight", f"{here}.weight", shape, "transpose" if len(shape) == 2 else ""))
        slots.append(Slot(f"{there}.bias", f"{here}.bias", shape[:1]))

    for layer in range(layers):
        there, here = f"blk.{layer}.", f"transformer.h.{layer}."
        affine(there + "attn_norm", here + "ln_1", (width,))
        affine(there + "attn_qkv", here + "attn.c_attn", (3 * width, width))
        affine(there + "attn_output", here + "attn.c_proj", (width, width))
        affine(there + "ffn_norm", here + "ln_2", (width,))
        affine(there + "ffn_up", here + "mlp.c_fc", (inner, width))
        affine(there + "ffn_down", here + "mlp.c_proj", (width, inner))
    affine("output_norm", "transformer.ln_f", (width,))
    tied = "output.weight" not in tensors
    if not tied:
        slots.append(Slot("output.weight", "lm_head.weight", (vocab, width)))
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_embd": width,
        "n_inner": inner,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        "layer_norm_epsilon": settings.real("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": tied,
    }
    return config, slots


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_READERS: dict[str, Callable[..., tuple[dict[str, Any], list[Slot]]]] = {
    **dict.fromkeys(_CLASSES, _llama_like),
    "gpt2": _gpt2,
}

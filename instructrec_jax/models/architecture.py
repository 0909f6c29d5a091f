"""One description for every language model: a decoder, an encoder-decoder or an encoder is a choice of shared parts.

GPT-2, Llama, Mistral, Qwen, Gemma, T5 and BERT differ in a dozen switches (which norm, where it stands, how positions enter, which
projections have a bias, ...). ``Architecture`` names the switches; ``models/language_model.py`` builds the parts that they choose;
``models/hf/configs.py`` translates the ``config.json`` of a published model. Frozen and hashable: it is static under ``jax.jit``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from instructrec_jax.config import ModelConfig
from instructrec_jax.errors import ConfigError


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): angle of pair j at position p is ``p / factor_j · theta^(-2j/H)``."""

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    # llama3 only: wave lengths beyond original / low_frequency are stretched by ``factor``, those below original /
    # high_frequency stay, between them it is interpolated.
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class Architecture:
    """The switches. Defaults are a Llama. Letters: D width, L layers, N heads, K kv_heads, H head_size, F mlp_width, V vocab."""

    family: str = "llama"  # Hugging Face's model_type: decides the names of exported weights
    kind: Literal["decoder", "encoder-decoder", "encoder"] = "decoder"
    vocab: int = 0  # V, rows of the word table as published (padded to divide over the mesh in memory)
    width: int = 64  # D
    layers: int = 2  # L, of the decoder, or of the encoder if that is all there is
    encoder_layers: int = 0  # of an encoder-decoder
    heads: int = 2  # N
    kv_heads: int = 2  # K; N / K query heads share a key/value head
    head_size: int = 32  # H
    mlp_width: int = 128  # F
    max_positions: int = 0  # longest context that the model was made for; 0 = unknown or unlimited

    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # plus_one: x / rms(x) · (1 + w), Gemma's
    norm_eps: float = 1e-6
    placement: Literal["pre", "post", "sandwich"] = (
        "pre"  # post: after the residual sum (BERT); sandwich: pre, and on each branch
    )
    input_norm: bool = False  # a norm on the embeddings
    final_norm: bool = True

    positions: Literal["rotary", "learned", "relative"] = "rotary"
    rope: Rope = field(default_factory=Rope)
    local_rope: Rope | None = None  # of the layers with a window, where it differs (Gemma 3)
    relative_buckets: int = 32  # T5: learned bias per head and bucket of distance, shared by all layers
    relative_distance: int = 128

    window: int = 0  # keys further back than this are not seen by local layers; 0 = all layers are global
    local_layers: tuple[bool, ...] = ()  # which layers have the window; () = all, if there is a window
    query_scale: float | None = None  # on q·k; None = H^-1/2
    attention_softcap: float = 0.0  # cap · tanh(scores / cap)
    final_softcap: float = 0.0
    qk_norm: bool = False  # norm over H on each query and key head

    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # down(act(gate x) · (up x)), else down(act(up x))
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False

    tied_head: bool = True
    embed_scale: float = 1.0  # on word embeddings (Gemma: sqrt D)
    head_scale: float = 1.0  # on the last hidden state before a tied head (T5 v1.0: D^-1/2)
    token_types: int = 0  # BERT's segment table
    decoder_start: int = 0  # first input of an encoder-decoder's decoder

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} query heads do not divide over {self.kv_heads} key/value heads")
        if self.local_layers and len(self.local_layers) != self.layers:
            raise ConfigError(f"local_layers names {len(self.local_layers)} layers of {self.layers}")
        if self.positions == "rotary" and self.head_size % 2:
            raise ConfigError(f"rotary positions need an even head size, not {self.head_size}")

    @property
    def groups(self) -> int:
        """G, query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def causal(self) -> bool:
        """Whether a position reads only what stands before it."""
        return self.kind != "encoder"

    def local(self, layer: int) -> bool:
        """Whether a layer has the window."""
        return bool(self.window) and (not self.local_layers or self.local_layers[layer])


def from_numbers(config: ModelConfig, vocab: int) -> Architecture:
    """The small Llama-shaped decoder that is trained from scratch, from the numbers of a run's config."""
    return Architecture(
        vocab=vocab,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        mlp_width=config.mlp_width,
        norm_eps=config.norm_eps,
        input_norm=True,  # words, items and features on one scale
        rope=Rope(config.rope_theta),
        tied_head=config.tied_head,
    )

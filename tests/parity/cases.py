"""The table of golden cases: small random models, one per family and per odd corner of a family.

The configs are written as published ones are (old and new spellings mixed as they are found), with small numbers, an odd
vocabulary and large epsilons and small caps, so that each setting shows in the output. ``matters`` lists changes of the
config that must change the output: ``tools/goldens.py`` refuses to write a case in which one of them does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

VOCAB = 61
LONG = 160  # length of the long sequence, where the context allows it

# A JSON object.
Config = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One golden: its config, what must matter, and how its file differs from what transformers itself writes."""

    config: Config
    matters: tuple[Config, ...] = ()
    untied_head: bool = False
    rename: Callable[[str], str] = str
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``decoder``, ``encoder-decoder`` or ``encoder``."""
        return {"t5": "encoder-decoder", "mt5": "encoder-decoder", "bert": "encoder"}.get(
            str(self.config["model_type"]), "decoder"
        )


def llama(**settings: object) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 256,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "rms_norm_eps": 3e-3,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
    } | settings


def gpt2(**settings: object) -> Config:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": VOCAB - 1,
        "embd_pdrop": 0.1,
        "eos_token_id": VOCAB - 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 3e-3,
        "n_ctx": 176,
        "n_embd": 24,
        "n_head": 3,
        "n_layer": 2,
        "n_positions": 176,
        "resid_pdrop": 0.1,
        "vocab_size": VOCAB,
    } | settings


def qwen(version: int, **settings: object) -> Config:
    return {
        "architectures": [f"Qwen{version}ForCausalLM"],
        "model_type": f"qwen{version}",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 40,
        "max_position_embeddings": 256,
        "max_window_layers": 2,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 3e-3,
        "rope_theta": 1000000.0,
        "sliding_window": 5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    } | settings


def gemma3(**settings: object) -> Config:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 18,
        "intermediate_size": 28,
        "max_position_embeddings": 256,
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 5,
        "rms_norm_eps": 3e-3,
        "rope_local_base_freq": 100.0,
        "rope_theta": 10000.0,
        "sliding_window": 5,
        "vocab_size": VOCAB,
    } | settings


def gemma2(**settings: object) -> Config:
    """Gemma 2; soft-caps are small so that they bend most values."""
    shared = {name: value for name, value in gemma3().items() if name != "rope_local_base_freq"}
    return (
        shared
        | {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attn_logit_softcapping": 1.5,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 4.0,
            "hidden_act": "gelu_pytorch_tanh",
            "num_attention_heads": 2,
        }
        | settings
    )


def t5(**settings: object) -> Config:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_ff": 40,
        "d_kv": 8,
        "d_model": 20,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 3e-3,
        "num_heads": 3,
        "num_layers": 2,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 8,
        "vocab_size": VOCAB,
    } | settings


def bert(**settings: object) -> Config:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "layer_norm_eps": 3e-3,
        "max_position_embeddings": 48,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": VOCAB,
    } | settings


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _gamma_and_beta(name: str) -> str:
    """The names of the first published BERT files."""
    return "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


_LLAMA3_ROPE: Config = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}

CASES: dict[str, Case] = {
    "gpt2": Case(gpt2(), matters=({"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-5})),
    # As published: no "transformer." before the names, and a causal mask stored beside every layer.
    "gpt2_published": Case(
        gpt2(n_inner=40, n_head=2, n_layer=3, n_ctx=40, n_positions=40),
        rename=lambda name: name.removeprefix("transformer."),
        extra={f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 40, 40), np.uint8)) for i in range(3)},
    ),
    "llama2": Case(
        llama(max_position_embeddings=320),
        matters=({"rope_theta": 500.0}, {"rms_norm_eps": 1e-6}, {"hidden_act": "gelu"}),
        extra={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": _zeros(4) for i in range(2)},
    ),
    "llama3": Case(
        llama(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_ROPE,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            mlp_bias=False,
            pretraining_tp=1,
        ),
        matters=(
            {"rope_scaling": None},
            {"rope_scaling": _LLAMA3_ROPE | {"high_freq_factor": 2.0}},
            {"rope_scaling": _LLAMA3_ROPE | {"low_freq_factor": 2.0}},
            {"rope_scaling": _LLAMA3_ROPE | {"factor": 4.0}},
        ),
    ),
    "llama_biases": Case(
        llama(
            attention_bias=True, mlp_bias=True, num_key_value_heads=1, rope_scaling={"type": "linear", "factor": 4.0}
        ),
        matters=({"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ),
    "smollm2": Case(
        llama(
            hidden_size=24,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_hidden_layers=3,
            rope_theta=100000,
            tie_word_embeddings=True,
            rope_interleaved=False,
            is_llama_config=True,
            pad_token_id=2,
            mlp_bias=False,
        ),
        matters=({"rope_theta": 10000.0},),
    ),
    "mistral": Case(
        llama(
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            rope_theta=1000000.0,
        ),
        matters=({"sliding_window": None}, {"sliding_window": 4}, {"sliding_window": 6}),
    ),
    "qwen2": Case(qwen(2), matters=({"rope_theta": 10000.0}, {"use_sliding_window": True, "max_window_layers": 1})),
    "qwen2_window": Case(
        qwen(2, use_sliding_window=True, max_window_layers=1, num_hidden_layers=3, tie_word_embeddings=False),
        matters=(
            {"use_sliding_window": False},
            {"max_window_layers": 2},
            {"max_window_layers": 0},
            {"sliding_window": 4},
        ),
    ),
    "qwen3": Case(
        qwen(3, head_dim=12, num_attention_heads=4, attention_bias=False, sliding_window=None),
        matters=({"rms_norm_eps": 1e-6}, {"rope_theta": 10000.0}),
    ),
    "gemma2": Case(
        gemma2(),
        matters=(
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 8},
            {"sliding_window": 4},
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            {"hidden_activation": "gelu"},
            {"rms_norm_eps": 1e-6},
        ),
    ),
    "gemma3": Case(
        gemma3(sliding_window_pattern=3, rope_scaling={"factor": 8.0, "rope_type": "linear"}),
        matters=(
            {"sliding_window_pattern": 2},
            {"sliding_window": 4},
            {"rope_scaling": None},
            {"rope_local_base_freq": 10000.0},
            {"rope_theta": 100.0},
            {"query_pre_attn_scalar": 8},
        ),
    ),
    # Five local layers to one global one, written out.
    "gemma3_layers": Case(
        gemma3(
            _sliding_window_pattern=6,
            layer_types=["sliding_attention"] * 5 + ["full_attention"],
            num_hidden_layers=6,
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=20,
            rope_scaling=None,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            query_pre_attn_scalar=8,
            attention_bias=False,
            dtype="float32",
        ),
        matters=({"layer_types": ["sliding_attention"] * 6}, {"rope_theta": 10000.0}, {"rope_local_base_freq": 1000.0}),
    ),
    "t5": Case(
        t5(n_positions=512, output_past=True, num_layers=3),
        matters=({"tie_word_embeddings": False}, {"layer_norm_epsilon": 1e-6}, {"relative_attention_max_distance": 20}),
        extra={"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": _zeros(8, 3)},
    ),
    # T5 1.1 and Flan-T5; another number of decoder layers; distances beyond the last bucket.
    "t5_v11": Case(
        t5(
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            num_decoder_layers=1,
            relative_attention_max_distance=20,
        ),
        matters=({"tie_word_embeddings": True}, {"relative_attention_max_distance": 128}),
        untied_head=True,
    ),
    "mt5": Case(
        t5(
            architectures=["MT5ForConditionalGeneration"],
            model_type="mt5",
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            relative_attention_num_buckets=12,
            tokenizer_class="T5Tokenizer",
        ),
        untied_head=True,
    ),
    "bert": Case(
        bert(architectures=["BertForPreTraining"]),
        matters=({"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-12}),
        rename=_gamma_and_beta,
        extra={
            "cls.predictions.bias": _zeros(VOCAB),
            "cls.predictions.transform.dense.weight": _zeros(24, 24),
            "cls.seq_relationship.weight": _zeros(2, 24),
        },
    ),
    "minilm": Case(
        bert(
            hidden_size=16,
            num_attention_heads=4,
            num_hidden_layers=3,
            intermediate_size=64,
            max_position_embeddings=32,
            layer_norm_eps=1e-12,
            position_embedding_type="absolute",
            gradient_checkpointing=False,
            use_cache=True,
        ),
        extra={"embeddings.position_ids": np.arange(32, dtype=np.int64)[None]},
    ),
}

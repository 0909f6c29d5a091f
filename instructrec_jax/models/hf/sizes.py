"""The sizes of published models: what their ``config.json`` says, how many parameters they have, what memory they take.

Everything here is arithmetic on shapes: no weights are needed, and no memory is used, whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from instructrec_jax.config import AdapterConfig
from instructrec_jax.errors import ConfigError, UserError, did_you_mean
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.configs import from_hf


@dataclass(frozen=True)
class Size:
    """A published model."""

    hub: str  # owner/name
    parameters: int  # of the published model, tied tables once
    licence: str
    config: dict[str, Any]  # the part of its config.json that decides the architecture
    outside: int = 0  # parameters among them of parts that are not read: pooling head, picture encoder


def _gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_embd": width, "n_head": heads,
        "n_layer": layers, "n_positions": 1024, "vocab_size": 50257,
    }  # fmt: skip


def _flan_t5(layers: int, width: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "t5", "d_ff": mlp, "d_kv": 64, "d_model": width, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6, "num_decoder_layers": layers, "num_heads": heads, "num_layers": layers,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
        "vocab_size": 32128,
    }  # fmt: skip


def _llama(
    layers: int,
    width: int,
    heads: tuple[int, int],
    mlp: int,
    vocab: int,
    theta: float,
    positions: int,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": width, "intermediate_size": mlp,
        "max_position_embeddings": positions, "mlp_bias": False, "num_attention_heads": heads[0], "num_hidden_layers": layers,
        "num_key_value_heads": heads[1], "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": theta,
        "tie_word_embeddings": tied, "vocab_size": vocab, **more,
    }  # fmt: skip


def _smollm2(layers: int, width: int, heads: tuple[int, int], mlp: int, theta: float) -> dict[str, Any]:
    return _llama(layers, width, heads, mlp, 49152, theta, 8192, True)


def _llama3(
    layers: int, width: int, heads: tuple[int, int], mlp: int, tied: bool, factor: float, **more: Any
) -> dict[str, Any]:
    scaling = {
        "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    return _llama(layers, width, heads, mlp, 128256, 500000.0, 131072, tied, rope_scaling=scaling, **more)


def _qwen3(layers: int, width: int, heads: tuple[int, int], mlp: int, tied: bool) -> dict[str, Any]:
    return _llama(
        layers, width, heads, mlp, 151936, 1000000, 40960, tied,
        model_type="qwen3", head_dim=128, max_window_layers=layers, rms_norm_eps=1e-6, sliding_window=None, use_sliding_window=False,
    )  # fmt: skip


def _gemma3(layers: int, width: int, mlp: int, pattern: str) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": width, "intermediate_size": mlp,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": layers, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, pattern: 6, "vocab_size": 262144,
    }  # fmt: skip


def _bert(layers: int, width: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": width, "intermediate_size": mlp, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": layers,
        "position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 30522,
    }  # fmt: skip


# The 4B model's file says no more than this; the rest are defaults of its architecture.
_GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
_GEMMA2_2B = {
    "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
    "vocab_size": 256000,
}  # fmt: skip
_QWEN25_05B = _llama(
    24, 896, (14, 2), 4864, 151936, 1000000.0, 32768, True,
    model_type="qwen2", max_window_layers=24, rms_norm_eps=1e-6, sliding_window=32768, use_sliding_window=False,
)  # fmt: skip
_MISTRAL_7B = _llama(
    32, 4096, (32, 8), 14336, 32768, 1000000.0, 32768, False, model_type="mistral", sliding_window=None
)

_MIT, _APACHE, _GEMMA = "MIT", "Apache-2.0", "Gemma Terms of Use"
_LLAMA31, _LLAMA32 = "Llama 3.1 Community License", "Llama 3.2 Community License"
_SMOL = "HuggingFaceTB/SmolLM2-"

SIZES: dict[str, Size] = {
    "gpt2": Size("openai-community/gpt2", 124_439_808, _MIT, _gpt2(12, 768, 12)),
    "gpt2-medium": Size("openai-community/gpt2-medium", 354_823_168, _MIT, _gpt2(24, 1024, 16)),
    "gpt2-large": Size("openai-community/gpt2-large", 774_030_080, _MIT, _gpt2(36, 1280, 20)),
    "gpt2-xl": Size("openai-community/gpt2-xl", 1_557_611_200, _MIT, _gpt2(48, 1600, 25)),
    "flan-t5-small": Size("google/flan-t5-small", 76_961_152, _APACHE, _flan_t5(8, 512, 6, 1024)),
    "flan-t5-base": Size("google/flan-t5-base", 247_577_856, _APACHE, _flan_t5(12, 768, 12, 2048)),
    "flan-t5-large": Size("google/flan-t5-large", 783_150_080, _APACHE, _flan_t5(24, 1024, 16, 2816)),
    "flan-t5-xl": Size("google/flan-t5-xl", 2_849_757_184, _APACHE, _flan_t5(24, 2048, 32, 5120)),
    "flan-t5-xxl": Size("google/flan-t5-xxl", 11_135_332_352, _APACHE, _flan_t5(24, 4096, 64, 10240)),
    "smollm2-135m": Size(f"{_SMOL}135M-Instruct", 134_515_008, _APACHE, _smollm2(30, 576, (9, 3), 1536, 100000)),
    "smollm2-360m": Size(f"{_SMOL}360M-Instruct", 361_821_120, _APACHE, _smollm2(32, 960, (15, 5), 2560, 100000)),
    "smollm2-1.7b": Size(f"{_SMOL}1.7B-Instruct", 1_711_376_384, _APACHE, _smollm2(24, 2048, (32, 32), 8192, 130000)),
    "qwen2.5-0.5b": Size("Qwen/Qwen2.5-0.5B", 494_032_768, _APACHE, _QWEN25_05B),
    "qwen3-0.6b": Size("Qwen/Qwen3-0.6B", 596_049_920, _APACHE, _qwen3(28, 1024, (16, 8), 3072, True)),
    "qwen3-1.7b": Size("Qwen/Qwen3-1.7B", 1_720_574_976, _APACHE, _qwen3(28, 2048, (16, 8), 6144, True)),
    "qwen3-4b": Size("Qwen/Qwen3-4B", 4_022_468_096, _APACHE, _qwen3(36, 2560, (32, 8), 9728, True)),
    "qwen3-8b": Size("Qwen/Qwen3-8B", 8_190_735_360, _APACHE, _qwen3(36, 4096, (32, 8), 12288, False)),
    "llama-3.2-1b": Size(
        "meta-llama/Llama-3.2-1B", 1_235_814_400, _LLAMA32, _llama3(16, 2048, (32, 8), 8192, True, 32.0, head_dim=64)
    ),
    "llama-3.2-3b": Size(
        "meta-llama/Llama-3.2-3B", 3_212_749_824, _LLAMA32, _llama3(28, 3072, (24, 8), 8192, True, 32.0, head_dim=128)
    ),
    "llama-3.1-8b": Size(
        "meta-llama/Llama-3.1-8B", 8_030_261_248, _LLAMA31, _llama3(32, 4096, (32, 8), 14336, False, 8.0)
    ),
    "llama-3.1-70b": Size(
        "meta-llama/Llama-3.1-70B", 70_553_706_496, _LLAMA31, _llama3(80, 8192, (64, 8), 28672, False, 8.0)
    ),
    "mistral-7b": Size("mistralai/Mistral-7B-v0.3", 7_248_023_552, _APACHE, _MISTRAL_7B),
    "gemma2-2b": Size("google/gemma-2-2b", 2_614_341_888, _GEMMA, _GEMMA2_2B),
    "gemma3-270m": Size("google/gemma-3-270m", 268_098_176, _GEMMA, _gemma3(18, 640, 2048, "_sliding_window_pattern")),
    "gemma3-1b": Size("google/gemma-3-1b-pt", 999_885_952, _GEMMA, _gemma3(26, 1152, 6912, "sliding_window_pattern")),
    # Outside: a SigLIP encoder of pictures (416,866,032) and its projection (2,950,272).
    "gemma3-4b": Size("google/gemma-3-4b-pt", 4_300_079_472, _GEMMA, _GEMMA3_4B, outside=419_816_304),
    # Outside: the pooling head, a linear layer on the first token.
    "bert-base": Size("google-bert/bert-base-uncased", 109_482_240, _APACHE, _bert(12, 768, 3072), outside=590_592),
    "minilm-l6": Size(
        "sentence-transformers/all-MiniLM-L6-v2", 22_713_216, _APACHE, _bert(6, 384, 1536), outside=147_840
    ),
}


def find(name: str | Path) -> Architecture:
    """The architecture of a known name, of its id on the hub, or of a folder with a config.json.

    Raises:
        UserError: none of these; with the nearest known name. DataError, ConfigError: the folder's config.json cannot be used.
    """
    known = {key: size for key, size in SIZES.items() if str(name).lower() in (key, size.hub.lower())}
    if known:
        return from_hf(next(iter(known.values())).config)
    if Path(name).is_dir():
        from instructrec_jax.models.hf.load import read_config

        return read_config(name)
    raise UserError(
        f"{name} is neither a known model nor a folder{did_you_mean(str(name), SIZES)}",
        remedy=f"give the folder of a model, or one of {', '.join(SIZES)}",
    )


# ---------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, of what stays there. Activations come on top: they depend on the batch."""

    parameters: int  # the model's, with its tables padded
    adapter: int = 0
    gradients: int = 0  # of what is trained
    optimiser: int = 0  # AdamW's two moments of what is trained
    cache_per_token: int = (
        0  # keys and values of one token of one row; an encoder-decoder's again for each token of the source
    )

    @property
    def total(self) -> int:
        """All but the cache."""
        return self.parameters + self.adapter + self.gradients + self.optimiser


def memory_estimate(
    arch: Architecture,
    *,
    dtype: str = "bfloat16",
    quantised: str = "none",
    adapter: AdapterConfig | None = None,
    optimizer: bool = False,
    mesh: Mapping[str, int] | None = None,
) -> Memory:
    """Bytes per device, from the shapes, types and partition specs that the model's own code gives its arrays.

    Args:
        arch: the architecture.
        dtype: of tables, layers and cache; norms and biases are float32, and so is what is trained.
        quantised: "none", "int8" or "nf4": the projections of the layers.
        adapter: that stands beside the layers; None or rank 0 = none.
        optimizer: with gradients and AdamW state: of the adapter, or without one of the whole model.
        mesh: axis sizes ``replica, fsdp, tensor``; None = one device.

    Raises:
        ConfigError: the model does not divide over the mesh, or quantised weights are to be trained without an adapter.
    """
    import jax
    import jax.numpy as jnp

    from instructrec_jax.models.adapters import TARGETS
    from instructrec_jax.models.hf.names import entries, inputs
    from instructrec_jax.models.language_model import PLAIN, LanguageModel, Sizes, apply, init_variables
    from instructrec_jax.models.quantise import shapes, specs
    from instructrec_jax.models.sharding import MESH_AXES, RULES, check_divides, padded

    adapter = adapter or AdapterConfig()
    if optimizer and quantised != "none" and not adapter.rank:
        raise ConfigError(f"{quantised} weights cannot be trained", remedy="give an adapter a rank, e.g. 8")
    sizes = {"replica": 1, "fsdp": 1, "tensor": 1, **(mesh or {})}
    rows = sizes["replica"] * sizes["fsdp"]
    check_divides(arch, sizes, rows)
    whole = optimizer and not adapter.rank
    tables = Sizes(padded(arch.vocab))
    options = replace(PLAIN, adapter=adapter, dtype=dtype)
    axes = jax.sharding.AbstractMesh(
        tuple(sizes[a] for a in MESH_AXES), MESH_AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3
    )

    def local(shape: tuple[int, ...], spec: Any, kind: Any) -> int:
        return math.prod(jax.NamedSharding(axes, spec).shard_shape(shape)) * jnp.dtype(kind).itemsize

    def one_token() -> Any:
        variables = init_variables(arch, tables, options, jax.random.key(0))
        names = ("tokens", "segment_ids", "positions", "text_target", "item_target")
        batch = {name: jnp.zeros((rows, 1), jnp.int32, out_sharding=RULES.ids_bs) for name in names}
        return variables, apply(LanguageModel(arch, tables, options), variables, batch).cache

    with jax.sharding.use_abstract_mesh(axes):
        variables, cache = jax.eval_shape(one_token)
        parameters = 0
        for entry in entries(arch):
            leaf = variables["params"]
            for key in entry.path:
                leaf = leaf[key]
            shape, spec, stacked = leaf.shape, leaf.sharding.spec, bool(entry.layers)
            if quantised != "none" and entry.path[-1] in TARGETS:
                kind: Any = quantised
                n_in = inputs(entry.path[-1])
                laid_out = specs(kind, spec, n_in, stacked, shape=shape)
                stored = shapes(kind, shape, n_in, stacked=stacked)
                parameters += sum(local(part.shape, laid_out[name], part.dtype) for name, part in stored.items())
            else:
                parameters += local(shape, spec, "float32" if whole or entry.kind == "vector" else dtype)
        beside = sum(local(x.shape, x.sharding.spec, x.dtype) for x in jax.tree.leaves(variables.get("lora", {})))
        kept = sum(local(x.shape, x.sharding.spec, x.dtype) for x in jax.tree.leaves(cache))
        if arch.kind == "encoder":  # reads once, and keeps nothing
            kept = 0
    trained = (parameters if whole else beside) if optimizer else 0
    return Memory(parameters, beside, trained, 2 * trained, kept)


def parts(arch: Architecture) -> dict[str, int]:
    """Number of parameters by part of the model; tables without padding. The sum is that of ``count_parameters``."""
    import jax

    from instructrec_jax.models.language_model import Sizes, abstract_params

    tree = abstract_params(arch, Sizes(arch.vocab))
    counts: dict[str, int] = dict.fromkeys(_PARTS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        counts[_part([str(key.key) for key in path])] += leaf.size
    return {name: count for name, count in counts.items() if count}


_PARTS = (
    "word table", "positions and types", "encoder attention", "encoder mlp", "attention", "cross-attention", "mlp", "norms",
    "word head",
)  # fmt: skip


def _part(keys: list[str]) -> str:
    if any("norm" in key for key in keys):
        return "norms"
    if keys[0] in ("layers", "encoder_layers"):
        side = "encoder " if keys[0] == "encoder_layers" else ""
        projection = keys[-1].removesuffix("_bias")
        if projection in ("gate", "up", "down"):
            return f"{side}mlp"
        return f"{side}cross-attention" if projection.startswith("cross_") else f"{side}attention"
    return {"words": "word table", "word_head": "word head"}.get(keys[0], "positions and types")


def describe(arch: Architecture) -> str:
    """A table in plain text: the shape, and the parameters by part."""
    layers = f"{arch.encoder_layers} + {arch.layers}" if arch.encoder_layers else str(arch.layers)
    heads = f"{arch.heads} heads of {arch.head_size}"
    if arch.kv_heads != arch.heads:
        heads += f" ({arch.kv_heads} for keys and values)"
    lines = [
        f"{arch.family}, {arch.kind}: {layers} layers, width {arch.width:,}, {heads}, MLP {arch.mlp_width:,}",
        f"vocabulary {arch.vocab:,}"
        + ("" if arch.kind == "encoder" else ", tied head" if arch.tied_head else ", untied head")
        + (f", context {arch.max_positions:,}" if arch.max_positions else ""),
    ]
    counts = parts(arch)
    total = sum(counts.values())
    lines += [f"  {name:<20}{count:>18,}  {count / total:>5.1%}" for name, count in counts.items()]
    return "\n".join([*lines, f"  {'parameters':<20}{total:>18,}"])


def show(name: str, *, mesh: str = "1,1,1", quantised: str = "none", rank: int = 0, dtype: str = "bfloat16") -> str:
    """What ``instructrec model show`` prints: the model's parts, and its memory on each device of a mesh.

    Raises:
        UserError, ConfigError: see ``find`` and ``memory_estimate``; or the mesh is not three numbers.
    """
    axes = mesh.split(",")
    if len(axes) != 3 or not all(axis.strip().isdecimal() and int(axis) > 0 for axis in axes):
        raise ConfigError(f"--mesh {mesh}", remedy="give the sizes of replica,fsdp,tensor, like 1,8,1")
    sizes: dict[str, int] = dict(zip(("replica", "fsdp", "tensor"), map(int, axes)))
    arch = find(name)
    known = next((size for size in SIZES.values() if from_hf(size.config) == arch), None)
    lines = [describe(arch)]
    if known:
        lines.insert(0, f"{known.hub} ({known.licence})")
        if known.outside:
            lines.append(f"  {'not read':<20}{known.outside:>18,}")
    weights = dtype if quantised == "none" else f"{dtype}, layers in {quantised}"
    count = math.prod(sizes.values())
    where = f"on each of {count} devices" if count > 1 else "on one device"
    lines.append(f"memory {where}, {weights}; activations come on top")
    # An encoder makes features, and is not trained.
    can_train = arch.kind != "encoder" and (quantised == "none" or rank > 0)
    adapter = AdapterConfig(rank=rank)
    memory = memory_estimate(
        arch, dtype=dtype, quantised=quantised, adapter=adapter if can_train else None, optimizer=can_train, mesh=sizes
    )
    plain = memory_estimate(arch, dtype=dtype, quantised=quantised, mesh=sizes)
    lines.append(_gigabytes("to run", plain.parameters))
    if plain.cache_per_token:
        lines.append(f"  {'  and for each token':<32}{plain.cache_per_token / 1e3:>12,.1f} kB of keys and values")
    if can_train:
        what = f"an adapter of rank {rank}" if rank else "all of it"
        lines.append(_gigabytes(f"to train {what}", memory.total))
        for label in ("parameters", "adapter", "gradients", "optimiser"):
            if getattr(memory, label):
                lines.append(_gigabytes(f"  {label}", getattr(memory, label)))
    return "\n".join(lines)


def _gigabytes(label: str, count: int) -> str:
    return f"  {label:<32}{count / 1e9:>12,.2f} GB"

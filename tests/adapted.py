"""Stored models with an adapter beside their weights, as a run starts them, and what tests of adapters ask of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructrec_jax.config import AdapterConfig, Config, MeshConfig, ModelConfig
from instructrec_jax.models import adapters
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.language_model import LanguageModel, Sizes, apply, word_logits
from instructrec_jax.models.sharding import padded
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import init_model
from tests.tiny import content, on_mesh, random_batch

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["smollm2", "t5_v11", "gpt2"]  # a decoder with grouped heads, an encoder-decoder, one with biases


def options(kind: Any = "lora", *, rank: int = 4, quantise: Any = "none", **adapter: Any) -> ModelConfig:
    """The settings of an adapter on a published model; no dropout but the adapter's."""
    settings = AdapterConfig(rank=rank, kind=kind, alpha=8.0, **{"targets": adapters.TARGETS, **adapter})
    return ModelConfig(
        pretrained="golden", adapter=settings, quantise=quantise, trainable=("adapter",), dropout=0.0, item_dropout=0.0
    )


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def word_batch(vocab: int, rows: int = 16, length: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows of words, with targets."""
    batch = {k: v for k, v in random_batch(rows, length, seed).items() if not k.startswith(("item", "feature"))}
    batch["tokens"] = batch["tokens"] % vocab
    batch["text_target"] = np.where(batch["text_target"] > 0, 1 + batch["text_target"] % vocab, 0)
    return batch | {"item_target": np.zeros_like(batch["tokens"])}


def start(folder: str, model: ModelConfig) -> tuple[Architecture, Sizes, Any, Any]:
    """Architecture, sizes, trained and frozen variables of a stored model, on the current mesh, as a run makes them."""
    return _start(folder, model, jax.sharding.get_mesh())


@functools.cache
def _start(folder: str, model: ModelConfig, mesh: Any) -> tuple[Architecture, Sizes, Any, Any]:
    del mesh
    arch = read_config(GOLDEN / folder)
    base = load_params(GOLDEN / folder, arch, model.param_dtype, quantised=model.quantise)
    sizes = Sizes(padded(arch.vocab))
    return arch, sizes, *init_model(Config(model=model), arch, sizes, content(), 0, base)


def disturbed(lora: Any) -> Any:
    """An adapter that has learned something: random B, magnitudes that differ from the weights' by up to a fifth."""
    random = np.random.default_rng(3)

    def leaf(path: tuple, x: jax.Array) -> jax.Array:
        if "magnitude" in jax.tree_util.keystr(path):
            values = np.asarray(x) * random.uniform(0.8, 1.2, x.shape)
        else:
            values = random.normal(scale=0.2, size=x.shape)
        return jax.device_put(values.astype(np.float32), x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, lora)


def logits_of(
    arch: Architecture, sizes: Sizes, model: ModelConfig, variables: Any, *, key: int | None = None
) -> np.ndarray:
    """Word logits of a fixed batch; with a key, as while training."""
    module = LanguageModel(arch, sizes, model, train=key is not None)
    rngs = {} if key is None else {"rngs": {"dropout": jax.random.key(key)}}

    @jax.jit
    def run(variables: Any, batch: Any) -> jax.Array:
        out = apply(module, variables, batch, **rngs)
        return word_logits(out.hidden, out, arch)[..., : arch.vocab]

    batch = word_batch(arch.vocab, 2, 16)
    batch["text_target"][:, 8:12] = 1  # an answer for encoder-decoders
    logits = np.asarray(run(variables, on_mesh(batch)))
    return logits * (batch["text_target"] > 0)[..., None] if arch.kind == "encoder-decoder" else logits


def assert_same(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(a).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def names(tree: Any) -> set[str]:
    return {"/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}

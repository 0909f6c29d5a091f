"""Training with an adapter: nothing else changes, every mesh gives the same, and checkpoints hold only what is trained."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructrec_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from instructrec_jax.models.hf.load import read_config
from instructrec_jax.models.language_model import Sizes, init_variables
from instructrec_jax.training.checkpoint import Checkpoints
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import init_model, init_state, make_train_step, put_batch
from tests.adapted import GOLDEN, one_device, options, start, word_batch
from tests.tiny import content

TRAIN = TrainConfig(batch_size=16, sequence_length=32, logits_chunk=32, steps=40, warmup_steps=1, learning_rate=1e-2)


def train(mesh: jax.sharding.Mesh, folder: str, model: ModelConfig, steps: int) -> tuple[list[float], Any, Any, Any]:
    """Losses, and the state, the frozen variables before and after."""
    config = Config(model=model, train=TRAIN)
    with jax.set_mesh(mesh):
        features = content()
        arch, sizes, trained, frozen = start(folder, model)
        before = jax.device_get(frozen)
        state = init_state(jax.tree.map(jnp.copy, trained), config.train)  # the step takes it over
        step = make_train_step(config, arch, sizes, 1)
        batch = put_batch(word_batch(arch.vocab), 1)
        losses = []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch, features)
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state), before, jax.device_get(frozen)


@pytest.mark.parametrize(
    "kind, quantise",
    [
        ("lora", "none"),
        pytest.param("rslora", "int8", marks=pytest.mark.slow),
        pytest.param("dora", "nf4", marks=pytest.mark.slow),
    ],
)
def test_training_changes_the_adapter_alone(kind: str, quantise: str) -> None:
    model = options(kind, quantise=quantise, dropout=0.1)
    losses, state, before, after = train(one_device(), "smollm2", model, 4)
    assert losses[-1] < losses[0] - 0.05, losses
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # D 24, K 2, G 3, H 4, F 40, 3 layers: inputs and outputs of each projection meet in rank 4.
    ends = {
        "query": (24, 24),
        "key": (24, 8),
        "value": (24, 8),
        "output": (24, 24),
        "gate": (24, 40),
        "up": (24, 40),
        "down": (40, 24),
    }
    numbers = 3 * sum(4 * (i + o) + o * (kind == "dora") for i, o in ends.values())
    assert set(state["params"]) == {"lora"}
    assert sum(leaf.size for leaf in jax.tree.leaves(state["params"])) == numbers
    assert sum(leaf.size for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim) == 2 * numbers


@functools.cache
def trained_alone(folder: str, model: ModelConfig) -> tuple[list[float], Any]:
    losses, state, _, _ = train(one_device(), folder, model, 4)
    return losses, state["params"]


@pytest.mark.parametrize(
    "sizes, folder, kind, quantise",
    [
        ((1, 8, 1), "smollm2", "lora", "none"),
        pytest.param((2, 2, 2), "smollm2", "dora", "nf4", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), "smollm2", "dora", "none", marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "smollm2", "lora", "int8", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), "smollm2", "lora", "int8", marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "smollm2", "dora", "nf4", marks=pytest.mark.slow),
        pytest.param((2, 4, 1), "t5_v11", "lora", "int8", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_on_every_mesh(sizes: tuple[int, int, int], folder: str, kind: str, quantise: str) -> None:
    # One target of each layout: the fewer, the shorter the compilation.
    model = options(kind, quantise=quantise, targets=("query", "key", "output", "down", "cross_value"))
    alone, params = trained_alone(folder, model)
    losses, state, _, _ = train(make_mesh(MeshConfig(*sizes)), folder, model, 4)
    np.testing.assert_allclose(alone, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, state["params"])


def bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_checkpoint_holds_what_is_trained(tmp_path: Path) -> None:
    """A wide table of words, frozen: the checkpoint is smaller than it, and restores beside it."""
    arch = replace(read_config(GOLDEN / "smollm2"), vocab=16384)
    written = {}
    with jax.set_mesh(one_device()):
        base = jax.jit(lambda key: init_variables(arch, Sizes(arch.vocab), options(rank=0), key))(jax.random.key(1))[
            "params"
        ]
        for name, model in (("adapter", options()), ("all", replace(options(rank=0), trainable=("all",)))):
            trained, _ = init_model(Config(model=model), arch, Sizes(arch.vocab), content(), 0, base)
            state = init_state(trained, TRAIN)
            checkpoints = Checkpoints(tmp_path / name)
            checkpoints.save(1, state, iter(grain.MapDataset.range(4).to_iter_dataset()), {"name": name}, None)
            checkpoints.wait()
            restored = checkpoints.restore_params(1, trained)
            checkpoints.close()
            jax.tree.map(np.testing.assert_array_equal, restored, trained)
            written[name] = bytes_on_disk(tmp_path / name / "1")
    table = base["words"].nbytes
    assert written["adapter"] < table / 4 and written["all"] > table / 2, (written, table)

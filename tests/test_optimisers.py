"""Optimisers, schedules and the running mean: under explicit sharding, the same on every mesh, against independent computations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from instructrec_jax.config import AdapterConfig, Config, MeshConfig, ModelConfig, TrainConfig
from instructrec_jax.models import architecture
from instructrec_jax.training import optimisers
from instructrec_jax.training.checkpoint import Checkpoints
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import averaged, evaluated, init_model, init_state, make_train_step, put_batch
from tests.tiny import NUM_ITEMS, SIZES, content, random_batch
from tests.variants import some

NAMES = ("adamw", "adafactor", "lion", "muon")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]
# Adafactor factors the moments of matrices whose sides have 128 or more.
MODEL = ModelConfig(
    width=128,
    layers=3,
    heads=4,
    kv_heads=2,
    head_size=64,
    mlp_width=256,
    dropout=0.0,
    item_dropout=0.0,
    scan_layers=True,
)
TRAIN = TrainConfig(
    batch_size=16, sequence_length=32, logits_chunk=32, steps=20, warmup_steps=2, learning_rate=1e-3, weight_decay=0.1
)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def parameters() -> tuple[dict, dict]:
    """Fresh parameters of a scanned model on the current mesh, and random gradients like them."""
    arch = architecture.from_numbers(MODEL, SIZES.vocab)
    params, _ = init_model(Config(model=MODEL), arch, SIZES, content(), 0)
    random = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: jax.device_put(random.normal(size=x.shape).astype(np.float32), x.sharding), params)
    return params, grads


def updated(mesh: jax.sharding.Mesh, name: str, steps: int = 20) -> Any:
    """Parameters after some steps with gradients that turn."""
    with jax.set_mesh(mesh):
        params, grads = parameters()
        config = replace(TRAIN, optimizer=name)
        tx, opt = optimisers.optimizer(config), init_state(params, config)["opt"]

        @jax.jit
        def step(params: Any, opt: Any, number: jax.Array) -> tuple[Any, Any]:
            turned = jax.tree.map(lambda g, p: g * jnp.cos(number) + p, grads, params)
            updates, opt = tx.update(turned, opt, params)
            return optax.apply_updates(params, updates), opt

        for number in range(steps):
            params, opt = step(params, opt, jnp.float32(number))
        return jax.device_get(params)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_updates_are_the_same_on_every_mesh(name: str) -> None:
    alone = updated(one_device(), name)
    start = updated(one_device(), name, 0)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), alone, start)
    assert min(jax.tree.leaves(moved)) > 1e-4, moved
    for sizes in MESHES:
        others = updated(make_mesh(MeshConfig(*sizes)), name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, others)


@pytest.mark.parametrize("name", some(NAMES, "adafactor", "muon"))
def test_the_state_lies_where_the_parameters_do(name: str) -> None:
    with jax.set_mesh(make_mesh(MeshConfig(1, 4, 2))):
        params, grads = parameters()
        config = replace(TRAIN, optimizer=name)
        state = init_state(params, config)
        _, after = jax.jit(optimisers.optimizer(config).update)(grads, state["opt"], params)
        for leaf in (*jax.tree.leaves(state["opt"]), *jax.tree.leaves(after)):
            assert len(leaf.sharding.device_set) == 8, leaf.sharding
        before = jax.tree.map(lambda x: x.sharding.spec, state["opt"])
        assert before == jax.tree.map(lambda x: x.sharding.spec, after)
        # Of each device only its part: all that is not tiny is spread as the parameters are.
        for leaf in jax.tree.leaves(state["opt"]):
            if leaf.size >= 128 * 128:
                assert leaf.addressable_shards[0].data.size == leaf.size // 8, (leaf.shape, leaf.sharding)
        held = sum(leaf.size for leaf in jax.tree.leaves(state["opt"]))
        weights = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert {"adamw": 1.9, "lion": 0.9, "muon": 1.0, "adafactor": 0.0}[name] * weights < held
        assert held < {"adamw": 2.1, "lion": 1.1, "muon": 1.9, "adafactor": 0.1}[name] * weights


def test_adafactor_keeps_a_row_and_a_column_of_every_matrix() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(1, 4, 2))):
        params, _ = parameters()
        factored = init_state(params, replace(TRAIN, optimizer="adafactor"))["opt"][1][0]
    rows, columns = (tree["params"]["layers"]["query"] for tree in (factored.v_row, factored.v_col))
    assert (rows.shape, columns.shape) == ((3, 128), (3, 256))  # D, and K x G x H
    assert (rows.sharding.spec, columns.sharding.spec) == (P(None, "fsdp"), P(None, "tensor"))


def test_adafactor_is_that_of_optax_on_a_matrix() -> None:
    """On a single matrix nothing is reshaped: optax's own, with absolute rates."""
    with jax.set_mesh(one_device()):
        w = jax.random.normal(jax.random.key(0), (160, 130))
        g = jax.random.normal(jax.random.key(1), (160, 130)) * 0.001
        config = replace(
            TRAIN, optimizer="adafactor", schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=1e9
        )
        ours = optimisers.optimizer(config)
        theirs = optax.adafactor(config.learning_rate, multiply_by_parameter_scale=False)
        a, b = ours.init({"up": w}), theirs.init({"up": w})
        for _ in range(3):
            x, a = ours.update({"up": g}, a, {"up": w})
            y, b = theirs.update({"up": g}, b, {"up": w})
        rate = optimisers.schedule(config)(2) / config.learning_rate
        np.testing.assert_allclose(x["up"], y["up"] * rate, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- muon


def test_orthogonalised_is_that_of_optax() -> None:
    # Without momentum optax's transformation is the iteration alone.
    axes = [optax.contrib.MuonDimensionNumbers()]
    theirs = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)
    with jax.set_mesh(one_device()):
        for shape in ((24, 40), (40, 24)):
            stack = jax.random.normal(jax.random.key(0), (3, *shape))
            ours = optimisers.orthogonalised(stack)
            for matrix, own in zip(stack, ours):
                expected, _ = theirs.update([matrix], theirs.init([matrix]))
                np.testing.assert_allclose(own, expected[0], atol=2e-5)
                values = np.linalg.svd(np.asarray(own), compute_uv=False)
                assert values.min() > 0.6 and values.max() < 1.3
        assert not np.asarray(optimisers.orthogonalised(jnp.zeros((2, 4, 5)))).any()


@pytest.mark.slow
def test_muon_sees_the_layers_matrices_with_their_heads_as_one_axis() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        before = {k: v for k, v in parameters()[1]["params"]["layers"].items() if not isinstance(v, dict)}  # no norms
        layers = jax.jit(optimisers.orthogonal_updates().update)({"layers": before}, optax.EmptyState())[0]["layers"]
        assert jax.tree.map(lambda x: x.sharding, layers) == jax.tree.map(lambda x: x.sharding, before)
    for name, rows in (("query", 128), ("output", 256), ("down", 256)):
        for layer in range(3):
            matrix = np.asarray(before[name][layer]).reshape(rows, -1)
            u, _, v = np.linalg.svd(matrix, full_matrices=False)
            own = np.asarray(layers[name][layer]).reshape(rows, -1)
            values = np.diag(u.T @ own @ v.T) / (0.2 * max(matrix.shape) ** 0.5)
            assert values.min() > 0.6 and values.max() < 1.3, (name, values)


@pytest.mark.slow
def test_what_muon_takes() -> None:
    with jax.set_mesh(one_device()):
        for model in (MODEL, replace(MODEL, scan_layers=False), replace(MODEL, adapter=AdapterConfig(rank=4))):
            arch = architecture.from_numbers(model, SIZES.vocab)
            params, _ = init_model(Config(model=model), arch, SIZES, content(), 0)
            names = set()
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
                axes = optimisers.matrix_axes(path, leaf.ndim)
                if axes is not None:
                    names.add(path[-1].key)
                    assert axes[0] == int(model.scan_layers)
            plain = {"query", "key", "value", "output", "gate", "up", "down"}
            low_rank = {f"{n}_{part}" for n in plain for part in "ab"} if model.adapter.rank else set()
            assert names == plain | low_rank


# ----------------------------------------------------------------------------------------------------------- schedules


def test_schedules() -> None:
    config = replace(TRAIN, steps=100, warmup_steps=10, learning_rate=2.0, final_lr_fraction=0.1, decay_fraction=0.3)
    rates = {
        name: np.asarray([float(optimisers.schedule(replace(config, schedule=name))(t)) for t in range(120)])
        for name in ("cosine", "linear", "constant", "wsd")
    }
    for name, rate in rates.items():
        np.testing.assert_allclose(rate[:11], np.arange(11) / 5, rtol=1e-6)
        np.testing.assert_allclose(rate[100:], 2.0 if name == "constant" else 0.2, rtol=1e-6)
    at = np.arange(10, 100)
    np.testing.assert_allclose(rates["cosine"][10:100], 0.2 + 0.9 * (1 + np.cos(np.pi * (at - 10) / 90)), rtol=1e-5)
    np.testing.assert_allclose(rates["linear"][10:100], 2 - 1.8 * (at - 10) / 90, rtol=1e-5)
    np.testing.assert_allclose(rates["wsd"][10:71], 2.0)
    np.testing.assert_allclose(rates["wsd"][70:101], 2 - 1.8 * np.arange(31) / 30, rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 100), (2, 2), (5, 100)])
def test_schedules_of_very_short_runs_are_defined(name: str, steps: int, warmup: int) -> None:
    rate = optimisers.schedule(replace(TRAIN, schedule=name, steps=steps, warmup_steps=warmup))
    values = [float(rate(t)) for t in range(steps + 2)]
    assert np.isfinite(values).all() and max(values) <= TRAIN.learning_rate * (1 + 1e-6)


# --------------------------------------------------------------------------------------------------------- running mean


def small_steps(mesh: jax.sharding.Mesh, config: Config, steps: int) -> tuple[list[dict], list[float], dict]:
    """Parameters after every step, losses, the last state."""
    with jax.set_mesh(mesh):
        arch, features = architecture.from_numbers(config.model, SIZES.vocab), content()
        trained, frozen = init_model(config, arch, SIZES, features, 0)
        state = init_state(trained, config.train)
        step = make_train_step(config, arch, SIZES, NUM_ITEMS)
        kept, losses = [jax.device_get(state["params"])], []
        for number in range(steps):
            state, metrics = step(state, frozen, put_batch(random_batch(16, 32, seed=number), 1), features)
            kept.append(jax.device_get(state["params"]))
            losses.append(float(metrics["loss"]))
        return kept, losses, jax.device_get(state)


SMALL = replace(MODEL, width=32, layers=2, head_size=8, mlp_width=32)


@pytest.mark.slow
def test_the_running_mean_is_kept_saved_and_restored(tmp_path: Path) -> None:
    config = Config(model=SMALL, train=replace(TRAIN, ema=0.5))
    kept, _, state = small_steps(make_mesh(MeshConfig(1, 4, 2)), config, 4)
    mean = kept[0]
    for t, params in enumerate(kept[1:]):
        decay = min(0.5, (1 + t) / (10 + t))
        mean = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, mean, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state["ema"], mean)
    assert evaluated(state) is state["ema"]
    with jax.set_mesh(one_device()):
        arch = architecture.from_numbers(SMALL, SIZES.vocab)
        trained, _ = init_model(config, arch, SIZES, content(), 0)
        fresh = init_state(trained, config.train)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, fresh)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, placed, iter(grain.MapDataset.range(4).to_iter_dataset()), {}, None)
        checkpoints.wait()
        restored = checkpoints.restore_params(1, trained, ema=True), checkpoints.restore_params(1, trained)
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored[0], state["ema"])
    jax.tree.map(np.testing.assert_array_equal, restored[1], state["params"])


def test_a_long_running_mean_forgets_where_it_started() -> None:
    """Weights that stay at 1 after a start at 0: without the short beginning 0.999 would leave 0.9 of the start after 100 steps."""
    mean = jnp.zeros(())
    for t in range(100):
        mean = averaged({"w": mean}, {"w": jnp.ones(())}, jnp.int32(t), 0.999)["w"]
    assert float(mean) > 0.999


@pytest.mark.parametrize("name", some(["adafactor", "muon"], "muon"))
def test_states_of_every_shape_are_saved_and_restored_on_another_mesh(name: str, tmp_path: Path) -> None:
    config = replace(TRAIN, optimizer=name)
    loader = iter(grain.MapDataset.range(4).to_iter_dataset())
    with jax.set_mesh(make_mesh(MeshConfig(1, 4, 2))):
        state = init_state(parameters()[0], config)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state, loader, {}, None)
        checkpoints.wait()
        checkpoints.close()
    with jax.set_mesh(one_device()):
        other = init_state(parameters()[0], config)
        checkpoints = Checkpoints(tmp_path)
        restored = checkpoints.restore(1, jax.tree.map(jnp.ones_like, other), loader)
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    assert jax.tree.structure(restored) == jax.tree.structure(other)


# --------------------------------------------------------------------------------------------------------- whole steps


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_are_the_same_on_every_mesh(name: str) -> None:
    # Lion takes the sign of its momentum, Adam's first steps nearly so: a rate at which rounding does not decide the losses.
    train = replace(TRAIN, optimizer=name, learning_rate=2e-4 if name == "lion" else 1e-3, ema=0.9, z_loss=1e-3)
    config = Config(model=replace(SMALL, dropout=0.1, item_dropout=0.1), train=train)
    _, alone, _ = small_steps(one_device(), config, 20)
    for sizes in MESHES:
        _, losses, _ = small_steps(make_mesh(MeshConfig(*sizes)), config, 20)
        np.testing.assert_allclose(alone, losses, rtol=1e-5, err_msg=f"{name} on {sizes}")

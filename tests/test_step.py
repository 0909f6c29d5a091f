"""One step: what is kept and what is computed again, the types of numbers, packed rows, the z-loss, the check before a run."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructrec_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from instructrec_jax.errors import UserError
from instructrec_jax.models import architecture
from instructrec_jax.models.language_model import apply
from instructrec_jax.training import checks
from instructrec_jax.training import loss as losses
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import (
    batch_gradients,
    count_targets,
    head_losses,
    init_model,
    init_state,
    make_train_step,
    put_batch,
)
from tests.tiny import NUM_ITEMS, SIZES, content, model_of, random_batch

MODEL = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=64, dropout=0.0, item_dropout=0.0)
TRAIN = TrainConfig(batch_size=16, sequence_length=32, logits_chunk=8)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]


def mesh_of(sizes: tuple[int, int, int] = (1, 1, 1)) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def gradient_function(model: ModelConfig, train: TrainConfig) -> Any:
    """``(params, batch, content) -> (loss, gradients)``, not yet compiled."""
    lm = model_of(model, train=True)

    def run(params: Any, batch: Any, features: jax.Array) -> tuple[jax.Array, Any]:
        totals = count_targets(batch)

        def micro_loss(params: Any, micro: Any, key: jax.Array) -> tuple[jax.Array, dict]:
            out = apply(lm, params, micro, features, rngs={"dropout": key})
            return head_losses(out, micro, totals, NUM_ITEMS, train, lm.arch)

        loss, _, grads = batch_gradients(micro_loss, params, batch, jax.random.key(0))
        return loss, grads

    return run


def arguments(model: ModelConfig, batch: dict[str, np.ndarray], accumulate: int = 1) -> tuple[Any, Any, jax.Array]:
    """Parameters, batch and content on the current mesh."""
    features = content()
    arch = architecture.from_numbers(model, SIZES.vocab)
    params, _ = init_model(Config(model=model), arch, SIZES, features, 0)
    return params, put_batch(batch, accumulate), features


def gradients(
    mesh: jax.sharding.Mesh, model: ModelConfig, train: TrainConfig, batch: dict[str, np.ndarray]
) -> tuple[float, Any]:
    with jax.set_mesh(mesh):
        loss, grads = jax.jit(gradient_function(model, train))(*arguments(model, batch, train.accumulate))
        return float(loss), jax.device_get(grads)


def assert_same(a: tuple[float, Any], b: tuple[float, Any], tolerance: float = 1e-5) -> None:
    assert a[0] == pytest.approx(b[0], rel=tolerance)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(a[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance * largest), a[1], b[1])


# --------------------------------------------------------------------------------------------------------------- remat


@functools.cache
def compiled(remat: str, scan: bool) -> Any:
    """The compiled gradient on one device, and its arguments."""
    model = replace(MODEL, remat=remat, scan_layers=scan, dropout=0.2, layers=4, mlp_width=256)
    with jax.set_mesh(mesh_of()):
        args = arguments(model, random_batch(16, 32))
        return jax.jit(gradient_function(model, TRAIN)).lower(*args).compile(), args


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "qkv", "attention", "full", "offload"])
@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_neither_loss_nor_gradients(remat: str, scan: bool) -> None:
    results = []
    for name in ("none", remat):
        program, args = compiled(name, scan)
        loss, grads = program(*args)
        results.append((float(loss), jax.device_get(grads)))
    assert_same(*results, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "sizes"), [(2, (1, 1, 1)), (3, (1, 2, 2))])
def test_groups_of_layers_change_neither_parameters_nor_gradients(group: int, sizes: tuple[int, int, int]) -> None:
    results = []
    for model in (replace(MODEL, layers=6), replace(MODEL, layers=6, layer_group=group, remat="least")):
        with jax.set_mesh(mesh_of(sizes)):
            args = arguments(model, random_batch(16, 32))
            loss, grads = jax.jit(gradient_function(model, TRAIN))(*args)
            results.append((float(loss), jax.device_get(grads)))
    assert jax.tree.structure(results[0][1]) == jax.tree.structure(results[1][1])
    assert_same(*results, tolerance=1e-6)


@pytest.mark.slow
def test_groups_of_layers_keep_less() -> None:
    """On a model of sixteen layers, whose inputs are most of what it keeps."""
    held = []
    for group in (1, 4):
        model = replace(MODEL, layers=16, layer_group=group, remat="full")
        with jax.set_mesh(mesh_of()):
            args = arguments(model, random_batch(16, 64))
            memory: Any = jax.jit(gradient_function(model, TRAIN)).lower(*args).compile().memory_analysis()
        held.append(memory.temp_size_in_bytes)
    one = 16 * 64 * MODEL.width * 4  # bytes of an input, float32
    assert held[0] - held[1] > (16 - 8) * one / 2, held


@pytest.mark.slow
def test_remat_policies_keep_less_and_less() -> None:
    names = ("none", "dots", "qkv", "attention", "full")
    held = [compiled(name, True)[0].memory_analysis().temp_size_in_bytes for name in names]
    assert held == sorted(held, reverse=True) and held[0] > 1.5 * held[-1], dict(zip(names, held))


# ----------------------------------------------------------------------------------------------------- types of numbers


def equations(jaxpr: Any) -> Any:
    """All equations of a traced function, those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # of a closed one
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_bfloat16_computes_products_and_float32_everything_delicate() -> None:
    model = replace(MODEL, dtype="bfloat16")
    with jax.set_mesh(mesh_of()):
        args = arguments(model, random_batch(16, 32))
        traced = jax.jit(gradient_function(model, TRAIN)).trace(*args)
        loss, grads = traced.out_info
        state = init_state(args[0], replace(TRAIN, ema=0.9))
    # Master weights, moments, the running mean and gradients are float32.
    assert {str(x.dtype) for x in jax.tree.leaves((args[0], grads, loss))} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves((state["opt"], state["ema"]))} == {"float32", "int32"}
    types: dict[str, list] = defaultdict(list)
    for equation in equations(traced.jaxpr.jaxpr):
        types[equation.primitive.name].append([str(v.aval.dtype) for v in equation.invars])
    # Softmax and loss (exp, log), norms (rsqrt), rotary angles (sin, cos): float32 alone.
    for name in ("exp", "log", "rsqrt", "sin", "cos"):
        assert types[name] and {t for operands in types[name] for t in operands} == {"float32"}, name
    # Layers multiply in bfloat16: per layer, 4 projections of attention, 3 of the MLP and 2 products of attention.
    narrow = [operands for operands in types["dot_general"] if operands == ["bfloat16", "bfloat16"]]
    assert len(narrow) >= 9 * 3, types["dot_general"]  # the layers are scanned; forward and two products backward
    # The heads' logits are products of float32.
    with jax.set_mesh(mesh_of()):
        lm = model_of(model)
        out = jax.eval_shape(
            lambda p, b, c: apply(lm, p, b, c), args[0], {k: v[0] for k, v in args[1].items()}, args[2]
        )
        logits = jax.eval_shape(lambda o: losses.item_logits(o.hidden, o, NUM_ITEMS), out)
    assert (out.hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


# ----------------------------------------------------------------------------------- packed rows, micro-batches, meshes


def packed_and_alone() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """32 examples of 3 to 16 tokens: two to a row of 32 places, and each in a row of its own."""
    random = np.random.default_rng(3)
    alone = random_batch(32, 32, seed=5)
    lengths = random.integers(3, 17, 32)
    for row, length in enumerate(lengths):
        for values in alone.values():
            values[row, length:] = 0
    packed = {k: np.zeros((16, 32), v.dtype) for k, v in alone.items()}
    for row in range(16):
        end = 0
        for segment, example in enumerate((row, row + 16), start=1):
            here = slice(end, end + lengths[example])
            for key, values in alone.items():
                packed[key][row, here] = values[example, : lengths[example]]
            packed["segment_ids"][row, here] = segment
            end = here.stop
    return packed, alone


@functools.cache
def alone_on_one_device() -> tuple[float, Any]:
    return gradients(mesh_of(), MODEL, TRAIN, packed_and_alone()[1])


@pytest.mark.parametrize("sizes", [(1, 1, 1), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in MESHES)])
def test_packed_equals_unpacked(sizes: tuple[int, int, int]) -> None:
    """The same examples, two to a row and alone: the same loss and gradients."""
    assert_same(alone_on_one_device(), gradients(mesh_of(sizes), MODEL, TRAIN, packed_and_alone()[0]))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), *MESHES])
def test_accumulated_equals_the_full_batch(sizes: tuple[int, int, int]) -> None:
    """Micro-batches with unequal numbers of targets: the last one has none."""
    batch = random_batch(16, 32, seed=9)
    for key in ("item_target", "text_target"):
        batch[key][8:] = 0
    whole = gradients(mesh_of(), MODEL, TRAIN, batch)
    assert_same(whole, gradients(mesh_of(sizes), MODEL, replace(TRAIN, accumulate=2), batch))


# --------------------------------------------------------------------------------------------------------------- z-loss


def test_z_loss_is_the_mean_squared_log_normaliser() -> None:
    batch = random_batch(4, 32)
    with jax.set_mesh(mesh_of()):
        lm = model_of(MODEL)
        params, put, features = arguments(MODEL, batch)
        micro, totals = {k: v[0] for k, v in put.items()}, count_targets(put)
        out = jax.jit(lambda p, b, c: apply(lm, p, b, c))(params, micro, features)

        def loss(z: float) -> float:
            train = replace(TRAIN, z_loss=z, text_loss_weight=0.5)
            return float(
                jax.jit(lambda o, m, t: head_losses(o, m, t, NUM_ITEMS, train, lm.arch)[0])(out, micro, totals)
            )

        item = np.square(jax.nn.logsumexp(losses.item_logits(out.hidden, out, NUM_ITEMS), axis=-1))
        word = np.square(jax.nn.logsumexp(losses.word_logits(out.hidden, out, lm.arch), axis=-1))
        expected = item[batch["item_target"] > 0].mean() + 0.5 * word[batch["text_target"] > 0].mean()
        assert loss(0.1) - loss(0.0) == pytest.approx(0.1 * expected, rel=1e-4)


# -------------------------------------------------------------------------------------------- the check before the run


def test_gradients_of_embeddings_are_checked_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_embedding_gradients.__wrapped__(mesh_of((1, 4, 2)))

    def broken(micro_loss: Any, tables: Any, batch: Any, key: jax.Array) -> Any:
        loss, sums, grads = batch_gradients(micro_loss, tables, batch, key)
        # What the miscompiled loop gives: the last micro-batch's gradient alone.
        if batch["tokens"].shape[0] > 1:
            grads["words"] = batch_gradients(micro_loss, tables, {k: v[1:] for k, v in batch.items()}, key)[2]["words"]
        return loss, sums, grads

    monkeypatch.setattr(checks, "batch_gradients", broken)
    with pytest.raises(UserError, match=r"(?s)table .words. wrongly.*while-loop-all-reduce-code-motion"):
        checks.check_embedding_gradients.__wrapped__(mesh_of((1, 4, 2)))


def test_the_state_is_donated() -> None:
    with jax.set_mesh(mesh_of()):
        features = content()
        arch = architecture.from_numbers(MODEL, SIZES.vocab)
        trained, frozen = init_model(Config(model=MODEL), arch, SIZES, features, 0)
        train = replace(TRAIN, ema=0.99)
        state = init_state(trained, train)
        step = make_train_step(Config(model=MODEL, train=train), arch, SIZES, NUM_ITEMS)
        step(state, frozen, put_batch(random_batch(16, 32), 1), features)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))

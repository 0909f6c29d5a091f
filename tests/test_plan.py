"""Names of chips, plans by arithmetic, meshes over slices, and the loss whose table is never gathered."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from instructrec_jax import config as configs
from instructrec_jax.cli import cli
from instructrec_jax.config import AdapterConfig, Config, MeshConfig, ModelConfig, TrainConfig
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.models import architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.models.sharding import RULES
from instructrec_jax.training.chips import SLICES, topology_of
from instructrec_jax.training.mesh import check_plan, hybrid_grid, make_mesh, slices_of
from instructrec_jax.training.plan import make_plan
from instructrec_jax.training.shapes import architecture_of, step_shapes
from instructrec_jax.training.step import init_model, init_state, make_train_step, put_batch
from instructrec_jax.training.tiles import table_scores
from tests.tiny import NUM_ITEMS, SIZES, content, random_batch
from tests.variants import some

AOT = sorted(Path("configs/aot").glob("*.yaml"))
MODEL = ModelConfig(width=32, heads=4, kv_heads=2, head_size=8, mlp_width=64, dropout=0.0, item_dropout=0.0)
TRAIN = TrainConfig(batch_size=16, sequence_length=32, logits_chunk=8, steps=20, warmup_steps=2)


# --------------------------------------------------------------------------------------------------------------- chips


def test_names_of_chips() -> None:
    for name, shape in SLICES.items():
        found = topology_of(name)
        assert found.chips == math.prod(map(int, shape.split(":")[1].split("x"))) == int(name.split("-")[1])
    assert topology_of("v5p-128").slice == "v5p:4x4x8"  # chips, not cores
    two = topology_of("v5e-16x2")
    assert (two.slice, two.slices, two.chips, two.chip.memory) == ("v5e:4x4", 2, 32, 16 * 2**30)


@pytest.mark.parametrize("name", ["v5e-15", "v7-16", "v5e", "v5e-16x", "v5e-16x0", "v5e-16xx2", ""])
def test_unknown_chips_list_the_known(name: str) -> None:
    with pytest.raises(UserError, match="unknown chips") as error:
        topology_of(name)
    assert "v5e-256" in str(error.value) and "v5p-128" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- mesh


def fake(slice_index: int, number: int, platform: str = "tpu") -> Any:
    coords = (number & 1, number >> 1 & 1, number >> 2 & 1)  # eight chips as a cube
    return SimpleNamespace(
        id=number, slice_index=slice_index, platform=platform, device_kind="TPU v5", process_index=slice_index,
        coords=coords, core_on_chip=0,
    )  # fmt: skip


def test_replica_crosses_slices() -> None:
    devices = [fake(s, 8 * s + i) for i in range(8) for s in range(2)]
    assert slices_of(devices) == 2
    grid = hybrid_grid((2, 4, 2), 2, devices)
    assert grid.shape == (2, 4, 2)
    assert [{d.slice_index for d in replica.flat} for replica in grid] == [{0}, {1}]
    grid = hybrid_grid((4, 2, 2), 2, devices)
    assert [{d.slice_index for d in replica.flat} for replica in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match=r"mesh.replica = 1 does not divide over 2 slices.*(?s:.*)mesh.replica to 2"):
        hybrid_grid((1, 8, 2), 2, devices)
    # Hosts of GPUs are no slices, and one slice needs no hybrid.
    assert slices_of([fake(s, s, "gpu") for s in range(4)]) == slices_of([fake(3, i) for i in range(4)]) == 1


@pytest.mark.parametrize(
    ("mesh", "change", "said"),
    [
        ((1, 8, 1), {"model": {"width": 36}}, r"model.width = 36 .* fsdp = 8(?s:.*)is 4"),
        ((1, 2, 4), {}, r"model.kv_heads = 2 .* tensor = 4(?s:.*)is 2"),
        ((1, 4, 2), {"model": {"mlp_width": 33}}, r"model.mlp_width = 33 .* tensor = 2(?s:.*)is 1"),
        ((1, 8, 1), {"train": {"batch_size": 12}}, r"train.batch_size .* = 12 .* replica x fsdp = 8(?s:.*)is 16"),
        ((1, 8, 1), {"train": {"accumulate": 3}}, r"batch_size = 16 .*accumulate = 3(?s:.*)is 2"),
        ((1, 8, 1), {"train": {"logits_chunk": 24}}, r"sequence_length = 32 .*logits_chunk = 24(?s:.*)is 16"),
        ((1, 8, 1), {"train": {"vocab_tiles": 6}}, r"256 rows .*vocab_tiles = 6(?s:.*)is 4"),
    ],
)
def test_a_plan_that_does_not_divide(mesh: tuple, change: dict[str, dict[str, int]], said: str) -> None:
    model = dataclasses.replace(MODEL, **change.get("model", {}))
    train = dataclasses.replace(TRAIN, **change.get("train", {}))
    config = Config(model=model, train=train, mesh=MeshConfig(*mesh))
    with pytest.raises(ConfigError, match=said):
        check_plan(config, architecture.from_numbers(model, SIZES.vocab), SIZES, 8)


def test_tables_must_divide_too() -> None:
    arch = architecture.from_numbers(dataclasses.replace(MODEL, kv_heads=3, heads=3, mlp_width=66), 256)
    config = Config(mesh=MeshConfig(1, 1, 3), train=TRAIN)
    with pytest.raises(ConfigError, match=r"the table of words = 256 .* tensor = 3(?s:.*)is 1"):
        check_plan(config, arch, Sizes(256, 128), 3)


# ------------------------------------------------------------------------------------------------ a table never gathered


def naive(hidden: jax.Array, target: jax.Array, table: jax.Array, bias: jax.Array, count: int, cap: float) -> tuple:
    logits = jnp.einsum("bsd,vd->bsv", hidden, table) + bias
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    logits = jnp.where(jnp.arange(len(table)) < count, logits, -1e30)
    chosen = jnp.take_along_axis(logits, jnp.maximum(target - 1, 0)[..., None], axis=-1)[..., 0]
    real = target > 0
    return jnp.where(real, chosen, 0), jnp.where(real, jax.nn.logsumexp(logits, axis=-1), 0)


def some_targets(spread: str) -> tuple[np.ndarray, int]:
    """[8, S] of 240 words, and a number of positions of each row."""
    r = np.random.default_rng(1)
    length, chunk = (16, 4) if spread == "short" else (128, 64)
    target = np.where(r.random((8, length)) < 0.6, r.integers(1, 240, (8, length)), 0).astype(np.int32)
    if spread == "short":
        target[:, 8:] = 0  # chunks to skip
    if spread == "uneven":  # a full row, rows with hardly a target, and none in the two rows of a device of (2, 2, 2)
        target[0], target[1:4, 3:], target[4:6] = r.integers(1, 240, length), 0, 0
    return target, chunk


@pytest.mark.parametrize("mesh", some([(1, 1, 1), (2, 2, 2), (1, 8, 1)], (2, 2, 2)))
@pytest.mark.parametrize(
    ("tiles", "cap", "spread"), [(1, 0.0, "short"), (4, 3.0, "short"), (1, 3.0, "long"), (2, 0.0, "uneven")]
)
def test_tiles_equal_the_whole_softmax(mesh: tuple, tiles: int, cap: float, spread: str) -> None:
    r = np.random.default_rng(0)
    target, chunk = some_targets(spread)
    hidden, table = (r.normal(size=s).astype(np.float32) for s in ((*target.shape, 32), (256, 32)))
    bias = r.normal(size=256).astype(np.float32)
    weights = r.normal(size=(2, *target.shape)).astype(np.float32) * (target > 0)

    def loss(found: tuple) -> jax.Array:
        return sum(jnp.sum(w * jnp.where(target > 0, x, 0)) for w, x in zip(weights, found))

    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])):
        on = lambda x, spec: jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))  # noqa: E731
        given = (on(hidden, RULES.act_bsd), on(table, RULES.table_vd), on(bias, RULES.vector_v))
        ids = on(target, RULES.ids_bs)

        def ours(h: jax.Array, t: jax.Array, b: jax.Array) -> jax.Array:
            scores = table_scores(h, ids, t, b, count=240, softcap=cap, tiles=tiles, chunk=chunk, learns=True)
            real = jax.reshard(jnp.asarray(target > 0), RULES.ids_bs)
            parts = (jax.reshard(jnp.asarray(w), RULES.ids_bs) for w in weights)
            return sum(jnp.sum(w * jnp.where(real, x, 0)) for w, x in zip(parts, scores))

        value, by = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*given)
        assert by[1].sharding.spec == RULES.table_vd
        value, by = jax.device_get((value, by))
    expected, wanted = jax.value_and_grad(lambda *g: loss(naive(g[0], target, *g[1:], 240, cap)), argnums=(0, 1, 2))(
        hidden, table, bias
    )
    assert value == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(by, wanted):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mesh", some([(1, 1, 1), (2, 2, 2), (1, 8, 1)], (2, 2, 2)))
@pytest.mark.parametrize(("tiles", "spread"), [(1, "short"), (4, "short"), (1, "long"), (2, "uneven")])
def test_a_frozen_table_is_walked_once_for_the_same_gradient(mesh: tuple, tiles: int, spread: str) -> None:
    r = np.random.default_rng(1)
    target, chunk = some_targets(spread)
    hidden, table = (r.normal(size=s).astype(np.float32) for s in ((*target.shape, 32), (256, 32)))
    weights = r.normal(size=(2, *target.shape)).astype(np.float32) * (target > 0)
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])):
        on = lambda x, spec: jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))  # noqa: E731
        t, ids = on(table, RULES.table_vd), on(target, RULES.ids_bs)
        by = [on(w, RULES.ids_bs) for w in weights]

        def ours(h: jax.Array, learns: bool) -> jax.Array:
            how = {"count": 240, "softcap": 0.0, "tiles": tiles, "chunk": chunk, "learns": learns}
            return sum(jnp.sum(w * x) for w, x in zip(by, table_scores(h, ids, t, None, **how)))

        found = [
            jax.device_get(jax.jit(jax.value_and_grad(partial(ours, learns=learns)))(on(hidden, RULES.act_bsd)))
            for learns in (False, True)
        ]
    (value, gradient), (expected, wanted) = found
    assert value == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=2e-5, rtol=1e-4)


def losses_of(config: Config, mesh: tuple, steps: int = 3) -> tuple[list[float], Any]:
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])):
        arch = architecture.from_numbers(config.model, SIZES.vocab)
        trained, frozen = init_model(config, arch, SIZES, content(), 0)
        state = init_state(trained, config.train)
        step = make_train_step(config, arch, SIZES, NUM_ITEMS)
        out = []
        for number in range(steps):
            state, metrics = step(state, frozen, put_batch(random_batch(16, 32, seed=number), 1), content())
            out.append(float(metrics["loss"]))
        return out, jax.device_get(state["params"])


@pytest.mark.slow
def test_tiles_and_remat_change_no_number() -> None:
    plain, params = losses_of(Config(model=MODEL, train=dataclasses.replace(TRAIN, logits_chunk=32)), (1, 1, 1))
    lean = dataclasses.replace(MODEL, remat="least")
    tiled, others = losses_of(Config(model=lean, train=dataclasses.replace(TRAIN, vocab_tiles=4)), (1, 4, 2))
    np.testing.assert_allclose(plain, tiled, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, others)


# --------------------------------------------------------------------------------------------------------------- plans


def test_what_is_stored_is_counted_exactly() -> None:
    """Against arrays: the same state on eight devices."""
    config = Config(model=MODEL, train=TRAIN, mesh=MeshConfig(1, 4, 2))
    arch = architecture.from_numbers(MODEL, SIZES.vocab)
    with jax.set_mesh(make_mesh(config.mesh)):
        trained, frozen = init_model(config, arch, SIZES, content(), 0)
        state = init_state(trained, TRAIN)
        first = jax.devices()[0]
        bytes_of = lambda tree: sum(  # noqa: E731
            s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first
        )
        shapes = step_shapes(config, arch, SIZES)
        same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype and a.sharding.spec == b.sharding.spec  # noqa: E731
        assert all(jax.tree.leaves(jax.tree.map(same, {**shapes.state}, state)))
        batch = put_batch(random_batch(16, 32), 1)
        assert all(jax.tree.leaves(jax.tree.map(same, shapes.batch, batch)))
        plan = make_plan(config, arch, SIZES, 8)
        assert plan.stored["trained weights"] == bytes_of(state["params"]) and not frozen
        assert plan.stored["optimiser"] == bytes_of(state["opt"])
        assert plan.stored["batch and item features"] == bytes_of(batch) + bytes_of(content())
    assert plan.trained == sum(x.size for x in jax.tree.leaves(trained)) and plan.fits is None and plan.seconds is None


@pytest.mark.parametrize("path", AOT, ids=lambda p: p.stem)
def test_shipped_configs_fit(path: Path) -> None:
    config = configs.load(path)
    topology = topology_of(config.mesh.chips)
    plan = make_plan(config, *architecture_of(config, 0), topology.chips, topology.chip)
    assert plan.fits and plan.tokens == config.train.batch_size * config.train.sequence_length
    from instructrec_jax.models.hf.sizes import SIZES as PUBLISHED

    published = PUBLISHED[config.model.pretrained].parameters
    assert published <= (plan.frozen or plan.trained) < 1.001 * published  # tables are padded


def test_bytes_grow_with_the_batch_and_with_what_is_kept() -> None:
    config = configs.load(AOT[-2])
    topology = topology_of("v5e-16")
    arch, sizes = architecture_of(config, 0)

    def total(remat: str, rows: int) -> int:
        changed = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, batch_size=rows * 16),
        )
        return make_plan(changed, arch, sizes, 16, topology.chip).total

    sizes_of = [total(remat, 4) for remat in ("least", "full", "attention", "qkv", "dots", "none")]
    assert sizes_of == sorted(sizes_of) and len(set(sizes_of)) == 6
    assert total("full", 4) < total("full", 8) < total("full", 16)


def test_groups_of_layers() -> None:
    config = configs.load(AOT[-2], ["--model.remat", "full", "--train.accumulate", "1"])
    arch, sizes = architecture_of(config, 0)
    plans = {}
    for group in (1, 4, 7):
        grouped = dataclasses.replace(config, model=dataclasses.replace(config.model, layer_group=group))
        plans[group] = make_plan(grouped, arch, sizes, 16)
    one = config.train.batch_size // 16 * config.train.sequence_length * arch.width * 2
    kept = {group: plan.working["kept by the layers"] / one for group, plan in plans.items()}
    assert kept == {1: arch.layers, 4: arch.layers // 4 + 4, 7: arch.layers // 7 + 7}
    assert plans[4].moved[0].bytes == 1.5 * plans[1].moved[0].bytes, "weights are gathered once more"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layer_group": 5}, "28 layers do not divide into groups.*= 5.*\n.*is 4"), ({"layer_group": 0}, "= 0"),
     ({"layer_group": 4, "scan_layers": False}, "layers are not scanned")],
)  # fmt: skip
def test_groups_that_do_not_fit(changes: dict, message: str) -> None:
    config = configs.load(AOT[-2])
    arch, sizes = architecture_of(config, 0)
    with pytest.raises(ConfigError, match=message):
        make_plan(dataclasses.replace(config, model=dataclasses.replace(config.model, **changes)), arch, sizes, 16)


def test_collectives_of_a_plan_by_hand() -> None:
    model = ModelConfig(
        pretrained="qwen3-0.6b", trainable=("adapter",), adapter=AdapterConfig(rank=4), dtype="bfloat16", remat="full"
    )
    train = dataclasses.replace(TRAIN, batch_size=8, vocab_tiles=16)
    config = Config(model=model, train=train, mesh=MeshConfig(2, 2, 2))
    arch, sizes = architecture_of(config, 0)
    plan = make_plan(config, arch, sizes, 8)
    moved = {(m.what, m.axis): m for m in plan.moved}
    assert moved["word head", "fsdp"].bytes == 2 * 151_936 // 2 * 1024 * 2 and moved["word head", "fsdp"].count == 32
    assert moved["activations", "tensor"].bytes == 6 * 28 * (2 * 32 * 1024 * 2)
    assert ("gradient of the word head", "fsdp") not in moved  # it is frozen
    alone = make_plan(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1)), arch, sizes, 1)
    assert not alone.moved


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(cli, ["plan", str(AOT[0]), "--chips", "v5p-128"])
    assert run.exit_code == 0 and "fits" in run.output and "all-gather" in run.output
    run = CliRunner().invoke(
        cli, ["plan", "configs/ml_latest_small.yaml", "--prepared", str(tmp_path), "--items", "500"]
    )
    assert run.exit_code == 0 and "8 devices" in run.output and "not known" in run.output
    run = CliRunner().invoke(cli, ["plan", str(AOT[-2]), "--train.batch_size", "16000"])
    assert run.exit_code == 1 and "does not fit" in run.output

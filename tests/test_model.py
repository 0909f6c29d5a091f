"""The decoder: counts, masks, layouts, caches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax.config import MeshConfig, ModelConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models import architecture
from instructrec_jax.models.attention import rotary
from instructrec_jax.models.language_model import (
    Memory,
    Sizes,
    abstract_params,
    count_parameters,
    item_logits,
    word_logits,
)
from instructrec_jax.models.sharding import check_divides
from instructrec_jax.training.mesh import make_mesh, mesh_sizes
from tests.tiny import NUM_ITEMS, SIZES, content, model_of, on_mesh, random_batch
from tests.variants import some

CONFIG = ModelConfig(width=32, heads=4, kv_heads=2, head_size=8, mlp_width=64, dropout=0.0, item_dropout=0.0)
PRESETS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("*.yaml"))
ONE = MeshConfig(1, 1, 1)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(ONE, jax.devices()[:1])


@pytest.mark.parametrize("changes", [{}, {"tied_head": False}, {"scan_layers": False}, {"item_id_embedding": False}])
def test_parameter_count_equals_the_tree(changes: dict) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    with jax.set_mesh(one_device()):
        tree = jax.jit(model_of(config).init)(jax.random.key(0), on_mesh(random_batch(2, 8)), content())
    assert sum(x.size for x in jax.tree.leaves(tree)) == count_parameters(
        architecture.from_numbers(config, SIZES.vocab), SIZES, config
    )


def test_seventy_billion_by_numbers_alone() -> None:
    """Llama 2 70B: 80 layers of width 8192, 64 heads, 8 key/value heads, MLP 28672, untied 32000 words (arXiv 2307.09288)."""
    config = ModelConfig(
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        head_size=128,
        mlp_width=28672,
        tied_head=False,
        item_id_embedding=False,
    )
    words = count_parameters(architecture.from_numbers(config, 32_000)) - config.width  # less the input norm
    assert words == 68_976_648_192


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_has_an_abstract_model(path: Path) -> None:
    config = configs.load(path).model
    sizes = Sizes(config.vocab_size, 4096, 64, config.content_features + config.cooccurrence_features)
    arch = architecture.from_numbers(config, sizes.vocab)
    tree = abstract_params(arch, sizes, config)
    assert (
        sum(x.size for x in jax.tree.leaves(tree))
        == count_parameters(arch, sizes, config)
        > config.vocab_size * config.width
    )


def outputs(mesh: jax.sharding.Mesh, config: ModelConfig, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    with jax.set_mesh(mesh):
        model, features = model_of(config), content()
        params = jax.jit(model.init)(jax.random.key(0), on_mesh(random_batch(8, 8)), features)

        @jax.jit
        def run(params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
            out = model.apply(params, batch, features)
            return item_logits(out.hidden, out, NUM_ITEMS), word_logits(out.hidden, out, model.arch)

        items, words = run(params, on_mesh(batch))
        return np.asarray(items), np.asarray(words)


@pytest.mark.parametrize("sizes", some([(1, 8, 1), (2, 2, 2)], (2, 2, 2)))
def test_eight_devices_give_the_numbers_of_one(sizes: tuple[int, int, int]) -> None:
    batch = random_batch(8, 12)
    alone = outputs(one_device(), CONFIG, batch)
    spread = outputs(make_mesh(MeshConfig(*sizes)), CONFIG, batch)
    for a, b in zip(alone, spread):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}])
def test_remat_changes_nothing(changes: dict) -> None:
    batch = random_batch(8, 12)
    plain = outputs(one_device(), CONFIG, batch)
    for a, b in zip(plain, outputs(one_device(), dataclasses.replace(CONFIG, **changes), batch)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_padding_items_are_never_ranked() -> None:
    items, _ = outputs(one_device(), CONFIG, random_batch(8, 12))
    assert (items[..., NUM_ITEMS:] < -1e29).all() and (items[..., :NUM_ITEMS] > -1e3).all()


def test_a_position_reads_only_its_segment_and_its_past() -> None:
    batch = random_batch(8, 16)
    batch["segment_ids"][:, 8:] = 2
    batch["positions"][:, 8:] = np.arange(8)
    before = outputs(one_device(), CONFIG, batch)[0]
    changed = {k: v.copy() for k, v in batch.items()}
    changed["tokens"][:, 12] += 1
    changed["item"][:, 12], changed["feature"][:, 12] = 0, 0
    changed["tokens"][:, 0] += 1
    changed["item"][:, 0], changed["feature"][:, 0] = 0, 0
    after = outputs(one_device(), CONFIG, changed)[0]
    same = np.isclose(before, after, atol=1e-5).all(axis=-1)
    assert same[:, 8:12].all(), "an earlier position or another segment was read"
    assert not same[:, :8].any() and not same[:, 12:].any(), "a changed token must be seen by its own future"


def test_packed_rows_equal_rows_of_their_own() -> None:
    batch = random_batch(8, 16)
    batch["segment_ids"][:, 8:] = 2
    batch["positions"][:, 8:] = np.arange(8)
    packed = outputs(one_device(), CONFIG, batch)[0]
    second = {k: v[:, 8:] for k, v in batch.items()} | {"segment_ids": np.ones((8, 8), np.int32)}
    np.testing.assert_allclose(packed[:, 8:], outputs(one_device(), CONFIG, second)[0], atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_cached_prefix_equals_one_pass(scan: bool) -> None:
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    whole = random_batch(8, 16)
    with jax.set_mesh(one_device()):
        model, features = model_of(config), content()
        batch = on_mesh(whole)
        params = jax.jit(model.init)(jax.random.key(0), batch, features)
        apply = jax.jit(model.apply)
        expected = apply(params, batch, features).hidden[:, 10:]
        head = on_mesh({k: v[:, :10] for k, v in whole.items()})
        tail = on_mesh({k: v[:, 10:] for k, v in whole.items()})
        cache = apply(params, head, features).cache
        memory = Memory(cache, head["segment_ids"] > 0, head["positions"], head["positions"][:, -1] + 1)
        found = apply(params, tail, features, memory).hidden
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def test_rotary_is_relative() -> None:
    """q·k after rotation depends on the distance of positions only, also far out where bfloat16 angles would round."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in range(2))

    def dot(a: int, b: int) -> float:
        at = lambda x, p: rotary(x, jnp.full((1, 1), p), 10_000.0)  # noqa: E731
        return float(jnp.sum(at(q, a) * at(k, b)))

    assert dot(5, 2) == pytest.approx(dot(1005, 1002), abs=1e-3)
    assert dot(5, 2) != pytest.approx(dot(5, 4), abs=1e-3)


def test_a_plan_that_does_not_divide_names_axis_number_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"kv_heads = 2 .* tensor = 8(.|\n)*nearest tensor size that divides 2 is 2"):
        check_divides(CONFIG, {"replica": 1, "fsdp": 1, "tensor": 8}, 8)
    for rows, nearest in ((6, 8), (3, 4), (9, 8)):
        with pytest.raises(
            ConfigError, match=rf"batch_size .* = {rows} .* = 4(.|\n)*nearest number that does is {nearest}"
        ):
            check_divides(CONFIG, {"replica": 2, "fsdp": 2, "tensor": 1}, rows)
    # A width of 24 would divide by 12, but then 16 devices have no place on the mesh.
    with pytest.raises(ConfigError, match=r"width = 24 .* fsdp = 16(.|\n)*nearest fsdp size that divides 24 is 8"):
        check_divides(dataclasses.replace(CONFIG, width=24), {"replica": 1, "fsdp": 16, "tensor": 1}, 16)


def test_mesh_sizes() -> None:
    assert mesh_sizes(MeshConfig(2, -1, 2), 8) == {"replica": 2, "fsdp": 2, "tensor": 2}
    for bad in (MeshConfig(3, -1, 1), MeshConfig(1, 4, 1), MeshConfig(-1, -1, 1)):
        with pytest.raises(ConfigError):
            mesh_sizes(bad, 8)
    with pytest.raises(ConfigError, match=r"needs 12 devices, there are 8\n.*mesh.fsdp = 4 needs 8"):
        mesh_sizes(MeshConfig(1, 6, 2), 8)
    with pytest.raises(ConfigError, match=r"needs 15 devices, there are 8\n.*: set one axis to -1"):
        mesh_sizes(MeshConfig(1, 5, 3), 8)

"""Losses on sampled negatives: by hand, unbiased, the same on a mesh, and able to learn."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.config import MeshConfig, TrainConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models.sharding import RULES
from instructrec_jax.run import train_run
from instructrec_jax.training.loss import item_loss
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.sampled import drawn, proposal, sampled_item_loss
from tests.tiny import NUM_ITEMS, SIZES, on_mesh, random_batch, tiny_config, write_slice

SAMPLED = TrainConfig(item_loss="sampled", item_negatives=64, logits_chunk=4)
GBCE = TrainConfig(item_loss="gbce", item_negatives=64, gbce_calibration=0.75, logits_chunk=4)


def parts(mesh: tuple[int, int, int] = (1, 1, 1)):
    """A mesh with hidden states, items and targets on it."""
    stack = jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))]))
    stack.__enter__()
    r = np.random.default_rng(3)
    hidden = r.normal(size=(8, 8, 16)).astype(np.float32)
    vectors = r.normal(size=(SIZES.items, 16)).astype(np.float32)
    bias = r.normal(size=SIZES.items).astype(np.float32)
    here = jax.sharding.get_mesh()
    out = SimpleNamespace(
        hidden=jax.device_put(hidden, jax.NamedSharding(here, RULES.act_bsd)),
        item_vectors=jax.device_put(vectors, jax.NamedSharding(here, RULES.table_used)),
        item_bias=jax.device_put(bias, jax.NamedSharding(here, RULES.vector_v)),
    )
    batch = random_batch(8, 8)
    return stack, out, batch, hidden, vectors, bias


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("config", [SAMPLED, GBCE], ids=lambda c: c.item_loss)
def test_the_formula_by_numpy(config: TrainConfig, mesh: tuple[int, int, int]) -> None:
    stack, out, batch, hidden, vectors, bias = parts(mesh)
    try:
        given = proposal(config, NUM_ITEMS, None)
        negatives = drawn(given, 64, jax.random.key(5))
        found = jax.jit(lambda b: sampled_item_loss(out, b, negatives, given, config))(on_mesh(batch))
    finally:
        stack.__exit__(None, None, None)
    total = 0.0
    rivals = np.asarray(negatives)
    alpha = 64 / (NUM_ITEMS - 1)
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    for row, place in zip(*np.nonzero(batch["item_target"])):
        target = batch["item_target"][row, place] - 1
        scores = vectors @ hidden[row, place] + bias
        others = scores[rivals[rivals != target]]
        if config.item_loss == "gbce":
            total += beta * np.logaddexp(0, -scores[target]) + np.logaddexp(0, others).sum()
        else:
            total += logsumexp([scores[target], *(others + np.log(NUM_ITEMS / 64))]) - scores[target]
    assert float(found.loss) == pytest.approx(total, rel=1e-5)
    assert float(found.count) == (batch["item_target"] > 0).sum()


def test_every_item_once_is_the_softmax_over_the_catalogue() -> None:
    stack, out, batch, *_ = parts()
    try:
        given = proposal(SAMPLED, NUM_ITEMS, None)
        placed = on_mesh(batch)
        full = item_loss(out, placed, NUM_ITEMS, 0.0, 4)
        found = sampled_item_loss(out, placed, jnp.arange(NUM_ITEMS), given, SAMPLED)
    finally:
        stack.__exit__(None, None, None)
    assert float(found.loss) == pytest.approx(float(full.loss), rel=1e-5)


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_the_normaliser_is_unbiased_whatever_negatives_are_drawn_by(by: str) -> None:
    """Mean of exp(normaliser) over many draws against the full sum, for one position."""
    stack, out, batch, hidden, vectors, bias = parts()
    config = TrainConfig(item_loss="sampled", item_negatives=64, item_negatives_by=by, logits_chunk=8)
    popularity = np.arange(NUM_ITEMS) ** 2
    one = {k: np.where(np.arange(8) == 3, np.maximum(v, 1), 0) if k == "item_target" else v for k, v in batch.items()}
    one["item_target"][1:] = 0
    try:
        given = proposal(config, NUM_ITEMS, popularity)
        placed = on_mesh(one)

        @jax.jit
        def normaliser(key: jax.Array) -> jax.Array:
            return jnp.sqrt(sampled_item_loss(out, placed, drawn(given, 64, key), given, config).z)

        found = np.exp([float(normaliser(jax.random.key(i))) for i in range(3000)])
    finally:
        stack.__exit__(None, None, None)
    expected = np.exp(logsumexp((vectors @ hidden[0, 3] + bias)[:NUM_ITEMS]))
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / np.sqrt(len(found)))
    assert found.std() / np.sqrt(len(found)) < 0.05 * expected


def test_draws_follow_the_proposal() -> None:
    popularity = np.zeros(NUM_ITEMS, int)
    popularity[7] = 99
    given = proposal(TrainConfig(item_loss="sampled", item_negatives_by="popularity"), NUM_ITEMS, popularity)
    some = np.asarray(drawn(given, 20_000, jax.random.key(0)))
    counts = np.bincount(some, minlength=NUM_ITEMS)
    assert counts[7] / 20_000 == pytest.approx(100 / 199, abs=0.02)
    assert len(counts) == NUM_ITEMS and (counts > 0).all()


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing = 0\.1 spreads over the whole catalogue"):
        proposal(TrainConfig(item_loss="gbce", label_smoothing=0.1), 10, None)
    with pytest.raises(ConfigError, match="needs the items' training events"):
        proposal(TrainConfig(item_loss="gbce", item_negatives_by="popularity"), 10, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampled", "gbce"])
def test_a_run_learns_with_it(kind: str, tmp_path: Path) -> None:
    write_slice(tmp_path / "data")
    every = {"steps": 30, "log_every": 5, "eval_every": 30, "checkpoint_every": 30}
    options = {"item_loss": kind, "item_negatives": 64, "item_negatives_by": "popularity", **every}
    config = tiny_config(tmp_path, **options)
    prepare.prepare(config, print)
    folder = configs.run_dir(config)
    train_run(config, folder, print)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["item_loss"] for line in lines if "item_loss" in line]
    assert losses[-1] < 0.95 * losses[0]

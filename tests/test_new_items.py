"""Items that training has not shown: their content counts, and what training pushed down does not."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from instructrec_jax.config import MeshConfig, ModelConfig
from instructrec_jax.models.language_model import apply
from instructrec_jax.models.new_items import with_new_items
from instructrec_jax.training.mesh import make_mesh
from tests.tiny import NUM_ITEMS, SIZES, content, model_of, on_mesh, random_batch

CONFIG = ModelConfig(width=32, heads=2, kv_heads=2, head_size=16, mlp_width=64, dropout=0.0, item_dropout=0.0)


@pytest.fixture(params=[(1, 1, 1), (1, 4, 2)], ids=str)
def mesh(request: pytest.FixtureRequest):
    """One device, and eight."""
    devices = jax.devices()[: int(np.prod(request.param))]
    with jax.set_mesh(make_mesh(MeshConfig(*request.param), devices)):
        yield


def test_a_new_item_keeps_its_content_and_takes_the_bias_of_rare_items(mesh: None) -> None:
    features = content()
    variables = dict(model_of(CONFIG).init(jax.random.key(0), on_mesh(random_batch(8, 16)), features))
    params = dict(variables["params"])
    params["item_bias"] = params["item_bias"] + jax.numpy.arange(SIZES.items, dtype=np.float32)
    variables["params"] = params
    popularity = np.arange(NUM_ITEMS)  # item 0 is new
    changed = with_new_items(variables, popularity)["params"]
    assert changed["item_id"].sharding == params["item_id"].sharding
    after, params = (jax.tree.map(np.asarray, tree) for tree in (changed, params))
    np.testing.assert_array_equal(after["item_id"][0], 0)
    np.testing.assert_array_equal(after["item_id"][1:], params["item_id"][1:])
    assert float(after["item_bias"][0]) == pytest.approx(np.arange(1, 11).mean())  # the rarest tenth of 99
    np.testing.assert_array_equal(after["item_bias"][1:], params["item_bias"][1:])
    assert with_new_items(variables, popularity + 1) is variables


def test_without_its_learned_part_an_item_is_what_is_written_about_it(mesh: None) -> None:
    """With a dropout of 1 the vectors are the content columns alone; the co-occurrence columns, the last 4, are left out."""
    config = ModelConfig(
        **{**CONFIG.__dict__, "item_id_dropout": 1.0, "cooccurrence_features": 4},
    )
    batch, features = on_mesh(random_batch(8, 16)), content()
    variables = model_of(config).init(jax.random.key(0), batch, features)
    out = model_of(config, train=True).apply(variables, batch, features, rngs={"dropout": jax.random.key(1)})
    written = np.asarray(features)[:, :-4] @ np.asarray(variables["params"]["item_content"])[:-4]
    np.testing.assert_allclose(out.item_vectors, written, atol=1e-5)
    plain = apply(model_of(config), variables, batch, features)
    assert np.abs(np.asarray(plain.item_vectors) - written).max() > 0.01  # only in training

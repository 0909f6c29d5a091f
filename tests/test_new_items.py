"""Items that training has not shown: their content counts, and what training pushed down does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from instructrec_jax import fit_new_items
from instructrec_jax.config import MeshConfig, ModelConfig
from instructrec_jax.data.schema import VALID
from instructrec_jax.models.language_model import apply
from instructrec_jax.models.new_items import with_new_items
from instructrec_jax.training.mesh import make_mesh
from tests.small_split import small_split
from tests.tiny import NUM_ITEMS, SIZES, content, model_of, on_mesh, random_batch, tiny_config
from tests.variants import some

CONFIG = ModelConfig(width=32, heads=2, kv_heads=2, head_size=16, mlp_width=64, dropout=0.0, item_dropout=0.0)


@pytest.fixture(params=some([(1, 1, 1), (1, 4, 2)], (1, 4, 2)), ids=str)
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
    lifted = with_new_items(variables, popularity, 2.5)["params"]
    np.testing.assert_array_equal(
        np.asarray(lifted["item_bias"]), after["item_bias"] + 2.5 * (np.arange(SIZES.items) == 0)
    )


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


@pytest.mark.parametrize("seen_in_validation", [True, False])
def test_the_lift_is_what_validation_ranks_best_with(
    seen_in_validation: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every target stands 1 above the others, and new items 3.2 too low: from 2.5 to 4 above, every target is first."""
    data = small_split(users=40)
    cases = data.cases(VALID)
    popularity = np.ones(data.num_items, int)
    popularity[cases.target[0] if seen_in_validation else np.setdiff1d(np.arange(data.num_items), cases.target)[0]] = 0
    asked: list[np.ndarray] = []

    def scores(s: Any, params: Any, run_dir: Path, some: Any, new: np.ndarray) -> np.ndarray:
        asked.append(new)
        found = np.zeros((len(some), data.num_items), np.float32)
        found[np.arange(len(some)), some.target] = 1
        return found - 3.2 * new

    monkeypatch.setattr(fit_new_items, "_scores", scores)
    config = tiny_config(tmp_path)
    s: Any = SimpleNamespace(prepared=SimpleNamespace(data=data), learnt=popularity, config=config)
    fit_new_items.fit_new_items(s, None, tmp_path, print)
    chosen = json.loads((tmp_path / fit_new_items.CHOSEN).read_text())
    (new,) = asked
    assert new.sum() == (1 if seen_in_validation else 1 + round(0.1 * (data.num_items - 1)))
    assert chosen["playing"] == (0 if seen_in_validation else new.sum() - 1)
    assert new[cases.target].any() and not new[cases.target].all()
    assert [t["lift"] for t in chosen["tried"] if t["ndcg"] == 1] == [2.5, 3, 4]
    assert fit_new_items.load_lift(config, tmp_path) == chosen["lift"] == 2.5

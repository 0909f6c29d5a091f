"""Several catalogues in one run: each its own softmax, its own candidates, its share of the examples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructrec_jax.config import MeshConfig, ModelConfig
from instructrec_jax.models.language_model import init_variables, item_logits
from instructrec_jax.training import loss as losses
from instructrec_jax.training.mesh import make_mesh
from tests.tiny import NUM_ITEMS, SIZES, content, model_of, on_mesh, random_batch

MODEL = ModelConfig(width=32, heads=4, kv_heads=2, head_size=8, mlp_width=32, rerank_head=True, item_dropout=0.0)
SPACES = (60, NUM_ITEMS)

# ------------------------------------------------------------------------------------------------------------- the losses


def within(batch: dict[str, np.ndarray], first: int, last: int) -> dict[str, np.ndarray]:
    """The batch with items and targets of one catalogue alone."""
    out = dict(batch)
    for key in ("item", "item_target"):
        out[key] = np.where(batch[key] > 0, first + (batch[key] - 1) % (last - first) + 1, 0).astype(np.int32)
    return out


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("chunk", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_a_target_is_predicted_among_the_items_of_its_own_catalogue(mesh: tuple[int, int, int], chunk: int) -> None:
    """Cross-entropy with smoothing, worked out with NumPy over each catalogue alone."""
    batch = random_batch(8, 16)
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])):
        model = model_of(MODEL)
        variables = jax.jit(lambda k: init_variables(model.arch, SIZES, MODEL, k))(jax.random.key(0))
        on = on_mesh(batch)
        out: Any = jax.jit(model.apply)(variables, on, content())
        sums = jax.jit(lambda o, b: losses.item_loss(o, b, NUM_ITEMS, 0.1, chunk, SPACES))(out, on)
        logits = np.asarray(item_logits(out.hidden, out, NUM_ITEMS), np.float64)
    expected = 0.0
    for b, s in np.argwhere(batch["item_target"] > 0):
        target = batch["item_target"][b, s] - 1
        first, last = (0, 60) if target < 60 else (60, NUM_ITEMS)
        own = logits[b, s, first:last]
        log_p = own - np.logaddexp.reduce(own)
        expected -= 0.9 * log_p[target - first] + 0.1 * log_p.mean()
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("first", "last"), [(0, 60), pytest.param(60, NUM_ITEMS, marks=pytest.mark.slow)])
def test_gradients_of_one_catalogue_do_not_touch_the_others_items(first: int, last: int, chunk: int) -> None:
    batch = within(random_batch(8, 16), first, last)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        model = model_of(MODEL)
        params = jax.jit(lambda k: init_variables(model.arch, SIZES, MODEL, k))(jax.random.key(0))["params"]
        on, features = on_mesh(batch), content()

        def loss(params: dict, spaces: tuple[int, ...]) -> jax.Array:
            out: Any = model.apply({"params": params}, on, features)
            item = losses.item_loss(out, on, NUM_ITEMS, 0.1, chunk, spaces)
            return item.loss + losses.rerank_loss(out, on, NUM_ITEMS, 20, 0.3, chunk, spaces).loss

        grad = jax.jit(jax.grad(loss), static_argnums=1)
        apart, together = (jax.tree.map(np.asarray, grad(params, spaces)) for spaces in (SPACES, ()))
    other = np.ones(SIZES.items, bool)
    other[first:last] = False
    for name in ("item_id", "item_bias", "rerank_bias"):
        assert not apart[name][other].any() and np.abs(apart[name][~other]).max() > 1e-6
    assert np.abs(together["item_id"][other]).max() > 1e-6


@pytest.mark.slow
def test_a_catalogue_smaller_than_the_list_of_the_rerank_head() -> None:
    """Of 5 items a list of 20 has 4 others: the loss is that of the five alone."""
    batch = within(random_batch(4, 8), 0, 5)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        model = model_of(MODEL)
        variables = init_variables(model.arch, SIZES, MODEL, jax.random.key(0))
        on = on_mesh(batch)
        out: Any = model.apply(variables, on, content())
        small = losses.rerank_loss(out, on, NUM_ITEMS, 20, 0.4, 4, (5, NUM_ITEMS))
        alone = losses.rerank_loss(out, on, 5, 20, 0.4, 4)
    assert float(small.loss) == pytest.approx(float(alone.loss), rel=1e-5) and np.isfinite(float(small.loss))


@pytest.mark.slow
def test_one_catalogue_is_what_it_was() -> None:
    """The catalogue as the only space: the same bits as without spaces."""
    batch = random_batch(8, 16)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        model = model_of(MODEL)
        variables = jax.jit(lambda k: init_variables(model.arch, SIZES, MODEL, k))(jax.random.key(0))
        on = on_mesh(batch)
        out: Any = jax.jit(model.apply)(variables, on, content())
        for chunk in (4, 16):
            for head, more in ((losses.item_loss, (0.1, chunk)), (losses.rerank_loss, (20, 0.3, chunk))):
                plain, one = (
                    jax.jit(head, static_argnums=range(2, 4 + len(more)))(out, on, NUM_ITEMS, *more, spaces)
                    for spaces in ((), (NUM_ITEMS,))
                )
                assert jnp.array_equal(plain.loss, one.loss) and jnp.array_equal(plain.task_loss, one.task_loss)

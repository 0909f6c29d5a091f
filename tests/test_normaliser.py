"""The log normaliser of all positions at once: its value and its gradients are those of ``logsumexp``."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from instructrec_jax.config import MeshConfig
from instructrec_jax.models.sharding import RULES
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.normaliser import log_normaliser

ROWS, LENGTH, WIDTH, WORDS, REAL = 8, 16, 32, 256, 240


def given() -> tuple[np.ndarray, ...]:
    """Hidden states, table, shift of the logits (16 rows only pad), and what each position's normaliser is multiplied with."""
    r = np.random.default_rng(0)
    hidden, table, by = (
        r.normal(size=s).astype(np.float32) for s in ((ROWS, LENGTH, WIDTH), (WORDS, WIDTH), (ROWS, LENGTH))
    )
    shift = np.where(np.arange(WORDS) < REAL, r.normal(size=WORDS), -1e30).astype(np.float32)
    by[:, ::3] = 0.0  # positions that nobody asks for
    return hidden, table, shift, by


def on(x: np.ndarray, spec: P, dtype: str = "float32") -> jax.Array:
    """On the mesh, laid out so."""
    return jax.device_put(jnp.asarray(x, dtype), jax.NamedSharding(jax.sharding.get_mesh(), spec))


def plain(hidden: jax.Array, table: jax.Array, shift: jax.Array, by: np.ndarray) -> jax.Array:
    return jnp.sum(by * jax.nn.logsumexp(jnp.einsum("bsd,vd->bsv", hidden, table) + shift, axis=-1))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_value_and_gradients_on_every_mesh(mesh: tuple[int, int, int]) -> None:
    hidden, table, shift, by = given()
    expected, wanted = jax.value_and_grad(plain, argnums=(0, 1, 2))(hidden, table, shift, by)
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])):
        weights = on(by, RULES.ids_bs)
        found, ours = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(weights * log_normaliser(*x)), argnums=(0, 1, 2)))(
            on(hidden, RULES.act_bsd), on(table, RULES.table_used), on(shift, RULES.vector_v)
        )
        found, ours = jax.device_get((found, ours))
    assert found == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(ours, wanted):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
    assert not ours[1][REAL:].any()  # a row without probability learns nothing


def test_without_a_shift_and_far_from_zero() -> None:
    hidden, table, _, by = given()
    zero = np.zeros(WORDS, np.float32)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        weights = on(by, RULES.ids_bs)
        found, ours = jax.value_and_grad(lambda h, t: jnp.sum(weights * log_normaliser(h, t, None)), argnums=(0, 1))(
            on(100 * hidden, RULES.act_bsd), on(table, RULES.table_used)
        )
    expected, wanted = jax.value_and_grad(plain, argnums=(0, 1))(100 * hidden, table, zero, by)
    assert found == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(ours, wanted):
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)


def test_in_bfloat16_the_products_are_rounded_and_the_sums_are_not() -> None:
    hidden, table, shift, by = given()
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        half, words = on(hidden, RULES.act_bsd, "bfloat16"), on(table, RULES.table_used)
        weights, added = on(by, RULES.ids_bs), on(shift, RULES.vector_v)
        found = log_normaliser(half, words, added)
        ours = jax.grad(lambda h, t: jnp.sum(weights * log_normaliser(h, t, added)), argnums=(0, 1))(half, words)
    rounded = [np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)) for x in map(jnp.asarray, (hidden, table))]
    np.testing.assert_allclose(found, jax.nn.logsumexp(np.einsum("bsd,vd->bsv", *rounded) + shift, axis=-1), rtol=1e-5)
    assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == jnp.float32
    for a, b in zip(ours, jax.grad(plain, argnums=(0, 1))(*rounded, shift, by)):
        a, b = (np.asarray(x, np.float32).ravel() for x in (a, b))
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)

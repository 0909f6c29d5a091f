"""Attention in blocks of queries against the whole softmax: packed rows and trees, values and gradients, sharded and not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from instructrec_jax.models.attention import attend, segment_ends, segment_mask, tree_mask
from instructrec_jax.models.causal_attention import causal_attention
from instructrec_jax.models.sharding import RULES
from tests.test_fused_attention import mesh_of, random_segments, random_trees

ROWS, KV_HEADS, GROUPS, HEAD = 4, 2, 3, 8


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    with jax.set_mesh(mesh_of((1, 1, 1))):
        yield


def random_heads(r: np.random.Generator, length: int, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    """Queries, keys, values, and a gradient of what is read."""
    many, few = (ROWS, length, KV_HEADS, GROUPS, HEAD), (ROWS, length, KV_HEADS, HEAD)
    return tuple(r.normal(size=s).astype(dtype) for s in (many, few, few, many))


def read_and_gradients(how, q, k, v, by, reads):
    """What the rows that read something get, and the gradients; others carry no loss."""
    read, back = jax.vjp(lambda *x: jnp.where(reads[..., None, None, None], how(*x), 0), q, k, v)
    return read, *back(jax.reshard(by.astype(read.dtype), jax.typeof(read).sharding.spec))


@given(st.integers(0, 2**32 - 1), st.sampled_from([9, 64, 65, 200, 384]), st.booleans())
@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_blocks_equal_the_whole_softmax(seed: int, length: int, trees: bool) -> None:
    r = np.random.default_rng(seed)
    q, k, v, by = random_heads(r, length)
    rows = [(random_trees if trees else random_segments)(r, length) for _ in range(ROWS)]
    until = jnp.asarray(np.stack(rows)) if trees else segment_ends(jnp.asarray(np.stack(rows)))
    dense = tree_mask(until)
    if not trees:
        np.testing.assert_array_equal(dense, segment_mask(jnp.asarray(np.stack(rows)), causal=True))
    given_ = (q, k, v, jnp.asarray(by), until > 0)
    found = jax.jit(partial(read_and_gradients, lambda *x: attend(*x, until)))(*given_)
    wanted = jax.jit(partial(read_and_gradients, lambda *x: attend(*x, dense)))(*given_)
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_sharded_rows_and_heads_give_the_same() -> None:
    r = np.random.default_rng(0)
    q, k, v, by = random_heads(r, 200)
    segments = np.stack([random_segments(r, 200) for _ in range(ROWS)])
    found = []
    for sizes in [(1, 1, 1), (2, 2, 2)]:
        with jax.set_mesh(mesh := mesh_of(sizes)):
            on = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
            until = segment_ends(on(segments, RULES.ids_bs))
            heads = [on(x, RULES.heads_bskgh if x.ndim == 5 else RULES.heads_bskh) for x in (q, k, v)]
            by_read = on(by, RULES.heads_bskgh)
            how = jax.jit(lambda *x: jax.vjp(lambda *y: causal_attention(*y, until), *x)[1](by_read))  # noqa: B023
            found.append(jax.device_get(how(*heads)))
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_half_precision_rounds_weights_and_nothing_before_them() -> None:
    r = np.random.default_rng(0)
    q, k, v, by = random_heads(r, 130)
    until = jnp.full((ROWS, 130), 130, jnp.int32)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    wide = [x.astype(jnp.float32) for x in half]
    rows = (jnp.asarray(by), until > 0)
    found = jax.jit(partial(read_and_gradients, lambda *x: attend(*x, until)))(*half, *rows)
    wanted = jax.jit(partial(read_and_gradients, lambda *x: attend(*x, tree_mask(until))))(*wide, *rows)
    for a, b in zip(found, wanted):
        assert a.dtype == jnp.bfloat16
        assert float(jnp.abs(a.astype(jnp.float32) - b).max()) < 0.02 * float(jnp.abs(b).max())


def test_less_is_computed_than_the_whole_square() -> None:
    """The compiler's count of operations of the products: of eight blocks 9/16 of the square."""
    q, k, v, _ = map(jnp.asarray, random_heads(np.random.default_rng(0), 512))
    until = jnp.full((ROWS, 512), 512, jnp.int32)

    def operations(mask: jax.Array) -> float:
        return jax.jit(lambda *x: attend(*x, mask)).lower(q, k, v).compile().cost_analysis()["flops"]

    assert operations(until) < 0.7 * operations(tree_mask(until))


@pytest.mark.parametrize("length", [64, 130])
def test_a_row_that_reads_nothing_harms_nobody(length: int) -> None:
    r = np.random.default_rng(0)
    q, k, v, by = random_heads(r, length)
    until = np.full((ROWS, length), length, np.int32)
    until[:, length // 2 :] = 0  # padding
    until[:, : length // 2] = length // 2
    how = jax.jit(partial(read_and_gradients, lambda *x: attend(*x, jnp.asarray(until))))
    found = how(q, k, v, jnp.asarray(by), until > 0)
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    assert not np.asarray(found[2])[:, length // 2 :].any()  # no gradient of keys that nobody reads

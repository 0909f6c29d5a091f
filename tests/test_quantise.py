"""Quantised weights: error bounds, the code book, odd sizes, every layout equal to one device, gradients, memory."""

from __future__ import annotations

import math
import re
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import P

from instructrec_jax.config import MeshConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models import quantise
from instructrec_jax.models.sharding import RULES, gathered
from instructrec_jax.training.mesh import make_mesh
from tests.variants import some

MESHES = [(1, 8, 1), (1, 2, 4), (1, 1, 1)]
B, S, D, K, G, H, F = 16, 3, 64, 4, 2, 16, 96
# Name: equation, n_in, shape of x, of w, layouts of x, w and the result.
CASES = {
    "query": ("bsd,dkgh->bskgh", 1, (B, S, D), (D, K, G, H), RULES.act_bsd, RULES.query_dkgh, RULES.heads_bskgh),
    "key": ("bsd,dkh->bskh", 1, (B, S, D), (D, K, H), RULES.act_bsd, RULES.key_dkh, RULES.heads_bskh),
    "output": (
        "bskgh,kghd->bsd",
        3,
        (B, S, K, G, H),
        (K, G, H, D),
        RULES.heads_bskgh,
        RULES.output_kghd,
        RULES.act_bsd,
    ),
    "mlp_in": ("bsd,df->bsf", 1, (B, S, D), (D, F), RULES.act_bsd, RULES.mlp_in_df, RULES.mlp_bsf),
    "mlp_out": ("bsf,fd->bsd", 1, (B, S, F), (F, D), RULES.mlp_bsf, RULES.mlp_out_fd, RULES.act_bsd),
}
CODES = np.array(quantise.CODE_BOOK, np.float32)


def mesh(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def put(value: Any, spec: P) -> jax.Array:
    return jax.device_put(value, jax.NamedSharding(jax.sharding.get_mesh(), spec))


def stored(w: np.ndarray, kind: Any, n_in: int, rule: P, **options: Any) -> tuple[dict[str, jax.Array], dict[str, P]]:
    """Parts of a weight with a rule, and their specs."""
    q = quantise.quantise(put(w, rule), kind, n_in, **options)
    return q, quantise.specs(kind, rule, n_in, shape=w.shape, **options)


def used(q: dict[str, jax.Array], specs: dict[str, P]) -> dict[str, jax.Array]:
    return {part: gathered(value, specs[part]) for part, value in q.items()}


def reference_nf4(w: np.ndarray, axis: int, group: int) -> np.ndarray:
    """Nearest entry by brute force, in float64: one group after the other."""
    moved = np.moveaxis(w, axis, -1).astype(np.float64)
    flat = moved.reshape(-1, group)
    out = np.empty_like(flat)
    for row, values in enumerate(flat):
        scale = np.abs(values).max()
        grid = scale * CODES.astype(np.float64)
        out[row] = grid[np.abs(values[:, None] - grid).argmin(-1)]
    return np.moveaxis(out.reshape(moved.shape), -1, axis)


# --------------------------------------------------------------------------------------------------------------- code book


def test_code_book_is_the_paper_s_construction() -> None:
    """Appendix E and section 3: quantiles of N(0, 1), 8 levels below zero, 7 above, and zero; scaled to [-1, 1]."""
    quantile = NormalDist().inv_cdf
    offset = 0.9677083  # (1 - 1/32 + 1 - 1/30) / 2, the tail that stands for the largest value
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    built = np.sort(np.array([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(quantise.CODE_BOOK, built, atol=2e-7)


def test_every_code_survives_packing() -> None:
    """All 256 bytes: what is decoded is the code book's entry, the first weight of a pair in the high bits."""
    pairs = np.stack(np.meshgrid(CODES, CODES, indexing="ij"), -1).reshape(-1, 2)  # [256, 2]
    w = np.concatenate([np.ones((256, 2), np.float32), pairs], 1).T  # every group holds a 1, so that its scale is 1
    q = quantise.quantise(jnp.asarray(w), "nf4", 1)
    assert q["nf4"].dtype == jnp.uint8 and q["nf4"].shape == (2, 256)
    np.testing.assert_array_equal(q["nf4"][0], np.full(256, 0xFF))
    np.testing.assert_array_equal(q["nf4"][1], np.arange(256))
    np.testing.assert_array_equal(quantise.dequantise(q, 1, jnp.float32), w)


# ------------------------------------------------------------------------------------------------------------ error bounds

# Without subnormal numbers, which processors may flush to zero.
FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
WEIGHTS = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=FLOATS)


@given(WEIGHTS)
def test_int8_error_is_half_a_step(w: np.ndarray) -> None:
    q = quantise.quantise(jnp.asarray(w), "int8", 1)
    assert q["int8"].shape == w.shape and q["scale"].shape == w.shape[1:]
    np.testing.assert_allclose(q["scale"], np.maximum(np.abs(w).max(0) / 127, np.finfo(np.float32).tiny), rtol=1e-6)
    step = np.float64(q["scale"])
    error = np.abs(np.float64(w) - np.float64(quantise.dequantise(q, 1, jnp.float32)))
    # One rounding of the quotient and one of the product, each relative to a value of up to 127 steps.
    assert (error <= step * (0.5 + 2 * 127 * 2.0**-24)).all()


@given(WEIGHTS, st.integers(1, 70))
def test_nf4_is_the_nearest_code(w: np.ndarray, group: int) -> None:
    q = quantise.quantise(jnp.asarray(w), "nf4", 1, group)
    size = quantise.group_size(len(w), group)
    assert len(w) % size == 0 and size <= group and q["scale"].shape[0] == len(w) // size
    got = np.float64(quantise.dequantise(q, 1, jnp.float32))
    scale = np.repeat(np.float64(q["scale"]), size, axis=0)
    nearest = reference_nf4(w, 0, size)
    # At a midpoint either neighbour is nearest: errors are compared, not codes.
    np.testing.assert_array_less(np.abs(got - w) - np.abs(nearest - w), 1e-6 * scale)


def test_nf4_equals_the_reference_on_normal_weights() -> None:
    w = normal((128, 3, 5))
    q = quantise.quantise(jnp.asarray(w), "nf4", 2, group=3)  # along the axis of 3
    np.testing.assert_allclose(quantise.dequantise(q, 2, jnp.float32), reference_nf4(w, 1, 3), rtol=1e-6)
    q = quantise.quantise(jnp.asarray(w), "nf4", 1)
    np.testing.assert_allclose(quantise.dequantise(q, 1, jnp.float32), reference_nf4(w, 0, 64), rtol=1e-6)


@pytest.mark.parametrize(
    ("dim", "group", "expected"), [(576, 64, 64), (100, 64, 50), (8, 64, 8), (67, 64, 1), (49, 8, 7)]
)
def test_a_group_divides_its_dimension(dim: int, group: int, expected: int) -> None:
    assert quantise.group_size(dim, group) == expected


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("dim", [1, 2, 7, 33, 50, 67])
def test_odd_sizes_and_shapes(kind: Any, dim: int) -> None:
    w = normal((2, dim, 3))
    for n_in, stacked in ((1, True), (2, False)):
        q = quantise.quantise(jnp.asarray(w), kind, n_in, stacked=stacked)
        abstract = quantise.shapes(kind, w.shape, n_in, stacked=stacked)
        assert {k: (v.shape, v.dtype) for k, v in q.items()} == {k: (v.shape, v.dtype) for k, v in abstract.items()}
        assert quantise.nbytes(q) == quantise.nbytes(abstract) == sum(v.nbytes for v in q.values())
        back = quantise.dequantise(q, n_in, jnp.float32, stacked=stacked)
        assert back.shape == w.shape
        worst = np.abs(w).max() * (0.5 / 127 if kind == "int8" else 0.16)
        assert np.abs(back - w).max() <= worst


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("dim", [64, 7])
def test_all_zero_groups_are_exact(kind: Any, dim: int) -> None:
    w = np.zeros((2 * dim, 3), np.float32)
    w[dim:, 0] = 1.0
    back = quantise.dequantise(quantise.quantise(jnp.asarray(w), kind, 1, dim), 1, jnp.float32)
    np.testing.assert_array_equal(back, w)
    assert not np.signbit(back).any()  # the code of 0, not another one times a scale of 0


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_a_stack_is_its_layers(kind: Any) -> None:
    w = jnp.asarray(normal((3, 24, 5)))
    whole = quantise.quantise(w, kind, 1, stacked=True)
    mapped = jax.vmap(lambda layer: quantise.quantise(layer, kind, 1))(w)
    for layer in range(3):
        for part, value in quantise.quantise(w[layer], kind, 1).items():
            np.testing.assert_array_equal(whole[part][layer], value)
            np.testing.assert_array_equal(mapped[part][layer], value)


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(kind: Any, bad: float) -> None:
    w = normal((8, 2))
    w[3, 1] = bad
    back = quantise.dequantise(quantise.quantise(jnp.asarray(w), kind, 1), 1, jnp.float32)
    assert np.isfinite(back[:, 0]).all() and not np.isfinite(back[:, 1]).any()


def test_bfloat16_weights_are_rounded_from_their_exact_values() -> None:
    w = jnp.asarray(normal((64, 4)), jnp.bfloat16)
    for kind in quantise.KINDS:
        for a, b in zip(*(quantise.quantise(v, kind, 1).values() for v in (w, w.astype(jnp.float32)))):
            np.testing.assert_array_equal(a, b)


# --------------------------------------------------------------------------------------------------------- on the mesh


def layer_out(case: str, kind: Any, sizes: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Result, gradient of x and the dequantised weight of one projection on a mesh, under jit."""
    equation, n_in, x_shape, w_shape, x_rule, w_rule, out = CASES[case]
    with jax.set_mesh(mesh(sizes)):
        x = put(normal(x_shape, seed), x_rule)
        y_shape = np.einsum(equation, normal(x_shape), normal(w_shape)).shape
        weights = put(normal(y_shape, 9), out)
        q, specs = stored(normal(w_shape, seed + 1), kind, n_in, w_rule)
        for part, value in q.items():
            assert jax.typeof(value).sharding.spec == specs[part], part

        def loss(x: jax.Array, q: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            y = quantise.contract(equation, x, used(q, specs), n_in=n_in, out_sharding=out, dtype=jnp.float32)
            assert jax.typeof(y).sharding.spec == out
            return jnp.sum(y * weights), y

        (_, y), dx = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, q)
        assert jax.typeof(dx).sharding.spec == x_rule
        w = jax.jit(lambda q: quantise.dequantise(used(q, specs), n_in, jnp.float32))(q)
        assert "fsdp" not in str(jax.typeof(w).sharding.spec)
    return np.asarray(y), np.asarray(dx), np.asarray(w), np.asarray(weights)


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("case", some(CASES, "query", "mlp_out"))
def test_every_mesh_is_one_device(case: str, kind: Any) -> None:
    """And both directions are those of the dequantised weight."""
    equation = CASES[case][0]
    one = layer_out(case, kind, (1, 1, 1))
    operands, result = equation.split("->")
    left, right = operands.split(",")
    x = normal(CASES[case][2], 0)
    np.testing.assert_allclose(one[0], np.einsum(equation, x, one[2]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one[1], np.einsum(f"{result},{right}->{left}", one[3], one[2]), rtol=1e-4, atol=1e-4)
    for sizes in MESHES[:2]:
        many = layer_out(case, kind, sizes)
        np.testing.assert_array_equal(many[2], one[2])  # the codes do not depend on the mesh
        np.testing.assert_allclose(many[0], one[0], rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(many[1], one[1], rtol=1e-5, atol=2e-5)


def test_specs_shard_where_the_parts_divide() -> None:
    with jax.set_mesh(mesh((1, 8, 1))):
        assert quantise.specs("nf4", P("fsdp", "tensor"), 1, shape=(1024, 8)) == {
            "nf4": P("fsdp", "tensor"),
            "scale": P("fsdp", "tensor"),
        }
        # 576 / 64 = 9 groups, 24 / 2 = 12 bytes: both do not divide by 8.
        assert quantise.specs("nf4", P("fsdp", "tensor"), 1, shape=(576, 8))["scale"] == P(None, "tensor")
        assert quantise.specs("nf4", P("fsdp", "tensor"), 1, shape=(576, 8))["nf4"] == P("fsdp", "tensor")
        assert quantise.specs("nf4", P("fsdp", "tensor"), 1, shape=(24, 8))["nf4"] == P(None, "tensor")
    # Without a shape: right for every shape.
    assert quantise.specs("nf4", RULES.query_dkgh, 1)["scale"] == P(None, "tensor", None, None)
    assert quantise.specs("int8", RULES.query_dkgh, 1)["scale"] == P("tensor", None, None)
    assert quantise.specs("int8", RULES.output_kghd, 3)["scale"] == P("fsdp")
    stack = quantise.specs("int8", P(None, *RULES.mlp_in_df), 1, stacked=True)
    assert stack == {"int8": P(None, "fsdp", "tensor"), "scale": P(None, "tensor")}


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("width", some([12, 24, 40], 12))
def test_layouts_that_do_not_divide_are_still_right(kind: Any, width: int) -> None:
    """12 / 2 = 6 bytes over 4 devices, 40 / 5 groups of 8, ...: parts are whole along that dimension, results the same."""
    x, w = normal((8, 2, width)), normal((width, 8), 1)
    results = []
    for sizes in MESHES:
        with jax.set_mesh(mesh(sizes)):
            q, specs = stored(w, kind, 1, RULES.mlp_out_fd, group=5)
            y = quantise.contract(
                "bsf,fd->bsd",
                put(x, RULES.mlp_bsf),
                used(q, specs),
                n_in=1,
                out_sharding=RULES.act_bsd,
                dtype=jnp.float32,
            )
            results.append(np.asarray(y))
    for y in results[:2]:
        np.testing.assert_allclose(y, results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("sizes", some(MESHES, (1, 2, 4)))
def test_scan_over_a_stack_equals_a_loop(kind: Any, sizes: tuple[int, int, int]) -> None:
    """Four residual MLPs, their weights stacked; result and gradient of the input, scanned and unrolled, and without a mesh."""
    ups, downs = normal((4, D, F), 1) / 8, normal((4, F, D), 2) / 10
    x = normal((B, S, D))

    def block(x: jax.Array, up: Any, down: Any, hidden: P | None, out: P | None) -> jax.Array:
        y = quantise.contract("bsd,df->bsf", x, up, n_in=1, out_sharding=hidden, dtype=jnp.float32)
        return x + quantise.contract("bsf,fd->bsd", jnp.tanh(y), down, n_in=1, out_sharding=out, dtype=jnp.float32)

    def plain(x: jax.Array) -> jax.Array:
        for up, down in zip(ups, downs):
            q = [quantise.quantise(jnp.asarray(w), kind, 1) for w in (up, down)]
            x = block(x, q[0], q[1], None, None)
        return jnp.sum(x**2)

    expected = jax.value_and_grad(plain)(jnp.asarray(x))
    with jax.set_mesh(mesh(sizes)):
        rules = [P(None, *rule) for rule in (RULES.mlp_in_df, RULES.mlp_out_fd)]
        q = [quantise.quantise(put(w, rule), kind, 1, stacked=True) for w, rule in zip((ups, downs), rules)]
        specs = [
            quantise.specs(kind, rule, 1, shape=shape)
            for rule, shape in ((RULES.mlp_in_df, (D, F)), (RULES.mlp_out_fd, (F, D)))
        ]

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            up, down = (used(part, spec) for part, spec in zip(layer, specs))
            return block(x, up, down, RULES.mlp_bsf, RULES.act_bsd), None

        def scanned(x: jax.Array, q: Any) -> jax.Array:
            return jnp.sum(jax.lax.scan(step, x, q)[0] ** 2)

        value, dx = jax.jit(jax.value_and_grad(scanned))(put(x, RULES.act_bsd), q)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(dx, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_vmap_over_experts(kind: Any) -> None:
    x, w = jnp.asarray(normal((3, 5, 24))), jnp.asarray(normal((3, 24, 6), 1))
    q = quantise.quantise(w, kind, 1, stacked=True)

    def total(x: jax.Array) -> jax.Array:
        one = lambda x, q: quantise.contract("sd,df->sf", x, q, n_in=1, out_sharding=None, dtype=jnp.float32)  # noqa: E731
        return jnp.sum(jax.vmap(one)(x, q) ** 2)

    def plain(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.einsum("esd,edf->esf", x, quantise.dequantise(q, 1, jnp.float32, stacked=True)) ** 2)

    np.testing.assert_allclose(total(x), plain(x), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(total)(x), jax.grad(plain)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", MESHES[:2])
@pytest.mark.parametrize("case", CASES)
def test_only_parts_cross_the_wire(case: str, sizes: tuple[int, int, int]) -> None:
    """No collective of the forward pass carries floats of the size of a weight: gathered are codes and scales."""
    equation, n_in, x_shape, w_shape, x_rule, w_rule, out = CASES[case]
    with jax.set_mesh(mesh(sizes)):
        q, specs = stored(normal(w_shape), "nf4", n_in, w_rule)
        forward = jax.jit(
            lambda x, q: quantise.contract(equation, x, used(q, specs), n_in=n_in, out_sharding=out, dtype=jnp.float32)
        )
        text = forward.lower(put(normal(x_shape), x_rule), q).compile().as_text() or ""
    gathers = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", text)
    floats = [math.prod(map(int, dims.split(","))) for kind, dims in gathers if kind == "f32" and dims]
    assert all(size <= q["scale"].size for size in floats), gathers
    assert any(kind == "u8" for kind, _ in gathers), gathers


# ------------------------------------------------------------------------------------------------- gradients and memory


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_gradients_flow_to_x_and_stop_at_the_parts(kind: Any) -> None:
    x, q = jnp.asarray(normal((4, 24))), quantise.quantise(jnp.asarray(normal((24, 6), 1)), kind, 1)

    def through_contract(x: jax.Array, scale: jax.Array) -> jax.Array:
        y = quantise.contract("sd,df->sf", x, q | {"scale": scale}, n_in=1, out_sharding=None, dtype=jnp.float32)
        return jnp.sum(jnp.sin(y))

    def through_floats(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ quantise.dequantise(q | {"scale": scale}, 1, jnp.float32)))

    dx, dscale = jax.grad(through_contract, (0, 1))(x, q["scale"])
    expected, dscale_floats = jax.grad(through_floats, (0, 1))(x, q["scale"])
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(dx).max() > 0.1
    assert not dscale.any() and not dscale_floats.any()


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_backward_keeps_the_parts_and_no_floats(kind: Any) -> None:
    """What a forward pass leaves for the backward pass has no float of the weight's size, without any rematerialisation."""
    x, w = jnp.asarray(normal((2, 128)), jnp.bfloat16), jnp.asarray(normal((128, 96), 1))
    q = quantise.quantise(w, kind, 1)
    contract = lambda x: quantise.contract("sd,df->sf", x, q, n_in=1, out_sharding=None, dtype=jnp.bfloat16)  # noqa: E731
    y, backward = jax.vjp(contract, x)
    assert y.dtype == jnp.bfloat16 and backward(y)[0].dtype == jnp.bfloat16
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert 0 < kept <= quantise.nbytes(q)


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_bfloat16_contraction_is_near_float32(kind: Any) -> None:
    x, q = normal((8, 256)), quantise.quantise(jnp.asarray(normal((256, 32), 1)), kind, 1)
    exact = x @ np.asarray(quantise.dequantise(q, 1, jnp.float32))
    y = quantise.contract("sd,df->sf", jnp.asarray(x), q, n_in=1, out_sharding=None, dtype=jnp.bfloat16)
    error = np.abs(np.float32(y) - exact)
    # 8 bits of mantissa in x, in w (NF4) and in y: relative errors of 2^-9 that average over 256 products.
    assert error.max() <= 4 * 2**-9 * np.linalg.norm(x, axis=1).max() * 1.5


@pytest.mark.parametrize(("kind", "ratio"), [("int8", 1 / 4), ("nf4", (4 + 32 / 64) / 32)])
def test_memory(kind: Any, ratio: float) -> None:
    shape = (4096, 32, 4, 128)
    scales = shape[1] * shape[2] * shape[3] * 4 if kind == "int8" else 0
    assert quantise.nbytes(quantise.shapes(kind, shape, 1)) == math.prod(shape) * 4 * ratio + scales


# -------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_is_quantised(kind: Any) -> None:
    assert quantise.is_quantised(quantise.quantise(jnp.ones((4, 2)), kind, 1))
    assert quantise.is_quantised(quantise.specs(kind, P("fsdp", "tensor"), 1))
    assert not any(map(quantise.is_quantised, [jnp.ones(3), {"scale": 1}, {kind: 1}, {}, {"scale": 1, "bias": 2}]))


def test_mistakes_are_named() -> None:
    w = jnp.ones((4, 2))
    bad: Any = "int3"
    with pytest.raises(ConfigError, match=r"int3.*\n.*int8, nf4"):
        quantise.quantise(w, bad, 1)
    with pytest.raises(ConfigError, match="2 dimensions cannot have 3 input dimensions"):
        quantise.quantise(w, "int8", 3)
    with pytest.raises(ConfigError, match=r"first one layers.* cannot have 2 input"):
        quantise.shapes("nf4", (4, 2), 2, stacked=True)
    with pytest.raises(ConfigError, match="groups of 0"):
        quantise.quantise(w, "nf4", 1, group=0)
    q = quantise.quantise(w, "nf4", 1)
    for equation in ("sd,fd->sf", "...d,df->...f", "sd,df->fs,", "sd,df->f", "sd,dd->sd"):
        with pytest.raises(ConfigError, match="does not contract the first 1 dimensions"):
            quantise.contract(equation, w.T, q, n_in=1, out_sharding=None, dtype=jnp.float32)

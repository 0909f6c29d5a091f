"""The kernel against the reference: trees, packed rows, memories, whole models. Its operations run one by one here (interpreted)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import aot_check

from instructrec_jax.config import MeshConfig, ModelConfig
from instructrec_jax.models import architecture
from instructrec_jax.models.attention import Past, attend, fuses, segment_ends, segment_mask, tree_mask
from instructrec_jax.models.language_model import LanguageModel, Sizes, apply, init_variables
from instructrec_jax.models.sharding import RULES
from instructrec_jax.models.tree_attention import tree_attention
from instructrec_jax.scoring import Request, Scorer
from instructrec_jax.training import loss as losses
from instructrec_jax.training.mesh import make_mesh
from tests.tiny import NUM_ITEMS, content, model_of, on_mesh, random_batch
from tests.variants import some

ROWS, LENGTH, KV_HEADS, HEAD = 4, 384, 2, 8  # three blocks of 128
MODEL = ModelConfig(width=32, heads=4, kv_heads=2, head_size=8, mlp_width=64, dropout=0.0, item_dropout=0.0)
MESHES = [(1, 1, 1), (2, 2, 2)]


def mesh_of(sizes: tuple[int, ...]) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def random_trees(r: np.random.Generator, length: int) -> np.ndarray:
    """``until`` of one row: trees in depth-first order, deep, wide or both, and padding behind them."""
    size = int(r.integers(1, length + 1))
    depth, go_on = np.zeros(size, int), r.random()
    for i in range(1, size):
        depth[i] = depth[i - 1] + 1 if r.random() < go_on else r.integers(0, depth[i - 1] + 2)
    until = np.zeros(length, np.int32)
    for i in range(size):
        after = np.flatnonzero(depth[i + 1 :] <= depth[i])
        until[i] = i + 1 + after[0] if len(after) else size
    return until


def random_segments(r: np.random.Generator, length: int) -> np.ndarray:
    """Segments of one row, with gaps of padding between and behind some."""
    out, at = np.zeros(length, np.int32), 0
    for segment in range(1, int(r.integers(2, 12))):
        size = int(r.integers(1, length // 3))
        out[at : at + size] = segment
        at += size + int(r.integers(0, 20)) * int(r.integers(0, 2))
    return out


@cache
def both(mesh: tuple[int, ...], groups: int) -> tuple[Callable, Callable]:
    """Jitted (read, gradients of q, k and v) by the kernel and by the reference."""

    def run(path: Any, q: Any, k: Any, v: Any, until: Any, weight: Any) -> Any:
        def read(q: Any, k: Any, v: Any) -> Any:
            out = attend(q, k, v, until, path=path) * weight
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(read, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    return jax.jit(partial(run, "fused")), jax.jit(partial(run, "reference"))


def put(x: np.ndarray, spec: Any) -> jax.Array:
    return jax.device_put(jnp.asarray(x), jax.NamedSharding(jax.sharding.get_mesh(), spec))


def check(mesh: tuple[int, ...], groups: int, until: np.ndarray, seed: int) -> None:
    """Forward and gradients; queries that may read nothing have no weight."""
    r = np.random.default_rng(seed)
    q = r.normal(size=(ROWS, LENGTH, KV_HEADS, groups, HEAD)).astype(np.float32)
    k, v = (r.normal(size=(ROWS, LENGTH, KV_HEADS, HEAD)).astype(np.float32) for _ in range(2))
    weight = np.asarray(tree_mask(jnp.asarray(until)).any(-1))[:, :, None, None, None] * r.normal(size=q.shape)
    with jax.set_mesh(mesh_of(mesh)):
        arguments = [put(x, RULES.heads_bskgh if x.ndim == 5 else RULES.heads_bskh) for x in (q, k, v)]
        arguments += [put(until, RULES.ids_bs), put(weight.astype(np.float32), RULES.heads_bskgh)]
        found, expected = (f(*arguments) for f in both(mesh, groups))
    for name, a, b in zip(("dq", "dk", "dv", "read"), jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("groups", some([1, 2, 4], 2))
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_trees(mesh: tuple[int, ...], groups: int, seed: int) -> None:
    r = np.random.default_rng(seed)
    check(mesh, groups, np.stack([random_trees(r, LENGTH) for _ in range(ROWS)]), seed)


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_packed_segments(seed: int) -> None:
    """One row is padding alone."""
    r = np.random.default_rng(seed)
    segments = np.stack([*(random_segments(r, LENGTH) for _ in range(ROWS - 1)), np.zeros(LENGTH, np.int32)])
    until = segment_ends(jnp.asarray(segments))
    np.testing.assert_array_equal(tree_mask(until), segment_mask(jnp.asarray(segments), causal=True))
    check((1, 1, 1), 2, np.asarray(until), seed)


@pytest.mark.parametrize(
    ("mesh", "memories"), [((1, 1, 1), 2), ((2, 2, 2), 4), pytest.param((2, 2, 2), 1, marks=pytest.mark.slow)]
)
def test_rows_that_continue_a_memory(mesh: tuple[int, ...], memories: int) -> None:
    """Read apart and merged; gradients go through the log-sum-exp. One memory is on every device, its rows over the mesh."""
    r = np.random.default_rng(1)
    rows, length, places = 8, 128, 256
    until = np.stack([random_trees(r, length) for _ in range(rows)])
    real = np.arange(places) < r.integers(1, places, (memories, 1))
    q = r.normal(size=(rows, length, KV_HEADS, 2, HEAD)).astype(np.float32)
    own = [r.normal(size=(rows, length, KV_HEADS, HEAD)).astype(np.float32) for _ in range(2)]
    past = [r.normal(size=(memories, places, KV_HEADS, HEAD)).astype(np.float32) for _ in range(2)]
    with jax.set_mesh(mesh_of(mesh)):
        first = RULES.ids_bs[0] if memories > 1 else None
        arguments = [put(q, RULES.heads_bskgh), *(put(x, RULES.heads_bskh) for x in own)]
        arguments += [put(x, jax.P(first, *RULES.heads_bskh[1:])) for x in past]
        masks = put(until, RULES.ids_bs), put(real, jax.P(first, None))

        def run(path: Any, *given: Any) -> Any:
            def read(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
                out = attend(q, k, v, masks[0], past=[Past(keys, values, masks[1])], path=path)
                return jnp.sum(jnp.sin(out)), out

            return jax.grad(read, argnums=tuple(range(5)), has_aux=True)(*given)

        found, expected = (jax.jit(partial(run, path))(*arguments) for path in ("fused", "reference"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_may_read_nothing_is_nought() -> None:
    r = np.random.default_rng(0)
    q, k = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((1, 128, 1, 2, 8), (1, 128, 1, 8)))
    read, total = tree_attention(q, k, k, jnp.zeros((1, 128), jnp.int32).at[0, :5].set(5), interpret=True)
    assert np.all(np.asarray(read)[:, 5:] == 0) and np.all(np.asarray(total)[:, 5:] == np.float32(-1e30))
    assert np.all(np.asarray(read)[:, :5] != 0)


# ------------------------------------------------------------------------------------------------------ which path is taken


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def kernels(f: Callable, *arguments: Any) -> int:
    return sum(e.primitive.name == "pallas_call" for e in equations(jax.make_jaxpr(f)(*arguments).jaxpr))


def test_what_the_kernel_cannot_do_goes_the_reference_way() -> None:
    with jax.set_mesh(mesh_of((1, 1, 1))):
        q, k = jnp.zeros((2, 128, 2, 2, 8)), jnp.zeros((2, 128, 2, 8))
        until, short = jnp.full((2, 128), 128), jnp.full((2, 64), 64)
        fused = partial(attend, path="fused")
        assert kernels(fused, q, k, k, until) == 1
        assert kernels(fused, q, k, k, tree_mask(until)) == 0
        assert kernels(partial(fused, softcap=30.0), q, k, k, until) == 0
        assert kernels(partial(fused, bias=jnp.zeros((2, 2, 128, 2, 128))), q, k, k, until) == 0
        assert kernels(fused, q[:, :64], k[:, :64], k[:, :64], short) == 0
        assert kernels(attend, q, k, k, until) == 0
        past = [Past(k, k, until > 0), Past(k[:, :3], k[:, :3], until[:, :3] > 0)]
        assert kernels(partial(fused, past=past), q, k, k, until) == 2
        assert fuses("fused") and not fuses("reference") and fuses("auto") == (jax.default_backend() == "tpu")


def test_no_mask_of_all_pairs_is_built() -> None:
    """Of a model's forward pass: nothing has two dimensions of the row's length."""
    with jax.set_mesh(mesh_of((1, 1, 1))):
        batch, features = on_mesh(random_batch(2, LENGTH)), content()

        def squares(path: Any) -> int:
            model = model_of(dataclasses.replace(MODEL, attention=path))
            params = jax.eval_shape(model.init, jax.random.key(0), batch, features)
            return squares_of(model.apply, params, batch, features)

        def squares_of(f: Any, *given: Any) -> int:
            traced = jax.make_jaxpr(f)(*given).jaxpr
            return sum(v.aval.shape.count(LENGTH) > 1 for e in equations(traced) for v in e.outvars)

        # The reference takes a block of queries at a time.
        assert squares("fused") == squares("reference") == 0
        assert squares_of(lambda b: segment_mask(b["segment_ids"], causal=True), batch) > 0


# ------------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ((1, 1, 1), "none"),
        pytest.param((2, 2, 2), "none", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), "full", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_of_a_training_step(mesh: tuple[int, ...], remat: Any) -> None:
    batch = random_batch(4, 128)
    r = np.random.default_rng(2)
    batch["segment_ids"] = np.stack([random_segments(r, 128) for _ in range(4)])
    for name in ("item_target", "text_target", "task"):
        batch[name] *= batch["segment_ids"] > 0
    found = []
    with jax.set_mesh(mesh_of(mesh)):
        rows, features = on_mesh(batch), content()
        variables = jax.jit(model_of(MODEL).init)(jax.random.key(0), rows, features)
        for path in ("fused", "reference"):
            model = model_of(dataclasses.replace(MODEL, attention=path, remat=remat), train=True)

            def loss(variables: Any, model: LanguageModel = model) -> jax.Array:
                out = apply(model, variables, rows, features)
                item, text = (
                    losses.item_loss(out, rows, NUM_ITEMS, 0.1, 64),
                    losses.word_loss(out, rows, 64, model.arch),
                )
                return item.loss / item.count + text.loss / text.count

            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(variables)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ((1, 1, 1), "packed"),
        *(pytest.param((2, 2, 2), layout, marks=pytest.mark.slow) for layout in ("batched", "packed")),
    ],
)
def test_scores_of_candidates(mesh: tuple[int, ...], layout: Any) -> None:
    """Packed rows of several requests, and blocks that continue a prompt."""
    r = np.random.default_rng(3)
    sizes = Sizes(vocab=256)
    asked = [
        Request(r.integers(6, 200, size), [r.integers(6, 200, r.integers(1, 6)).tolist() for _ in range(count)])
        for size, count in ((90, 12), (40, 30), (130, 5), (7, 1), (60, 20))
    ]
    found = []
    with jax.set_mesh(mesh_of(mesh)):
        arch = architecture.from_numbers(MODEL, sizes.vocab)
        params = jax.jit(lambda key: init_variables(arch, sizes, MODEL, key))(jax.random.key(0))
        for path in ("fused", "reference"):
            options: Any = dataclasses.replace(MODEL, attention=path)
            text: Any = None
            empty = put(np.zeros((0, 0), np.float32), jax.P(None, None))
            scorer = Scorer(options, arch, sizes, params, empty, 0, text, [], row_tokens=384, layout=layout)
            found.append(scorer.score(asked, "likelihood"))
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- for a TPU


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # needs a client, which needs a chip
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, the compiler: pip install -e '.[tpu]'")
@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize(("kv_heads", "groups", "size"), [(8, 2, 128), (2, 4, 64), (1, 4, 256), (2, 1, 32)])
def test_compiles_for_a_v5e(length: int, kv_heads: int, groups: int, size: int) -> None:
    """Qwen3-0.6B's heads first. One kernel forward and two backward, and no array of all pairs beside them."""
    mesh = make_mesh(MeshConfig(), [aot_check.device_of("v5e:1x1")])
    with jax.set_mesh(mesh):
        shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        q = shape((4, length, kv_heads, groups, size), sharding=jax.NamedSharding(mesh, RULES.heads_bskgh))
        k = shape((4, length, kv_heads, size), sharding=jax.NamedSharding(mesh, RULES.heads_bskh))
        until = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=jax.NamedSharding(mesh, RULES.ids_bs))
        forward = partial(attend, path="auto")
        backward = jax.grad(lambda *x: jnp.sum(forward(*x).astype(jnp.float32)), argnums=(0, 1, 2))
        for f, calls in ((forward, 1), (backward, 3)):
            text = jax.jit(f).lower(q, k, k, until).compile().as_text() or ""
            assert text.count('custom_call_target="tpu_custom_call"') == calls
            assert f"{length},{length}" not in text

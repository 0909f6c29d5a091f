"""cuDNN's attention on NVIDIA GPUs, as far as a machine without one can tell: when it is taken, what it is given, what is lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructrec_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from instructrec_jax.models import architecture, attention
from instructrec_jax.models.attention import attend, by_cudnn, segment_ends, tree_mask
from instructrec_jax.models.sharding import RULES
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.shapes import step_shapes
from instructrec_jax.training.step import make_train_step
from tests.tiny import NUM_ITEMS, SIZES

ROWS, LENGTH, KV_HEADS, GROUPS, HEAD = 4, 64, 2, 3, 16
CALL = "__cudnn$fmha"
MODEL = ModelConfig(
    width=32, heads=4, kv_heads=2, head_size=8, mlp_width=64, dropout=0.0, item_dropout=0.0, dtype="bfloat16"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU with cuDNN 9.12, which JAX asks the library for."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(attention, "_cuda", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)


def inputs(dtype: str = "bfloat16", length: int = LENGTH, head: int = HEAD) -> tuple[jax.Array, ...]:
    """q, k, v and the ends of three segments, with padding behind them."""
    r = np.random.default_rng(0)
    segments = np.repeat([1, 2, 3, 0], [length // 2, length // 4, 5, length - length // 2 - length // 4 - 5])
    until = segment_ends(jnp.asarray(np.tile(segments, (ROWS, 1))))
    shapes = ((ROWS, length, KV_HEADS, GROUPS, head), *[(ROWS, length, KV_HEADS, head)] * 2)
    q, k, v = (jnp.asarray(r.normal(size=shape), dtype) for shape in shapes)
    return q, k, v, until


@pytest.mark.parametrize(
    ("what", "taken"),
    [
        ({}, True),
        ({"dtype": "float16"}, True),
        ({"dtype": "float32"}, False),
        ({"head": 128}, True),
        ({"head": 136}, False),
        ({"head": 12}, False),
        ({"length": 65}, False),
        ({"path": "reference"}, False),
        ({"path": "fused"}, False),
        ({"softcap": 50.0}, False),
        ({"bias": jnp.zeros(())}, False),
        ({"mask": lambda until: tree_mask(until)}, False),
        ({"mask": lambda until: until > 0}, False),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_when_it_is_taken(what: dict[str, Any], taken: bool) -> None:
    shape = {k: v for k, v in what.items() if k in ("dtype", "length", "head")}
    q, _, _, until = inputs(**shape)
    mask = what.get("mask", lambda until: until)(until)
    assert by_cudnn(what.get("path", "auto"), q, mask, what.get("bias"), what.get("softcap", 0.0)) == taken


@pytest.mark.parametrize(
    ("platform", "capability", "taken"),
    [
        ("gpu", "9.0", True),
        ("gpu", "8.0", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx942", False),
        ("gpu", None, False),
        ("cpu", "9.0", False),
        ("tpu", "9.0", False),
        (None, "9.0", False),
    ],
)
def test_on_which_devices(
    platform: str | None, capability: str | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = type("Device", (), {} if capability is None else {"compute_capability": capability})
    monkeypatch.setattr(attention, "_platform", lambda: platform)
    monkeypatch.setattr(attention.jax, "local_devices", lambda: [device()])
    assert by_cudnn("auto", inputs()[0], inputs()[3], None, 0.0) == taken


def test_not_here() -> None:
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert jax.default_backend() == "gpu" or not by_cudnn("auto", inputs()[0], inputs()[3], None, 0.0)


def both(mesh: tuple[int, int, int]) -> tuple[Callable, tuple[jax.Array, ...]]:
    """Attention with its gradients by a path, and arguments on the current mesh."""
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))  # noqa: E731
    q, k, v, until = inputs("bfloat16")
    given = (put(q, RULES.heads_bskgh), put(k, RULES.heads_bskh), put(v, RULES.heads_bskh), put(until, RULES.ids_bs))

    def read(q: jax.Array, k: jax.Array, v: jax.Array, until: jax.Array, path: Any) -> tuple[jax.Array, tuple]:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(q, k, v, until, path=path)
            real = (until > 0)[:, :, None, None, None]  # padding carries no loss
            return jnp.sum(jnp.where(real, out, 0).astype(jnp.float32) ** 2), jnp.where(real, out, 0)

        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    return jax.jit(read, static_argnames="path"), given


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.usefixtures("gpu")
def test_what_cudnn_is_asked_for_is_the_reference(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call by JAX's own implementation: heads in their order, and the mask."""
    plain = jax.nn.dot_product_attention
    asked = []

    def by_xla(*arguments: Any, implementation: str, **options: Any) -> jax.Array:
        asked.append(implementation)
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", by_xla)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])):
        read, given = both(sizes)
        found, wanted = read(*given, path="auto"), read(*given, path="reference")
    assert set(asked) == {"cudnn"}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def lowered(step: Any, *given: Any, **static: Any) -> str:
    return step.trace(*given, **static).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.usefixtures("gpu")
def test_attention_is_lowered_to_cudnn(sizes: tuple[int, int, int]) -> None:
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])):
        read, given = both(sizes)
        text = lowered(read, *given, path="auto")
        assert f"{CALL}ScaleBiasSoftmax(" in text and f"{CALL}ScaleBiasSoftmaxBackward(" in text
        assert CALL not in lowered(read, *given, path="reference")


@pytest.mark.usefixtures("gpu")
def test_the_mask_is_not_kept_for_the_backward_pass() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        q, k, v, until = both((1, 1, 1))[1]
        kept = jax.eval_shape(lambda q, k, v: jax.vjp(partial(attend, mask=until, path="auto"), q, k, v)[1], q, k, v)
    shapes = [x.shape for x in jax.tree.leaves(kept)]
    assert shapes and not [shape for shape in shapes if shape.count(LENGTH) > 1]


@pytest.mark.parametrize("remat", ["none", "least"])
@pytest.mark.usefixtures("gpu")
def test_a_training_step_is_lowered_to_cudnn(remat: Any) -> None:
    config = Config(model=replace(MODEL, remat=remat), train=TrainConfig(batch_size=8, sequence_length=64))
    arch = architecture.from_numbers(config.model, SIZES.vocab)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])):
        text = lowered(make_train_step(config, arch, SIZES, NUM_ITEMS), *step_shapes(config, arch, SIZES))
    assert f"{CALL}ScaleBiasSoftmaxBackward" in text

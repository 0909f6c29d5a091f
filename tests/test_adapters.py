"""Adapters beside frozen weights: what they add to plain and quantised weights, what learns, which settings are refused."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from instructrec_jax.config import AdapterConfig, ModelConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models import adapters
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.hf.names import inputs
from instructrec_jax.models.language_model import Sizes, init_variables
from instructrec_jax.models.parts import product
from instructrec_jax.models.sharding import padded
from tests.adapted import GOLDEN, MODELS, assert_same, disturbed, logits_of, names, one_device, options, start
from tests.tiny import SIZES, content
from tests.variants import some


@functools.cache
def plain_logits(folder: str, quantise: str = "none") -> np.ndarray:
    """Of the model without an adapter."""
    arch = read_config(GOLDEN / folder)
    base = load_params(GOLDEN / folder, arch, quantised=quantise)
    model = replace(options(rank=0), quantise=quantise)
    return logits_of(arch, Sizes(padded(arch.vocab)), model, {"params": base})


# ------------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("folder", some(MODELS, MODELS[0]))
def test_a_fresh_adapter_changes_nothing(folder: str, kind: str) -> None:
    model = options(kind)
    with jax.set_mesh(one_device()):
        arch, sizes, trained, frozen = start(folder, model)
        assert_same(
            logits_of(arch, sizes, model, adapters.join(trained, frozen)),
            plain_logits(folder),
            1e-6 if kind == "lora" else 1e-5,
        )


@pytest.mark.parametrize("quantise", some(["int8", "nf4"], "nf4"))
def test_a_fresh_dora_on_quantised_weights_changes_nothing(quantise: str) -> None:
    """Its magnitudes are those of the weights as they are after rounding."""
    model = options("dora", quantise=quantise)
    with jax.set_mesh(one_device()):
        arch, sizes, trained, frozen = start("smollm2", model)
        assert_same(logits_of(arch, sizes, model, adapters.join(trained, frozen)), plain_logits("smollm2", quantise))


@functools.partial(jax.jit, static_argnums=1)
def merged(variables: Any, adapter: AdapterConfig) -> Any:
    """The parameters with the adapter inside, layer by layer."""
    params = dict(variables["params"])
    for stack, lora in variables["lora"].items():
        layers = dict(params[stack])
        for name in {key.rsplit("_", 1)[0] for key in lora}:
            count = lora[f"{name}_a"].shape[0]
            at = [jax.tree.map(lambda leaf, i=i: leaf[i], (layers[name], lora)) for i in range(count)]
            layers[name] = jnp.stack([adapters.merged_layer(weight, own, name, adapter) for weight, own in at])
        params[stack] = layers
    return params


@pytest.mark.parametrize(
    "folder, kind, quantise",
    [
        *[(folder, "dora", "none") for folder in MODELS[:2]],
        *[pytest.param(folder, "dora", "none", marks=pytest.mark.slow) for folder in MODELS[2:]],
        *[pytest.param(folder, "lora", "none", marks=pytest.mark.slow) for folder in MODELS],
        pytest.param("smollm2", "rslora", "none", marks=pytest.mark.slow),
        ("smollm2", "lora", "int8"),
        ("smollm2", "dora", "nf4"),
    ],
)
def test_merged_weights_equal_base_and_adapter(folder: str, kind: str, quantise: str) -> None:
    model = options(kind, quantise=quantise)
    with jax.set_mesh(one_device()):
        arch, sizes, trained, frozen = start(folder, model)
        variables = adapters.join(disturbed(trained), frozen)
        apart = logits_of(arch, sizes, model, variables)
        together = logits_of(arch, sizes, options(rank=0), {"params": merged(variables, model.adapter)})
        assert_same(apart, together)
        assert np.abs(apart - plain_logits(folder, quantise)).max() > 0.05, "the adapter did nothing"


def test_scale() -> None:
    """rsLoRA divides by the root of the rank."""
    a, b = np.ones((3, 4), np.float32), np.ones((4, 2), np.float32)
    kinds: dict[Any, float] = {"lora": 8 / 4, "rslora": 8 / 2}
    for kind, scale in kinds.items():
        found = adapters.change({"up_a": a, "up_b": b}, "up", 1, AdapterConfig(rank=4, alpha=8.0, kind=kind))
        np.testing.assert_array_equal(np.asarray(found), np.full((3, 2), 4 * scale, np.float32))


def abstract(folder: str, model: ModelConfig) -> Any:
    arch = read_config(GOLDEN / folder)
    return jax.eval_shape(lambda: init_variables(arch, Sizes(padded(arch.vocab)), model, jax.random.key(0)))


@pytest.mark.parametrize(
    "folder, targets, expected",
    [
        ("smollm2", ("query", "down"), {"layers": {"query", "down"}}),
        ("gpt2", AdapterConfig().targets, {"layers": {"query", "key", "value", "output", "up", "down"}}),
        ("t5_v11", ("value",), {"layers": {"value"}, "encoder_layers": {"value"}}),
        ("t5_v11", ("cross_value", "gate"), {"layers": {"cross_value", "gate"}, "encoder_layers": {"gate"}}),
    ],
)
def test_targets_choose(folder: str, targets: tuple[str, ...], expected: dict[str, set[str]]) -> None:
    with jax.set_mesh(one_device()):
        tree = abstract(folder, options("dora", targets=targets))
    wanted = {f"{s}/{n}_{part}" for s, own in expected.items() for n in own for part in ("a", "b", "magnitude")}
    assert names(tree["lora"]) == wanted
    for stack, own in expected.items():
        for name in own:
            shape, n_in = tree["params"][stack][name].shape[1:], inputs(name)
            got = [tree["lora"][stack][f"{name}_{part}"].shape[1:] for part in ("a", "b", "magnitude")]
            assert got == [(*shape[:n_in], 4), (4, *shape[n_in:]), shape[n_in:]]


@pytest.mark.slow
def test_layers_may_be_unrolled() -> None:
    """Scanned or not, an adapter stands beside each layer, and its magnitudes are those of its weights."""
    model = replace(options("dora"), scan_layers=False)
    arch = replace(read_config(GOLDEN / "smollm2"), layers=2)
    with jax.set_mesh(one_device()):
        sizes = Sizes(padded(arch.vocab))
        variables = jax.jit(lambda key: init_variables(arch, sizes, model, key))(jax.random.key(0))
        assert set(variables["lora"]) == {"layer_0", "layer_1"}
        scaled = {**variables, "params": jax.tree.map(lambda leaf: leaf * 2, variables["params"])}
        measured = adapters.with_magnitudes(scaled, model.adapter)["lora"]
        for layer, lora in variables["lora"].items():
            for name, leaf in lora.items():
                factor = 2 if name.endswith("magnitude") else 1
                np.testing.assert_allclose(np.asarray(measured[layer][name]), factor * np.asarray(leaf), rtol=1e-6)


def test_dropout_is_on_the_adapter_alone_and_only_in_training() -> None:
    model = options(dropout=0.5)
    with jax.set_mesh(one_device()):
        arch, sizes, trained, frozen = start("smollm2", model)
        fresh = adapters.join(trained, frozen)
        # Dropped inputs of an adapter that adds nothing yet: the base does not see them.
        assert_same(logits_of(arch, sizes, model, fresh, key=0), plain_logits("smollm2"), 1e-6)
        learned = adapters.join(disturbed(trained), frozen)
        run = functools.partial(logits_of, arch, sizes)
        assert_same(run(model, learned), run(options(), learned), 0.0)
        one, same, other = (run(model, learned, key=key) for key in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).max() > 0.01
        assert_same(run(options(), learned, key=1), run(options(), learned), 1e-6)


def test_the_gradient_of_few_columns_is_a_product_with_few_rows() -> None:
    """XLA takes a transpose into the product before it, where nothing keeps it from that: eight columns take three times as long."""
    with jax.set_mesh(one_device()):
        x, w = jnp.ones((2, 16, 48)), jnp.ones((48, 8))
        gradient = jax.jit(jax.grad(lambda w: product("bsd,dr->bsr", P(None, None, None), x, w).sum()))
        compiled = gradient.lower(w).compile().as_text()
        np.testing.assert_allclose(gradient(w), np.full((48, 8), 32.0))
    assert "= f32[8,48]" in compiled and not re.search(r"= f32\[48,8\]\S* dot\(", compiled)


def test_the_gradient_of_a_weight_turns_nothing_in_memory() -> None:
    r = np.random.default_rng(0)
    x, w, by = (r.normal(size=s).astype(np.float32) for s in ((2, 16, 3, 2, 8), (3, 2, 8, 40), (2, 16, 40)))

    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(by * product("bskgh,kghd->bsd", P(None, None, None), x, w))

    with jax.set_mesh(one_device()):
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = gradients.lower(x, w).compile().as_text()
        ours = gradients(x, w)
    for a, b in zip(
        ours, jax.grad(lambda x, w: jnp.sum(by * jnp.einsum("bskgh,kghd->bsd", x, w)), argnums=(0, 1))(x, w)
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    assert "f32[48,40]" in compiled and not re.search(r" (transpose|copy)\(", compiled)


# ------------------------------------------------------------------------------------------------------------- what learns


@functools.cache
def whole_model() -> Any:
    """Variables of a small model with items and an adapter."""
    arch = replace(read_config(GOLDEN / "smollm2"), vocab=SIZES.vocab, tied_head=False)
    model = replace(options(), trainable=("adapter", "items"))
    return jax.jit(lambda key, c: init_variables(arch, SIZES, model, key, c))(jax.random.key(0), content())


ITEMS = {"item_bias", "item_content", "item_id", "unknown_item", "feature_table", "feature_offset"}


@pytest.mark.parametrize(
    "trainable",
    [
        ("adapter",),
        pytest.param(("items",), marks=pytest.mark.slow),
        pytest.param(("embeddings",), marks=pytest.mark.slow),
        ("adapter", "items"),
        pytest.param(("adapter", "items", "embeddings"), marks=pytest.mark.slow),
        ("all",),
    ],
)
def test_what_learns(trainable: tuple[str, ...]) -> None:
    with jax.set_mesh(one_device()):
        variables = whole_model()
        trained, frozen = adapters.split(variables, trainable)
        everything = names(variables)
        wanted = set()
        if "adapter" in trainable:
            wanted |= {name for name in everything if name.startswith("lora/")}
        if "items" in trainable:
            wanted |= {f"params/{name}" for name in ITEMS}
        if "embeddings" in trainable:
            wanted |= {"params/words", "params/word_head"}
        assert names(trained) == (everything if "all" in trainable else wanted)
        assert names(frozen) == everything - names(trained)
        back = adapters.join(trained, frozen)
        assert jax.tree.structure(back) == jax.tree.structure(variables)
        jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_what_learns_is_float32() -> None:
    model = replace(options(), param_dtype="bfloat16", trainable=("adapter", "embeddings"))
    with jax.set_mesh(one_device()):
        _, _, trained, frozen = start("gpt2", model)
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
        assert set(trained["params"]) == {"words", "positions"}
        assert frozen["params"]["layers"]["query"].dtype == jnp.bfloat16


def test_quantised_weights_are_leaves_of_the_frozen_tree() -> None:
    with jax.set_mesh(one_device()):
        _, _, trained, frozen = start("smollm2", options(quantise="nf4"))
    assert set(trained) == {"lora"} and set(frozen["params"]["layers"]["query"]) == {"nf4", "scale"}


def test_an_adapter_without_a_place_is_refused() -> None:
    with jax.set_mesh(one_device()), pytest.raises(ConfigError, match=r"nothing would learn"):
        start("gpt2", options(targets=("gate",)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trainable": ("adapters",)}, r"model.trainable names 'adapters' \(did you mean 'adapter'\?\)"),
        ({"trainable": ()}, r"model.trainable is empty"),
        ({"rank": 0}, r"names the adapter, but model.adapter.rank is 0"),
        ({"trainable": ("items",)}, r"model.adapter.rank is set, but model.trainable leaves the adapter out"),
        ({"quantise": "nf4", "trainable": ("all",)}, r"nf4: quantised weights cannot be trained"),
        ({"quantise": "int8", "pretrained": ""}, r"model.quantise needs a pretrained model"),
        ({"pretrained": ""}, r"model.trainable other than all needs model.pretrained"),
        ({"targets": ("query", "vaule")}, r"model.adapter.targets names 'vaule' \(did you mean 'value'\?\)"),
        ({"targets": ("cross_gate",)}, r"model.adapter.targets names 'cross_gate'"),
        ({"targets": ()}, r"model.adapter.targets is empty"),
        ({"rank": -1}, r"model.adapter.rank = -1"),
        ({"alpha": 0.0}, r"model.adapter.alpha = 0.0"),
        ({"dropout": 1.0}, r"model.adapter.dropout = 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    model = options()
    own = {k: v for k, v in changes.items() if hasattr(model.adapter, k)}
    others = {k: v for k, v in changes.items() if k not in own}
    # The adapter's dropout, not the model's.
    bad = replace(model, adapter=replace(model.adapter, **own), **others)
    with pytest.raises(ConfigError, match=message) as error:
        adapters.check(bad)
    assert error.value.remedy or re.search("would|leaves|needs", error.value.message)


def test_settings_that_fit() -> None:
    adapters.check(ModelConfig())
    for model in (
        options(),
        options("dora", quantise="nf4", targets=("cross_query", "up")),
        replace(options(), trainable=("adapter", "items", "embeddings")),
        replace(options(rank=0), trainable=("all",)),
        replace(options(rank=0), trainable=("items",), quantise="int8"),
    ):
        adapters.check(model)

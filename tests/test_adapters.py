"""Adapters beside frozen weights: what they add, what learns, what is stored, on plain and quantised weights and on every mesh."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructrec_jax.config import AdapterConfig, Config, MeshConfig, ModelConfig, TrainConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models import adapters
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.hf.names import inputs
from instructrec_jax.models.language_model import LanguageModel, Sizes, apply, init_variables, word_logits
from instructrec_jax.models.sharding import padded
from instructrec_jax.training.checkpoint import Checkpoints
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import init_model, init_state, make_train_step, put_batch
from tests.tiny import SIZES, content, on_mesh, random_batch

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["smollm2", "t5_v11", "gpt2"]  # a decoder with grouped heads, an encoder-decoder, one with biases
ALL_TARGETS = adapters.TARGETS
TRAIN = TrainConfig(batch_size=16, sequence_length=32, logits_chunk=32, steps=40, warmup_steps=1, learning_rate=1e-2)


def options(kind: Any = "lora", *, rank: int = 4, quantise: Any = "none", **adapter: Any) -> ModelConfig:
    """The settings of an adapter on a published model; no dropout but the adapter's."""
    settings = AdapterConfig(rank=rank, kind=kind, alpha=8.0, **{"targets": ALL_TARGETS, **adapter})
    return ModelConfig(
        pretrained="golden", adapter=settings, quantise=quantise, trainable=("adapter",), dropout=0.0, item_dropout=0.0
    )


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def word_batch(vocab: int, rows: int = 16, length: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows of words, with targets."""
    batch = {k: v for k, v in random_batch(rows, length, seed).items() if not k.startswith(("item", "feature"))}
    batch["tokens"] = batch["tokens"] % vocab
    batch["text_target"] = np.where(batch["text_target"] > 0, 1 + batch["text_target"] % vocab, 0)
    return batch | {"item_target": np.zeros_like(batch["tokens"])}


def start(folder: str, model: ModelConfig) -> tuple[Architecture, Sizes, Any, Any]:
    """Architecture, sizes, trained and frozen variables of a stored model, on the current mesh, as a run makes them."""
    return _start(folder, model, jax.sharding.get_mesh())


@functools.cache
def _start(folder: str, model: ModelConfig, mesh: Any) -> tuple[Architecture, Sizes, Any, Any]:
    del mesh
    arch = read_config(GOLDEN / folder)
    base = load_params(GOLDEN / folder, arch, model.param_dtype, quantised=model.quantise)
    sizes = Sizes(padded(arch.vocab))
    return arch, sizes, *init_model(Config(model=model), arch, sizes, content(), 0, base)


def disturbed(lora: Any) -> Any:
    """An adapter that has learned something: random B, magnitudes that differ from the weights' by up to a fifth."""
    random = np.random.default_rng(3)

    def leaf(path: tuple, x: jax.Array) -> jax.Array:
        if "magnitude" in jax.tree_util.keystr(path):
            values = np.asarray(x) * random.uniform(0.8, 1.2, x.shape)
        else:
            values = random.normal(scale=0.2, size=x.shape)
        return jax.device_put(values.astype(np.float32), x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, lora)


def logits_of(
    arch: Architecture, sizes: Sizes, model: ModelConfig, variables: Any, *, key: int | None = None
) -> np.ndarray:
    """Word logits of a fixed batch; with a key, as while training."""
    module = LanguageModel(arch, sizes, model, train=key is not None)
    rngs = {} if key is None else {"rngs": {"dropout": jax.random.key(key)}}

    @jax.jit
    def run(variables: Any, batch: Any) -> jax.Array:
        out = apply(module, variables, batch, **rngs)
        return word_logits(out.hidden, out, arch)[..., : arch.vocab]

    batch = word_batch(arch.vocab, 2, 16)
    batch["text_target"][:, 8:12] = 1  # an answer for encoder-decoders
    logits = np.asarray(run(variables, on_mesh(batch)))
    return logits * (batch["text_target"] > 0)[..., None] if arch.kind == "encoder-decoder" else logits


def assert_same(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(a).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@functools.cache
def plain_logits(folder: str, quantise: str = "none") -> np.ndarray:
    """Of the model without an adapter."""
    arch = read_config(GOLDEN / folder)
    base = load_params(GOLDEN / folder, arch, quantised=quantise)
    model = replace(options(rank=0), quantise=quantise)
    return logits_of(arch, Sizes(padded(arch.vocab)), model, {"params": base})


def names(tree: Any) -> set[str]:
    return {"/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


# ------------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("folder", MODELS)
def test_a_fresh_adapter_changes_nothing(folder: str, kind: str) -> None:
    model = options(kind)
    with jax.set_mesh(one_device()):
        arch, sizes, trained, frozen = start(folder, model)
        assert_same(logits_of(arch, sizes, model, adapters.join(trained, frozen)), plain_logits(folder), 3e-6)


@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_a_fresh_dora_on_quantised_weights_changes_nothing(quantise: str) -> None:
    """Its magnitudes are those of the weights as they are after rounding."""
    model = options("dora", quantise=quantise)
    with jax.set_mesh(one_device()):
        arch, sizes, trained, frozen = start("smollm2", model)
        assert_same(
            logits_of(arch, sizes, model, adapters.join(trained, frozen)), plain_logits("smollm2", quantise), 3e-6
        )


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
        *[(folder, kind, "none") for folder in MODELS for kind in ("lora", "dora")],
        ("smollm2", "rslora", "none"),
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
    for kind, scale in (("lora", 8 / 4), ("rslora", 8 / 2)):
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
        assert_same(logits_of(arch, sizes, model, fresh, key=0), plain_logits("smollm2"), 3e-6)
        learned = adapters.join(disturbed(trained), frozen)
        run = functools.partial(logits_of, arch, sizes)
        assert_same(run(model, learned), run(options(), learned), 0.0)
        one, same, other = (run(model, learned, key=key) for key in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).max() > 0.01
        assert_same(run(options(), learned, key=1), run(options(), learned), 1e-6)


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
    [("adapter",), ("items",), ("embeddings",), ("adapter", "items"), ("adapter", "items", "embeddings"), ("all",)],
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


# ---------------------------------------------------------------------------------------------------------------- training


def train(mesh: jax.sharding.Mesh, folder: str, model: ModelConfig, steps: int) -> tuple[list[float], Any, Any, Any]:
    """Losses, and the state, the frozen variables before and after."""
    config = Config(model=model, train=TRAIN)
    with jax.set_mesh(mesh):
        features = content()
        arch, sizes, trained, frozen = start(folder, model)
        before = jax.device_get(frozen)
        state = init_state(jax.tree.map(jnp.copy, trained), config.train)  # the step takes it over
        step = make_train_step(config, arch, sizes, 1)
        batch = put_batch(word_batch(arch.vocab), 1)
        losses = []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch, features)
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state), before, jax.device_get(frozen)


@pytest.mark.parametrize("kind, quantise", [("lora", "none"), ("rslora", "int8"), ("dora", "nf4")])
def test_training_changes_the_adapter_alone(kind: str, quantise: str) -> None:
    model = options(kind, quantise=quantise, dropout=0.1)
    losses, state, before, after = train(one_device(), "smollm2", model, 4)
    assert losses[-1] < losses[0] - 0.05, losses
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # D 24, K 2, G 3, H 4, F 40, 3 layers: inputs and outputs of each projection meet in rank 4.
    ends = {
        "query": (24, 24),
        "key": (24, 8),
        "value": (24, 8),
        "output": (24, 24),
        "gate": (24, 40),
        "up": (24, 40),
        "down": (40, 24),
    }
    numbers = 3 * sum(4 * (i + o) + o * (kind == "dora") for i, o in ends.values())
    assert set(state["params"]) == {"lora"}
    assert sum(leaf.size for leaf in jax.tree.leaves(state["params"])) == numbers
    assert sum(leaf.size for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim) == 2 * numbers


@functools.cache
def trained_alone(folder: str, model: ModelConfig) -> tuple[list[float], Any]:
    losses, state, _, _ = train(one_device(), folder, model, 4)
    return losses, state["params"]


@pytest.mark.parametrize(
    "sizes, folder, kind, quantise",
    [
        ((1, 8, 1), "smollm2", "lora", "none"),
        ((2, 2, 2), "smollm2", "dora", "none"),
        ((1, 8, 1), "smollm2", "lora", "int8"),
        ((2, 2, 2), "smollm2", "lora", "int8"),
        ((1, 8, 1), "smollm2", "dora", "nf4"),
        ((2, 2, 2), "smollm2", "dora", "nf4"),
        ((2, 4, 1), "t5_v11", "lora", "int8"),
    ],
)
def test_training_is_the_same_on_every_mesh(sizes: tuple[int, int, int], folder: str, kind: str, quantise: str) -> None:
    # One target of each layout: the fewer, the shorter the compilation.
    model = options(kind, quantise=quantise, targets=("query", "key", "output", "down", "cross_value"))
    alone, params = trained_alone(folder, model)
    losses, state, _, _ = train(make_mesh(MeshConfig(*sizes)), folder, model, 4)
    np.testing.assert_allclose(alone, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, state["params"])


def bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_checkpoint_holds_what_is_trained(tmp_path: Path) -> None:
    """A wide table of words, frozen: the checkpoint is smaller than it, and restores beside it."""
    arch = replace(read_config(GOLDEN / "smollm2"), vocab=16384)
    written = {}
    with jax.set_mesh(one_device()):
        base = jax.jit(lambda key: init_variables(arch, Sizes(arch.vocab), options(rank=0), key))(jax.random.key(1))[
            "params"
        ]
        for name, model in (("adapter", options()), ("all", replace(options(rank=0), trainable=("all",)))):
            trained, _ = init_model(Config(model=model), arch, Sizes(arch.vocab), content(), 0, base)
            state = init_state(trained, TRAIN)
            checkpoints = Checkpoints(tmp_path / name)
            checkpoints.save(1, state, iter(grain.MapDataset.range(4).to_iter_dataset()), {"name": name}, None)
            checkpoints.wait()
            restored = checkpoints.restore_params(1, trained)
            checkpoints.close()
            jax.tree.map(np.testing.assert_array_equal, restored, trained)
            written[name] = bytes_on_disk(tmp_path / name / "1")
    table = base["words"].nbytes
    assert written["adapter"] < table / 4 and written["all"] > table / 2, (written, table)

"""Every known size: parameter count, names and shapes of its tensors both ways, memory. Arithmetic on shapes; no weights, no memory."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from instructrec_jax import config as configs
from instructrec_jax.cli import cli
from instructrec_jax.config import AdapterConfig, Config, MeshConfig, ModelConfig
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.configs import from_hf
from instructrec_jax.models.hf.fetch import KNOWN
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.hf.names import Entry, entries, inputs, redundant, spellings
from instructrec_jax.models.hf.sizes import SIZES, describe, find, memory_estimate, parts
from instructrec_jax.models.hf.tensors import open_folder
from instructrec_jax.models.language_model import Sizes, abstract_params, count_parameters
from instructrec_jax.models.sharding import padded
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import init_model, init_state
from tests.variants import some

GOLDEN = Path(__file__).parent / "golden"
# One of every family
USUAL = some(
    SIZES,
    "gpt2",
    "flan-t5-small",
    "smollm2-135m",
    "qwen3-0.6b",
    "llama-3.1-70b",
    "mistral-7b",
    "gemma2-2b",
    "gemma3-1b",
    "minilm-l6",
)
FOLDERS = sorted(path.name for path in GOLDEN.iterdir())


tree_of = functools.cache(lambda arch: abstract_params(arch, Sizes(arch.vocab)))


def architecture(name: str) -> Architecture:
    return from_hf(SIZES[name].config)


def entry_shapes(arch: Architecture) -> Iterator[tuple[Entry, tuple[int, ...], int, tuple[int, ...]]]:
    """Every entry with the parameter's own shape (one layer), its number of inputs and the shape of the published tensor."""
    tree = tree_of(arch)
    for entry in entries(arch):
        leaf: Any = tree
        for key in entry.path:
            leaf = leaf[key]
        shape = leaf.shape
        if entry.layers:
            assert shape[0] == entry.layers, entry
            shape = shape[1:]
        n_in = inputs(entry.path[-1])
        yield (
            entry,
            shape,
            n_in,
            entry.published_shape(shape, arch.vocab if entry.path[0].startswith("word") else 0, n_in),
        )


def published(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published folder, by the name map."""
    out: dict[str, tuple[int, ...]] = {}
    for entry, _, _, shape in entry_shapes(arch):
        for layer in range(max(entry.layers, 1)):
            name = entry.published(layer)
            assert out.setdefault(name, shape) == shape, f"{name} has two shapes"
    return out


@pytest.mark.parametrize("name", USUAL)
def test_parameter_count_is_the_published_one(name: str) -> None:
    size = SIZES[name]
    assert count_parameters(architecture(name)) + size.outside == size.parameters
    assert sum(parts(architecture(name)).values()) + size.outside == size.parameters


@pytest.mark.parametrize("name", USUAL)
def test_every_parameter_has_its_published_tensor(name: str) -> None:
    arch = architecture(name)
    wanted = {tuple(str(k.key) for k in path) for path, _ in leaves(tree_of(arch))}
    pieces: dict[str, list[tuple[int, int]]] = {}
    covered = []
    for entry in entries(arch):
        covered.append(entry.path)
        for layer in range(max(entry.layers, 1)):
            pieces.setdefault(entry.published(layer), []).append(entry.part)
    assert sorted(covered) == sorted(wanted), "each parameter once"
    for tensor, found in pieces.items():
        # One entry for a tensor, but for GPT-2's query, key and value: all thirds of it, each once.
        assert sorted(found) == [(i, found[0][1]) for i in range(found[0][1])], tensor
        assert len(found) == 1 or (arch.family == "gpt2" and ".attn.c_attn." in tensor)
    # All elements, too: what the tensors hold is what the parameters hold.
    assert sum(int(np.prod(shape)) for shape in published(arch).values()) == count_parameters(arch)


@pytest.mark.parametrize("name", SIZES)
def test_shapes_fit_both_ways(name: str) -> None:
    for entry, shape, n_in, tensor in entry_shapes(architecture(name)):
        # Zero strides: an array of any shape in the memory of one number.
        ours = entry.ours(np.broadcast_to(np.float32(0), tensor), shape, n_in)
        assert ours.shape == shape, entry
        theirs = entry.theirs(np.broadcast_to(np.float32(0), shape), 0, n_in)
        assert (*theirs.shape[:-1], theirs.shape[-1] * entry.part[1]) == tensor, entry
        assert not any(ours.strides) and not any(theirs.strides), "a copy"


@pytest.mark.parametrize("name", USUAL)
def test_memory_estimate(name: str) -> None:
    arch = architecture(name)
    memory = memory_estimate(arch)
    spread = memory_estimate(arch, mesh={"fsdp": 4})
    print(f"{name}: {memory.parameters / 1e9:.2f} GB in bfloat16, {spread.parameters / 1e9:.2f} on each of 4 devices")
    count = count_parameters(arch)
    assert 2 * count <= memory.total < 2.02 * count + 600_000  # norms in float32, at most 127 rows of padding a table
    assert memory.parameters / 4 <= spread.parameters < 1.02 * memory.parameters / 4 + 300_000
    if arch.kind != "encoder":
        assert memory.cache_per_token == 2 * arch.layers * arch.kv_heads * arch.head_size * 2


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


# ------------------------------------------------------------------------------------------------------ independent sources

# Of gemma3-4b's config.json: the part that is not read.
PICTURES = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_are_those_of_real_files(folder: str) -> None:
    """Files that transformers has written: every tensor is known, every known tensor is there, values come back."""
    arch = read_config(GOLDEN / folder)
    tensors = open_folder(GOLDEN / folder)
    names = {name: next(s for s in spellings(arch.family, name) if s in tensors) for name in published(arch)}
    for name, shape in published(arch).items():
        assert tensors[names[name]].shape == shape, name
    left = set(tensors) - set(names.values())
    assert all(redundant(arch.family, name) for name in left), left
    back: dict[str, list[np.ndarray]] = {}
    for entry, shape, n_in, _ in entry_shapes(arch):
        for layer in range(max(entry.layers, 1)):
            name = names[entry.published(layer)]
            ours = entry.ours(tensors[name].read(), shape, n_in)
            back.setdefault(name, []).append(entry.theirs(np.ascontiguousarray(ours), 0, n_in))
    for name, pieces in back.items():
        np.testing.assert_array_equal(
            np.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0], tensors[name].read()
        )


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    """The model that transformers builds from the same config.json, without memory: same tensors, same count."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    size, arch = SIZES[name], architecture(name)
    config = json.loads(json.dumps(size.config))
    if "text_config" in config:
        config["vision_config"] = PICTURES
    config = transformers.AutoConfig.for_model(**config)
    kinds = {"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM", "encoder": "AutoModel"}
    kind = "AutoModelForImageTextToText" if size.config["model_type"] == "gemma3" else kinds[arch.kind]
    with torch.device("meta"):
        model = getattr(transformers, kind).from_config(config)
        if (
            arch.family == "t5" and not arch.tied_head
        ):  # transformers gives T5 a matrix of its own only when it loads one
            model.lm_head.weight = torch.nn.Parameter(torch.empty(arch.vocab, arch.width))
    assert sum(parameter.numel() for parameter in model.parameters()) == size.parameters
    there = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    used = set()
    for tensor, shape in published(arch).items():
        key = next((s for s in spellings(arch.family, tensor) if s in there), None)
        assert key is not None, f"{tensor} is not in the model"
        assert there[key] == shape, tensor
        used.add(key)
    assert all(redundant(arch.family, key) for key in set(there) - used), sorted(set(there) - used)[:5]


@pytest.mark.parametrize(
    "name, cache",
    [("llama-3.1-70b", 327_680), ("qwen3-8b", 147_456), ("llama-3.1-8b", 131_072), ("llama-3.2-1b", 32_768)],
)
def test_cache_per_token_is_the_known_one(name: str, cache: int) -> None:
    """Keys and values in 16 bits, as capacity tables of servers print them."""
    assert memory_estimate(architecture(name)).cache_per_token == cache


def test_hub_ids_and_licences_agree_with_what_is_fetched() -> None:
    for name, known in KNOWN.items():
        assert (SIZES[name].hub, SIZES[name].licence) == (known.hub, known.licence)


# ---------------------------------------------------------------------------------------------------- memory, as it comes out


def on_first_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]


def axes(mesh: tuple[int, int, int]) -> dict[str, int]:
    return {"replica": mesh[0], "fsdp": mesh[1], "tensor": mesh[2]}


@pytest.mark.parametrize("quantised", ["none", "int8", "nf4"])
@pytest.mark.parametrize("mesh", some(MESHES, (2, 2, 2)))
def test_memory_estimate_is_what_a_loaded_model_takes(mesh: tuple[int, int, int], quantised: str) -> None:
    folder = GOLDEN / "smollm2"
    arch = read_config(folder)
    estimate = memory_estimate(arch, quantised=quantised, mesh=axes(mesh))
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])):
        params = load_params(folder, arch, "bfloat16", quantised=quantised)
        assert estimate.parameters == on_first_device(params)


@pytest.mark.parametrize("mesh, kind", [((1, 1, 1), "lora"), ((2, 2, 2), "dora")])
def test_memory_estimate_is_what_training_takes(mesh: tuple[int, int, int], kind: Any) -> None:
    folder = GOLDEN / "smollm2"
    arch = read_config(folder)
    adapter = AdapterConfig(rank=4, kind=kind)
    estimate = memory_estimate(arch, quantised="nf4", adapter=adapter, optimizer=True, mesh=axes(mesh))
    model = ModelConfig(pretrained=str(folder), adapter=adapter, quantise="nf4", trainable=("adapter",))
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])):
        base = load_params(folder, arch, "bfloat16", quantised="nf4")
        trained, frozen = init_model(
            Config(model=model), arch, Sizes(padded(arch.vocab)), jax.numpy.zeros((0, 0)), 0, base
        )
        assert estimate.adapter == estimate.gradients == on_first_device(trained)
        assert estimate.parameters == on_first_device(frozen)
        moments = [leaf for leaf in jax.tree.leaves(init_state(trained, configs.TrainConfig())["opt"]) if leaf.ndim]
        assert estimate.optimiser == on_first_device(moments)
        assert estimate.total == on_first_device([trained, trained, frozen, moments])


def test_training_all_is_in_float32() -> None:
    arch = architecture("gpt2")
    run, train = memory_estimate(arch, dtype="float32"), memory_estimate(arch, optimizer=True)
    assert train.parameters == train.gradients == run.parameters and train.optimiser == 2 * run.parameters


def test_plans_that_do_not_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_heads = 3 .* tensor = 2"):
        memory_estimate(architecture("smollm2-135m"), mesh={"tensor": 2})
    with pytest.raises(ConfigError, match="nf4 weights cannot be trained"):
        memory_estimate(architecture("gpt2"), quantised="nf4", optimizer=True)


# ------------------------------------------------------------------------------------------------------------ what is shown


def test_find() -> None:
    assert find("qwen3-0.6b") == find("Qwen/Qwen3-0.6B") == architecture("qwen3-0.6b")
    assert find(GOLDEN / "gpt2").family == "gpt2"
    with pytest.raises(UserError, match=r"did you mean 'qwen3-0.6b'"):
        find("qwen3-06b")


def test_describe_names_every_part() -> None:
    text = describe(architecture("flan-t5-small"))
    assert "8 + 8 layers, width 512, 6 heads of 64, MLP 1,024" in text and "untied head" in text
    assert "cross-attention" in text and text.endswith(f"{76_961_152:,}")
    assert "9 heads of 64 (3 for keys and values)" in describe(architecture("smollm2-135m"))


def test_show(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(cli, ["model", "show", "llama-3.1-8b", "--mesh", "1,8,1", "--quantise", "nf4", "--rank", "8"])
    assert shown.exit_code == 0, shown.output
    memory = memory_estimate(
        architecture("llama-3.1-8b"), quantised="nf4", adapter=AdapterConfig(rank=8), optimizer=True, mesh={"fsdp": 8}
    )
    for text in (
        "8,030,261,248",
        f"{memory.parameters / 1e9:.2f} GB",
        f"{memory.total / 1e9:.2f} GB",
        "Llama 3.1 Community",
    ):
        assert text in shown.output, text
    folder = runner.invoke(cli, ["model", "show", str(GOLDEN / "t5_v11")])
    assert folder.exit_code == 0 and "t5, encoder-decoder: 2 + 1 layers" in folder.output
    for bad in (["--mesh", "1,8"], ["--mesh", "1,x,1"], ["--mesh", "1,0,1"]):
        assert isinstance(runner.invoke(cli, ["model", "show", "gpt2", *bad]).exception, ConfigError)


def test_the_table_is_read_without_jax() -> None:
    script = (
        "import sys; from instructrec_jax.models.hf import sizes; assert not {'jax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ})

"""Weights out: the same values back, shards, adapters merged or kept, a full disk, and a run exported by the command."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax import config as configs
from instructrec_jax import export, prepare, run
from instructrec_jax.cli import cli
from instructrec_jax.config import AdapterConfig, MeshConfig, ModelConfig
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.models import quantise
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf import save
from instructrec_jax.models.hf.gguf import convert
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.hf.names import redundant, spellings
from instructrec_jax.models.hf.peft import adapter_config, save_adapter, target_modules
from instructrec_jax.models.hf.tensors import INDEX, SINGLE, open_folder
from instructrec_jax.models.language_model import PLAIN, LanguageModel, Sizes, apply, init_variables, plain_batch
from instructrec_jax.models.sharding import padded
from instructrec_jax.training.mesh import make_mesh
from tests import gguf_files
from tests.parity.cases import CASES
from tests.tiny import tiny_config, write_slice
from tests.variants import some

GOLDEN = Path(__file__).parent / "golden"


@contextmanager
def mesh(sizes: tuple[int, int, int] = (1, 1, 1)) -> Iterator[None]:
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])):
        yield


def values(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read()) for name, tensor in open_folder(folder).items()}


def values_of(file: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, whatever its name."""
    (tmp_path / "alone").mkdir()
    shutil.copyfile(file, tmp_path / "alone" / SINGLE)
    return values(tmp_path / "alone")


def bits(array: np.ndarray) -> bytes:
    return f"{array.dtype} {array.shape}".encode() + array.tobytes()


def write_again(folder: Path, out: Path, **how: Any) -> Architecture:
    """A published folder loaded and written to ``out``."""
    arch = read_config(folder)
    params = load_params(folder, arch)
    out.mkdir()
    save.save_params(save.merged_weights({"params": params}), arch, out, **how)
    shutil.copyfile(folder / "config.json", out / "config.json")
    return arch


# ------------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", some(CASES, "gpt2", "llama3", "qwen2", "gemma3", "t5", "t5_v11", "bert"))
def test_weights_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    """float32 as published; then bfloat16 through float32 in memory."""
    with mesh():
        arch = write_again(GOLDEN / name, tmp_path / "float32", dtype="float32")
        write_again(tmp_path / "float32", tmp_path / "half", dtype="bfloat16")
        write_again(tmp_path / "half", tmp_path / "again", dtype="bfloat16")
    source, out, half = values(GOLDEN / name), values(tmp_path / "float32"), values(tmp_path / "half")
    used = set()
    for tensor, value in out.items():
        found = next(n for n in spellings(arch.family, tensor) if n in source)
        assert bits(value) == bits(source[found]), tensor
        assert bits(half[tensor]) == bits(value.astype(ml_dtypes.bfloat16)), tensor
        used.add(found)
    assert all(redundant(arch.family, n) for n in set(source) - used) and len(half) == len(out)
    assert (tmp_path / "half" / SINGLE).read_bytes() == (tmp_path / "again" / SINGLE).read_bytes()


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", ["llama3", "gpt2", "t5"])
def test_from_eight_devices_the_same_file(name: str, tmp_path: Path) -> None:
    tensor = 1 if read_config(GOLDEN / name).kv_heads % 2 else 2
    with mesh():
        write_again(GOLDEN / name, tmp_path / "one")
    with mesh((2, 4 // tensor, tensor)):
        write_again(GOLDEN / name, tmp_path / "eight")
    assert (tmp_path / "one" / SINGLE).read_bytes() == (tmp_path / "eight" / SINGLE).read_bytes()


def test_shards_and_their_index(tmp_path: Path) -> None:
    most, lines = 9_000, []
    with mesh():
        arch = write_again(GOLDEN / "llama2", tmp_path / "out", dtype="float32", max_shard_bytes=most, say=lines.append)
        back = load_params(tmp_path / "out", arch)
        source = load_params(GOLDEN / "llama2", arch)
    jax.tree.map(np.testing.assert_array_equal, back, source)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert [line.split(":")[0].strip() for line in lines] == files
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = open_folder(tmp_path / "out")
    sizes = {name: t.dtype.itemsize * int(np.prod(t.shape)) for name, t in tensors.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values()), "total_parameters": sum(sizes.values()) // 4}
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in tensors.items()}
    for file in files:
        inside = [sizes[name] for name, where in index["weight_map"].items() if where == file]
        assert sum(inside) <= most or len(inside) == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_shards_keep_the_order_and_the_limit(sizes: list[int], most: int) -> None:
    slots = [save.Slot(str(i), (size,)) for i, size in enumerate(sizes)]
    groups = save.shards(slots, "float32", most * 4)
    assert [slot for group in groups for slot in group] == slots and all(groups)
    for group, following in zip(groups, [*groups[1:], None]):
        assert sum(slot.shape[0] for slot in group) <= most or len(group) == 1
        if following:  # nothing that would have fitted is put off
            assert sum(slot.shape[0] for slot in group) + following[0].shape[0] > most


@given(st.integers(1, 999_999), st.sampled_from(["B", "kb", "MB", "GB", " GiB", ""]))
def test_sizes_are_read(number: int, unit: str) -> None:
    factor = {"b": 1, "kb": 1000, "mb": 10**6, "gb": 10**9, "gib": 2**30, "": 1}[unit.strip().lower()]
    assert export.parse_size(f"{number}{unit}") == number * factor


@given(st.text(max_size=12))
def test_a_size_is_a_number_of_bytes_or_refused(text: str) -> None:
    try:
        assert export.parse_size(text) >= 1
    except UserError as error:
        assert "is not a size" in error.message


# ---------------------------------------------------------------------------------------------------------- what goes wrong


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write beyond ``size`` bytes of a file, as a full disk does in the middle of one."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def llama() -> Iterator[tuple[Architecture, Any]]:
    with mesh():
        arch = read_config(GOLDEN / "llama3")
        yield arch, load_params(GOLDEN / "llama3", arch)


def test_a_full_disk_names_the_tensor_and_leaves_nothing(llama: tuple[Architecture, Any], tmp_path: Path) -> None:
    arch, params = llama
    with (
        pytest.raises(UserError, match="cannot write the tensor") as caught,
        files_of_at_most(30_000),
        save.new_folder(tmp_path / "out") as folder,
    ):
        save.save_params(save.merged_weights({"params": params}), arch, folder, dtype="float32")
    slots, at = save.plan(arch), 0
    stopped = next(s for s in slots if f"{s.name} " in caught.value.message)
    for slot in slots[: slots.index(stopped)]:
        at += slot.nbytes("float32")
    assert at <= 30_000 <= at + stopped.nbytes("float32") + 8192  # what the stream holds back before it writes
    assert f"of shape {stopped.shape} ({stopped.nbytes('float32'):,} bytes as float32)" in caught.value.message
    assert "bytes are free" in caught.value.message and caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_seen_before_anything_is_written(
    llama: tuple[Architecture, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, _ = llama
    slots = save.plan(arch)
    sizes = [slot.nbytes("bfloat16") for slot in slots]
    free = sum(sizes[:5]) + 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.raises(UserError) as caught:
        save.save_params(lambda entry, layer: pytest.fail("a value was read"), arch, tmp_path)
    assert f"{slots[5]} ({sizes[5]:,} bytes as bfloat16) does not fit" in caught.value.message
    assert f"{free:,} bytes are free" in caught.value.message and f"need {sum(sizes):,}" in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (lambda v: v[:-1], "float32", r"model.norm.weight of shape \(32,\) has a value of shape \(31,\)"),
        (lambda v: v * np.nan, "bfloat16", "model.norm.weight of shape .* holds values that are not finite"),
        (lambda v: v * 1e30, "float16", "model.norm.weight .* holds values beyond float16"),
    ],
)
def test_a_wrong_value_is_named(
    change: Any, dtype: str, message: str, llama: tuple[Architecture, Any], tmp_path: Path
) -> None:
    arch, params = llama
    params["final_norm"]["scale"] = change(np.asarray(params["final_norm"]["scale"]))
    with pytest.raises(DataError, match=message), save.new_folder(tmp_path / "out") as folder:
        save.save_params(save.merged_weights({"params": params}), arch, folder, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty: may be filled
    with save.new_folder(out, about={"step": 3}) as folder:
        (folder / "config.json").write_text("first")
    assert json.loads((out / save.MANIFEST).read_text()) == {"step": 3, "files": {"config.json": 5}}
    with pytest.raises(UserError, match="is not empty"), save.new_folder(out):
        pytest.fail("it was entered")
    with pytest.raises(ZeroDivisionError), save.new_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("broken")
        _ = 1 / 0
    assert (out / "config.json").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with save.new_folder(out, overwrite=True) as folder:
        (folder / "model.safetensors").write_text("second")
    assert sorted(p.name for p in out.iterdir()) == [save.MANIFEST, "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex, which no export wrote"), save.new_folder(out, overwrite=True):
        pytest.fail("it was entered")
    with pytest.raises(UserError, match="is a file"), save.new_folder(out / "thesis.tex", overwrite=True):
        pytest.fail("it was entered")
    assert (out / "thesis.tex").is_file()


# ------------------------------------------------------------------------------------------------------------------ adapters


def with_adapter(name: str, adapter: AdapterConfig, quantised: str = "none") -> tuple[Architecture, Any]:
    """A golden with a random adapter, B and DoRA's magnitudes included, on the current mesh."""
    arch = read_config(GOLDEN / name)
    params = load_params(GOLDEN / name, arch, quantised=quantised)
    options = ModelConfig(dropout=0.0, adapter=adapter)
    shapes = jax.eval_shape(
        lambda key: init_variables(arch, Sizes(padded(arch.vocab)), options, key), jax.random.key(1)
    )
    random = np.random.default_rng(2)

    def drawn(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = random.normal(size=leaf.shape).astype(np.float32)
        value = 1 + 0.2 * noise if "magnitude" in str(path) else 0.1 * noise
        return jax.device_put(value, jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec))

    return arch, {"params": params, "lora": jax.tree_util.tree_map_with_path(drawn, shapes["lora"])}


def random_tokens(shape: tuple[int, int], vocab: int) -> jax.Array:
    return jax.numpy.asarray(np.random.default_rng(3).integers(6, vocab, shape, dtype=np.int32))


@partial(jax.jit, static_argnums=0)
def _forward(model: LanguageModel, variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return model.word_logits(apply(model, variables, batch))


def logits(arch: Architecture, variables: Any, options: ModelConfig = PLAIN) -> np.ndarray:
    batch = plain_batch(random_tokens((8, 12), arch.vocab))
    if arch.kind == "encoder-decoder":
        pairs = {f"source_{k}": v for k, v in batch.items()}
        batch = {**batch, **pairs, "tokens": jax.numpy.roll(batch["tokens"], 3, axis=1)}
    return np.asarray(_forward(LanguageModel(arch, None, options), variables, batch))


ATTENTION = AdapterConfig(rank=4, alpha=12, targets=("query", "value"))
ALL = AdapterConfig(rank=3, alpha=8)
CROSS = replace(ALL, targets=(*ALL.targets, "cross_query", "cross_key", "cross_value", "cross_output"))
MERGES = [
    ("llama3", ALL, "none"),
    pytest.param("llama3", replace(ATTENTION, kind="rslora"), "none", marks=pytest.mark.slow),
    pytest.param("llama_biases", replace(ALL, kind="dora"), "none", marks=pytest.mark.slow),
    ("gpt2", replace(ALL, kind="dora"), "none"),
    pytest.param("t5_v11", CROSS, "none", marks=pytest.mark.slow),
    pytest.param("qwen2", ALL, "int8", marks=pytest.mark.slow),
    ("llama3", replace(ALL, kind="dora"), "nf4"),
]


@pytest.mark.parametrize(("name", "adapter", "quantised"), MERGES)
def test_a_merged_model_answers_like_the_adapted_one(
    name: str, adapter: AdapterConfig, quantised: str, tmp_path: Path
) -> None:
    with mesh():
        arch, variables = with_adapter(name, adapter, quantised)
        options = ModelConfig(dropout=0.0, adapter=adapter, quantise=quantised)  # pyright: ignore[reportArgumentType]
        expected = logits(arch, variables, options)
        save.save_params(save.merged_weights(variables, adapter), arch, tmp_path, dtype="float32")
        merged = load_params(tmp_path, arch)
        plain = logits(arch, {"params": merged})
        base = logits(arch, {"params": load_params(GOLDEN / name, arch)})
    np.testing.assert_allclose(plain, expected, rtol=0, atol=2e-5)
    assert np.abs(expected - base).max() > 0.05  # the adapter matters


def test_what_has_no_adapter_is_untouched(tmp_path: Path) -> None:
    with mesh():
        arch, variables = with_adapter("llama3", ATTENTION)
        save.save_params(save.merged_weights(variables, ATTENTION), arch, tmp_path, dtype="float32")
    source, out = values(GOLDEN / "llama3"), values(tmp_path)
    changed = {name for name in out if bits(out[name]) != bits(source[name])}
    assert changed == {name for name in out if "q_proj" in name or "v_proj" in name}


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("quantised", ["none", "nf4"])
def test_merging_from_eight_devices(quantised: str, tmp_path: Path) -> None:
    adapter = replace(ALL, kind="dora")
    for place, sizes in (("one", (1, 1, 1)), ("eight", (2, 2, 2))):
        with mesh(sizes):
            arch, variables = with_adapter("llama3", adapter, quantised)
            (tmp_path / place).mkdir()
            get = save.merged_weights(variables, adapter)
            save.save_params(get, arch, tmp_path / place, dtype="float32")
    one, eight = values(tmp_path / "one"), values(tmp_path / "eight")
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_unrolled_layers_are_found(tmp_path: Path) -> None:
    with mesh():
        arch, variables = with_adapter("t5_v11", CROSS)
        unrolled: Any = {collection: {} for collection in variables}
        for collection, tree in variables.items():
            for key, node in tree.items():
                if key not in ("layers", "encoder_layers"):
                    unrolled[collection][key] = node
                    continue
                single, count = ("layer", arch.layers) if key == "layers" else ("encoder_layer", arch.encoder_layers)
                for i in range(count):
                    unrolled[collection][f"{single}_{i}"] = jax.tree.map(lambda leaf, at=i: leaf[at], node)
        for place, tree in (("stacked", variables), ("unrolled", unrolled)):
            (tmp_path / place).mkdir()
            save.save_params(save.merged_weights(tree, CROSS), arch, tmp_path / place)
    assert (tmp_path / "stacked" / SINGLE).read_bytes() == (tmp_path / "unrolled" / SINGLE).read_bytes()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_as_peft_keeps_it(kind: Any, tmp_path: Path) -> None:
    adapter = replace(ALL, kind=kind, dropout=0.1)
    with mesh():
        arch, variables = with_adapter("llama3", adapter)
        size = save_adapter(variables["lora"], arch, adapter, tmp_path, base="owner/base")
        get = save.merged_weights(variables, adapter)
        merged = {s.name: save.published_value(s, get, arch) for s in save.plan(arch)}
    held = values_of(tmp_path / "adapter_model.safetensors", tmp_path)
    assert size == sum(value.nbytes for value in held.values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 8, 0.1)
    assert (config["use_rslora"], config["use_dora"]) == (kind == "rslora", kind == "dora")
    assert config["base_model_name_or_path"] == "owner/base" and config["task_type"] == "CAUSAL_LM"
    # PEFT's own formula on these tensors gives the merged weights.
    scale = 8 / (3**0.5 if kind == "rslora" else 3)
    for name, base in values(GOLDEN / "llama3").items():
        at = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{at}.lora_A.weight" not in held:
            continue
        whole = base + scale * held.pop(f"{at}.lora_B.weight") @ held.pop(f"{at}.lora_A.weight")
        if kind == "dora":
            whole *= (held.pop(f"{at}.lora_magnitude_vector") / np.linalg.norm(whole, axis=1))[:, None]
        np.testing.assert_allclose(merged[name], whole, rtol=0, atol=1e-6)
    assert not held


def test_the_modules_that_peft_is_told() -> None:
    t5, gpt2 = read_config(GOLDEN / "t5_v11"), read_config(GOLDEN / "gpt2")
    assert target_modules(t5, AdapterConfig(rank=1, targets=("query",))) == ["SelfAttention.q"]
    assert target_modules(t5, AdapterConfig(rank=1, targets=("query", "cross_query", "up"))) == ["q", "wi_1"]
    assert adapter_config(t5, ATTENTION, "b")["task_type"] == "SEQ_2_SEQ_LM"
    mlp = AdapterConfig(rank=1, targets=("up", "down"))
    assert adapter_config(gpt2, mlp, "b")["target_modules"] == ["c_fc", "mlp.c_proj"]
    assert adapter_config(gpt2, mlp, "b")["fan_in_fan_out"] and not adapter_config(t5, ATTENTION, "b")["fan_in_fan_out"]
    with pytest.raises(UserError, match=r"query alone: a gpt2 model has it fused in .*c_attn") as caught:
        adapter_config(gpt2, ATTENTION, "b")
    assert "without --adapter" in caught.value.remedy


# ---------------------------------------------------------------------------------------------------------------------- runs


class Runs(NamedTuple):
    scratch: Path
    tuned: Path
    base: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two runs of a few steps: from scratch, and a published chat model with a DoRA adapter on NF4 weights and item tokens."""
    tmp = tmp_path_factory.mktemp("export")
    write_slice(tmp / "data")
    # Scaled so that activations stay near 1: what is compared below is then a matter of float32, not of saturated attention.
    weights = {k: v * v.shape[-1] ** -0.5 if v.ndim > 1 else 1 + v / 10 for k, v in gguf_files.random_weights().items()}
    base = convert(gguf_files.write(tmp / "base.gguf", weights), tmp / "base")
    (base / "NOTICE.txt").write_text("pass this on")
    scratch = tiny_config(tmp, steps=4)
    adapter = AdapterConfig(rank=2, kind="dora", targets=("query", "up"))
    model = replace(
        scratch.model,
        pretrained=str(base),
        adapter=adapter,
        quantise="nf4",
        trainable=("adapter", "items"),
        chat="none",
    )
    folders = []
    for config in (scratch, replace(scratch, name="tuned", model=model)):
        prepare.prepare(config, lambda line: None)
        folders.append(configs.run_dir(config))
        run.train_run(config, folders[-1], lambda line: None)
    return Runs(folders[0], folders[1], base)


def call(*words: str) -> str:
    result = CliRunner().invoke(cli, ["export", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def word_logits(arch: Architecture, params: Any, tokens: jax.Array) -> np.ndarray:
    return np.asarray(_forward(LanguageModel(arch), {"params": params}, plain_batch(tokens)))


def test_a_run_from_scratch_becomes_a_stock_llama(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    said = call(str(runs.scratch), str(out), "--to", "hf", "--dtype", "float32", "--max-shard", "50KB")
    assert f"exported: {out}" in said and "model-00001-of-" in said
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == config["torch_dtype"] == "float32"
    assert not config["tie_word_embeddings"] and (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    tokens = random_tokens((8, 16), 300)
    with run.trained(runs.scratch) as (s, variables, step):
        model, batch = LanguageModel(s.arch, s.sizes, s.config.model), plain_batch(tokens)
        both = jax.jit(lambda v, c: (model.word_logits(o := apply(model, v, batch, c)), o.item_vectors))
        expected, items = map(np.asarray, both(variables, s.content))
        items = items[: s.prepared.data.num_items]
        bias = np.asarray(variables["params"]["item_bias"])[: len(items)]
        ids = s.prepared.data.catalogue.item_ids
    manifest = json.loads((out / save.MANIFEST).read_text())
    assert manifest["step"] == step and manifest["adapter"] == "none" and manifest["base"] == ""
    assert all((out / name).stat().st_size == size for name, size in manifest["files"].items())
    with mesh():
        arch = read_config(out)
        assert not arch.input_norm and arch.family == "llama"
        np.testing.assert_allclose(word_logits(arch, load_params(out, arch), tokens), expected, rtol=0, atol=1e-5)

    held = values_of(out / export.ITEMS, tmp_path)
    np.testing.assert_array_equal(held["item_head"], items)
    np.testing.assert_array_equal(held["item_bias"], bias)
    rms = np.sqrt((items.astype(np.float64) ** 2).mean(1, keepdims=True) + arch.norm_eps)
    np.testing.assert_allclose(held["item_inputs"], items / rms * held["input_norm"], rtol=1e-5, atol=1e-6)
    names = json.loads((out / export.ITEM_NAMES).read_text())
    assert names["item_ids"] == ids and len(names["titles"]) == len(ids)
    assert "item_head" in (out / "README.md").read_text() and "input_norm" in held

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    talk = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "Heat"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<bos>a filmHeat<eos>"
    assert tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"][0] == 1

    with pytest.raises(UserError, match="is not empty"):
        call(str(runs.scratch), str(out))
    call(str(runs.scratch), str(out), "--overwrite")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16" and (out / SINGLE).is_file()
    assert not list(out.glob("model-*"))


def test_a_tuned_run_merged(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = call(str(runs.tuned), str(out), "--dtype", "float32")
    assert "nf4 weights are written as the values that they stand for" in said and "merged in float32" in said
    published, config = (json.loads((f / "config.json").read_text()) for f in (runs.base, out))
    assert config == {**published, "dtype": "float32", "torch_dtype": "float32"}
    assert (out / "NOTICE.txt").read_text() == "pass this on"
    assert json.loads((out / save.MANIFEST).read_text())["adapter"] == "dora, merged"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (runs.base / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    tokens = random_tokens((8, 16), 200)
    with run.trained(runs.tuned) as (s, variables, _):
        model, batch = LanguageModel(s.arch, s.sizes, s.config.model), plain_batch(tokens)
        forward = jax.jit(lambda v, c: model.word_logits(apply(model, v, batch, c)))
        expected = np.asarray(forward(variables, s.content))
        rounded = np.asarray(quantise.dequantise(
            jax.tree.map(np.asarray, variables["params"]["layers"]["down"]), 1, np.float32, stacked=True
        ))  # fmt: skip
    with mesh():
        arch = read_config(out)
        np.testing.assert_allclose(word_logits(arch, load_params(out, arch), tokens), expected, rtol=0, atol=2e-5)
    held, source = values(out), values(runs.base)
    for name in set(held) - {n for n in held if "proj" in n}:  # neither quantised nor adapted
        assert bits(held[name]) == bits(source[name].astype(np.float32)), name
    np.testing.assert_array_equal(held["model.layers.1.mlp.down_proj.weight"], rounded[1].T)
    assert (out / export.ITEMS).is_file() and "`input_norm" not in (out / "README.md").read_text()


def test_a_tuned_run_as_an_adapter(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = call(str(runs.tuned), str(out), "--adapter")
    assert "learned beside nf4 weights" in said and "not DoRA" in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(runs.base.resolve())
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert not (out / "config.json").exists() and not list(out.glob("model*"))
    assert (out / "tokenizer.json").is_file() and (out / export.ITEMS).is_file()
    assert "AutoPeftModelForCausalLM" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RUN", "OUT", "--adapter"), "the run has no adapter"),
        (("RUN", "OUT", "--max-shard", "5 pounds"), "is not a size"),
        (("nowhere", "OUT"), "is not a run"),
        (("RUN", "OUT", "--trian.steps", "3"), "did you mean 'train'"),
        (("RUN", "RUN", "--overwrite"), "which no export wrote"),
    ],
)
def test_mistakes_are_named(runs: Runs, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    places = {"RUN": str(runs.scratch), "OUT": str(tmp_path / "out")}
    with pytest.raises(UserError, match=message):
        call(*(places.get(word, word) for word in words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"trainable": ("adapter", "embeddings")}, "trained the base's weights .*embeddings"),
        ({"trainable": ("all",)}, "trained the base's weights .*all"),
        ({"pretrained": "", "trainable": ("all",)}, "no published base"),
        ({"adapter": AdapterConfig()}, "has no adapter"),
    ],
)
def test_an_adapter_that_is_not_the_whole_change_is_not_exported_alone(model: dict, message: str) -> None:
    fine = ModelConfig(pretrained="base", adapter=ALL, trainable=("adapter", "items"))
    export._check_adapter(fine)
    with pytest.raises(UserError, match=message):
        export._check_adapter(replace(fine, **model))


def test_a_model_of_words_and_pictures_becomes_one_of_words(tmp_path: Path) -> None:
    inner = {**json.loads((GOLDEN / "gemma3" / "config.json").read_text()), "architectures": None}
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "vision_config": {}, "quantization_config": {}}))
    arch = read_config(tmp_path)
    config = export.published_config(tmp_path, arch)
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["model_type"] == "gemma3_text"
    assert "vision_config" not in config and "quantization_config" not in config and config["tie_word_embeddings"]

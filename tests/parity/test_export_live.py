"""What is exported, in the hands of transformers and PEFT (PyTorch, fp32, on the CPU)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
import transformers

from instructrec_jax import export
from instructrec_jax.config import AdapterConfig, ModelConfig
from instructrec_jax.models.architecture import from_numbers
from instructrec_jax.models.hf import save
from instructrec_jax.models.hf.configs import to_hf
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.hf.peft import save_adapter
from instructrec_jax.models.language_model import LanguageModel, apply, init_variables, item_logits
from tests.parity import reference
from tests.parity.cases import CASES
from tests.parity.ours import LOGITS, one_device
from tests.test_export import ALL, CROSS, GOLDEN, logits, random_tokens, with_adapter
from tests.tiny import NUM_ITEMS, SIZES, content, on_mesh, random_batch


@pytest.fixture(autouse=True)
def _mesh() -> Iterator[None]:
    with jax.set_mesh(one_device()):
        yield


def write(get: save.Get, folder: Path, source: Path, **how: Any) -> Path:
    """A model folder as ``instructrec export`` writes it, but for the tokeniser."""
    arch = read_config(source)
    folder.mkdir()
    save.save_params(get, arch, folder, **how)
    config = export.published_config(source, arch)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": how["dtype"], "torch_dtype": how["dtype"]}))
    return folder


def loaded(folder: Path, dtype: Any = torch.float32) -> Any:
    """The stock model of a folder; no tensor is missing, left over or misshapen."""
    auto = reference.auto_class(json.loads((folder / "config.json").read_text()))
    model, info = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def their_logits(model: Any, kind: str, vocab: int) -> np.ndarray:
    """On the rows that ``tests.test_export.logits`` gives ours."""
    tokens = torch.from_numpy(np.array(random_tokens((8, 12), vocab))).long()
    more = {"decoder_input_ids": tokens.roll(3, 1)} if kind == "encoder-decoder" else {}
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits.float().numpy()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind != "encoder"])
def test_the_stock_classes_load_every_family(name: str, tmp_path: Path) -> None:
    """Sharded, with nothing missing or left over, and with the same parameters bit by bit as the source gives them."""
    arch = read_config(GOLDEN / name)
    get = save.merged_weights({"params": load_params(GOLDEN / name, arch)})
    full = write(get, tmp_path / "full", GOLDEN / name, dtype="float32", max_shard_bytes=20_000)
    half = write(get, tmp_path / "half", GOLDEN / name, dtype="bfloat16")
    auto = reference.auto_class(json.loads((GOLDEN / name / "config.json").read_text()))
    source = auto.from_pretrained(GOLDEN / name, dtype=torch.float32).state_dict()
    ours = loaded(full).state_dict()
    assert ours.keys() == source.keys()
    assert all(torch.equal(ours[key], value) for key, value in source.items())
    rounded = loaded(half, "auto")
    assert rounded.dtype == torch.bfloat16
    assert all(torch.equal(value, source[key].bfloat16()) for key, value in rounded.state_dict().items())


ADAPTERS = [
    ("llama3", ALL),
    ("llama3", replace(ALL, kind="rslora")),
    ("llama3", replace(ALL, kind="dora")),
    ("gpt2", replace(ALL, kind="dora", targets=("output", "up", "down"))),
    ("t5_v11", replace(CROSS, kind="rslora")),
]


@pytest.mark.parametrize(("name", "adapter"), ADAPTERS)
def test_peft_and_the_merged_model_answer_like_ours(name: str, adapter: AdapterConfig, tmp_path: Path) -> None:
    arch, variables = with_adapter(name, adapter)
    expected = logits(arch, variables, ModelConfig(dropout=0.0, adapter=adapter))
    (tmp_path / "adapter").mkdir()
    save_adapter(variables["lora"], arch, adapter, tmp_path / "adapter", base=str(GOLDEN / name))
    base = loaded(GOLDEN / name)
    plain = their_logits(base, arch.kind, arch.vocab)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    held = peft.get_peft_model_state_dict(adapted)
    from safetensors.torch import load_file

    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert held.keys() == written.keys() and all(torch.equal(held[key], value) for key, value in written.items())
    np.testing.assert_allclose(their_logits(adapted, arch.kind, arch.vocab), expected, rtol=0, atol=LOGITS)
    assert np.abs(expected - plain).max() > 0.05

    get = save.merged_weights(variables, adapter)
    merged = loaded(write(get, tmp_path / "merged", GOLDEN / name, dtype="float32"))
    np.testing.assert_allclose(their_logits(merged, arch.kind, arch.vocab), expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_scratch_is_a_stock_llama_with_items_beside_it(tied: bool, tmp_path: Path) -> None:
    """Words and items mixed in one prompt: logits of words, and item scores from the tensors beside the model."""
    options = ModelConfig(dropout=0.0, item_dropout=0.0, tied_head=tied, width=32, heads=4, kv_heads=2, head_size=8)
    arch = from_numbers(options, SIZES.vocab)
    fresh = jax.jit(lambda key, c: init_variables(arch, SIZES, options, key, c))(jax.random.key(0), content())
    random = np.random.default_rng(4)
    params = jax.tree.map(lambda v: v + 0.1 * random.normal(size=v.shape).astype(np.float32), fresh["params"])
    variables = {"params": params}
    batch = on_mesh(random_batch(4, 12))
    batch["feature"] = batch["feature"] * 0
    model = LanguageModel(arch, SIZES, options)

    def both(v: Any, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = apply(model, v, batch, c)
        return model.word_logits(out), item_logits(out.hidden, out, NUM_ITEMS)[..., :NUM_ITEMS]

    words, items = map(np.asarray, jax.jit(both)(variables, content()))
    stock, get = export.without_input_norm(arch, save.merged_weights(variables), params)
    save.save_params(get, stock, tmp_path, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(stock)))
    prepared = SimpleNamespace(data=SimpleNamespace(num_items=NUM_ITEMS), users=SimpleNamespace(names=[]))
    session: Any = SimpleNamespace(
        arch=arch, sizes=SIZES, config=SimpleNamespace(model=options), content=content(), prepared=prepared
    )
    beside = export.item_tensors(session, variables)

    theirs = loaded(tmp_path)
    with torch.no_grad():
        embedded = theirs.get_input_embeddings()(torch.from_numpy(np.array(batch["tokens"])).long())
        item = np.asarray(batch["item"])
        embedded[torch.from_numpy(item > 0)] = torch.from_numpy(beside["item_inputs"][item[item > 0] - 1])
        out = theirs(inputs_embeds=embedded, output_hidden_states=True)
    np.testing.assert_allclose(out.logits.numpy(), words, rtol=0, atol=LOGITS)
    scores = out.hidden_states[-1].numpy() @ beside["item_head"].T + beside["item_bias"]
    np.testing.assert_allclose(scores, items, rtol=0, atol=LOGITS)


def test_the_tokeniser_and_its_template_go_along(tmp_path: Path) -> None:
    """A stock folder of both: what it was asked is read with the template, and an answer is generated."""
    from instructrec_jax.models.hf.gguf import convert
    from tests import gguf_files

    base = convert(gguf_files.write(tmp_path / "base.gguf"), tmp_path / "base")
    arch = read_config(base)
    get = save.merged_weights({"params": load_params(base, arch)})
    out = write(get, tmp_path / "out", base, dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, out / name)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(out), loaded(out, "auto")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the 19"}], return_tensors="pt", return_dict=True
    )
    said = model.generate(**asked, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert said.shape[1] == asked["input_ids"].shape[1] + 3

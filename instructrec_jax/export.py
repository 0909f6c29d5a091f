"""A trained run as a folder that transformers, vLLM or PEFT load unchanged: the command ``instructrec export``.

What has no place in a stock language model, the item tokens and the matching head, stands beside it, so that nothing is lost.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructrec_jax import __version__
from instructrec_jax import config as configs
from instructrec_jax.config import ModelConfig
from instructrec_jax.data.tokenizer import FILES as TOKENIZER_FILES
from instructrec_jax.errors import UserError
from instructrec_jax.files import path_of, write_json

if TYPE_CHECKING:
    from instructrec_jax.models.architecture import Architecture
    from instructrec_jax.models.hf.save import Get
    from instructrec_jax.run import Session

Say = Callable[[str], None]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "bert": "BertModel",
}
ITEMS, ITEM_NAMES = "instructrec_items.safetensors", "instructrec_items.json"
# Of a published model's folder, what goes with its weights: tokenisers in older formats, and what its licence wants passed on.
_BESIDE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt",
           "generation_config.json", "LICEN[CS]E*", "NOTICE*", "TERMS*", "USE_POLICY*")  # fmt: skip
# A model from scratch reads <bos>, the prompt, and answers until <eos>.
_CHAT = """{{ bos_token }}{% for message in messages %}{{ message['content'] }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1.5GiB" or a plain number.

    Raises:
        UserError: it is none of these, or less than a byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    unit = match and match[2].upper()
    if not match or unit not in _UNITS or (size := round(float(match[1]) * _UNITS[unit])) < 1:
        raise UserError(f"{text!r} is not a size", remedy="like 5GB, 500MB or 2GiB")
    return size


def export_hf(
    run_dir: str | Path,
    out: str | Path,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    max_shard: str = "5GB",
    overwrite: bool = False,
    overrides: tuple[str, ...] = (),
    say: Say = lambda line: None,
) -> Path:
    """Write the best step of a run in Hugging Face's layout; the folder's path.

    Args:
        run_dir: the run.
        out: the new folder. It is complete or absent.
        adapter: write the adapter alone, for PEFT; else it is merged.
        dtype: of the tensors: "bfloat16" (default of a whole model), "float16" or "float32" (default of an adapter).
        max_shard: size of a file, like "5GB".
        overwrite: replace an earlier export.
        overrides: dotted settings, like ``("--mesh.fsdp", "1")``.
        say: takes lines for the user.

    Raises:
        UserError: not a run, nothing to export that way, ``out`` is in use, or the disk is full.
    """
    from instructrec_jax.models.hf.save import check_replaceable, new_folder
    from instructrec_jax.run import trained

    most = parse_size(max_shard)
    place = check_replaceable(out, overwrite)
    if (path_of(run_dir) / "config.yaml").is_file() and adapter:
        _check_adapter(configs.load(path_of(run_dir) / "config.yaml", overrides).model)
    dtype = dtype or ("float32" if adapter else "bfloat16")
    with trained(run_dir, overrides) as (s, variables, step):
        _check_one_process()
        about = {
            "instructrec_jax": __version__,
            "name": s.config.name,
            "step": step,
            "base": _base(s),
            "adapter": _adapter_kind(s.config.model, kept=adapter),
            "dtype": dtype,
        }
        say(f"step {step} of {run_dir}, as {dtype}")
        with new_folder(place, overwrite=overwrite, about=about) as folder:
            _save_tokenizer(s, folder)
            if adapter:
                _save_adapter(s, variables, folder, dtype, say)
            else:
                _save_model(s, variables, folder, dtype, most, say)
            if s.sizes.items:
                _save_items(s, variables, folder, say)
            (folder / "README.md").write_text(_readme(s, about), encoding="utf-8")
    return place


def _check_one_process() -> None:
    import jax

    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes cannot export together",
            remedy="run it once, on one machine (a CPU will do)",
        )


def _check_adapter(model: ModelConfig) -> None:
    if not model.adapter.rank:
        raise UserError("the run has no adapter", remedy="export without --adapter")
    why = "" if model.pretrained else "it has no published base"
    for group in ("all", "embeddings"):
        if group in model.trainable and model.pretrained:
            why = f"the run also trained the base's weights (model.trainable: {group})"
    if why:
        raise UserError(f"the adapter alone is not this model: {why}", remedy="export without --adapter")


def _adapter_kind(model: ModelConfig, *, kept: bool) -> str:
    return f"{model.adapter.kind}, {'kept' if kept else 'merged'}" if model.adapter.rank else "none"


def _base(s: Session) -> str:
    """Hub id or absolute folder of the published model, "" without one."""
    from instructrec_jax.models.hf import hub
    from instructrec_jax.models.hf.fetch import KNOWN

    if s.model_folder is None:
        return ""
    name = s.config.model.pretrained
    at_hub = name not in KNOWN and not Path(name).expanduser().exists() and hub.is_hub_id(name)
    return name if at_hub else str(s.model_folder.resolve())


# -------------------------------------------------------------------------------------------------------------- the parts


def _save_model(s: Session, variables: Any, folder: Path, dtype: str, most: int, say: Say) -> None:
    from instructrec_jax.models.hf.configs import to_hf
    from instructrec_jax.models.hf.save import merged_weights, save_params

    options, arch = s.config.model, s.arch
    _check_complete(arch, variables["params"])
    if options.quantise != "none":
        say(f"  the {options.quantise} weights are written as the values that they stand for, rounded to {dtype}")
    if options.adapter.rank:
        say(f"  the {options.adapter.kind} adapter (rank {options.adapter.rank}) is merged in float32 and cast once")
    get = merged_weights(variables, options.adapter)
    if s.model_folder is None:
        arch, get = without_input_norm(arch, get, variables["params"])
        text = s.prepared.text
        ids = {"bos_token_id": text.bos, "eos_token_id": text.eos, "pad_token_id": 0}
        config = {**to_hf(arch), **ids}
        write_json(folder / "generation_config.json", ids)
    else:
        config = published_config(s.model_folder, arch)
    save_params(get, arch, folder, dtype=dtype, max_shard_bytes=most, say=say)
    # Last of the model: without it nothing loads.
    write_json(folder / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})


def _check_complete(arch: Architecture, params: Any) -> None:
    """Every parameter has a place in the export."""
    from instructrec_jax.models.adapters import ITEM_PARAMS
    from instructrec_jax.models.hf.names import entries

    known = {e.path[0] for e in entries(arch)} | {*ITEM_PARAMS, "input_norm"}
    lost = [name for name in params if name not in known and not re.fullmatch(r"(encoder_)?layer_\d+", name)]
    if lost:
        raise UserError(f"a stock {arch.family} model has no place for the parameter {lost[0]}")


def published_config(folder: Path, arch: Architecture) -> dict[str, Any]:
    """The ``config.json`` of a published model, as one of the stock class for text."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "text_config" in config and config.get("model_type") != arch.family:
        # Words and pictures: only the language model inside is here.
        config = {"tie_word_embeddings": arch.tied_head, **config["text_config"], "model_type": arch.family}
    config.pop("quantization_config", None)
    return {**config, "architectures": [ARCHITECTURES[arch.family]]}


def without_input_norm(arch: Architecture, get: Get, params: Any) -> tuple[Architecture, Get]:
    """The same model of words without a norm on the embeddings, which no published Llama has.

    A word enters the first layer as the norm of its row, which depends on nothing else: the normed rows become the word table, and
    the rows as they are become a head of its own.
    """

    def folded(entry: Any, layer: int) -> np.ndarray:
        if entry.path == ("words",):
            return normed(arch, params, get(entry, layer))
        if entry.path == ("word_head",) and arch.tied_head:
            return get(replace(entry, path=("words",)), layer)
        return get(entry, layer)

    return replace(arch, input_norm=False, tied_head=False), folded


def normed(arch: Architecture, params: Any, rows: np.ndarray) -> np.ndarray:
    """Embeddings [..., D] after the model's input norm, float32; as they are if it has none."""
    import jax

    from instructrec_jax.models.hf.save import one_device
    from instructrec_jax.models.parts import norm

    rows = np.asarray(rows, np.float32)
    if not arch.input_norm:
        return rows
    own = jax.tree.map(np.asarray, params["input_norm"])
    with one_device():
        return np.asarray(norm(arch.norm, arch.norm_eps, "input_norm").apply({"params": own}, jax.numpy.asarray(rows)))


def _save_adapter(s: Session, variables: Any, folder: Path, dtype: str, say: Say) -> None:
    from instructrec_jax.models.hf.peft import save_adapter

    options = s.config.model
    size = save_adapter(variables["lora"], s.arch, options.adapter, folder, base=_base(s), dtype=dtype)
    say(f"  adapter ({options.adapter.kind}, rank {options.adapter.rank}): {size / 1e6:.1f} MB, beside {_base(s)}")
    if options.quantise != "none":
        say(f"  it learned beside {options.quantise} weights; beside the unrounded ones the answers differ a little")
    if options.adapter.kind == "dora":
        say("  vLLM serves LoRA and rsLoRA adapters, not DoRA: export without --adapter for it")


def _save_tokenizer(s: Session, folder: Path) -> None:
    own = s.prepared.folder / "tokenizer"
    for name in TOKENIZER_FILES:
        if (own / name).is_file():
            shutil.copyfile(own / name, folder / name)
    if s.model_folder is None:
        (folder / "chat_template.jinja").write_text(_CHAT, encoding="utf-8")
        return
    for pattern in _BESIDE:
        for path in s.model_folder.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def item_tensors(s: Session, variables: Any) -> dict[str, np.ndarray]:
    """What the model knows of items and user features, float32; see the README that ``export_hf`` writes."""
    import jax

    from instructrec_jax.models.language_model import LanguageModel, apply, plain_batch

    model, params = LanguageModel(s.arch, s.sizes, s.config.model), variables["params"]
    rows = jax.sharding.get_mesh().size
    batch = plain_batch(jax.numpy.zeros((rows, 8), np.int32))
    # Jitted, only what the vectors need is computed.
    vectors = np.asarray(jax.jit(lambda v, c: apply(model, v, batch, c).item_vectors)(variables, s.content))
    vectors = vectors[: s.prepared.data.num_items]
    out = {
        "item_inputs": normed(s.arch, params, vectors),
        "item_head": vectors * np.float32(s.arch.head_scale),
        "item_bias": np.asarray(params["item_bias"], np.float32)[: len(vectors)],
        "unknown_item_input": normed(s.arch, params, np.asarray(params["unknown_item"])),
    }
    if names := s.prepared.users.names:
        out |= {k: np.asarray(params[k], np.float32)[: len(names)] for k in ("feature_table", "feature_offset")}
    if s.arch.input_norm:
        out["input_norm"] = np.asarray(params["input_norm"]["scale"], np.float32)
    return out


def _save_items(s: Session, variables: Any, folder: Path, say: Say) -> None:
    from instructrec_jax.models.hf.save import Slot, write_safetensors

    tensors = item_tensors(s, variables)
    write_safetensors(
        folder / ITEMS, [Slot(k, v.shape) for k, v in tensors.items()], lambda slot: tensors[slot.name], "float32"
    )
    catalogue = s.prepared.data.catalogue
    names = {"item_ids": catalogue.item_ids, "titles": catalogue.titles, "features": s.prepared.users.names}
    write_json(folder / ITEM_NAMES, names)
    say(f"  {ITEMS}: vectors, biases and names of {len(catalogue):,} items, which a stock model has no place for")


def _readme(s: Session, about: dict[str, Any]) -> str:
    kept = about["adapter"].endswith("kept")
    seq2seq = s.arch.kind == "encoder-decoder"
    auto = f"AutoModelFor{'Seq2Seq' if seq2seq else 'Causal'}LM"
    load = f'model = {auto}.from_pretrained("."{"" if kept else ", dtype=" + repr("auto")})'
    if kept:
        load = (
            f'model = AutoPeft{auto.removeprefix("Auto")}.from_pretrained(".")  # of peft; loads {about["base"]} first'
        )
    lines = [
        f"# {about['name']}\n",
        f"Step {about['step']} of a run of instructrec_jax {about['instructrec_jax']}"
        + (f", tuned from {about['base']}" if about["base"] else ", trained from scratch")
        + f". Adapter: {about['adapter']}. Tensors: {about['dtype']}.\n",
        "```python",
        load,
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```\n",
    ]
    if s.sizes.items:
        lines += [_ITEMS_README.format(items=ITEMS, names=ITEM_NAMES, width=s.arch.width)]
        if names := s.prepared.users.names:
            lines += [_FEATURES_README.format(names=ITEM_NAMES)]
        if names and s.arch.input_norm:
            lines += [f"That is, after the RMS norm (eps {s.arch.norm_eps:g}) with the scale `input_norm [D]`.\n"]
    return "\n".join(lines)


_ITEMS_README = """## Items

`{items}` (float32) holds what a stock language model has no place for; row i is item i of `{names}`. D = {width}.

- `item_inputs [I, D]`: what stands in the text where item i does: in `inputs_embeds`, in place of a word's embedding.
- `unknown_item_input [D]`: the same of an item that is not in the catalogue.
- `item_head [I, D]`, `item_bias [I]`: the score of item i is g · item_head[i] + item_bias[i], with g the last hidden state (after
  the final norm) of the prompt's last token.
"""

_FEATURES_README = """A user feature with the value v (row j of `features` in `{names}`) stands in the text as
`v * feature_table[j] + feature_offset[j]`.
"""

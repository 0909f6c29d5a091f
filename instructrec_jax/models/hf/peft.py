"""An adapter out, as PEFT keeps it: ``adapter_config.json`` and ``adapter_model.safetensors``, to load onto the published model.

A is [in..., R] and B [R, out...] here, with heads apart; ``lora_A.weight`` [R, in] and ``lora_B.weight`` [out, R] there. DoRA's
magnitudes are ``lora_magnitude_vector`` [out].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from instructrec_jax.config import AdapterConfig
from instructrec_jax.errors import UserError
from instructrec_jax.files import write_json
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.names import Entry, entries
from instructrec_jax.models.hf.save import Slot, check_room, of_layer, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FRONT = "base_model.model."


def adapter_config(arch: Architecture, adapter: AdapterConfig, base: str) -> dict[str, Any]:
    """PEFT's ``LoraConfig`` of an adapter.

    Args:
        arch: of the model.
        adapter: its settings.
        base: folder or hub id of the model that it stands beside.

    Raises:
        UserError: a target is a part of a fused tensor, which PEFT cannot adapt alone.
    """
    alpha = adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if arch.kind == "encoder-decoder" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": target_modules(arch, adapter),
        "use_rslora": adapter.kind == "rslora",
        "use_dora": adapter.kind == "dora",
        "fan_in_fan_out": any(e.kind == "conv1d" for e in targeted(arch, adapter)),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def targeted(arch: Architecture, adapter: AdapterConfig) -> list[Entry]:
    """The weights that have an adapter.

    Raises:
        UserError: as ``adapter_config``.
    """
    found = [e for e in _linear(arch) if e.path[-1] in adapter.targets]
    for entry in found:
        if entry.part[1] > 1:
            raise UserError(
                f"PEFT cannot hold an adapter of {entry.path[-1]} alone: a {arch.family} model has it fused in {entry.name}",
                remedy="merge the adapter: export without --adapter",
            )
    return found


def target_modules(arch: Architecture, adapter: AdapterConfig) -> list[str]:
    """The shortest ends of module names that fit the adapted modules and no others, like ``q_proj``.

    Raises:
        UserError: as ``adapter_config``.
    """
    adapted = {_module(e) for e in targeted(arch, adapter)}
    others = {_module(e) for e in _linear(arch)} - adapted
    ends = set()
    for module in adapted:
        words = module.split(".")
        tails = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        ends.add(next(t for t in tails if not any(f".{other}".endswith(f".{t}") for other in others)))
    return sorted(ends)


def save_adapter(
    lora: Any, arch: Architecture, adapter: AdapterConfig, folder: Path, *, base: str, dtype: str = "float32"
) -> int:
    """Write an adapter into a folder (see ``save.new_folder``); the bytes of its tensors. Call inside ``jax.set_mesh``.

    Args:
        lora: the collection "lora", layers stacked or unrolled.
        arch: of the model.
        adapter: its settings.
        folder: that exists.
        base: folder or hub id of the model that it stands beside.
        dtype: of the tensors.

    Raises:
        UserError: a target that PEFT cannot adapt, or a failed write, with tensor, shape and bytes.
    """
    config = adapter_config(arch, adapter, base)
    values: dict[str, np.ndarray] = {}
    for entry in targeted(arch, adapter):
        name = entry.path[-1]
        for layer in range(entry.layers):
            parts = of_layer(lora, entry.path[:-1], entry.layers, layer, f"{name}_")
            at = _FRONT + entry.published(layer).removesuffix(".weight")
            values[f"{at}.lora_A.weight"] = parts[f"{name}_a"].reshape(-1, adapter.rank).T
            values[f"{at}.lora_B.weight"] = parts[f"{name}_b"].reshape(adapter.rank, -1).T
            if adapter.kind == "dora":
                values[f"{at}.lora_magnitude_vector"] = parts[f"{name}_magnitude"].reshape(-1)
    slots = [Slot(name, value.shape) for name, value in values.items()]
    total = check_room(folder, slots, dtype)
    write_safetensors(folder / WEIGHTS, slots, lambda slot: values[slot.name], dtype)
    write_json(folder / CONFIG, config)
    return total


def _linear(arch: Architecture) -> list[Entry]:
    return [e for e in entries(arch) if e.layers and e.kind in ("linear", "conv1d")]


def _module(entry: Entry) -> str:
    return entry.name.removesuffix(".weight")

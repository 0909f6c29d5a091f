"""What transformers (PyTorch, fp32, eager attention, on the CPU) says about a small random model.

Imported only where PyTorch is installed: by ``tools/goldens.py``, which stores the answers, and by ``test_live.py``.

    with tempfile.TemporaryDirectory() as folder:
        model = write_model(config, Path(folder), seed=0)
        logits = decoder_logits(model, tokens, mask)      # [B, S, V], zero where mask is 0

Letters: B batch, S sequence, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# The family's classes, as the parity tests use them.
_AUTO = {
    "t5": transformers.AutoModelForSeq2SeqLM,
    "mt5": transformers.AutoModelForSeq2SeqLM,
    "bert": transformers.AutoModel,
}
# Families whose RMS norms multiply by 1 + weight.
_OFFSET_NORMS = ("gemma2", "gemma3_text")


def auto_class(config: dict) -> type:
    """The transformers class that runs a ``config.json``: causal language model unless the family says otherwise."""
    return _AUTO.get(config["model_type"], transformers.AutoModelForCausalLM)


def _config(config: dict):
    # A copy: transformers writes defaults into the mappings that it is given.
    return transformers.AutoConfig.for_model(**copy.deepcopy(config))


def random_value(name: str, shape: tuple[int, ...], config: dict, seed: int) -> np.ndarray:
    """A value for one tensor, fp32, that depends on its name and the seed alone.

    Scales keep activations, attention scores and logits near 1, so that an absolute tolerance means something. Norms lie
    around their neutral value and biases away from zero: a norm or a bias that is dropped shows.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = rng.standard_normal(shape)
    family = config["model_type"]
    if re.search(r"(norm|ln_\w|layer_norm|LayerNorm)[^.]*\.weight$", name):
        value = (-0.3 if family in _OFFSET_NORMS else 1.1) + 0.2 * noise
    elif name.endswith("bias") or len(shape) == 1:
        value = 0.3 * noise
    elif "relative_attention_bias" in name:
        value = noise
    elif re.search(r"(embed|wte|wpe|shared)", name):
        value = (1.0 if "t5" in family else 0.2) * noise
    else:
        # gpt2 stores [in, out], everyone else [out, in].
        fan_in = shape[0] if family == "gpt2" and "lm_head" not in name else shape[1]
        value = noise / np.sqrt(fan_in)
        if not re.search(r"(\.q|\.k|q_proj|k_proj|query|key|c_attn)\.weight$", name):
            value *= 0.7
        if "t5" in family and re.search(r"Attention\.q\.", name):  # T5 does not divide its scores by sqrt(d_kv)
            value /= np.sqrt(config["d_kv"])
    return value.astype(np.float32)


def write_model(
    config: dict,
    folder: Path,
    seed: int = 0,
    untied_head: bool = False,
    rename: Callable[[str], str] = lambda name: name,
    extra: dict[str, np.ndarray] | None = None,
):
    """Write a random model as a published folder (``config.json``, ``model.safetensors``) and load it back.

    Args:
        config: the content of ``config.json``, written as it is.
        folder: where to write; made if missing.
        seed: of the weights.
        untied_head: give an output matrix of its own to a family that transformers always builds tied (T5 1.1, mT5).
        rename: from the name of a tensor in transformers to its name in the file.
        extra: tensors that published files hold and nobody reads.

    Returns the model that transformers loads from the folder: fp32, eager attention, no dropout.
    """
    cls = auto_class(config)
    model = cls.from_config(_config(config), attn_implementation="eager")
    if untied_head:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    # named_parameters names a shared tensor once, which is what a published file does.
    values = {name: random_value(name, tuple(p.shape), config, seed) for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {rename(name): torch.from_numpy(value) for name, value in values.items()}
    tensors |= {name: torch.from_numpy(value) for name, value in (extra or {}).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder)
    for name, p in loaded.named_parameters():
        if not np.array_equal(p.detach().numpy(), values[name]):
            raise AssertionError(f"{folder}: transformers did not read {name} from the file")
    return loaded


def load_model(folder: Path, **overrides: object):
    """The model of a folder in transformers: fp32, eager attention, no dropout; ``overrides`` change its config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = _config(config | overrides)
    cls = auto_class({"model_type": config.model_type})
    model = cls.from_pretrained(folder, config=config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def saved_config(model) -> dict:
    """The config as this version of transformers writes it, which names and nests RoPE settings in a newer way."""
    return json.loads(model.config.to_json_string(use_diff=True))


def _tensor(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(np.asarray(array, np.int64))


def _masked(values: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    return (values.detach().numpy() * mask[..., None]).astype(np.float32)


def decoder_logits(
    model, tokens: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None
) -> np.ndarray:
    """Logits ``[B, S, V]`` of a causal model, zero where ``mask`` is 0.

    A mask always goes along: without one transformers takes a jump in ``positions`` for the begin of a packed sequence.
    """
    mask = np.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        out = model(
            _tensor(tokens), attention_mask=_tensor(mask), position_ids=_tensor(positions), use_cache=False
        )  # fmt: skip
    return _masked(out.logits, mask)


def cached_logits(model, tokens: np.ndarray, prefix: int) -> np.ndarray:
    """Logits ``[B, S - prefix, V]`` of the tokens after ``prefix``, one at a time through the key-value cache."""
    with torch.no_grad():
        cache = model(_tensor(tokens[:, :prefix]), use_cache=True).past_key_values
        steps = []
        for at in range(prefix, tokens.shape[1]):
            out = model(_tensor(tokens[:, at : at + 1]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    return torch.cat(steps, 1).numpy()


def seq2seq_logits(model, source: np.ndarray, source_mask: np.ndarray, target: np.ndarray, target_mask: np.ndarray):
    """Logits ``[B, T, V]`` of an encoder-decoder at the decoder's input tokens ``target``, zero where its mask is 0."""
    with torch.no_grad():
        out = model(
            input_ids=_tensor(source),
            attention_mask=_tensor(source_mask),
            decoder_input_ids=_tensor(target),
            decoder_attention_mask=_tensor(target_mask),
            use_cache=False,
        )
    return _masked(out.logits, target_mask)


def encode(model, tokens: np.ndarray, mask: np.ndarray, token_types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states ``[B, S, D]`` of a BERT (zero where ``mask`` is 0) and their normalised means ``[B, D]``."""
    with torch.no_grad():
        hidden, pooled = _encode(model, tokens, mask, token_types)
    return _masked(hidden, mask), pooled.numpy()


def _encode(model, tokens: np.ndarray, mask: np.ndarray, token_types: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(_tensor(tokens), attention_mask=_tensor(mask), token_type_ids=_tensor(token_types))
    hidden = out.last_hidden_state
    weight = torch.from_numpy(mask[..., None].astype(np.float32))
    # As sentence-transformers do: Pooling (mean over the mask), then Normalize.
    return hidden, torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def _mean_cross_entropy(logits: torch.Tensor, targets: np.ndarray, weight: np.ndarray) -> torch.Tensor:
    """Mean over the places where ``weight`` is 1."""
    wanted = torch.from_numpy(targets.astype(np.int64)).flatten()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
    chosen = torch.from_numpy(weight.astype(np.float32)).flatten()
    return (losses * chosen).sum() / chosen.sum()


def _gradients(model, loss: torch.Tensor) -> tuple[float, dict[str, np.ndarray]]:
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def mean_loss(model, tokens: np.ndarray) -> float:
    """Mean cross-entropy of tokens ``[1, S]`` after the first, in nats."""
    with torch.no_grad():
        logits = model(_tensor(tokens), use_cache=False).logits
        return float(_mean_cross_entropy(logits[:, :-1], tokens[:, 1:], np.ones_like(tokens[:, 1:])))


def decoder_gradients(model, tokens: np.ndarray, mask: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Mean cross-entropy of every real token that follows a real token, and its gradient by parameter name."""
    logits = model(_tensor(tokens), attention_mask=_tensor(mask), use_cache=False).logits
    return _gradients(model, _mean_cross_entropy(logits[:, :-1], tokens[:, 1:], mask[:, 1:] * mask[:, :-1]))


def seq2seq_gradients(
    model, source: np.ndarray, source_mask: np.ndarray, target: np.ndarray, target_mask: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """As ``decoder_gradients``, of the decoder's tokens."""
    logits = model(
        input_ids=_tensor(source),
        attention_mask=_tensor(source_mask),
        decoder_input_ids=_tensor(target),
        decoder_attention_mask=_tensor(target_mask),
        use_cache=False,
    ).logits
    weight = target_mask[:, 1:] * target_mask[:, :-1]
    return _gradients(model, _mean_cross_entropy(logits[:, :-1], target[:, 1:], weight))


def encoder_gradients(
    model, tokens: np.ndarray, mask: np.ndarray, token_types: np.ndarray, direction: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Mean over rows of the embedding's dot product with ``direction [B, D]``, and its gradient by parameter name."""
    _, pooled = _encode(model, tokens, mask, token_types)
    return _gradients(model, (pooled * torch.from_numpy(direction)).sum(-1).mean())

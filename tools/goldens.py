"""Write ``tests/golden/``: what transformers computes for the small random models of ``tests/parity/cases.py``.

    python -m tools.goldens             # all cases
    python -m tools.goldens gemma2 t5   # only these

Needs PyTorch (see CONTRIBUTING.md, Parity with PyTorch). Every case becomes a folder:

    config.json          as published
    config_saved.json    the same config as the installed transformers would save it
    model.safetensors    fp32
    io.npz               inputs and outputs, see ``decoder_io``, ``seq2seq_io`` and ``encoder_io``

Weights and inputs are seeded; the same versions write the same bytes. A case in which a setting that should matter does
not is an error: its golden would prove nothing about that setting.

Letters: B batch, S sequence, V vocabulary, D width.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np

from tests.parity import inputs
from tests.parity.cases import CASES, LONG, VOCAB, Case

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
# A changed setting must move some output by at least this; the tests' bar on a logit is 1e-5.
VISIBLE = 2e-4

# Gradients that are stored: embeddings, the first layer's query and small tensors, the last layer's way out of the MLP,
# the output matrix and everything one-dimensional outside the layers (the last norm).
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|block|layer)\.(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|wte|wpe|shared|\w+_embeddings|lm_head|relative_attention_bias)\.weight$")
_QUERY = re.compile(r"(q_proj|c_attn|SelfAttention\.q|EncDecAttention\.q|self\.query)\.weight$")
_DOWN = re.compile(r"(down_proj|mlp\.c_proj|DenseReluDense\.wo|\d\.output\.dense)\.weight$")


def stored(name: str, shape: tuple[int, ...], layers: int) -> bool:
    """Whether the golden holds the gradient of this parameter."""
    match = _LAYER.search(name)
    if match is None:
        return len(shape) == 1 or bool(_EMBEDDING.search(name))
    layer = int(match[1])
    if layer == 0 and (len(shape) == 1 or _QUERY.search(name) or _EMBEDDING.search(name)):
        return True
    return layer == layers - 1 and bool(_DOWN.search(name))


def _with_gradients(io: dict[str, np.ndarray], loss: float, grads: dict[str, np.ndarray], layers: int) -> dict:
    kept = {f"grad:{name}": g for name, g in grads.items() if stored(name, g.shape, layers)}
    return io | {"loss": np.asarray(loss, np.float32)} | kept


def decoder_io(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs and logits of a causal model; logits are zero at padding.

    ``right_*``: tokens ``[B, S]`` padded on the right, ``lengths [B]``. ``left_*``: the same sequences padded on the left
    with the positions of ``generate()``. ``packed_*``: sequences in one row, each computed alone. ``long_*``: one long
    sequence, logits at the places ``long_at``. ``far_*``: positions up to the end of the context, with gaps unless a
    window counts tokens. ``cache_*``: row 0 continued after ``cache_prefix`` tokens. ``loss`` and ``grad:NAME``: mean
    cross-entropy of ``right_*`` and its gradients.
    """
    from tests.parity import reference

    lengths = [11, 4, 8]
    mask = inputs.right_mask(lengths, 11)
    tokens = inputs.random_tokens(rng, VOCAB, 3, 11)
    io = {"right_tokens": tokens, "lengths": np.asarray(lengths, np.int32)}
    io["right_logits"] = reference.decoder_logits(model, tokens, mask)

    left_mask = inputs.to_left(mask, lengths)
    io |= {"left_tokens": inputs.to_left(tokens, lengths), "left_mask": left_mask}
    io["left_positions"] = inputs.generate_positions(left_mask)
    io["left_logits"] = reference.decoder_logits(model, io["left_tokens"], left_mask, io["left_positions"])

    segments, positions = inputs.pack([7, 3, 9], 21)
    packed = inputs.random_tokens(rng, VOCAB, 1, 21)
    logits = np.zeros((1, 21, VOCAB), np.float32)
    for number in range(1, segments.max() + 1):
        logits[:, segments[0] == number] = reference.decoder_logits(model, packed[:, segments[0] == number])
    io |= {"packed_tokens": packed, "packed_segments": segments, "packed_positions": positions, "packed_logits": logits}

    context = model.config.max_position_embeddings
    long = min(LONG, context)
    at = np.linspace(3, long - 1, 12).astype(np.int32)
    io |= {"long_tokens": inputs.random_tokens(rng, VOCAB, 1, long), "long_at": at}
    io["long_logits"] = reference.decoder_logits(model, io["long_tokens"])[0, at]

    windowed = getattr(model.config, "sliding_window", None) is not None
    far = np.arange(context - 12, context) if windowed else np.sort(rng.choice(context, 12, replace=False))
    far = np.append(far[:-1], context - 1).astype(np.int32)[None]
    io |= {"far_tokens": inputs.random_tokens(rng, VOCAB, 1, 12), "far_positions": far}
    io["far_logits"] = reference.decoder_logits(model, io["far_tokens"], None, far)

    prefix = 6
    io |= {
        "cache_prefix": np.asarray(prefix, np.int32),
        "cache_logits": reference.cached_logits(model, tokens[:1], prefix),
    }
    return _with_gradients(io, *reference.decoder_gradients(model, tokens, mask), model.config.num_hidden_layers)


def seq2seq_io(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs and logits of an encoder-decoder; logits are zero at padding.

    ``source [B, S]`` and ``target [B, T]`` (beginning with the start token) are padded on the right to ``source_lengths`` and
    ``target_lengths``. ``packed_*``: pairs in one row, each computed alone; one segment number on both sides is one pair.
    ``loss`` and ``grad:NAME``: mean cross-entropy of the target's tokens and its gradients.
    """
    from tests.parity import reference

    def target_tokens(*shape: int) -> np.ndarray:
        tokens = inputs.random_tokens(rng, VOCAB, *shape)
        tokens[:, 0] = model.config.decoder_start_token_id
        return tokens

    source_lengths, target_lengths = [40, 9, 23], [9, 26, 14]
    source_mask, target_mask = inputs.right_mask(source_lengths, 40), inputs.right_mask(target_lengths, 26)
    batch = (inputs.random_tokens(rng, VOCAB, 3, 40), source_mask, target_tokens(3, 26), target_mask)
    io = {"source": batch[0], "target": batch[2], "logits": reference.seq2seq_logits(model, *batch)}
    io |= {
        "source_lengths": np.asarray(source_lengths, np.int32),
        "target_lengths": np.asarray(target_lengths, np.int32),
    }

    source_segments, _ = inputs.pack([8, 5, 11], 27)
    target_segments, _ = inputs.pack([4, 7, 3], 16)
    source, target = inputs.random_tokens(rng, VOCAB, 1, 27), inputs.random_tokens(rng, VOCAB, 1, 16)
    logits = np.zeros((1, 16, VOCAB), np.float32)
    for number in range(1, 4):
        s, t = source_segments[0] == number, target_segments[0] == number
        target[:, np.argmax(t)] = model.config.decoder_start_token_id
        pair = (source[:, s], target[:, t])
        logits[:, t] = reference.seq2seq_logits(model, pair[0], np.ones_like(pair[0]), pair[1], np.ones_like(pair[1]))
    io |= {
        "packed_source": source,
        "packed_source_segments": source_segments,
    }
    io |= {
        "packed_target": target,
        "packed_target_segments": target_segments,
    }
    io["packed_logits"] = logits
    layers = model.config.num_layers
    loss, grads = reference.seq2seq_gradients(model, *batch)
    kept = {n: g for n, g in grads.items() if stored(n, g.shape, layers)}
    kept |= {
        n: g
        for n, g in grads.items()
        if n.startswith("decoder") and stored(n, g.shape, model.config.num_decoder_layers)
    }
    return io | {"loss": np.asarray(loss, np.float32)} | {f"grad:{n}": g for n, g in kept.items()}


def encoder_io(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs, hidden states and text embeddings of a BERT; hidden states are zero at padding.

    ``tokens``, ``token_types [B, S]``, padded on the right to ``lengths``; ``hidden [B, S, D]``; ``embedding [B, D]``: mean of
    the hidden states over real tokens, normalised. ``packed_*``: sequences in one row, each computed alone. ``loss`` and
    ``grad:NAME``: mean over rows of ``embedding`` times ``direction [B, D]``, and its gradients.
    """
    from tests.parity import reference

    lengths = [20, 6, 13]
    mask = inputs.right_mask(lengths, 20)
    tokens = inputs.random_tokens(rng, VOCAB, 3, 20)
    types = rng.integers(0, 2, tokens.shape, dtype=np.int32)
    io = {"tokens": tokens, "token_types": types, "lengths": np.asarray(lengths, np.int32)}
    io["hidden"], io["embedding"] = reference.encode(model, tokens, mask, types)

    segments, positions = inputs.pack([7, 4, 12], 25)
    packed = inputs.random_tokens(rng, VOCAB, 1, 25)
    packed_types = rng.integers(0, 2, packed.shape, dtype=np.int32)
    hidden = np.zeros((1, 25, model.config.hidden_size), np.float32)
    for number in range(1, 4):
        s = segments[0] == number
        hidden[:, s] = reference.encode(model, packed[:, s], np.ones_like(packed[:, s]), packed_types[:, s])[0]
    io |= {"packed_tokens": packed, "packed_token_types": packed_types, "packed_segments": segments}
    io |= {"packed_positions": positions, "packed_hidden": hidden}

    io["direction"] = rng.standard_normal(io["embedding"].shape, dtype=np.float32) * np.sqrt(io["embedding"].shape[1])
    io["direction"] = io["direction"].astype(np.float32)
    grads = reference.encoder_gradients(model, tokens, mask, types, io["direction"])
    return _with_gradients(io, *grads, model.config.num_hidden_layers)


IO = {"decoder": decoder_io, "encoder-decoder": seq2seq_io, "encoder": encoder_io}


def _outputs(case: Case, model, seed: int) -> dict[str, np.ndarray]:
    return IO[case.kind](model, np.random.default_rng(seed))


def write(name: str, case: Case) -> None:
    """Write one golden folder, replacing the old one, once every setting of ``case.matters`` has been seen to matter."""
    from tests.parity import reference

    seed = zlib.crc32(name.encode())
    folder = GOLDEN / f".{name}.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    model = reference.write_model(case.config, folder, seed, case.untied_head, case.rename, case.extra)
    saved = json.dumps(reference.saved_config(model), indent=1, sort_keys=True)
    (folder / "config_saved.json").write_text(saved + "\n", encoding="utf-8")
    io = _outputs(case, model, seed)
    np.savez_compressed(folder / "io.npz", allow_pickle=False, **io)

    outputs = [key for key in io if key.endswith(("logits", "hidden", "embedding"))]
    for change in case.matters:
        other = _outputs(case, reference.load_model(folder, **change), seed)
        moved = max(float(np.abs(io[key] - other[key]).max()) for key in outputs)
        if moved < VISIBLE:
            raise AssertionError(
                f"{name}: {change} moves the outputs by {moved:.1e} only; make the case more sensitive"
            )

    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    folder.rename(GOLDEN / name)
    largest = max(float(np.abs(io[key]).max()) for key in outputs)
    size = sum(f.stat().st_size for f in (GOLDEN / name).iterdir())
    gradients = sum(key.startswith("grad:") for key in io)
    print(
        f"{name:16} {size / 1000:6.0f} kB  largest output {largest:.1f}  loss {io['loss']:.2f}  {gradients} gradients"
    )


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"no such case: {', '.join(unknown)}; cases: {', '.join(CASES)}")
    for name in names or CASES:
        write(name, CASES[name])


if __name__ == "__main__":
    main(sys.argv[1:])

"""Texts as vectors by a published encoder (BERT, MiniLM): item features that know what words mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from instructrec_jax.errors import ConfigError
from instructrec_jax.models.hf.load import load_params, read_config
from instructrec_jax.models.language_model import LanguageModel, apply, pooled
from instructrec_jax.models.rows import plain_batch
from instructrec_jax.scoring.buckets import bucket, groups_by_length


def encode_texts(
    folder: str | Path,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = 256,
    advance: Callable[[int], None] = lambda _: None,
) -> Float[np.ndarray, "N D"]:
    """The mean of each text's last hidden states, scaled to length 1. Call inside ``jax.set_mesh``.

    Args:
        folder: of a published encoder.
        texts: any number; those of more than ``max_length`` tokens lose their end.
        batch_size: most texts in one device batch.
        max_length: tokens, special ones included; at most the encoder's own number of positions.
        advance: told the number of texts done, for a progress bar.

    Raises:
        ConfigError: the folder holds no encoder. DataError: see ``load_params``.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    arch = read_config(folder)
    if arch.kind != "encoder":
        raise ConfigError(f"{folder} is a {arch.kind}, not an encoder", remedy="use an encoder such as minilm-l6")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(max_length, arch.max_positions))
    ids = [e.ids for e in tokenizer.encode_batch(list(texts))]
    params = load_params(folder, arch)
    model = LanguageModel(arch)
    mesh = jax.sharding.get_mesh()
    shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    rows = -(-batch_size // shards) * shards

    @jax.jit
    def embed(params: dict, batch: dict[str, jax.Array]) -> jax.Array:
        return pooled(apply(model, {"params": params}, batch).hidden, batch["segment_ids"] > 0)

    out = np.zeros((len(texts), arch.width), np.float32)
    for group in groups_by_length([len(i) for i in ids], rows):
        length = bucket(max(len(ids[i]) for i in group), 16)
        tokens, real = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
        for row, i in enumerate(group):
            tokens[row, : len(ids[i])] = ids[i]
            real[row, : len(ids[i])] = 1
        out[group] = np.asarray(embed(params, plain_batch(tokens, real)))[: len(group)]
        advance(len(group))
    return out

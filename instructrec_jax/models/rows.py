"""Rows of tokens as a model takes them: plain text, and training rows as an encoder-decoder splits them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from instructrec_jax.models.sharding import RULES

Batch = dict[str, jax.Array]


def plain_batch(
    tokens: Int[Array, "B S"] | Int[np.ndarray, "B S"], segment_ids: Any = None, positions: Any = None, **more: Any
) -> Batch:
    """Rows of words alone, on the current mesh; without ``segment_ids`` each row is one text, without ``positions`` from 0 on.

    Rows that do not divide over the mesh are on every device.
    """
    shape = tokens.shape
    segment_ids = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape) if positions is None else positions
    mesh = jax.sharding.get_mesh()
    divides = shape[0] % (mesh.shape["replica"] * mesh.shape["fsdp"]) == 0
    rows = jax.NamedSharding(mesh, RULES.ids_bs if divides else jax.P(None, None))
    parts = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, **more}
    return {k: jax.device_put(jnp.asarray(v, jnp.int32), rows) for k, v in parts.items()}


def start_row(batch: Batch, start: int) -> Batch:
    """The decoder's first input alone, for every row: ``[B, 1]``."""
    one = jnp.zeros_like(batch["tokens"][:, :1])
    return {"tokens": one + start, "segment_ids": one + 1, "positions": one}


def split_rows(batch: Batch, start: int) -> tuple[Batch, Batch]:
    """Training rows as an encoder-decoder sees them: the prompts that the encoder reads, and the answers that the decoder reads.

    Both keep the rows' layout ``[B, S]``, so that targets and segments stay where they are. The decoder is at work where something
    is predicted: at a prompt's last position (its input there is the start token) and at the answer's positions.
    """
    predicts = (batch["text_target"] > 0) | (batch["item_target"] > 0)
    before = jnp.pad(predicts[:, :-1], ((0, 0), (1, 0)))
    first = predicts & ~(before & (batch["positions"] > 0))
    # The number of predictions so far in the row, less that at the segment's first: the position inside the answer.
    count = jnp.cumsum(predicts.astype(jnp.int32), axis=1)
    base = jax.lax.cummax(jnp.where(first, count, 0), axis=1)
    answer = {
        "tokens": jnp.where(first, start, batch["tokens"]),
        "segment_ids": jnp.where(predicts, batch["segment_ids"], 0),
        "positions": jnp.where(predicts, count - base, 0),
    }
    prompt = {**batch, "segment_ids": jnp.where(predicts & ~first, 0, batch["segment_ids"])}
    return prompt, answer

"""Item tokens of a published model that begin where its words are: an item's vector is the mean of its title's word vectors.

A soft token then means something to the layers before anything was learnt, and with tied word tables the matching head begins as a likeness
of words (LLaRA and CoLLM project vectors of another recommender into the same place; here no other model is needed).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from instructrec_jax.config import ModelConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models.adapters import Tree
from instructrec_jax.models.sharding import fetch, put


def title_vectors(
    words: Float[np.ndarray, "V D"], titles: Sequence[Int[np.ndarray, " n"]], rows: int
) -> Float[np.ndarray, "I D"]:
    """Mean word vector of every title, float32, scaled to the mean length of a word's vector (a mean of many words is shorter).

    Args:
        words: the word table.
        titles: token ids of each item's title; a title without tokens gets the mean of all words.
        rows: I of the item table; those behind the titles stay zero.
    """
    words = np.asarray(words, np.float32)
    length, everything = float(np.linalg.norm(words, axis=1).mean()), words.mean(0)
    out = np.zeros((rows, words.shape[1]), np.float32)
    for item, ids in enumerate(titles):
        mean = words[np.asarray(ids)].mean(0) if len(ids) else everything
        out[item] = mean * (length / max(float(np.linalg.norm(mean)), 1e-12))
    return out


def begin_at_titles(params: Tree, words: Float[Array, "V D"], titles: Sequence[Int[np.ndarray, " n"]]) -> None:
    """Put the title vectors in the place of the fresh item table ``params["item_id"]``, with its sharding."""
    table = params["item_id"]
    params["item_id"] = put(title_vectors(fetch(words), titles, table.shape[0]), table.sharding)


def check_item_start(config: ModelConfig) -> None:
    """Refuse a start from titles where there are no words to start from, or no learned part to put it in.

    Raises:
        ConfigError: naming the setting and a remedy.
    """
    if config.item_start == "titles" and not (config.pretrained and config.uses_items and config.item_id_embedding):
        raise ConfigError(
            "model.item_start = titles begins item tokens at the word vectors of a published model",
            remedy="set model.pretrained, items among model.trainable, and model.item_id_embedding; or model.item_start: random",
        )

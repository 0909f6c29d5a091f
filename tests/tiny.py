"""A small real data set (a slice of the embedded one) and a small model, for tests that walk the whole way."""

from __future__ import annotations

import csv
from pathlib import Path

import jax
import numpy as np

from instructrec_jax import config as configs
from instructrec_jax.config import Config
from instructrec_jax.data import sources
from instructrec_jax.models import architecture
from instructrec_jax.models.language_model import LanguageModel, Sizes
from instructrec_jax.models.sharding import RULES


def write_slice(folder: Path, users: int = 40) -> Path:
    """The first users of ml-latest-small, with the items that they touched, as CSV files.

    Tests that keep to this number of users share what the compiler makes: a catalogue of another size is another program.
    """
    raw = sources.read(configs.DataConfig(), "ml")
    folder.mkdir(parents=True, exist_ok=True)
    kept = set(sorted(set(raw.interactions["user_id"].to_pylist()), key=int)[:users])
    seen = set()
    with (folder / "interactions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "rating", "timestamp"])
        for row in raw.interactions.to_pylist():
            if row["user_id"] in kept:
                writer.writerow([row["user_id"], row["item_id"], row["rating"], row["timestamp"]])
                seen.add(row["item_id"])
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "title", "genres"])
        for row in raw.items.to_pylist():
            if row["item_id"] in seen:
                writer.writerow([row["item_id"], row["title"], "|".join(row["genres"])])
    return folder


def tiny_config(tmp: Path, **train: object) -> Config:
    """A config over the slice in ``tmp/data``, prepared and run under ``tmp``."""
    return configs.from_dict(
        {
            "name": "tiny",
            "prepared": str(tmp / "prepared"),
            "runs": str(tmp / "runs"),
            "data": {"source": "tables", "path": str(tmp / "data")},
            "instructions": {"history_items": 16, "short_history_items": 8},
            "model": {
                "width": 32, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp_width": 32, "vocab_size": 512, "content_features": 16,
            },
            "train": {
                "steps": 8, "batch_size": 16, "sequence_length": 64, "warmup_steps": 2, "eval_every": 4, "checkpoint_every": 2,
                "log_every": 2, **train,
            },
            "evaluate": {"bootstrap": 200, "likelihood_users": 8},
        }
    )  # fmt: skip


SIZES = Sizes(vocab=256, items=128, features=64, content=12)
NUM_ITEMS = 100


def random_batch(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch with every kind of token and target; host arrays."""
    r = np.random.default_rng(seed)
    some = r.random((rows, length))
    batch = {
        "tokens": r.integers(6, 200, (rows, length)),
        "item": np.where(some < 0.4, r.integers(1, NUM_ITEMS + 1, (rows, length)), 0),
        "feature": np.where(some > 0.95, r.integers(1, 50, (rows, length)), 0),
        "feature_value": r.normal(size=(rows, length)),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "segment_ids": np.ones((rows, length), int),
        "text_target": np.where(r.random((rows, length)) < 0.1, r.integers(6, 200, (rows, length)), 0),
        "item_target": np.where(r.random((rows, length)) < 0.3, r.integers(1, NUM_ITEMS + 1, (rows, length)), 0),
        "task": r.integers(1, 6, (rows, length)),
    }
    return {k: v.astype(np.float32 if k == "feature_value" else np.int32) for k, v in batch.items()}


def on_mesh(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays ``[B, S]`` on the current mesh."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), RULES.ids_bs)
    return {k: jax.device_put(v, sharding) for k, v in batch.items()}


def content(seed: int = 1) -> jax.Array:
    """Random item features on the current mesh."""
    values = np.random.default_rng(seed).normal(size=(SIZES.items, SIZES.content)).astype(np.float32)
    return jax.device_put(values, jax.NamedSharding(jax.sharding.get_mesh(), RULES.table_used))


def model_of(config: configs.ModelConfig, sizes: Sizes = SIZES, train: bool = False) -> LanguageModel:
    """The from-scratch model of a config."""
    return LanguageModel(architecture.from_numbers(config, sizes.vocab), sizes, config, train)

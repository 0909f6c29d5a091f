"""A preset sized from the data: what ``instructrec evaluate --auto DIR`` runs on a folder that it has never seen."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instructrec_jax import config as configs
from instructrec_jax import prepare, run
from instructrec_jax.config import (
    CleanConfig,
    Config,
    DataConfig,
    InstructionConfig,
    ItemMemoryConfig,
    ModelConfig,
    TrainConfig,
    WishWordsConfig,
)
from instructrec_jax.data import sources
from instructrec_jax.data.cleaning import codes, core_mask
from instructrec_jax.data.schema import RawData
from instructrec_jax.errors import DataError

COMPUTE = 5e13  # floating-point operations of training: about a quarter of an hour on two cores
LOGITS = 1e7  # item logits at one time: 40 MB. Where they leave a CPU's caches a step takes up to six times as long
MEMORY_ITEMS = 17_000  # largest catalogue that gets an item memory
CORE_KEEPS = 0.8  # the 5-core is taken where it keeps this share of the interactions


def auto_config(folder: Path) -> Config:
    """A config for a folder with interactions and items (CSV, gzipped CSV or Parquet), from their sizes alone.

    * 5-core if it keeps most of the data, else every user with three events and every item;
    * repeats are kept as events where they are common (more than 2 % of the pairs), else the last one counts;
    * history and row length from the histories; width, dropout, batch and steps from the number of interactions and items.

    Raises:
        DataError: the folder cannot be read; the message says what is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("no such folder", file=folder, remedy="give a folder with interactions.csv.gz and items.csv.gz")
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name) or "auto"
    data = DataConfig(source="tables", path=str(folder.resolve()))
    raw = sources.read(dataclasses.replace(data, clean=CleanConfig(unknown_item="title-less")), name)
    user, _ = codes(raw.interactions["user_id"])
    item, _ = codes(raw.interactions["item_id"])

    core, _ = core_mask(user, item, 5, 5)
    use_core = bool(core.mean() >= CORE_KEEPS)
    pairs = len(np.unique(user.astype(np.int64) * (int(item.max()) + 1) + item))
    repeats = 1 - pairs / len(user)
    clean = CleanConfig(
        k_core=5 if use_core else 0, duplicates="keep" if repeats > 0.02 else "last", unknown_item="title-less"
    )
    kept_user = user[core] if use_core else user
    events, items = len(kept_user), len(np.unique(item[core] if use_core else item))
    lengths = np.bincount(kept_user)
    lengths = lengths[lengths > 0]

    # Histories: long enough for three quarters of the users, at most 64 items in a prompt.
    history = int(np.clip(16 * np.ceil(np.quantile(lengths, 0.75) / 16), 16, 64))
    large = events >= 300_000
    width = 64
    # A large log learns more from as many tokens in small steps: docs/results.md, MovieLens 1M
    tokens = 2048 if large else 4096
    length = 128 if history > 32 else 64
    rows = tokens // length
    # About 100 passes over a small log; a large one converges in fewer. Half of the tokens of a batch predict an item.
    targets = 0.5 * tokens
    passes = float(np.clip(100 * (100_000 / events) ** 0.5, 8, 150))
    # 3 matrix products per weight in a step, and the item logits once more for the recomputed backward pass.
    flops = 8 * width * items * targets + 6 * tokens * 2 * (4 * width * width + 6 * width * width)
    steps = 50 * int(np.clip(min(passes * events / targets, COMPUTE / flops) / 50, 16, 240 if large else 60))
    return Config(
        name=f"auto-{name}",
        data=dataclasses.replace(data, clean=clean, domain=_domain(raw)),
        instructions=InstructionConfig(history_items=history),
        model=ModelConfig(
            width=width,
            heads=width // 32,
            kv_heads=width // 32,
            mlp_width=2 * width,
            dropout=0.2 if large else 0.3,
            cooccurrence_features=64,
            # Its time grows with the cube of the catalogue: a minute or two for so many items.
            item_memory=ItemMemoryConfig(past=20 if items <= MEMORY_ITEMS else 0),
            wish_words=WishWordsConfig(enabled=True),
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=rows,
            sequence_length=length,
            logits_chunk=2 ** int(np.clip(np.log2(LOGITS / (rows * items)), 0, 4)),
            label_smoothing=0.1,
            learning_rate=1e-3 if large else 2e-3 if items < 10_000 else 1.5e-3,
            ema=0.999 if large else 0.0,
            eval_every=max(100, steps // 8 // 50 * 50),
            checkpoint_every=max(100, steps // 8 // 50 * 50),
        ),
    )


def auto_run(folder: Path, overrides: Sequence[str], say: run.Say) -> Path:
    """Prepare and train (or resume) the automatic preset of a folder; returns the run folder."""
    config = auto_config(folder)
    if overrides:
        tree = configs.to_dict(config)
        config = configs.from_dict(configs.with_overrides(tree, overrides), where="--auto")
    try:
        prepare.load(config)
    except DataError:
        say(f"preparing {config.data.path}")
        prepare.prepare(config, say)
    run_dir = configs.run_dir(config)
    say(
        f"training {run_dir}: {config.train.steps} steps, width {config.model.width}, histories of {config.instructions.history_items}"
    )
    run.train_run(config, run_dir, say)
    return run_dir


def _domain(raw: RawData) -> str:
    """Words of the prompts: films for titles that end in a year beside genres, products where there is a brand, else neutral."""
    names = raw.items.column_names
    titles = raw.items["title"].slice(0, 500).to_pylist()
    years = sum(bool(re.search(r"\((18|19|20)\d\d\)\s*$", t or "")) for t in titles)
    if "genres" in names and years > len(titles) / 2:
        return "films"
    return "products" if "brand" in names else "generic"

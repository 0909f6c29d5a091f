"""Tuned baselines on disk, beside the prepared data that they belong to.

prepared/NAME-baselines/BASELINE/
    trials.json          every setting tried so far; a killed search goes on behind them
    trial_N.npz          parameters of the best trial, learnt from training events alone (if the baseline is worth keeping)
    model.npz            parameters of the final fit, on training and validation events (likewise)
    PROTOCOL_ranks.npz   user, end, target, greater and ties of every test case: what paired tests need
    lists.csv.gz         top lists, a recommendation file
    result.json          settings, trials, figures, times, versions; written last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructrec_jax import retrieval
from instructrec_jax.config import Config
from instructrec_jax.data.store import MANIFEST
from instructrec_jax.files import read_arrays, read_json, sha256
from instructrec_jax.prepare import Prepared
from instructrec_jax.retrieval.base import Budget, Recommender, Stored
from instructrec_jax.retrieval.content import text_part

BY_GRADIENTS = ("gmf", "mlp", "neumf", "gru4rec", "sasrec")
SEEDED = ("ials", "bpr")
AGAIN = "run `instructrec baseline NAME CONFIG` again"


def folder_of(config: Config) -> Path:
    """Where the baselines of a config's prepared data are."""
    return config.prepared_dir.with_name(f"{config.name}-baselines")


def data_key(prepared: Prepared) -> str:
    """SHA-256 of the manifest of the split data, which has a sum of every table: other instructions leave it as it is."""
    return sha256(prepared.folder / "data" / MANIFEST)


def build(
    name: str,
    options: Mapping[str, Any],
    config: Config,
    prepared: Prepared,
    *,
    epochs: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Recommender:
    """A recommender with its options and with what it takes from the config and the prepared data.

    ``epochs``: of a fit by gradients that need not be validated; ``say`` takes its lines of progress.
    """
    tuning, given = config.baseline, dict(options)
    if name in BY_GRADIENTS:
        given["budget"] = Budget(tuning.epochs, tuning.patience, tuning.valid_users, tuning.seed, say)
        given["epochs"] = epochs
    elif name in SEEDED:
        given["seed"] = tuning.seed
    elif name == "content":
        given["vectors"] = text_part(prepared.item_features, config.model.cooccurrence_features)
    return retrieval.make(name, **given)


@dataclass(frozen=True)
class Saved:
    """A tuned baseline of some prepared data."""

    name: str
    folder: Path
    result: dict[str, Any]

    def recommender(self, config: Config, prepared: Prepared, *, include_valid: bool) -> Recommender:
        """The fitted recommender: from its file, or fitted again with the tuned settings where there is none.

        Raises:
            DataError: the file is damaged.
        """
        recommender = build(self.name, self.result["options"], config, prepared, epochs=self.result["epochs"])
        file = self.folder / ("model.npz" if include_valid else f"trial_{self.result['trial']}.npz")
        if isinstance(recommender, Stored) and file.is_file():
            return recommender.restore(read_arrays(file, AGAIN, expected=self.result["files"].get(file.name)))
        return recommender.fit(prepared.data, include_valid=include_valid)


def saved(config: Config, prepared: Prepared) -> dict[str, Saved]:
    """The tuned baselines that belong to these data, by name. Those of other data are left out."""
    key, out = data_key(prepared), {}
    for file in sorted(folder_of(config).glob("*/result.json")):
        result = read_json(file, AGAIN)
        if result.get("data_key") == key:
            out[file.parent.name] = Saved(file.parent.name, file.parent, result)
    return out

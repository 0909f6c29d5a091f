"""Training once more on training and validation events together, for the steps that validation has chosen.

A validation event is the newest that is known of a user before the test event. The classic recommenders of ``evaluate`` learn from
it; a model that only uses it to choose its best step gives it away. Nothing is chosen on the test split: the number of steps is the
first run's best, in proportion to the events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from instructrec_jax import config as configs
from instructrec_jax import fit_words, prepare
from instructrec_jax.config import Config, ItemMemoryConfig, WishWordsConfig
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.files import path_of, read_json
from instructrec_jax.fit_memory import CHOSEN
from instructrec_jax.fit_new_items import load_lift
from instructrec_jax.training import hosts


def refit_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config that trains a finished run again, with its validation events among the training events.

    Raises:
        UserError: the folder is not a run, the run has not come to its end, it is itself a refit, or a mixture.
    """
    run_dir = path_of(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run: it has no config.yaml", remedy="give the folder of a finished run")
    config = configs.load(run_dir / "config.yaml", overrides)
    if config.mixture:
        raise UserError(
            f"{run_dir} is a mixture, whose splits are those of its sets",
            remedy="set data.split.learn_valid: true in the sets' configs, and train.steps to the best step",
        )
    if config.data.split.learn_valid:
        raise UserError(f"{run_dir} has learnt from the validation events already")
    end = (
        read_json(run_dir / "finished.json", "train it to its end first")
        if (run_dir / "finished.json").is_file()
        else {}
    )
    if end.get("step") != config.train.steps or not end.get("best_step"):
        raise UserError(
            f"{run_dir} is at step {end.get('step', 0)} of {config.train.steps}", remedy="train it to its end first"
        )
    events = prepare.load(config).manifest["statistics"]["events"]
    steps = round(end["best_step"] * (1 + events["valid"] / max(events["train"], 1)))
    return dataclasses.replace(
        config,
        name=f"{config.name}-refit",
        data=dataclasses.replace(config.data, split=dataclasses.replace(config.data.split, learn_valid=True)),
        model=dataclasses.replace(
            config.model,
            item_memory=_memory(config, run_dir),
            wish_words=_words(config, run_dir),
            new_item_lift=load_lift(config, run_dir) or config.model.new_item_lift,
        ),
        train=dataclasses.replace(config.train, steps=steps),
    )


def _memory(config: Config, run_dir: Path) -> ItemMemoryConfig:
    """The first run's item memory, with what validation chose."""
    settings = config.model.item_memory
    if not settings.past:
        return settings
    chosen = read_json(run_dir / CHOSEN, "run the same `instructrec train` again")
    return dataclasses.replace(
        settings, l2=chosen["l2"], weights=tuple(chosen["weights"]), prior_weight=chosen["prior_weight"]
    )


def _words(config: Config, run_dir: Path) -> WishWordsConfig:
    """What the first run's validation chose for the words of a wish."""
    settings = config.model.wish_words
    if not settings.enabled:
        return settings
    chosen = read_json(run_dir / fit_words.CHOSEN, "run the same `instructrec train` again")
    return dataclasses.replace(settings, weights=tuple(chosen["weights"]))


def prepared_for(config: Config, say: prepare.Say, progress: prepare.Progress | None = None) -> None:
    """Prepare a config's data unless that is done."""
    try:
        prepare.load(config)
    except DataError:
        hosts.alone("prepare the data of a refit")
        say(f"preparing {config.prepared_dir}")
        prepare.prepare(config, say, progress)

"""A refit: the steps that validation chose, on training and validation events; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.config import ItemMemoryConfig
from instructrec_jax.data.schema import TEST, VALID
from instructrec_jax.errors import UserError
from instructrec_jax.fit_memory import load_memory
from instructrec_jax.refit import prepared_for, refit_config
from instructrec_jax.run import train_run, trained
from instructrec_jax.scoring.scorer import added
from tests.tiny import tiny_config, write_slice


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    tmp = tmp_path_factory.mktemp("refit")
    write_slice(tmp / "data")
    config = tiny_config(tmp)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, item_memory=ItemMemoryConfig(past=5, links=20))
    )
    prepare.prepare(config, print)
    folder = configs.run_dir(config)
    train_run(config, folder, print)
    return folder


def test_a_refit_takes_the_best_step_and_learns_from_the_validation_events(first: Path) -> None:
    best = json.loads((first / "finished.json").read_text())["best_step"]
    config = refit_config(first)
    before = prepare.load(configs.load(first / "config.yaml"))
    events = before.manifest["statistics"]["events"]
    assert config.train.steps == round(best * (1 + events["valid"] / events["train"]))

    prepared_for(config, print)
    after = prepare.load(config)
    assert not (after.data.split == VALID).any()
    assert (after.data.split == TEST).sum() == (before.data.split == TEST).sum()
    learnt = {i for e in (before, after) for i in [int(e.data.train_popularity.sum())]}
    assert len(learnt) == 2 and max(learnt) - min(learnt) == events["valid"]

    folder = configs.run_dir(config)
    assert folder.parent == first.parent and folder.name.startswith("tiny-refit-")
    finished = train_run(config, folder, print)
    assert finished.step == config.train.steps and not finished.best  # nothing to validate on
    chosen = json.loads((first / "item_memory.json").read_text())
    again = json.loads((folder / "item_memory.json").read_text())
    assert (chosen["l2"], chosen["weights"], again["tried"]) == (again["l2"], again["weights"], [])
    with trained(folder) as (s, params, step):
        assert step == config.train.steps
        cases = s.prepared.data.cases(TEST)
        prompts = s.sequential_prompts(cases)
        memory = load_memory(config, folder, "all", s.prepared.data.num_items)
        bare = s.scorer(params, memory="none").score_all(prompts)
        np.testing.assert_allclose(
            s.scorer(params).score_all(prompts), added(bare, [memory.scores(prompts)]), atol=1e-5
        )
    with pytest.raises(UserError, match="learnt from the validation events already"):
        refit_config(folder)


def test_the_weight_is_the_best_that_was_tried_and_validation_events_join_at_the_end(first: Path) -> None:
    chosen = json.loads((first / "item_memory.json").read_text())
    tried = [t for t in chosen["tried"] if t["what"] == "history"]
    best = max(tried, key=lambda t: t["ndcg"])
    assert (best["l2"], best["weight"]) == (chosen["l2"], chosen["weights"][0])
    assert {t["l2"] for t in tried} == {30, 100, 300, 1000}
    config = configs.load(first / "config.yaml")
    items = prepare.load(config).data.num_items
    known, learnt = (load_memory(config, first, which, items) for which in ("all", "train"))
    assert (known.links != learnt.links).nnz and (np.diff(known.links.indptr) == 20).all()


def test_a_run_that_is_not_at_its_end_is_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        refit_config(tmp_path)
    (tmp_path / "config.yaml").write_text((first / "config.yaml").read_text())
    with pytest.raises(UserError, match="at step 0 of 8"):
        refit_config(tmp_path)

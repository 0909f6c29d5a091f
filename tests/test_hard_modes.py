"""The hard cases of a small run: what each table ranks, and what it shows the systems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import fit_new_items, prepare
from instructrec_jax.cases import rank, sample_cases
from instructrec_jax.data.schema import TEST
from instructrec_jax.evaluate import fit_baselines
from instructrec_jax.files import read_json
from instructrec_jax.fit_new_items import CHOSEN, SHARE
from instructrec_jax.hard_modes import HardModes, hard_modes
from instructrec_jax.run import train_run, trained
from tests.tiny import tiny_config, write_slice


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a split with new items."""
    tmp = tmp_path_factory.mktemp("hard")
    write_slice(tmp / "data")
    tree = configs.to_dict(tiny_config(tmp, steps=4, eval_every=4, checkpoint_every=4, item_loss="full"))
    tree["data"]["split"] |= {"kind": "cold-items", "cold_fraction": 0.2}
    tree["evaluate"]["baselines"] = ["popularity", "itemknn", "ease"]
    config = configs.from_dict(tree)
    prepare.prepare(config, print)
    folder = configs.run_dir(config)
    train_run(config, folder, print)
    return folder


def test_every_table_is_there(run_dir: Path) -> None:
    found = hard_modes(run_dir, say=print)
    assert json.loads((run_dir / "hard_modes.json").read_text()) == json.loads(json.dumps(found))
    tables = {table["protocol"]: table for table in found["tables"]}
    assert {
        "full, newest 0 events",
        "full, newest 10 events",
        "full",
        "among the items unseen in training",
    } <= tables.keys()
    nothing = {row["name"]: row["metrics"] for row in tables["full, newest 0 events"]["rows"]}
    assert (
        nothing["popularity"]["ndcg@10"]
        == {r["name"]: r["metrics"] for r in tables["full"]["rows"]}["popularity"]["ndcg@10"]
    )
    (hard,) = [t for name, t in tables.items() if name.startswith("1+9 hard, by")]
    assert all(row["metrics"]["hr@10"]["mean"] == 1 for row in hard["rows"])  # ten candidates, ten places
    up, down = (
        tables[f"full, new items lifted: {what}"]["rows"] for what in ("new targets", "validation, seen targets")
    )
    assert (
        [row["name"] for row in up]
        == [row["name"] for row in down]
        == [*(f"model, new items + {n}" for n in (0, 2, 3, 4, 5, 6, 8)), "content"]
    )
    gains, losses = ([row["metrics"]["hr@10"]["mean"] for row in rows[:-1]] for rows in (up, down))
    assert gains == sorted(gains) and losses == sorted(losses, reverse=True) and gains[-1] > gains[0]
    (like,) = [t for name, t in tables.items() if name.startswith("full, something like the newest item (100%")]
    likes = {row["name"]: row["metrics"] for row in like["rows"]}
    one = {row["name"]: row["metrics"] for row in tables["full, newest 1 events"]["rows"]}
    assert {"model", "model, words as they are"} <= likes.keys() and likes["itemknn"]["ndcg@10"] == one["itemknn"][
        "ndcg@10"
    ]
    order = {row["name"] for row in tables["full, order of the history"]["rows"]}
    assert order == {"model", "model, newest first", "model, shuffled"}
    tail = found["long_tail"]
    assert sum(tail["cases"]) == tables["full"]["cases"] and len(tail["systems"]["model"]) == len(tail["popularity"])
    assert (
        len(found["candidate_order"]["hr@1"]) == 5 and 0 <= found["candidate_order"]["share_with_one_first_choice"] <= 1
    )


def test_what_is_ranked(run_dir: Path) -> None:
    with trained(run_dir) as (s, params, _):
        data = s.prepared.data
        fitted = {name: r for name, (r, _) in fit_baselines(s, include_valid=True, say=print).items()}
        hard = HardModes(s, s.scorer(params), fitted, data.cases(TEST), TEST, print)
        # All targets are new, and rank among the new items alone.
        new = np.flatnonzero(data.train_popularity == 0)
        assert np.isin(hard.cases.target, new).all()
        (cold,) = hard.cold_items()
        popular = cold.row("popularity").metrics["hr@10"]
        chance = np.mean([min(10 / (len(new) - np.isin(new, h).sum()), 1) for h in hard.task.histories])
        assert popular.mean == pytest.approx(chance)  # all are level
        # Rivals are the recommender's own best, without the target and the history.
        rivals = hard._rivals("ease", 9)
        scores = fitted["ease"].score(hard.task.histories)
        for case in range(len(rivals)):
            out = [*hard.task.histories[case].tolist(), int(hard.cases.target[case])]
            left = np.delete(np.arange(data.num_items), out)
            assert not np.isin(rivals[case], out).any()
            assert scores[case, rivals[case]].min() == np.sort(scores[case, left])[-9]
        # The whole history is what evaluation shows.
        shown = [hard._prompt(int(u), h.tolist()) for u, h in zip(hard.cases.user, hard.task.histories)]
        for one, usual in zip(shown, s.sequential_prompts(hard.cases), strict=True):
            assert (one.prompt, one.prompt_items, one.features) == (usual.prompt, usual.prompt_items, usual.features)
        ranked = rank(hard.task, hard._model(hard.task.histories), 10)
        np.testing.assert_array_equal(ranked.ranks.greater, hard.usual["model"].ranks.greater)


def test_new_items_stand_as_high_as_validation_says(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = read_json(run_dir / CHOSEN, "")
    monkeypatch.setattr(fit_new_items, "read_json", lambda *_: chosen | {"lift": 3.0})
    scores = []
    for words in ((), ("--model.new_item_lift", "1")):
        with trained(run_dir, words) as (s, params, _):
            data = s.prepared.data
            scores.append(s.scorer(params).score_all(s.sequential_prompts(sample_cases(data.cases(TEST), 8, 0))))
    new = data.train_popularity == 0
    assert chosen["playing"] == round(SHARE * (~new).sum())  # no validation event has a new item
    # Log probabilities: all seen items change by one number, the new ones by 3 - 1 more. In float32, of sums of about ten.
    changed = scores[0] - scores[1]
    np.testing.assert_allclose(changed - changed[:, ~new].mean(1, keepdims=True), np.tile(2.0 * new, (8, 1)), atol=1e-5)

"""``instructrec baseline``: the trials and their budget, what is saved and read again, and the table of ``evaluate``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from instructrec_jax import baseline_store, baselines, prepare, retrieval
from instructrec_jax import config as configs
from instructrec_jax.cases import Task, rank
from instructrec_jax.cli import cli
from instructrec_jax.config import Config
from instructrec_jax.data.schema import TEST, VALID
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.evaluate import fit_baselines
from instructrec_jax.evaluation import metrics
from instructrec_jax.evaluation.recommendations import evaluate_lists, read_recommendations
from instructrec_jax.retrieval.ease import EASE
from instructrec_jax.training.mesh import make_mesh
from tests.tiny import tiny_config, write_slice

QUIET = ("--baseline.trials", "2", "--baseline.epochs", "2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A prepared slice of real data; ``config.yaml`` beside it."""
    tmp = tmp_path_factory.mktemp("tuned")
    write_slice(tmp / "data")
    made = tiny_config(tmp)
    (tmp / "tiny.yaml").write_text(configs.dump(made), encoding="utf-8")
    prepare.prepare(made, lambda _: None)
    return made


def file_of(config: Config) -> str:
    return str(Path(config.prepared).parent / "tiny.yaml")


def data_of(config: Config, **tuning: object) -> baselines.Data:
    tuned = replace(config, baseline=replace(config.baseline, **tuning))  # pyright: ignore
    return baselines.Data(tuned, prepare.load(config))


def call(*words: str) -> str:
    result = CliRunner().invoke(cli, ["baseline", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_and_the_table_of_evaluate(config: Config) -> None:
    output = call("popularity", "ease_last", "gmf", file_of(config), *QUIET, "--json")
    last = json.loads(output.strip().splitlines()[-1])
    assert "gmf, trial 2 of 2" in output and "popularity, trial 1 of 1: nothing to set" in output
    assert last["protocol"] == "full" and last["options"]["popularity"] == {}

    s = data_of(config)
    folder = baseline_store.folder_of(config)
    assert folder == Path(config.prepared) / "tiny-baselines"
    cases = s.prepared.data.cases(TEST)
    for name in ("popularity", "ease_last", "gmf"):
        result = json.loads((folder / name / "result.json").read_text(encoding="utf-8"))
        assert len(result["trials"]) == (1 if name == "popularity" else 2) and result["budget"]["trials"] == 2
        best = max(result["trials"], key=lambda trial: trial["ndcg"])
        assert best["options"] == result["options"] == last["options"][name]
        row = result["evaluations"]["full"]["rows"][0]
        assert (
            row["metrics"]["ndcg@10"]["mean"] == last[name]["ndcg@10"] and row["metrics"]["ndcg@10"]["low"] is not None
        )
        assert {"tune", "fit", "score"} == set(result["seconds"]) and "jax" in result["versions"]
        with np.load(folder / name / "full_ranks.npz") as saved:
            np.testing.assert_array_equal(saved["target"], cases.target)
            ranks = metrics.TargetRank(saved["greater"], saved["ties"])
        value = metrics.metrics_at(ranks, (10,))["ndcg@10"]
        assert value.mean() == pytest.approx(last[name]["ndcg@10"])
        lists = read_recommendations(folder / name / "lists.csv.gz", s.prepared.data, k=20)
        assert evaluate_lists(lists, s.prepared.data).values["hr@10"].mean() == pytest.approx(
            last[name]["hr@10"], abs=0.05
        )

    # Evaluate ranks the tuned ones as they were ranked here, beside those that it fits itself, on any candidates.
    fitted = fit_baselines(s, include_valid=True, say=lambda _: None)
    assert set(fitted) == {*config.evaluate.baselines, "ease_last", "gmf"}
    task = Task.of(s.prepared.data, cases)
    for name in ("ease_last", "gmf"):
        with jax.set_mesh(make_mesh(config.mesh)):  # all devices, as in evaluate
            again = rank(task, lambda a, b, r=fitted[name][0]: r.score(task.histories[a:b], cases.user[a:b]), 20).ranks
        with np.load(folder / name / "full_ranks.npz") as saved:
            np.testing.assert_array_equal(again.greater, saved["greater"])
    sampled = call("ease_last", file_of(config), *QUIET, "--evaluate.protocol", "1+9")
    assert "1+9 uniform seed 0" in sampled and sampled.count("(done before)") == 2
    result = json.loads((folder / "ease_last" / "result.json").read_text(encoding="utf-8"))
    assert set(result["evaluations"]) == {"full", "1+9 uniform seed 0"}

    # For the validation split they know training events alone.
    valid = fit_baselines(s, include_valid=False, say=lambda _: None)
    trial = max(
        json.loads((folder / "gmf" / "trials.json").read_text(encoding="utf-8"))["trials"], key=lambda t: t["ndcg"]
    )
    cases = s.prepared.data.cases(VALID)
    task = Task.of(s.prepared.data, cases)
    found = rank(task, lambda a, b: valid["gmf"][0].score(task.histories[a:b], cases.user[a:b]), 10).ranks
    assert metrics.metrics_at(found, (10,))["ndcg@10"].mean() == pytest.approx(trial["ndcg"])

    (folder / "gmf" / "model.npz").write_bytes(b"other")
    with pytest.raises(DataError, match=r"model\.npz.*damaged or changed"):
        baseline_store.saved(config, s.prepared)["gmf"].recommender(config, s.prepared, include_valid=True)


def test_a_killed_search_goes_on_and_a_larger_budget_adds_to_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = 0
    fit = EASE.fit

    def counted(self: EASE, *args: object, **more: object) -> EASE:
        nonlocal fits
        fits += 1
        if fits == 3:
            raise KeyboardInterrupt
        return fit(self, *args, **more)  # pyright: ignore

    monkeypatch.setattr(EASE, "fit", counted)
    s = data_of(config, trials=4)
    with pytest.raises(KeyboardInterrupt):
        baselines.tune(s, "ease_last", tmp_path, lambda _: None)
    assert len(json.loads((tmp_path / "trials.json").read_text(encoding="utf-8"))["trials"]) == 2
    trials = baselines.tune(s, "ease_last", tmp_path, lambda _: None)
    assert fits == 5 and [t.options for t in trials] == baselines.settings("ease_last", 4, 0)
    more = baselines.tune(data_of(config, trials=6), "ease_last", tmp_path, lambda _: None)
    assert fits == 7 and more[:4] == trials
    assert baselines.tune(data_of(config, trials=2), "ease_last", tmp_path, lambda _: None) == trials[:2] and fits == 7
    baselines.tune(
        data_of(config, trials=2, patience=1), "ease_last", tmp_path, lambda _: None
    )  # another budget of a fit
    assert fits == 9


def test_the_tuned_number_of_last_events_is_the_best_of_all_by_hand(config: Config, tmp_path: Path) -> None:
    """With a budget for the whole grid the search finds what a loop over it finds."""
    s = data_of(config, trials=48)
    trials = baselines.tune(s, "ease_last", tmp_path, lambda _: None)
    data, grid = s.prepared.data, retrieval.class_of("ease_last").grid
    assert len(trials) == len(grid["last"]) * len(grid["l2"]) == 48
    cases = data.cases(VALID)
    seen = s.prepared.data.histories(cases)
    figures = {}
    for l2 in grid["l2"]:
        whole = EASE(l2).fit(data)
        for last in grid["last"]:
            scores = np.stack([whole.weights[np.unique(h[-last:] if last else h)].sum(axis=0) for h in seen])  # pyright: ignore
            ranks = metrics.rank_of_target(scores, cases.target, seen)
            figures[l2, last] = float(metrics.metrics_at(ranks, (10,))["ndcg@10"].mean())
    best = max(trials, key=lambda trial: trial.ndcg)
    assert best.ndcg == pytest.approx(max(figures.values()), abs=0.01)
    assert figures[best.options["l2"], best.options["last"]] == pytest.approx(best.ndcg, abs=0.01)


def test_settings_begin_with_the_defaults_and_do_not_repeat() -> None:
    few, many = baselines.settings("sasrec", 3, 0), baselines.settings("sasrec", 9, 0)
    assert many[:3] == few and few[0] == {k: v[0] for k, v in retrieval.class_of("sasrec").grid.items()}
    assert all(a != b for i, a in enumerate(many) for b in many[:i])
    assert baselines.settings("sasrec", 9, 1)[1:] != many[1:]
    assert len(baselines.settings("itemknn", 50, 0)) == len(retrieval.class_of("itemknn").grid["neighbours"])
    assert baselines.settings("popularity", 5, 0) == [{}]


def test_results_of_other_data_are_not_taken(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    call("popularity", file_of(config))
    s = data_of(config)
    assert "popularity" in baseline_store.saved(config, s.prepared)
    monkeypatch.setattr(baseline_store, "data_key", lambda _: "other")
    assert not baseline_store.saved(config, s.prepared)


def test_mistakes_are_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'sasrec'"):
        CliRunner().invoke(cli, ["baseline", "sasrek", file_of(config)], catch_exceptions=False, standalone_mode=False)
    with pytest.raises(UserError, match="give one NAME or more"):
        CliRunner().invoke(cli, ["baseline", file_of(config)], catch_exceptions=False, standalone_mode=False)
    with pytest.raises(DataError, match="no prepared data set"):
        baselines.baseline(["ease"], replace(config, name="absent"), lambda _: None)
    wordless = replace(config, evaluate=replace(config.evaluate, bootstrap=50))
    s = baselines.Data(wordless, replace(prepare.load(config), item_features=np.zeros((1, 0), np.float32)))
    with pytest.raises(UserError, match="content: 1 vectors"):
        baselines.tune(s, "content", tmp_path, lambda _: None)

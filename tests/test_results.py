"""Tables of several seeds: every figure is one that a run has written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from click.testing import CliRunner

from instructrec_jax import config as configs
from instructrec_jax.cli import cli
from instructrec_jax.config import Config
from instructrec_jax.errors import UserError
from instructrec_jax.evaluation.metrics import TargetRank
from instructrec_jax.evaluation.table import EvaluationResult, Row
from instructrec_jax.results import compared, markdown, put_block, read_runs


def write_run(folder: Path, seed: int, **train: object) -> Path:
    """A run as it looks after ``evaluate``; the model is better than the baseline."""
    rng = np.random.default_rng(seed)
    users = np.arange(60)
    ranks = {"model": rng.integers(0, 12, 60), "popularity": np.random.default_rng(9).integers(0, 30, 60)}
    rows = [
        Row.from_ranks(n, users, TargetRank(r, np.zeros_like(r)), (1, 10), baseline=n != "model", seconds_fit=1.5)
        for n, r in ranks.items()
    ]
    result = EvaluationResult.build(rows, np.ones(40, int), protocol="full", data="films", resamples=200)
    config = Config(train=dataclasses.replace(Config().train, seed=seed, **train))
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.dump(config))
    payload = {"best_step": 1200 + seed, "next_item": result.to_json(), "search": None, "likelihood": None}
    (folder / "evaluation/full.json").write_text(json.dumps(payload))
    (folder / "finished.json").write_text(json.dumps({"step": 1500, "seconds": {"step": 200.0, "evaluate": 100.0}}))
    return folder


def test_the_block_of_a_document_is_made_from_the_runs(tmp_path: Path) -> None:
    preset = tmp_path / "films.yaml"
    preset.write_text("name: other\ntrain: {steps: 900}\n")
    runs = [str(write_run(tmp_path / f"r{seed}", seed)) for seed in (2, 0, 1)]
    document, picture = tmp_path / "results.md", tmp_path / "images/films.png"
    document.write_text("# Results\n\n<!-- results: films -->\nold 0.9999\n<!-- end of results: films -->\n\nBelow.\n")
    words = [*runs, "--preset", str(preset), "--into", str(document), "--block", "films", "--picture", str(picture)]
    for _ in range(2):  # the second time changes nothing
        found = CliRunner().invoke(cli, ["results", *words], catch_exceptions=False)
        assert found.exit_code == 0, found.output
    text = document.read_text()
    assert text.startswith("# Results") and text.endswith("Below.\n") and "0.9999" not in text
    assert text.count("<!-- results: films -->") == 1 and "![" in text and "](images/films.png)" in text
    assert picture.read_bytes().startswith(b"\x89PNG")

    seeds = [run.result("next_item") for run in read_runs(runs)]
    values = [r.row("model").metrics["ndcg@10"].mean for r in seeds]
    assert f"**{mean(values):.4f}**" in text and ", ".join(f"{v:.4f}" for v in values) in text
    middle = seeds[values.index(sorted(values)[1])].row("model").metrics["ndcg@10"]
    assert f"({middle.low:.4f} to {middle.high:.4f})" in text
    for result in seeds:
        test = next(c for c in result.comparisons if c.metric == "ndcg@10")
        assert f"{test.difference:+.4f}" in text and f"p = {test.p:.3f}" in text
    assert "best step 1200, 1201, 1202; training took 5, 5, 5 minutes" in text
    assert f"for seed in 0 1 2; do instructrec train {preset} --train.steps 1500 --train.seed $seed" in text


def test_runs_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, learning_rate=1.0)
    with pytest.raises(UserError, match=r"differ in train\.learning_rate"):
        read_runs([one, other])
    with pytest.raises(UserError, match=r"the same seed: \[0, 0\]"):
        read_runs([one, write_run(tmp_path / "c", 0)])
    with pytest.raises(UserError, match="is not a run"):
        read_runs([tmp_path])
    (one / "evaluation/full.json").unlink()
    with pytest.raises(UserError, match="evaluate"):
        read_runs([one])


def test_a_new_block_comes_at_the_end(tmp_path: Path) -> None:
    put_block(tmp_path / "new.md", "a", "one\n")
    put_block(tmp_path / "new.md", "b", r"two \1")
    put_block(tmp_path / "new.md", "a", "three")
    assert (tmp_path / "new.md").read_text() == (
        "<!-- results: a -->\nthree\n<!-- end of results: a -->\n\n<!-- results: b -->\ntwo \\1\n<!-- end of results: b -->\n"
    )


def test_the_tables_of_hard_modes(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    for run in runs:
        table = json.loads((run / "evaluation/full.json").read_text())["next_item"]
        tables = [table, {**table, "protocol": "among the items unseen in training"}]
        (run / "hard_modes.json").write_text(json.dumps({"best_step": 1200, "tables": tables}))
    words = ["results", *map(str, runs), "--protocol", "hard-modes"]
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert "instructrec hard-modes RUN_DIR" in found.output
    value = read_runs(runs, "hard-modes")[0].results()["among the items unseen in training"].row("model").metrics
    assert found.output.count(f"[{value['ndcg@10'].mean:.4f}, ") == 2
    found = CliRunner().invoke(cli, [*words, "--table", "full"], catch_exceptions=False)
    assert "films, full**" in found.output and "unseen" not in found.output
    with pytest.raises(UserError, match=r"'half'.*\n.*full, among"):
        markdown(read_runs(runs, "hard-modes"), only=["half"])
    (runs[1] / "hard_modes.json").unlink()
    with pytest.raises(UserError, match="hard-modes"):
        read_runs(runs, "hard-modes")


def test_two_configs_side_by_side(tmp_path: Path) -> None:
    ours = [write_run(tmp_path / f"a{seed}", seed) for seed in (0, 1)]
    theirs = [write_run(tmp_path / f"b{seed}", seed, learning_rate=1.0) for seed in (0, 1)]
    beside = [word for run in theirs for word in ("--beside", str(run))]
    found = CliRunner().invoke(cli, ["results", *map(str, ours), *beside], catch_exceptions=False)
    assert found.exit_code == 0 and "train.learning_rate 1.0" in found.output, found.output
    assert "popularity" not in found.output
    assert "+0.0000 ± 0.0000 by seed [+0.0000, +0.0000]" in found.output  # the same ranks in both
    with pytest.raises(UserError, match="the seeds differ"):
        compared(read_runs(ours), read_runs(theirs[:1]))

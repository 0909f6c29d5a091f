"""What a run shows: where its time went, utilisation, profiler windows, writers, a packed batch."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from instructrec_jax import prepare, run
from instructrec_jax.config import Config, TrainConfig, run_dir
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.models.architecture import from_numbers
from instructrec_jax.models.language_model import Sizes, count_parameters
from instructrec_jax.training import writers
from instructrec_jax.training.goodput import KINDS, Ledger
from instructrec_jax.training.log import step_flops
from tests.tiny import tiny_config, write_slice


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -------------------------------------------------------------------------------------------------------------- ledger


def test_every_second_has_one_kind() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    clock.now += 1
    with ledger("step"):
        clock.now += 2
        with ledger("evaluate"):
            clock.now += 4
            with ledger("checkpoint"):
                clock.now += 8
            clock.now += 16
        clock.now += 32
        ledger.move(3, "step", "data")
    clock.now += 64
    seconds = ledger.seconds()
    assert {k: v for k, v in seconds.items() if v} == {
        "init": 65,
        "step": 31,
        "data": 3,
        "evaluate": 20,
        "checkpoint": 8,
    }
    assert tuple(seconds) == KINDS and sum(seconds.values()) == clock.now - 100
    table = ledger.table()
    assert table.startswith("goodput 24.4 % of 127.0 s") and "evaluate        20.0 s  15.7 %" in table
    assert "lost" not in table


def test_an_exception_closes_its_kind() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    with pytest.raises(RuntimeError), ledger("step"):
        clock.now += 1
        raise RuntimeError
    clock.now += 1
    assert ledger.seconds()["init"] == ledger.seconds()["step"] == 1


def test_calls_add_up_and_what_is_done_again_is_lost(tmp_path: Path) -> None:
    file, clock = tmp_path / "metrics.jsonl", Clock()
    first = Ledger(clock)
    first.resume(file, 0)  # there is none yet
    lines = []
    for step, seconds in ((10, 5.0), (20, 7.0), (25, 2.5)):
        with first("step"):
            clock.now += seconds
        lines.append(json.dumps({"step": step, **first.values()}))
    lines.insert(1, json.dumps({"step": 10, "valid_ndcg@10": 0.1}))
    file.write_text("\n".join([*lines, '{"step": 26, "lo']), encoding="utf-8")

    second = Ledger(clock)
    clock.now += 1
    second.resume(file, 20)  # step 25 was reached, 20 was saved
    with second("step"):
        clock.now += 4
    seconds = {k: v for k, v in second.seconds().items() if v}
    assert seconds == {"init": 1, "step": 16, "lost": 2.5}
    # A third call that loses nothing.
    file.write_text(json.dumps({"step": 30, **second.values()}), encoding="utf-8")
    third = Ledger(clock)
    third.resume(file, 30)
    assert third.seconds() == second.seconds()


# ------------------------------------------------------------------------------------------------------------- whole run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("seeing")
    write_slice(tmp / "data")
    prepare.prepare(tiny_config(tmp), lambda _: None)
    return tmp


def config_of(prepared: Path, profile: dict[str, int] | None = None, **train: Any) -> Config:
    from dataclasses import replace

    from instructrec_jax.config import ProfileConfig

    return replace(tiny_config(prepared, **train), profile=ProfileConfig(**(profile or {})))


@pytest.mark.slow
def test_a_run_accounts_for_its_time_and_traces_a_window(prepared: Path, tmp_path: Path) -> None:
    config = config_of(prepared, {"start": 3, "steps": 2}, ema=0.9)
    lines: list[str] = []
    run.train_run(config, tmp_path, lines.append)
    finished = json.loads((tmp_path / "finished.json").read_text(encoding="utf-8"))
    assert tuple(finished["seconds"]) == KINDS
    assert all(finished["seconds"][kind] > 0 for kind in ("init", "compile", "step", "checkpoint", "evaluate"))
    assert finished["seconds"]["lost"] == 0
    assert any(line.startswith("goodput ") for line in lines)

    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in logged if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    for line in steps:
        assert 0 < line["useful_mfu"] <= line["raw_mfu"] and 0 <= line["input_stall"] <= 1
    totals = [sum(line[f"goodput/{kind}"] for kind in KINDS) for line in logged if "goodput/step" in line]
    assert totals == sorted(totals) and totals[-1] <= sum(finished["seconds"].values()) + 1e-6

    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    found = [name for name in (b"attention", b"mlp") if name in traces[0].read_bytes()]
    assert found == [b"attention", b"mlp"], "named scopes are in the trace"

    # The same call again has nothing to do, and its seconds are added.
    run.train_run(config, tmp_path, lines.append)
    again = json.loads((tmp_path / "finished.json").read_text(encoding="utf-8"))["seconds"]
    assert again["step"] >= finished["seconds"]["step"] and again["init"] > finished["seconds"]["init"]


def test_a_profile_does_not_make_another_run(prepared: Path) -> None:
    assert run_dir(config_of(prepared)) == run_dir(config_of(prepared, {"steps": 5}))


# ----------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_a_plain_step_are_six_per_weight_and_token() -> None:
    from instructrec_jax.config import ModelConfig

    model = ModelConfig(width=64, layers=3, heads=4, kv_heads=2, head_size=16, mlp_width=96)
    arch = from_numbers(model, 128)
    weights = count_parameters(arch, Sizes(128)) - 128 * 64 - 8 * 64  # without the table and the norms
    assert step_flops(arch, Sizes(128), 10, 0, 0, 0) == 6 * weights * 10
    # A causal row of 9: 45 pairs, two products of N x H per pair and layer, forward and twice backward.
    assert step_flops(arch, Sizes(128), 0, 45, 0, 0) == 3 * 2 * 3 * 45 * 2 * 64
    assert step_flops(arch, Sizes(128), 0, 0, 0, 5) == 6 * 64 * 128 * 5


# --------------------------------------------------------------------------------------------------------------- writers


class Recorder:
    """A writer that keeps what it is given."""

    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self, folder: Path, name: str, config: Config, resume_step: int):
        self.arguments, self.written, self.closed = (folder, name, config, resume_step), [], False
        Recorder.made.append(self)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.written.append((step, values))

    def close(self) -> None:
        self.closed = True


def declare(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Packages that offer writers."""
    declared = [importlib.metadata.EntryPoint(n, value, writers.GROUP) for n, value in points.items()]

    real = importlib.metadata.entry_points

    def entry_points(**selection: str) -> Any:
        return declared if selection == {"group": "instructrec_jax.writers"} else real(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def with_writers(*names: str) -> Config:
    return Config(train=TrainConfig(writers=names))


def test_a_package_offers_a_writer(monkeypatch: pytest.MonkeyPatch, prepared: Path, tmp_path: Path) -> None:
    declare(monkeypatch, mine="tests.test_seeing:Recorder")
    from tests import test_seeing

    test_seeing.Recorder.made.clear()
    config = config_of(prepared, writers=["mine"], steps=2)
    run.train_run(config, tmp_path, lambda _: None)
    (writer,) = test_seeing.Recorder.made
    assert writer.arguments == (tmp_path, tmp_path.name, config, 0) and writer.closed
    names = {name for _, values in writer.written for name in values}
    assert {"loss", "useful_mfu", "raw_mfu", "goodput/step", "valid_ndcg@10"} <= names
    assert not (tmp_path / "tensorboard").exists()


def test_unknown_and_missing_writers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    declare(monkeypatch, wandb="instructrec_jax.training.writers:WandB")
    with pytest.raises(ConfigError, match=r"'wandbb', which no installed package offers \(did you mean 'wandb'\?\)"):
        writers.open_writers(tmp_path, "run", with_writers("wandbb"), 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'instructrec_jax\[wandb\]'"):
        writers.open_writers(tmp_path, "run", with_writers("wandb"), 0)
    assert writers.open_writers(tmp_path, "run", with_writers(), 0) == []


def test_the_package_declares_its_writers() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["entry-points"][writers.GROUP]
    for name, value in declared.items():
        assert callable(importlib.metadata.EntryPoint(name, value, writers.GROUP).load())
    assert set(declared) - {"tensorboard"} <= set(project["optional-dependencies"])


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple] = []
    session = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", values, step)), finish=lambda: calls.append(("finish",))
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(("init", options)) or session)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    declare(monkeypatch, wandb="instructrec_jax.training.writers:WandB")
    (writer,) = writers.open_writers(tmp_path, "films-1234", with_writers("wandb"), 7)
    writer.write(8, {"loss": 1.5})
    writer.close()
    (_, options), log, end = calls
    assert (options["id"], options["resume"], options["config"]["train"]["writers"]) == (
        "films-1234",
        "allow",
        ["wandb"],
    )
    assert "mode" not in options, "WANDB_MODE decides"
    assert (log, end) == (("log", {"loss": 1.5}, 8), ("finish",))


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple] = []

    run_of = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    class Client:
        def __getattr__(self, name: str) -> Any:
            def call(*values: Any, **options: Any) -> Any:
                calls.append((name, values, options))
                if name == "search_runs":
                    return [run_of] if "create_run" in [c[0] for c in calls] else []
                return {"create_run": run_of, "create_experiment": "e1"}.get(name)

            return call

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mlflow.tracking", types.SimpleNamespace(MlflowClient=Client))
    declare(monkeypatch, mlflow="instructrec_jax.training.writers:MLflow")
    for _ in range(2):  # a run, and its resumption
        (writer,) = writers.open_writers(tmp_path, "run", with_writers("mlflow"), 0)
        writer.write(3, {"valid_ndcg@10": 0.25})
        writer.close()
    assert [c[0] for c in calls].count("create_run") == 1
    metrics = [c for c in calls if c[0] == "log_metric"]
    assert metrics == [("log_metric", ("r1", "valid_ndcg_at_10", 0.25), {"step": 3})] * 2
    assert [c[1] for c in calls if c[0] == "set_terminated"] == [("r1",)] * 2


# ----------------------------------------------------------------------------------------------------------- show-batch


def test_a_packed_batch_is_shown(prepared: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from instructrec_jax import config as configs
    from instructrec_jax.cli import cli

    config = tiny_config(prepared)
    file = tmp_path / "tiny.yaml"
    file.write_text(configs.dump(config), encoding="utf-8")
    html = tmp_path / "batch.html"
    command = ["data", "show-batch", str(file), "--rows", "3", "--html", str(html)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("row ") == 3 and "useful" in result.output
    page = html.read_text(encoding="utf-8")
    assert "text-decoration: underline" in page and "<html" in page
    # The rows are those of the run's first step.
    from instructrec_jax.data.loader import training_iterator

    p = prepare.load(config)
    stream = training_iterator(p.records, p.text, batch_size=16, sequence_length=64, seed=config.train.seed)
    batch = next(stream)
    stream.close()
    titles = [p.data.catalogue.titles[i - 1] for i in batch["item"][:3].ravel() if i]
    shown = " ".join(result.output.split())
    assert all(" ".join(title.split()) in shown for title in titles) and titles

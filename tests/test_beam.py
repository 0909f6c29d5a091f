"""Beam writes the bytes that the local engine writes: any number of workers, any parts, bundles that fail or run twice."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from instructrec_jax import prepare
from instructrec_jax.cli import cli
from instructrec_jax.config import Config, DataConfig, InstructionConfig
from instructrec_jax.data import records, store
from instructrec_jax.data.features import UserFeatures
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.files import sha256
from instructrec_jax.instructions.build import FAMILIES
from tests.small_split import small_split

beam = pytest.importorskip("apache_beam", reason="needs the extra beam")

from instructrec_jax import beam_engine  # noqa: E402

CONFIG = Config(
    name="small",
    data=DataConfig(domain="films"),
    instructions=InstructionConfig(
        languages=("en", "zh"), history_items=8, short_history_items=5, candidates=5, shard_records=150,
        **dict.fromkeys(FAMILIES, 0.7), negatives="popularity", max_per_user=6,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared folder without records, and what the local engine makes of it in ``expected``."""
    folder = tmp_path_factory.mktemp("beam")
    data = small_split(users=40)
    store.save_split(data, folder / "data")
    value = np.linspace(-1, 1, data.num_users, dtype=np.float32)[:, None]
    users = UserFeatures(["age"], np.where(value > 0, 0, -1), value)
    np.savez(folder / "user_features.npz", names=np.asarray(users.names, str), index=users.index, value=users.value)
    builder = prepare.builder_of(data, users, CONFIG, folder)
    examples = prepare._Examples(builder, CONFIG, None)
    records.write(
        examples,
        folder / "expected",
        config_hash=CONFIG.data_hash(),
        seed=0,
        shard_records=CONFIG.instructions.shard_records,
    )
    (folder / "counts.json").write_text(json.dumps([builder.written, builder.skipped]))
    return folder


def sums(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same(folder: Path, *options: str, **settings) -> None:
    manifest, counts = beam_engine.write(folder, CONFIG, options, **settings)
    assert sums(folder / "records") == sums(folder / "expected")
    assert manifest == records.verify(folder / "records") and len(manifest["shards"]) > 3
    assert [counts["written"], counts["skipped"]] == json.loads((folder / "counts.json").read_text())
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_give_the_same_bytes(folder, workers):
    running = ("--direct_running_mode", "multi_threading") if workers > 1 else ()
    assert_same(folder, "--direct_num_workers", str(workers), *running, part_events=100)


@pytest.mark.parametrize("part_events", [1, 10_000])
def test_parts_change_no_byte(folder, part_events):
    assert_same(folder, part_events=part_events)


def test_bundles_that_run_twice_change_no_byte(folder):
    assert_same(folder, "--direct_runner_bundle_repeat", "1", part_events=200)


def test_workers_that_fail_change_no_byte(folder, monkeypatch, tmp_path):
    """The first three attempts of each step break off after they have given a part of what they give; Beam gives up after four."""
    failed = fail_three_times(monkeypatch)
    assert_same(folder, "--runner", "BundleBasedDirectRunner", part_events=200)
    assert sorted(failed) == sorted(STEPS * 3)


STEPS = ["Render", "Number", "Rank", "Write"]


def fail_three_times(monkeypatch) -> list[str]:
    """Break the first three attempts of every step; their names are put in the list."""
    failed: list[str] = []
    for name in STEPS:
        step = getattr(beam_engine, name)
        monkeypatch.setattr(step, "process", _failing(step.process, name, failed))
    return failed


def _failing(process, name, failed):
    def attempt(self, element, *args):
        given = process(self, element, *args)
        if failed.count(name) < 3:
            yield from itertools.islice(given, 2)
            failed.append(name)
            raise OSError("the worker is gone")
        yield from given

    return attempt


def test_a_pipeline_that_fails_leaves_the_older_records(folder, monkeypatch):
    assert_same(folder)

    def broken(self, element, *args):
        raise OSError("the disk is full")

    monkeypatch.setattr(beam_engine.Write, "process", broken)
    with pytest.raises(Exception, match="the disk is full"):
        beam_engine.write(folder, CONFIG)
    assert sums(folder / "records") == sums(folder / "expected")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shard_records": 1, "languages": ("zh",)}, ConfigError, "shard_records = 1 asks for"),
        (
            {**dict.fromkeys(FAMILIES, 0.0), "families": ("search",), "shard_records": 9999},
            DataError,
            "no instruction example",
        ),
    ],
)
def test_errors_are_those_of_the_local_engine(folder, change, error, message):
    config = replace(CONFIG, instructions=replace(CONFIG.instructions, **change))
    with pytest.raises(error, match=message):
        beam_engine.write(folder, config)


# --------------------------------------------------------------------------------------------------------- the command

SETS = {
    "ml_latest_small": None,
    "ml_1m": Path(os.environ.get("INSTRUCTREC_DATA", "../shared/data")) / "ml-1m",
}  # a million rows


@pytest.fixture(scope="module", params=SETS)
def whole_set(request, tmp_path_factory):
    """A preset's arguments, and the sums of what the local engine prepares with them."""
    data = SETS[request.param]
    if data and not data.is_dir():
        pytest.skip(f"{data} is missing")
    words = [f"configs/{request.param}.yaml", "--instructions.shard_records", "2000"]
    words += ["--data.path", str(data)] if data else []
    return words, prepared(tmp_path_factory.mktemp("local"), words)


def prepared(folder: Path, words: list[str], *options: str) -> dict[str, str]:
    done = CliRunner().invoke(cli, ["data", "prepare", *words, "--prepared", str(folder / "prepared"), *options])
    assert done.exit_code == 0, done.output
    return sums(folder / "prepared")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_command_prepares_whole_sets_alike(tmp_path, whole_set, workers):
    words, expected = whole_set
    options = ["--beam.direct_num_workers", str(workers)]
    options += ["--beam.direct_running_mode", "multi_processing"] if workers > 1 else []
    assert prepared(tmp_path, words, "--engine", "beam", *options) == expected


@pytest.mark.slow
def test_workers_that_fail_change_no_byte_of_whole_sets(tmp_path, whole_set, monkeypatch):
    words, expected = whole_set
    failed = fail_three_times(monkeypatch)
    assert prepared(tmp_path, words, "--engine", "beam", "--beam.runner", "BundleBasedDirectRunner") == expected
    assert sorted(failed) == sorted(STEPS * 3)

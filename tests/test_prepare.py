"""A prepared folder is complete or absent, belongs to one config, and its manifest says what is in it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.config import Config
from instructrec_jax.data import features, records, store, tokenizer
from instructrec_jax.data.records import Records
from instructrec_jax.data.schema import SPLIT_NAMES
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.instructions.build import Builder
from tests.datasets import write_csv

USERS, ITEMS = 12, 30


def write_folder(folder: Path) -> Path:
    """Users with ages and sexes, films with genres, each user with 8 to 13 events."""
    r = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        (u, i, 3 + (u + i) % 3, 100 + t) for u in range(USERS) for t, i in enumerate(r.permutation(ITEMS)[: 8 + u % 6])
    ]
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "rating", "timestamp"], rows)
    genres = ["Drama|War", "Comedy", "Sci-Fi"]
    items = [(i, f"Picture {i} ({1960 + i})", genres[i % 3]) for i in range(ITEMS)]
    write_csv(folder / "items.csv", ["item_id", "title", "genres"], items)
    write_csv(folder / "users.csv", ["user_id", "age", "sex"], [(u, 20 + u, "FM"[u % 2]) for u in range(USERS)])
    return folder


def config_of(tmp: Path, **sections: Any) -> Config:
    tree = {
        "name": "set",
        "prepared": str(tmp / "prepared"),
        "data": {"source": "tables", "path": str(tmp / "data"), "clean": {"k_core": 0}},
        "instructions": {"history_items": 8, "short_history_items": 4, "candidates": 4},
        "model": {"vocab_size": 400, "content_features": 8, "cooccurrence_features": 4},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return configs.from_dict(tree)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Config, prepare.Prepared, list[str]]:
    tmp = tmp_path_factory.mktemp("prepare")
    write_folder(tmp / "data")
    said: list[str] = []
    config = config_of(tmp)
    return config, prepare.prepare(config, said.append), said


@pytest.fixture
def copied(made, tmp_path) -> Config:
    """A config with a copy of the prepared folder, to be damaged."""
    config = dataclasses.replace(made[0], prepared=str(tmp_path / "prepared"))
    shutil.copytree(made[1].folder, config.prepared_dir)
    prepare.load(config)
    return config


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --------------------------------------------------------------------------------------------------------------- content


def test_the_manifest_agrees_with_the_data(made):
    config, prepared, said = made
    manifest, data = prepared.manifest, prepared.data
    assert manifest == json.loads((prepared.folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["name"], manifest["config_hash"]) == ("set", config.data_hash())
    assert manifest["statistics"] == store.statistics(data)
    numbers = manifest["statistics"]
    assert (numbers["users"], numbers["items"], numbers["interactions"]) == (
        data.num_users,
        data.num_items,
        len(data.item),
    )
    assert numbers["users"] == USERS and numbers["interactions"] == sum(8 + u % 6 for u in range(USERS))
    for number, name in enumerate(SPLIT_NAMES):
        assert numbers["events"][name] == int((data.split == number).sum())
    assert [s["name"] for s in manifest["steps"]] == [s.name for s in data.steps]
    for step, line in zip(manifest["steps"], said):
        assert step["name"] in line and f"{step['interactions'][1]:,} interactions" in line


def test_the_records_are_the_builders_examples(made):
    config, prepared, _ = made
    read = Records(prepared.records)
    assert read.manifest["config_hash"] == config.data_hash()
    builder = Builder(prepared.data, config.instructions, "films", prepared.users.tokens)
    expected = sorted(map(repr, builder.training_examples()))
    assert sorted(repr(read[i]) for i in range(len(read))) == expected
    assert sum(prepared.manifest["examples"].values()) == len(read) == sum(read.manifest["records_by_aspect"].values())
    assert prepared.manifest["examples"] == dict(builder.written)
    assert prepared.manifest["skipped"] == dict(builder.skipped)
    again = list(prepared.builder(config).training_examples())
    assert sorted(map(repr, again)) == expected


def test_features_and_tokeniser_are_those_of_the_data(made):
    _, prepared, _ = made
    np.testing.assert_array_equal(prepared.item_features, features.item_features(prepared.data, 8, 4))
    assert prepared.item_features.shape == (ITEMS, 12)
    users = features.user_features(prepared.data)
    assert prepared.users.names == users.names == ["age", "sex=F", "sex=M"]
    np.testing.assert_array_equal(prepared.users.index, users.index)
    np.testing.assert_array_equal(prepared.users.value, users.value)
    assert prepared.text.vocab_size <= 400
    for title in prepared.data.catalogue.titles:
        assert prepared.text.decode(prepared.text.encode(title)) == title


def test_loading_gives_what_prepare_gave(made):
    config, prepared, _ = made
    loaded = prepare.load(config)
    assert loaded.manifest == prepared.manifest and loaded.folder == prepared.folder
    np.testing.assert_array_equal(loaded.data.item, prepared.data.item)
    np.testing.assert_array_equal(loaded.item_features, prepared.item_features)
    assert loaded.text.encode("Picture 3") == prepared.text.encode("Picture 3")


def test_a_set_without_users_has_no_feature_tokens(tmp_path):
    (write_folder(tmp_path / "data") / "users.csv").unlink()
    config = config_of(tmp_path, model={"content_features": 0, "cooccurrence_features": 0})
    prepared = prepare.prepare(config, silent)
    assert prepared.users.names == [] and prepared.item_features.shape == (ITEMS, 0)
    assert not any(e.features for e in prepared.builder(config).training_examples())


def test_preparing_twice_gives_the_same_files_and_replaces_the_folder(made, tmp_path):
    config, prepared, _ = made
    other = dataclasses.replace(config, prepared=str(tmp_path / "p"))
    first = everything(prepare.prepare(other, silent).folder)
    assert everything(prepare.prepare(other, silent).folder).keys() == first.keys()
    stable = {name: content for name, content in first.items() if not name.endswith((".json", ".npz"))}
    assert stable == {n: c for n, c in everything(prepared.folder).items() if n in stable}
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["set"]


def test_progress_sees_every_example(made, tmp_path):
    config = dataclasses.replace(made[0], prepared=str(tmp_path))
    seen: list[tuple[str, int]] = []
    count = 0

    def progress(label, expected, stream):
        nonlocal count
        seen.append((label, expected))
        for example in stream:
            count += 1
            yield example

    prepared = prepare.prepare(config, silent, progress)
    assert len(seen) == 1 and count == len(Records(prepared.records))
    # The length hint rounds the sum of the families' shares, the builder rounds each of the five.
    assert seen[0][1] == pytest.approx(count + sum(prepared.manifest["skipped"].values()), abs=5)


# -------------------------------------------------------------------------------------------------- complete or absent


class Stop(BaseException):
    pass


PLACES = [
    (store, "save_split"),
    (features, "item_features"),
    (features, "user_features"),
    (tokenizer, "train"),
    (records, "write"),
    (store, "statistics"),
    (prepare, "write_json"),
    (Path, "replace"),
]


@pytest.mark.parametrize(("module", "name"), PLACES, ids=[name for _, name in PLACES])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_stop_anywhere_leaves_nothing_behind(made, tmp_path, monkeypatch, module, name, after):
    config = dataclasses.replace(made[0], prepared=str(tmp_path / "prepared"))
    real = getattr(module, name)

    def stop(*args: Any, **kwargs: Any) -> None:
        if after:
            real(*args, **kwargs)
        raise Stop

    monkeypatch.setattr(module, name, stop)
    with pytest.raises(Stop):
        prepare.prepare(config, silent)
    monkeypatch.undo()
    assert not list((tmp_path / "prepared").iterdir())
    with pytest.raises(DataError, match="no prepared data set here"):
        prepare.load(config)


def test_a_stop_keeps_the_older_folder(copied, monkeypatch):
    before = everything(copied.prepared_dir)
    monkeypatch.setattr(records, "write", lambda *_, **__: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        prepare.prepare(copied, silent)
    assert everything(copied.prepared_dir) == before
    assert [p.name for p in copied.prepared_dir.parent.iterdir()] == ["set"]


def test_bad_input_leaves_the_older_folder(copied, tmp_path):
    (write_folder(tmp_path / "bad") / "items.csv").write_text("item_id\n1\n")
    data = dataclasses.replace(copied.data, path=str(tmp_path / "bad"))
    before = everything(copied.prepared_dir)
    with pytest.raises(DataError, match=r"items\.csv.*title"):
        prepare.prepare(dataclasses.replace(copied, data=data), silent)
    assert everything(copied.prepared_dir) == before


def test_a_folder_of_somebody_else_is_not_replaced(made, tmp_path):
    config = dataclasses.replace(made[0], prepared=str(tmp_path))
    photos = config.prepared_dir / "photos"
    photos.mkdir(parents=True)
    with pytest.raises(ConfigError, match="not a prepared data set"):
        prepare.prepare(config, silent)
    assert photos.is_dir()
    shutil.rmtree(config.prepared_dir)
    config.prepared_dir.write_text("a file")
    with pytest.raises(ConfigError, match="not a prepared data set"):
        prepare.prepare(config, silent)
    config.prepared_dir.unlink()
    config.prepared_dir.mkdir()
    assert prepare.prepare(config, silent).folder == config.prepared_dir, "an empty folder may be filled"


# ---------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"split": configs.SplitConfig(seed=1)}),
        ("instructions", {"seed": 1}),
        ("model", {"content_features": 9}),
        ("model", {"vocab_size": 401}),
    ],
)
def test_another_config_is_refused_with_both_hashes(made, section, change):
    config = made[0]
    other = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
    with pytest.raises(DataError) as caught:
        prepare.load(other)
    assert config.data_hash() in str(caught.value) and other.data_hash() in str(caught.value)
    assert "data prepare" in caught.value.remedy


def test_training_settings_do_not_matter_to_the_data(made):
    config = made[0]
    model = dataclasses.replace(config.model, width=128)
    other = dataclasses.replace(config, model=model, train=configs.TrainConfig(steps=3))
    assert prepare.load(other).manifest == made[1].manifest


@pytest.mark.parametrize(
    "name",
    ["item_features.npy", "user_features.npz", "tokenizer/tokenizer.json", "data/events.parquet", "manifest.json"],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_named(copied, name, damage):
    file = copied.prepared_dir / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        at = len(content) // 2
        changed = content[:at] + (b"" if damage == "truncated" else bytes([content[at] ^ 128]) + content[at + 1 :])
        file.write_bytes(changed)
    with pytest.raises(DataError) as caught:
        prepare.load(copied)
    whole = name == "manifest.json" and damage == "missing"  # without its manifest the folder counts as absent
    assert Path(str(caught.value.file)) == (copied.prepared_dir if whole else file)
    assert caught.value.remedy

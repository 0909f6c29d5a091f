"""Forgetting a user: everything of theirs is gone, everything of others is what it was."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instructrec_jax import baseline_store, prepare
from instructrec_jax import config as configs
from instructrec_jax.config import Config
from instructrec_jax.data.records import Records
from instructrec_jax.errors import DataError, UserError
from instructrec_jax.forget import _own_tags, forget, runs_that_saw
from instructrec_jax.instructions.teacher.cache import Cache, Reply, Usage
from instructrec_jax.instructions.teacher.texts import Taught, read, save
from instructrec_jax.teach import folder_of
from tests.datasets import write_csv
from tests.test_prepare import config_of, silent, write_folder

NAMES = [f"person-{u:02d}-q" for u in range(12)]


def write_named(folder: Path) -> Path:
    """As ``write_folder``, with telling user ids and tags; only person 3 calls item 4 "zebra striped"."""
    write_folder(folder)
    for name in ("interactions", "users"):
        with (folder / f"{name}.csv").open(newline="") as file:
            header, *rows = list(csv.reader(file))
        write_csv(folder / f"{name}.csv", header, [(NAMES[int(r[0])], *r[1:]) for r in rows])
    with (folder / "interactions.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    tags = [
        (r["user_id"], r["item_id"], "zebra striped" if r["user_id"] == NAMES[3] else "slow", int(r["timestamp"]))
        for r in log
    ]
    write_csv(folder / "tags.csv", ["user_id", "item_id", "tag", "timestamp"], tags)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("forget")
    write_named(tmp / "data")
    prepare.prepare(config_in(tmp), silent)
    return tmp


def config_in(tmp: Path) -> Config:
    return config_of(tmp, runs=str(tmp / "runs"), instructions={"search": 3.0})


def of(config: Config) -> list:
    records = Records(config.prepared_dir / "records")
    return [records[i] for i in range(len(records))]


def test_a_user_is_gone_and_the_others_are_as_before(original, tmp_path):
    shutil.copytree(original / "prepared", tmp_path / "prepared")
    config = configs.from_dict({**configs.to_dict(config_in(original)), "prepared": str(tmp_path / "prepared")})
    before, records = prepare.load(config).data, of(config)
    assert any("zebra" in e.prompt and e.user != 3 for e in records)
    folder = folder_of(config)
    folder.mkdir()
    taught = [Taught("preference", "en", n, 1, "A", n, "Enjoys war films.", "- B") for n in (NAMES[3], NAMES[4])]
    title = before.catalogue.titles[int(before.history(3)[0])]
    taught += [
        Taught("intention", "en", "", -1, title, tag, f"a film with {tag}", f"title: {title}\npeople call it: {tag}")
        for tag in ("zebra striped", "slow")
    ]
    save(taught, folder / "texts.parquet", 20)
    (folder / "rejected.jsonl").write_text("".join(json.dumps({"gate": "form", **vars(t)}) + "\n" for t in taught[:2]))
    cache = Cache(folder)
    for name in NAMES[3:5]:
        cache.put(name + " key", Reply("x", Usage()), cache.begin(Usage()), name)
    cache.put("an item", Reply("a Zebra Striped film", Usage()), cache.begin(Usage()))
    cache.close()
    tuned = baseline_store.folder_of(config) / "ease"
    tuned.mkdir(parents=True)
    (tuned / "trials.json").write_text("{}")
    (tuned / "lists.csv").write_text(f"{NAMES[3]},1\n")

    gone = forget(config, NAMES[3])
    assert gone.baselines == ("ease",) and not tuned.parent.exists()
    after = prepare.load(config).data
    count = int(before.offsets[4] - before.offsets[3])
    assert gone.events == count and len(after.item) == len(before.item) - count
    assert after.num_users == before.num_users and after.offsets[4] == after.offsets[3]
    for u in set(range(12)) - {3}:
        np.testing.assert_array_equal(after.history(u), before.history(u))
        assert after.user_ids[u] == before.user_ids[u]
    assert all(user != 3 for user, _, _ in after.tags) and len(after.tags) == len(before.tags) - gone.tags
    left = of(config)
    expected = [e for e in records if e.user != 3 and not ("zebra" in e.prompt and e.intention == "I1")]
    assert sorted(left, key=repr) == sorted(expected, key=repr)
    assert gone.records == sum(e.user == 3 for e in records) and gone.worded_by > 0
    assert gone.records + gone.worded_by == len(records) - len(left)
    assert (gone.texts, gone.answers) == (3, 2)
    assert [(t.user, t.content) for t in read(folder / "texts.parquet")[0]] == [(NAMES[4], NAMES[4]), ("", "slow")]
    # Their name and their words are in no file of either folder, nor beside them.
    for path in (p for p in (tmp_path / "prepared").rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert NAMES[3].encode() not in content, path
        assert b"zebra" not in content.lower() or path.name == "tokenizer.json", path
    users = prepare.load(config).users
    assert users.tokens(3) == () and users.tokens(4) != ()
    manifest = prepare.load(config).manifest
    assert manifest["forgotten"][0]["records"] == len(records) - len(left) and NAMES[3] not in json.dumps(manifest)
    assert manifest["statistics"]["interactions"] == len(after.item)
    # The data still serve: prompts of the others, and another user may follow.
    assert list(prepare.load(config).builder(config).training_examples())
    with pytest.raises(UserError, match="forgotten before"):
        forget(config, NAMES[3])
    with pytest.raises(UserError, match="forgotten before"):
        forget(config, "forgotten-3")
    forget(config, NAMES[0])
    assert len(prepare.load(config).manifest["forgotten"]) == 2


def test_runs_that_saw_the_user_are_listed(original, tmp_path):
    config = configs.from_dict({**configs.to_dict(config_in(original)), "runs": str(tmp_path)})
    seed = configs.from_dict({**configs.to_dict(config), "instructions": {"seed": 5}})
    other = replace(config, data=replace(config.data, path=str(tmp_path / "another log")))
    (tmp_path / "set.yaml").write_text(configs.dump(config))
    mixture = configs.from_dict({"name": "mix", "mixture": {str(tmp_path / "set.yaml"): 1.0}})
    split = replace(config, data=replace(config.data, split=replace(config.data.split, learn_valid=True)))
    for name, settings in (("same", config), ("seed", seed), ("other", other), ("mix", mixture), ("refit", split)):
        (tmp_path / name / "checkpoints" / "20").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "100").mkdir()
        (tmp_path / name / "config.yaml").write_text(configs.dump(settings))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("no_such_key: 1\n")
    seen = runs_that_saw(config)
    names = ("mix", "old", "refit", "same", "seed")
    assert [(s.run.name, s.checkpoints) for s in seen] == [(n, () if n == "old" else ("20", "100")) for n in names]


def test_other_folders_that_hold_the_user_are_listed(original, tmp_path):
    shutil.copytree(original / "prepared", tmp_path / "prepared")
    config = configs.from_dict({**configs.to_dict(config_in(original)), "prepared": str(tmp_path / "prepared")})
    (tmp_path / "set.yaml").write_text(configs.dump(config))
    mixture = {"name": "mix", "prepared": str(tmp_path / "prepared"), "mixture": {str(tmp_path / "set.yaml"): 1.0}}
    mixed = prepare.prepare(configs.from_dict({**mixture, "model": {"vocab_size": 300}}), silent).folder
    write_named(tmp_path / "stranger")  # the same user ids, but other items
    for name in ("interactions", "items", "tags"):
        with (tmp_path / "stranger" / f"{name}.csv").open(newline="") as file:
            header, *rows = list(csv.reader(file))
        at = header.index("item_id")
        write_csv(Path(file.name), header, [(*r[:at], f"other-{r[at]}", *r[at + 1 :]) for r in rows])
    stranger = replace(config, name="stranger", data=replace(config.data, path=str(tmp_path / "stranger")))
    prepare.prepare(stranger, silent)
    again = replace(config, name="again", instructions=replace(config.instructions, seed=3))
    prepare.prepare(again, silent)
    gone = forget(config, NAMES[3])
    assert gone.folders == (again.prepared_dir, mixed)


def test_a_tag_that_no_prompt_can_say_is_in_no_prompt(original):
    """Of nothing but a slot's sign: an empty text, which every other text holds."""
    data = replace(prepare.load(config_in(original)).data, tags=[(3, 0, "\ufffc"), (3, 1, " Old  West"), (4, 1, "old")])
    assert _own_tags(data, 3) == {1: ["old west"]}


def test_words_of_the_user_leave_every_family(tmp_path):
    """Widenings answer with a wish, and some have no target by which it could be looked up."""
    write_named(tmp_path / "data")
    families = dict.fromkeys(("turn_around", "relatedness", "reasoning", "rerank_more", "pointwise_more"), 20.0)
    config = config_of(tmp_path, instructions={"search": 3.0, **families})
    prepare.prepare(config, silent)
    before = [e for e in of(config) if "zebra" in (e.prompt + e.answer).lower() and e.user != 3]
    assert any(e.target < 0 for e in before) and any("zebra" in e.answer.lower() for e in before)
    gone = forget(config, NAMES[3])
    assert not [e for e in of(config) if "zebra" in (e.prompt + e.answer).lower()]
    assert gone.worded_by == len(before)


def test_damaged_or_absent_data_are_left_alone(original, tmp_path):
    config = configs.from_dict({**configs.to_dict(config_in(original)), "prepared": str(tmp_path / "prepared")})
    with pytest.raises(DataError, match="no prepared data set"):
        forget(config, NAMES[3])
    shutil.copytree(original / "prepared", tmp_path / "prepared")
    (shard,) = (config.prepared_dir / "records").rglob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes, the manifest says"):
        forget(config, NAMES[3])
    assert prepare.load(config).data.user_ids == NAMES
    assert not [p for p in (tmp_path / "prepared").iterdir() if p.is_dir() and p.name != "set"]


def test_a_failure_half_way_leaves_the_old_folder(original, tmp_path, monkeypatch):
    shutil.copytree(original / "prepared", tmp_path / "prepared")
    config = configs.from_dict({**configs.to_dict(config_in(original)), "prepared": str(tmp_path / "prepared")})
    before = {p.relative_to(tmp_path): p.read_bytes() for p in config.prepared_dir.rglob("*") if p.is_file()}

    def full(*args, **how):
        raise OSError("no space left")

    monkeypatch.setattr("instructrec_jax.forget.records.write", full)
    with pytest.raises(OSError, match="no space"):
        forget(config, NAMES[3])
    assert before == {p.relative_to(tmp_path): p.read_bytes() for p in config.prepared_dir.rglob("*") if p.is_file()}
    assert [p.name for p in (tmp_path / "prepared").iterdir() if p.is_dir()] == ["set"]

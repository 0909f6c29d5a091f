"""Candidates out of a retriever's file: in the prepared data, and in sampled protocols."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instructrec_jax import prepare, run
from instructrec_jax.cases import frozen_negatives
from instructrec_jax.config import Config, EvaluateConfig
from instructrec_jax.data.records import Records
from instructrec_jax.data.schema import TEST, TRAIN, SplitData
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.evaluation.hard_negatives import list_name, read_lists
from instructrec_jax.evaluation.recommendations import write_recommendations
from instructrec_jax.forget import forget
from tests.tiny import tiny_config, write_slice


def most_popular(data: SplitData, file: Path, k: int = 60) -> Path:
    """A retriever's file: the most popular items, the same for everybody."""
    top = np.argsort(-data.train_popularity, kind="stable")[:k]
    users = np.arange(data.num_users)
    return write_recommendations(file, data, users, np.tile(top, (len(users), 1)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, prepare.Prepared]:
    tmp = tmp_path_factory.mktemp("hard")
    write_slice(tmp / "data")
    config = tiny_config(tmp)
    return config, prepare.prepare(config, lambda _: None)


def with_file(config: Config, file: Path) -> Config:
    settings = replace(config.instructions, negatives="file", negatives_file=str(file), rerank=1.0)
    return replace(config, name="hard", instructions=settings)


def test_prepared_data_hold_candidates_of_the_list(plain: tuple, tmp_path: Path) -> None:
    config, before = plain
    data = before.data
    file = most_popular(data, tmp_path / "popular.csv.gz")
    hard = with_file(config, file)
    said: list[str] = []
    prepared = prepare.prepare(hard, said.append)
    counts = prepared.manifest["negatives"]
    assert counts["listed"] > 0 and any("negatives: " in line and "listed" in line for line in said)
    top = set(np.argsort(-data.train_popularity, kind="stable")[:60].tolist())
    records = Records(prepared.records)
    examples = [e for e in records.__getitems__(range(len(records))) if e.task == "T3"]
    shown = [set(e.candidates) - {e.target} - top for e in examples]
    assert examples and sum(map(len, shown)) <= counts.get("uniform", 0)
    for example in examples:
        assert not (set(example.candidates) - {example.target}) & set(data.history(example.user).tolist())

    # Another content at the same place is another data set.
    first = hard.data_hash()
    most_popular(data, file, k=30)
    assert hard.data_hash() != first
    with pytest.raises(DataError, match="config hash"):
        prepare.load(hard)


def test_a_forgotten_user_has_no_list(plain: tuple, tmp_path: Path) -> None:
    config, before = plain
    hard = with_file(config, most_popular(before.data, tmp_path / "popular.parquet"))
    folder = prepare.prepare(hard, lambda _: None).folder
    forget(hard, before.data.user_ids[3])
    lists = np.load(folder / prepare.NEGATIVES)
    assert (lists[3] == -1).all() and (lists[4] >= 0).all()
    prepare.load(hard)


def test_what_a_file_says_of_others_is_counted(plain: tuple, tmp_path: Path) -> None:
    data = plain[1].data
    file = tmp_path / "lists.csv"
    user, item = data.user_ids[0], data.catalogue.item_ids[5]
    file.write_text(f"user_id,item_id,score\n{user},nowhere,3\n{user},{item},2\nnobody,{item},1\n")
    lists, found = read_lists(file, data)
    assert lists[0].tolist() == [-1, 5] and (lists[1:] == -1).all()
    assert found == f"lists of 1 of {data.num_users} users; 1 unknown users are left out; 1 unknown items are left out"
    file.write_text(f"user_id,item_id,score\n{user},nowhere,3\n")
    with pytest.raises(DataError, match="none of its 1 items"):
        read_lists(file, data)
    with pytest.raises(ConfigError, match="negatives_file"):
        read_lists("", data)


def test_a_protocol_on_hard_negatives(plain: tuple, tmp_path: Path) -> None:
    config, before = plain
    data = before.data
    file = most_popular(data, tmp_path / "popular.csv", k=data.num_items)
    assert list_name(file) == "popular"
    settings = EvaluateConfig(negatives="file", negatives_file=str(file))
    with run.session(replace(config, evaluate=settings)) as s:
        cases = data.cases(TEST)
        histories = s.prepared.data.histories(cases)
        name, negatives = frozen_negatives(s, cases, histories, 9)
        assert name.startswith("1+9 hard popular")
        order = np.argsort(-data.train_popularity, kind="stable")
        full = 0
        for row, (history, target) in enumerate(zip(histories, cases.target)):
            allowed = order[: 9 + 100][~np.isin(order[: 9 + 100], [*history, target])][:9]
            assert negatives[row, : len(allowed)].tolist() == allowed.tolist()
            assert len(set(negatives[row])) == 9 and not set(negatives[row]) & {*history, target}
            full += len(allowed) == 9
        assert (full == len(cases)) == ("uniform" not in name)


def test_beam_writes_the_same_bytes(plain: tuple, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    config, before = plain
    hard = with_file(config, most_popular(before.data, tmp_path / "popular.csv"))
    sums = []
    for engine in ("local", "beam"):
        manifest = prepare.prepare(hard, lambda _: None, engine=engine).manifest
        records = prepare.load(hard).records
        sums.append((manifest["negatives"], [f.read_bytes() for f in sorted(records.rglob("*record-*"))]))
        shutil.rmtree(hard.prepared_dir)
    assert sums[0] == sums[1] and before.data.split.min() == TRAIN

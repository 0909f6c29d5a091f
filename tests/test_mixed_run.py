"""Two shops and a library in one run, from their tables to the evaluation: nobody ranks another's items."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import evaluate, prepare, refit, run
from instructrec_jax.config import Config
from instructrec_jax.data.mixture import shifted
from instructrec_jax.data.records import Records
from instructrec_jax.data.schema import TEST
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.evaluation.report import write_report
from instructrec_jax.models.adapters import join
from instructrec_jax.recommend import recommend
from instructrec_jax.scoring import Request
from tests.datasets import write_csv
from tests.tiny import tiny_config

WEIGHTS = {"tools": 3.0, "toys": 1.0, "books": 0.0}
ITEMS = {"tools": 40, "toys": 25, "books": 30}
KINDS = ("steel", "copper", "paper", "glass", "wooden")


def write_tables(folder: Path, name: str, items: int, users: int = 20) -> None:
    """Users with 8 events each; the ids are the same in every set."""
    rng = np.random.default_rng(items)
    folder.mkdir(parents=True)
    rows = [(u, i, 4, 10 * n) for u in range(users) for n, i in enumerate(rng.permutation(items)[:8])]
    write_csv(folder / "interactions.csv", ("user_id", "item_id", "rating", "timestamp"), rows)
    titles = [(i, f"{KINDS[i % 5]} {name} number {i}", f"{KINDS[i % 5]}|{name}") for i in range(items)]
    write_csv(folder / "items.csv", ("item_id", "title", "genres"), titles)
    people = [(u, ("f", "m")[(u + items) % 2]) for u in range(users)]
    write_csv(folder / "users.csv", ("user_id", "gender"), people)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A prepared mixture; its sets' configs lie beside it."""
    tmp = tmp_path_factory.mktemp("mixture")
    files = {}
    for name, items in ITEMS.items():
        write_tables(tmp / name, name, items)
        one = tiny_config(tmp)
        clean = dataclasses.replace(one.data.clean, k_core=0)
        one = dataclasses.replace(
            one, name=name, data=dataclasses.replace(one.data, path=str(tmp / name), domain="products", clean=clean)
        )
        files[name] = tmp / f"{name}.yaml"
        files[name].write_text(configs.dump(one), encoding="utf-8")
        prepare.prepare(one, lambda _: None)
    plain = tiny_config(tmp, steps=4, eval_every=2)
    config = dataclasses.replace(
        plain,
        name="shops",
        mixture={str(files[name]): weight for name, weight in WEIGHTS.items()},
        data=configs.DataConfig(),
        instructions=configs.InstructionConfig(),
    )
    prepare.prepare(config, lambda _: None)
    return config


@pytest.fixture(scope="module")
def trained(mixture: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped half way and went on."""
    folder = tmp_path_factory.mktemp("runs") / "shops"
    half = dataclasses.replace(mixture, train=dataclasses.replace(mixture.train, steps=2))
    assert run.train_run(half, folder, lambda _: None).step == 2
    lines: list[str] = []
    memory = configs.ItemMemoryConfig(past=5, l2=30.0, weights=(4.0, 1.0, 1.0))
    config = dataclasses.replace(mixture, model=dataclasses.replace(mixture.model, item_memory=memory))
    assert run.train_run(config, folder, lines.append).step == 4
    assert "resumed from step 2" in lines
    return folder


# ----------------------------------------------------------------------------------------------------------- what is there


def test_the_sets_come_out_as_they_went_in(mixture: Config) -> None:
    prepared = prepare.load(mixture)
    assert prepared.data.num_items == sum(ITEMS.values())
    for config, part, _ in prepare.each_set(mixture, prepared):
        alone = prepare.load(mixture.members()[list(ITEMS).index(config.name)])
        for name in ("item", "offsets", "split", "rating", "time"):
            np.testing.assert_array_equal(getattr(part.data, name), getattr(alone.data, name))
        assert part.data.catalogue.table.equals(alone.data.catalogue.table)
        assert (part.data.user_ids, part.data.catalogue.item_ids) == (
            alone.data.user_ids,
            alone.data.catalogue.item_ids,
        )
        assert part.users.names == alone.users.names
        np.testing.assert_array_equal(part.users.index, alone.users.index)
        assert part.manifest["statistics"] == alone.manifest["statistics"]


def test_examples_stand_in_the_ratio_of_the_weights_and_in_one_set_each(mixture: Config) -> None:
    prepared = prepare.load(mixture)
    ends = [space.items[1] for space in prepared.sets]
    counts: Counter[str] = Counter()
    records = Records(prepared.records)
    for number in range(len(records)):
        example = records[number]
        shown = {*example.prompt_items, *example.answer_items, *example.candidates, example.target} - {-1}
        inside = {int(np.searchsorted(ends, item, side="right")) for item in shown}
        assert len(inside) == 1
        counts[prepared.sets[inside.pop()].name] += 1
    alone = {c.name: prepare.load(c).num_records for c in mixture.members()}
    total = alone["tools"] + alone["toys"]  # a set without a share adds nothing to an epoch
    assert counts == {"tools": round(0.75 * total), "toys": round(0.25 * total)}


# ------------------------------------------------------------------------------------------------------------ what is ranked


@pytest.mark.slow
def test_a_set_is_ranked_by_the_softmax_over_its_own_items(mixture: Config) -> None:
    config = dataclasses.replace(mixture, model=dataclasses.replace(mixture.model, rerank_head=True))
    with run.session(config) as every:
        params = join(*every.start())
        for part in every.sets():
            assert part.space is not None
            first, last = part.space.items
            cases = part.prepared.data.cases(TEST)
            prompts = part.sequential_prompts(cases)[:6]
            own, all_items = part.scorer(params), every.scorer(params)
            found = own.score_all(prompts)
            assert found.shape == (6, ITEMS[part.config.name])
            np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
            whole = all_items.score_all([shifted(p, part.space) for p in prompts])[:, first:last]
            expected = whole - np.logaddexp.reduce(whole, axis=1, keepdims=True)
            np.testing.assert_allclose(found, expected, atol=1e-4)
            candidates = [3, 0, 7]
            picked = own.score([Request(prompts[0], candidates)])[0]
            np.testing.assert_allclose(picked, found[0, candidates], atol=1e-4)
            reranked = own.score([Request(prompts[0], candidates)], "rerank")[0]
            there = [c + first for c in candidates]
            moved = all_items.score([Request(shifted(prompts[0], part.space), there)], "rerank")[0]
            np.testing.assert_allclose(reranked, moved, atol=1e-4)
            with pytest.raises(UserError, match=f"outside the catalogue of {last - first} items"):
                own.score([Request(prompts[0], [last - first])])


def test_items_of_a_set_without_a_share_have_their_content_alone(trained: Path) -> None:
    with run.trained(trained) as (s, params, _):
        books = next(space for space in s.prepared.sets if space.name == "books")
        table, bias = (np.asarray(params["params"][name]) for name in ("item_id", "item_bias"))
        assert s.prepared.data.train_popularity[slice(*books.items)].any()  # the set has training events
        assert not table[slice(*books.items)].any() and table[: books.items[0]].any()
        assert len(np.unique(bias[slice(*books.items)])) == 1


# --------------------------------------------------------------------------------------------------------- run, evaluation


def test_validation_is_the_mean_over_the_sets_that_train(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    valid = [line for line in lines if "valid_ndcg@10" in line]
    assert [line["step"] for line in valid] == [2, 4]
    for line in valid:
        own = {key: value for key, value in line.items() if key.startswith("valid_ndcg@10/")}
        assert own.keys() == {"valid_ndcg@10/tools", "valid_ndcg@10/toys"}
        assert line["valid_ndcg@10"] == pytest.approx(np.mean(list(own.values())))
    # Each has an item memory of its own; a set that nothing was learnt of has none.
    assert {p.parent.name for p in trained.glob("sets/*/item_memory.npz")} == {"tools", "toys"}


def test_evaluation_ranks_no_item_of_another_set(trained: Path) -> None:
    fast = (
        "--evaluate.wording_cases",
        "0",
        "--evaluate.likelihood_users",
        "0",
        "--evaluate.baselines",
        '["popularity"]',
    )
    payloads = evaluate.evaluate_sets(trained, fast, say=lambda _: None)
    assert [p["set"] for p in payloads] == list(ITEMS)
    for payload in payloads:
        name = payload["set"]
        table = payload["next_item"]
        assert (table["data"], table["items"], table["cases"]) == (name, ITEMS[name], 20)
        systems = {row["name"] for row in table["rows"]}
        assert systems == {"model", "popularity"} | ({"model without item memory"} if WEIGHTS[name] else set())
        written = json.loads((trained / f"evaluation/full_{name}.json").read_text(encoding="utf-8"))
        assert written["next_item"] == table
        lists = _lists(trained / f"evaluation/full_{name}_model.csv.gz")
        assert lists and {row["item_id"] for row in lists} <= {str(i) for i in range(ITEMS[name])}
    alone = evaluate.evaluate(trained, fast, set_name="toys", say=lambda _: None)
    assert _means(alone) == _means(payloads[1])
    page = write_report(trained).read_text(encoding="utf-8")
    assert all(f"{name}: Full ranking" in page for name in ITEMS) and "NDCG@10/toys" in page


def _means(payload: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row["metrics"]["ndcg@10"] for row in payload["next_item"]["rows"]}


def _lists(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_recommendations_come_from_the_set_that_is_named(trained: Path) -> None:
    answer = recommend(trained, user="3", set_name="toys", count=ITEMS["toys"])
    with run.trained(trained) as (s, _, _):
        data = s.one_set("toys").prepared.data
    user = data.user_ids.index("3")
    history = [data.catalogue.titles[i] for i in data.history(user, int(data.offsets[user + 1]))]
    assert answer["history"] == history
    assert {row["title"] for row in answer["items"]} == set(data.catalogue.titles) - set(history)


def test_what_needs_one_set_asks_for_its_name(trained: Path) -> None:
    with pytest.raises(UserError, match=r"shops is a mixture\n.*--set with one of tools, toys, books"):
        evaluate.evaluate(trained, say=lambda _: None)
    with pytest.raises(UserError, match=r"shops has no set 'toy' \(did you mean 'toys'"):
        evaluate.evaluate(trained, set_name="toy", say=lambda _: None)
    with pytest.raises(UserError, match="is a mixture, whose splits are those of its sets"):
        refit.refit_config(trained)


# --------------------------------------------------------------------------------------------------------------- settings


def test_settings_that_a_mixture_cannot_have(mixture: Config) -> None:
    files = list(mixture.mixture)
    with pytest.raises(ConfigError, match="at least one above 0"):
        prepare.prepare(dataclasses.replace(mixture, mixture=dict.fromkeys(files, 0.0)), lambda _: None)
    with pytest.raises(ConfigError, match="give each a name of its own"):
        dataclasses.replace(mixture, name="toys").members()
    with pytest.raises(ConfigError, match="domain beside it"):
        dataclasses.replace(mixture, data=configs.DataConfig(domain="games")).members()


def test_another_config_is_its_own_only_set(mixture: Config) -> None:
    one = mixture.members()[0]
    with run.session(one) as s:
        assert s.sets() == [s] and s.one_set() is s and s.one_set("tools") is s and s.sizes.spaces == ()
        np.testing.assert_array_equal(s.learnt, s.prepared.data.train_popularity)

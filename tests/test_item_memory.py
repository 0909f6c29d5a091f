"""What followed what: the closed form by hand, the links that are kept, and where they count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp

from instructrec_jax.config import ItemMemoryConfig
from instructrec_jax.data.schema import TEST, SplitData
from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.fit_memory import check_memory, ndcg
from instructrec_jax.instructions.example import Feature, InstructionExample
from instructrec_jax.retrieval.slit import SLIT, recent
from instructrec_jax.scoring.item_memory import ItemMemory, log_shares, strongest
from instructrec_jax.scoring.scorer import added
from tests.test_baselines import toy
from tests.test_recommendations import toy as split_toy

PRIOR = np.array([-1.0, -2.0, -3.0, -4.0], np.float32)
MEMORY = ItemMemory(sp.csr_matrix(np.arange(16, dtype=np.float32).reshape(4, 4)), 2, (2.0, 0.5, 0.25), PRIOR, 3.0)


def prompt(items: tuple[int, ...], task: str = "T2", intention: str = "I0") -> InstructionExample:
    return InstructionExample("x", "en", "P1", intention, task, "next-item", 0, "\ufffc" * len(items), items, "")


def one_user(events: int) -> SplitData:
    """Items 0, 1, 2, ...; the last is test, the one before it valid."""
    some = toy(items=events)
    labels = np.array([0] * (events - 2) + [1, 2], np.int8)
    return SplitData("one", ["u"], some.catalogue, np.array([0, events]), np.arange(events), labels)


def test_the_system_by_hand() -> None:
    """One user, events 0 1 2 | 3 | 4: past 2, future 2."""
    data = one_user(5)
    gram, cross = SLIT(past=2, future=2).system(data, include_valid=False)
    # Rows of X: event 0 has none before it; event 1 has item 0; event 2 has item 1 and, at distance 2, item 0.
    x = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0.5, 1, 0, 0, 0]])
    y = np.array([[1, 0.5, 0, 0, 0], [0, 1, 0.5, 0, 0], [0, 0, 1, 0, 0]])
    np.testing.assert_allclose(gram, x.T @ x, atol=1e-6)
    np.testing.assert_allclose(cross, x.T @ y, atol=1e-6)
    fitted = SLIT(l2=3.0, past=2, future=2).fit(data)
    weights = np.linalg.inv(x.T @ x + 3 * np.eye(5)) @ x.T @ y
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-6)
    np.testing.assert_allclose(fitted.score([np.array([4, 0, 1])])[0], weights[1] + weights[0] / 2, atol=1e-6)
    learnt, _ = SLIT(past=2, future=2).system(data, include_valid=True)
    assert learnt[2, 2] > 0 and learnt[3].sum() == 0  # the validation event is predicted now, and predicts nothing


def test_newest_events_weigh_by_distance() -> None:
    found = recent([np.array([3, 1, 2]), np.zeros(0, int), np.array([1, 1])], items=4, past=2).toarray()
    np.testing.assert_allclose(found, [[0, 0.5, 1, 0], [0, 0, 0, 0], [0, 1.5, 0, 0]])


def test_links_count_for_prompts_with_a_history_and_no_candidates() -> None:
    prompts = [prompt((0, 1)), prompt((0, 1), intention="I2"), prompt((0, 1), task="T3"), prompt(()), [1, 2, 3]]
    rows = MEMORY.links.toarray()
    one = rows[1] + rows[0] / 2
    np.testing.assert_allclose(MEMORY.scores(prompts), [2 * one, 0.25 * one, 0 * one, 0 * one, 0 * one])
    found = added(np.log(np.full((5, 4), 0.25)), [MEMORY.scores(prompts)])
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1)
    np.testing.assert_allclose(found[0] - found[0, 0], 2 * (one - one[0]), atol=1e-6)
    np.testing.assert_allclose(found[2], np.log(0.25))


def test_popularity_counts_where_a_prompt_tells_nothing() -> None:
    plain = prompt(())
    nothing = plain._replace(preference="P0")
    wish = nothing._replace(intention="I1")
    known = nothing._replace(features=(Feature(0, 1.0),))
    np.testing.assert_allclose(MEMORY.scores([nothing, wish, known, plain]), [3 * PRIOR, *np.zeros((3, 4))])
    shares = np.exp(log_shares(np.array([3, 0, 1])))
    np.testing.assert_allclose(shares, np.array([3.5, 0.5, 1.5]) / 5.5, rtol=1e-6)


def test_the_strongest_links_are_kept() -> None:
    weights = np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)
    kept = strongest(weights, 5).toarray()
    assert ((kept != 0).sum(axis=1) == 5).all()
    for row, all_of_it in zip(kept, weights):
        assert np.abs(row[row != 0]).min() >= np.abs(all_of_it[row == 0]).max()
        np.testing.assert_array_equal(row[row != 0], all_of_it[row != 0])
    np.testing.assert_array_equal(strongest(weights, 20).toarray(), weights)


def test_saved_and_read_again(tmp_path: Path) -> None:
    MEMORY.save(tmp_path / "m.npz")
    again = ItemMemory.load(tmp_path / "m.npz", 4)
    np.testing.assert_array_equal(again.links.toarray(), MEMORY.links.toarray())
    assert (again.past, again.weights, again.prior_weight) == (2, (2.0, 0.5, 0.25), 3.0)
    np.testing.assert_array_equal(again.prior, PRIOR)
    with pytest.raises(DataError, match="4 items; the catalogue has 5"):
        ItemMemory.load(tmp_path / "m.npz", 5)
    (tmp_path / "m.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="damaged"):
        ItemMemory.load(tmp_path / "m.npz", 4)
    np.savez(tmp_path / "m.npz", prior=PRIOR)
    with pytest.raises(DataError, match="not an item memory: no data, indices, indptr, past"):
        ItemMemory.load(tmp_path / "m.npz", 4)


def test_a_catalogue_that_is_too_large_is_named() -> None:
    data = toy(items=30)
    with pytest.raises(ConfigError, match="30 items need dense 30 x 30 matrices"):
        SLIT(max_items=20).fit(data)


def test_an_item_memory_that_could_not_be_fitted_is_refused_before_the_first_step() -> None:
    check_memory(ItemMemoryConfig(past=20), True, 25_000)
    with pytest.raises(ConfigError, match="at most 25,000 items, and there are 25,001"):
        check_memory(ItemMemoryConfig(past=20), True, 25_001)
    with pytest.raises(ConfigError, match="there is no item head"):
        check_memory(ItemMemoryConfig(past=20), False, 10)
    with pytest.raises(ConfigError, match="weights has 2 numbers"):
        check_memory(ItemMemoryConfig(past=20, weights=(1.0, 2.0)), True, 10)


def test_the_whole_ranking_counts_where_the_first_ten_say_nothing() -> None:
    """By hand: one target is 3rd of 40, the other 19th and then 14th, for the user has had two of the items above it."""
    data = split_toy(histories=((5, 6, 2), (7, 0, 20)), items=40)
    s, cases = SimpleNamespace(prepared=SimpleNamespace(data=data)), data.cases(TEST)
    scores = np.tile(-np.arange(40.0), (2, 1))
    found = ndcg(s, scores, cases)  # pyright: ignore[reportArgumentType]
    scores[1, 20] = -14.5
    better = ndcg(s, scores, cases)  # pyright: ignore[reportArgumentType]
    assert found["ndcg"] == pytest.approx((1 / np.log2(4) + 1 / np.log2(20)) / 2)
    assert found["ndcg@10"] == better["ndcg@10"] == pytest.approx(1 / np.log2(4) / 2)
    assert better["ndcg"] == pytest.approx((1 / np.log2(4) + 1 / np.log2(15)) / 2)

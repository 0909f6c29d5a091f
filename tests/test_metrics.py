"""Metrics against an independent library, against brute force over tie orders, and against their invariants."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from instructrec_jax.errors import UserError
from instructrec_jax.evaluation import metrics, slices

CUTOFFS = (1, 3, 5, 10, 20)


def random_case(seed, cases=40, items=30):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(items, dtype=np.float32), (cases, 1)), axis=1)  # all different
    target = rng.integers(0, items, cases)
    history = [rng.choice(items, rng.integers(0, 8), replace=False) for _ in range(cases)]
    return scores, target, [h[h != t] for h, t in zip(history, target)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_hr_ndcg_mrr_agree_with_ir_measures(seed):
    ir = pytest.importorskip("ir_measures")
    scores, target, history = random_case(seed)
    found = metrics.metrics_at(metrics.rank_of_target(scores, target, history), CUTOFFS)
    truth = {str(q): {str(t): 1} for q, t in enumerate(target)}
    run = {
        str(q): {str(i): float(s) for i, s in enumerate(row) if i not in set(history[q].tolist())}
        for q, row in enumerate(scores)
    }
    wanted = {"hr": ir.Success, "ndcg": ir.nDCG, "mrr": ir.RR}
    measures = {wanted[name] @ k: f"{name}@{k}" for name in wanted for k in CUTOFFS}
    count = 0
    for result in ir.iter_calc(list(measures), truth, run):
        ours = found[measures[result.measure]][int(result.query_id)]
        assert ours == pytest.approx(result.value, abs=1e-9), (result.measure, result.query_id)
        count += 1
    assert count == len(measures) * len(target)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_list_metrics_agree_with_ir_measures(seed):
    ir = pytest.importorskip("ir_measures")
    rng = np.random.default_rng(seed)
    lists = np.stack([rng.permutation(25)[:20] for _ in range(20)])
    relevant = [rng.choice(25, rng.integers(1, 12), replace=False) for _ in range(20)]
    found = metrics.list_metrics(lists, relevant, CUTOFFS)
    truth = {str(q): {str(i): 1 for i in r} for q, r in enumerate(relevant)}
    run = {str(q): {str(i): float(-place) for place, i in enumerate(row)} for q, row in enumerate(lists)}
    wanted = {"recall": ir.R, "hr": ir.Success, "ndcg": ir.nDCG, "mrr": ir.RR}
    measures = {wanted[name] @ k: f"{name}@{k}" for name in wanted for k in CUTOFFS}
    for result in ir.iter_calc(list(measures), truth, run):
        assert found[measures[result.measure]][int(result.query_id)] == pytest.approx(result.value, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int8, st.integers(1, 6), elements=st.integers(0, 2)), st.data())
def test_tie_rule_is_the_mean_over_all_tie_orders(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    found = metrics.metrics_at(metrics.rank_of_target(scores[None].astype(np.float32), np.array([target])), (1, 2, 4))
    places = []
    for order in itertools.permutations(range(len(scores))):  # a stable sort of a random order: a random tie order
        ranked = sorted(order, key=lambda i: -int(scores[i]))
        places.append(ranked.index(target) + 1)
    for k in (1, 2, 4):
        assert found[f"hr@{k}"][0] == pytest.approx(np.mean([p <= k for p in places]))
        assert found[f"ndcg@{k}"][0] == pytest.approx(np.mean([(p <= k) / math.log2(p + 1) for p in places]))
        assert found[f"mrr@{k}"][0] == pytest.approx(np.mean([(p <= k) / p for p in places]))


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int8, (6, 9), elements=st.integers(0, 3)), st.integers(0, 2**31))
def test_metrics_do_not_depend_on_the_order_of_the_catalogue(scores, seed):
    rng = np.random.default_rng(seed)
    scores, target = scores.astype(np.float32), rng.integers(0, 9, 6)
    history = [rng.integers(0, 9, 3) for _ in range(6)]  # may hold the target, and repeats
    order = rng.permutation(9)
    place = np.argsort(order)
    a = metrics.rank_of_target(scores, target, history)
    b = metrics.rank_of_target(scores[:, order], place[target], [place[h] for h in history])
    np.testing.assert_array_equal(a.greater, b.greater)
    np.testing.assert_array_equal(a.ties, b.ties)


def test_constant_scores_give_chance_not_zero_and_not_one():
    scores = np.zeros((3, 50), np.float32)
    found = metrics.metrics_at(metrics.rank_of_target(scores, np.array([0, 25, 49])), (10,))
    np.testing.assert_allclose(found["hr@10"], 10 / 50)
    np.testing.assert_allclose(found["ndcg@10"], sum(1 / math.log2(p + 1) for p in range(1, 11)) / 50)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=20))
def test_invariants(pairs):
    greater, ties = np.array(pairs).T
    found = metrics.metrics_at(metrics.TargetRank(greater, ties), CUTOFFS)
    for k in CUTOFFS:
        assert (found[f"mrr@{k}"] <= found[f"ndcg@{k}"] + 1e-12).all()  # 1/p <= 1/log2(p+1)
        assert (found[f"ndcg@{k}"] <= found[f"hr@{k}"] + 1e-12).all()
        assert (found[f"hr@{k}"] <= 1).all() and (found[f"mrr@{k}"] >= 0).all()
    for name in ("hr", "ndcg", "mrr"):
        for small, large in itertools.pairwise(CUTOFFS):
            assert (found[f"{name}@{small}"] <= found[f"{name}@{large}"] + 1e-12).all()
    np.testing.assert_allclose(found["hr@1"], found["ndcg@1"])


def test_history_is_left_out_but_the_target_never():
    scores = np.array([[5.0, 4, 3, 2, 1]])
    assert metrics.rank_of_target(scores, np.array([2])).greater[0] == 2
    assert metrics.rank_of_target(scores, np.array([2]), [np.array([0, 0, 4])]).greater[0] == 1
    assert metrics.rank_of_target(scores, np.array([2]), [np.array([0, 1, 2])]).greater[0] == 0
    mask = sp.csr_matrix(np.array([[1, 0, 1, 0, 0]]))
    assert metrics.rank_of_target(scores, np.array([2]), mask).greater[0] == 1
    assert metrics.rank_of_target(scores, np.array([2]), mask.astype(bool)).greater[0] == 1


def test_sampled_candidates():
    scores = np.array([[5.0, 4, 3, 2, 3], [0, 0, 0, 0, 0]])
    candidates = np.array([[0, 3, 4], [1, 2, -1]])
    ranks = metrics.rank_of_target(scores, np.array([2, 3]), candidates=candidates)
    assert ranks.greater.tolist() == [1, 0]
    assert ranks.ties.tolist() == [1, 2]
    # The target among the negatives, and a negative twice, count as if they were not there.
    ranks = metrics.rank_of_target(scores, np.array([2, 3]), candidates=np.array([[0, 0, 2], [3, -1, -1]]))
    assert ranks.greater.tolist() == [1, 0] and ranks.ties.tolist() == [0, 0]
    everyone = np.tile(np.arange(5), (2, 1))
    for field in ("greater", "ties"):
        np.testing.assert_array_equal(
            getattr(metrics.rank_of_target(scores, np.array([2, 3]), candidates=everyone), field),
            getattr(metrics.rank_of_target(scores, np.array([2, 3])), field),
        )


def test_infinite_scores_are_ordinary_and_nan_is_an_error():
    scores = np.array([[np.inf, 1, -np.inf, -np.inf], [0, 0, 0, np.nan]])
    assert metrics.rank_of_target(scores[:1], np.array([2])).ties.tolist() == [1]
    with pytest.raises(UserError, match=r"case 101: 1 of 4 scores are NaN \(first at item 3\)"):
        metrics.rank_of_target(scores, np.array([0, 0]), first_case=100)
    with pytest.raises(UserError, match="NaN"):
        metrics.top_lists(scores, 2)


@pytest.mark.parametrize(
    ("target", "exclude", "message"),
    [
        ([7], None, "target 7 is outside the catalogue of 4 items"),
        ([-1], None, "target -1"),
        ([0], [np.array([9])], "item 9"),
        ([0], [np.array([1]), np.array([2])], "2 histories to exclude for 1 cases"),
        ([0], sp.csr_matrix((1, 3)), r"\(1, 3\)"),
        ([0, 1], None, "do not match"),
    ],
)
def test_wrong_shapes_and_indices(target, exclude, message):
    with pytest.raises(UserError, match=message):
        metrics.rank_of_target(np.zeros((1, 4)), np.array(target), exclude)


def test_no_cases_and_bad_cutoffs():
    ranks = metrics.rank_of_target(np.zeros((0, 4)), np.zeros(0, int), [])
    assert len(ranks) == 0 and metrics.metrics_at(ranks, (10,))["hr@10"].shape == (0,)
    for cutoffs in ((), (0, 1)):
        with pytest.raises(UserError, match="cutoffs"):
            metrics.metrics_at(ranks, cutoffs)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int8, (4, 12), elements=st.integers(0, 4)), st.integers(1, 15), st.integers(0, 2**31))
def test_top_lists_equal_a_full_stable_sort(scores, k, seed):
    rng = np.random.default_rng(seed)
    history = [rng.integers(0, 12, rng.integers(0, 14)) for _ in range(4)]
    lists = metrics.top_lists(scores.astype(np.float32), k, history)
    for row, seen, ranked in zip(scores, history, lists):
        wanted = [i for i in np.argsort(-row.astype(int), kind="stable") if i not in set(seen.tolist())][:k]
        assert ranked.tolist() == wanted + [-1] * (k - len(wanted))


def test_rank_in_lists():
    lists = np.array([[3, 1, 3], [2, -1, -1]])
    ranks = metrics.rank_in_lists(lists, np.array([3, 5]))
    assert ranks.greater.tolist() == [0, metrics.NOT_RANKED]
    assert metrics.metrics_at(ranks, (3,))["hr@3"].tolist() == [1, 0]
    assert np.isinf(ranks.expected_rank[1])


def test_list_metrics_by_hand():
    lists = np.array([[7, 7, 2, -3, 5]])  # a repeat and an unknown item fill places and earn nothing
    found = metrics.list_metrics(lists, [np.array([7, 5, 9])], (2, 5))
    assert found["recall@2"][0] == pytest.approx(1 / 3)
    assert found["recall@5"][0] == pytest.approx(2 / 3)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert found["ndcg@5"][0] == pytest.approx((1 + 1 / math.log2(6)) / ideal)
    assert found["ndcg@2"][0] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    with pytest.raises(UserError, match="case 1 has no relevant item"):
        metrics.list_metrics(np.zeros((2, 3), int), [np.array([1]), np.array([], int)], (3,))


def test_list_quality_by_hand():
    popularity = np.array([6, 1, 0, 0])
    lists = np.array([[0, 1, 1, -3], [-2, -2, -1, -1], [-1, -1, -1, -1], [2, 3, 0, 1]])
    found = metrics.list_quality(lists, popularity, 4)
    np.testing.assert_allclose(found["popularity@4"], [8 / 3, np.nan, np.nan, 7 / 4])
    np.testing.assert_allclose(found["out_of_catalogue@4"], [1 / 4, 1, np.nan, 0])
    np.testing.assert_allclose(found["duplicate@4"], [1 / 4, 0, np.nan, 0])  # -2 has no identity
    np.testing.assert_allclose(found["short@4"], [0, 1, 1, 0])
    bits = -np.log2((popularity + 1) / 11)
    np.testing.assert_allclose(found["novelty@4"][[0, 3]], [(bits[0] + 2 * bits[1]) / 3, bits.mean()])
    with pytest.raises(UserError, match="k = 5"):
        metrics.list_quality(lists, popularity, 5)


def test_coverage_gini_and_lorenz_agree():
    assert metrics.gini(np.full(10, 3)) == pytest.approx(0)
    assert metrics.gini(np.array([0, 0, 0, 5])) == pytest.approx(3 / 4)
    assert math.isnan(metrics.gini(np.zeros(4)))
    assert metrics.coverage(np.array([0, 2, 0, 1])) == 0.5
    counts = np.random.default_rng(0).poisson(1.0, 400)
    x, y = slices.lorenz(counts, points=len(counts) + 1)
    assert metrics.gini(counts) == pytest.approx(1 - 2 * np.trapezoid(y, x), abs=1e-9)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, pytest.approx(1))
    assert (np.diff(y) >= 0).all() and (y <= x + 1e-12).all()
    assert metrics.exposure(np.array([[0, 2, -1], [2, -3, 9]]), 4).tolist() == [1, 0, 2, 0]
    assert metrics.exposure(np.array([[0, 2, -1], [2, -3, 9]]), 4, k=1).tolist() == [1, 0, 1, 0]


def test_heat_map_counts_every_case_once():
    rng = np.random.default_rng(1)
    values, length, popularity = rng.random(300), rng.integers(1, 60, 300), rng.geometric(0.05, 300)
    heat = slices.heat_map(values, length, popularity)
    assert heat.count.sum() == 300
    assert np.nansum(heat.mean * heat.count) == pytest.approx(values.sum())
    assert heat.mean.shape == (len(heat.rows), len(heat.columns))
    fixed = slices.heat_map(values, length, popularity, length_edges=(5, 6, 20), popularity_edges=(1,))
    assert fixed.rows == ["5", "6-19", "20+"] and fixed.columns == ["1+"]
    assert fixed.count[0, 0] == (length <= 5).sum()  # below the first edge falls into the first bucket
    assert fixed.row_mean[2] == pytest.approx(values[length >= 20].mean())
    alike = slices.heat_map(values, np.full(300, 7), popularity)
    assert alike.rows == ["7+"]
    with pytest.raises(UserError, match="ascend"):
        slices.heat_map(values, length, popularity, length_edges=(5, 5))
    with pytest.raises(UserError, match="300, 3, 300"):
        slices.heat_map(values, length[:3], popularity)

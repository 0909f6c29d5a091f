"""Intervals and tests: seeded, over users, with the right coverage and level; and the result object built on them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrec_jax.errors import DataError, UserError
from instructrec_jax.evaluation import intervals, metrics
from instructrec_jax.evaluation.table import EvaluationResult, Row


def test_interval_is_seeded_and_near_the_normal_one():
    values = np.random.default_rng(0).random(800)
    found = intervals.bootstrap_mean(values, seed=3)
    assert found == intervals.bootstrap_mean(values, seed=3)
    assert found != intervals.bootstrap_mean(values, seed=4)
    half = 1.96 * values.std() / math.sqrt(800)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    bca = intervals.bootstrap_mean(values, seed=3, method="BCa")
    assert bca.low == pytest.approx(found.low, abs=0.1 * half)


def test_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        found = intervals.bootstrap_mean(rng.random(150) < 0.2, resamples=400, seed=seed)
        hits += found.low <= 0.2 <= found.high
    assert 0.89 <= hits / 200 <= 0.99  # the binomial 99.9 % range around 0.95


def test_cases_of_one_user_count_as_one():
    user = np.array([0, 0, 0, 1, 2])
    values = np.array([1.0, 0, 0.5, 0, np.nan])
    np.testing.assert_allclose(intervals.per_user(values, user), [0.5, 0])
    found = intervals.bootstrap_mean(values, user)
    assert found.mean == pytest.approx(0.25) and found.users == 2
    # The same user a hundred times over gives no narrower interval than once.
    base = np.random.default_rng(2).random(60)
    once = intervals.bootstrap_mean(base)
    often = intervals.bootstrap_mean(np.repeat(base, 100), np.repeat(np.arange(60), 100))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_degenerate_samples():
    alike = intervals.bootstrap_mean(np.full(7, 0.1))
    assert (alike.mean, alike.low, alike.high, alike.users) == (0.1, 0.1, 0.1, 7)
    assert intervals.bootstrap_mean(np.zeros(7), method="BCa").high == 0
    one = intervals.bootstrap_mean(np.array([0.4]))
    assert one.mean == 0.4 and math.isnan(one.low) and one.users == 1
    none = intervals.bootstrap_mean(np.array([np.nan, np.nan]), np.array([0, 1]))
    assert math.isnan(none.mean) and none.users == 0


def test_many_metrics_at_once_equal_one_at_a_time():
    rng = np.random.default_rng(4)
    values = {
        "a": rng.random(90),
        "b": rng.random(90),
        "gap": np.where(rng.random(90) < 0.2, np.nan, 1.0),
        "c": np.ones(90),
    }
    together = intervals.bootstrap_means(values)
    assert list(together) == list(values)
    for name, column in values.items():
        alone = intervals.bootstrap_mean(column)
        assert (together[name].low, together[name].high) == pytest.approx((alone.low, alone.high))


def test_batches_do_not_change_an_interval(monkeypatch):
    values = np.random.default_rng(5).random(50)
    whole = intervals.bootstrap_mean(values, resamples=300)
    monkeypatch.setattr(intervals, "_BATCH_NUMBERS", 50 * 40)
    assert intervals.bootstrap_mean(values, resamples=300) == whole


def test_paired_test_is_exact_for_few_differences():
    a = np.array([1.0, 1, 1, 1, 1, 0.5, 0.5])
    b = np.array([0.0, 0, 0, 0, 0, 0.5, 0.5])
    found = intervals.paired_test(a, b)
    assert found.p == pytest.approx(2 / 2**5)  # of 32 sign patterns two are as extreme
    assert found.changed == 5 and found.difference == pytest.approx(5 / 7)
    assert intervals.paired_test(b, a).difference == pytest.approx(-5 / 7)
    assert intervals.paired_test(a, a).p == 1
    assert intervals.paired_test(np.array([1.0, 0, 0]), np.zeros(3)).p == 1  # one difference proves nothing


def test_paired_test_level_and_power():
    rng = np.random.default_rng(6)
    under_null = [
        intervals.paired_test(*rng.random((2, 80)), resamples=300, interval_resamples=50).p for _ in range(150)
    ]
    assert np.mean(np.array(under_null) < 0.05) < 0.12
    a = rng.random(300)
    better = intervals.paired_test(a + 0.05 + 0.1 * rng.standard_normal(300), a)
    assert better.p < 0.001 and better.low > 0


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05])
def test_paired_test_of_many_users_is_the_limit_of_the_sampled_one(shift, monkeypatch):
    rng = np.random.default_rng(5)
    a, b = rng.choice([0.0, 0.4, 0.6, 1.0], (2, 1500))
    sampled = intervals.paired_test(a + shift, b)
    monkeypatch.setattr(intervals, "_MANY", 1000)
    # Ten thousand samples give p with a standard deviation of at most 0.01.
    assert intervals.paired_test(a + shift, b).p == pytest.approx(sampled.p, abs=0.015)


def test_paired_test_wants_the_same_cases():
    with pytest.raises(UserError, match=r"\(3,\) and \(4,\)"):
        intervals.paired_test(np.zeros(3), np.zeros(4))
    with pytest.raises(UserError, match="users"):
        intervals.bootstrap_mean(np.zeros(3), np.zeros(4))


# ----------------------------------------------------------------------------------------------------------- the table


def rows(cases=60, items=40, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, items, cases)
    out = []
    for name, skill, baseline in (("model", 2.0, False), ("good", 1.0, True), ("bad", 0.0, True)):
        scores = rng.standard_normal((cases, items))
        scores[np.arange(cases), target] += skill
        out.append(
            Row.from_ranks(
                name,
                np.arange(cases),
                metrics.rank_of_target(scores, target),
                (1, 10),
                lists=metrics.top_lists(scores, 10),
                baseline=baseline,
                seconds_fit=0.5,
                notes={"n": np.int64(3)},
            )
        )
    return out, rng.integers(0, 9, items)


def test_result_has_intervals_and_compares_with_the_best_baseline():
    systems, popularity = rows()
    result = EvaluationResult.build(systems, popularity, protocol="full", data="toy", resamples=200)
    assert (result.cases, result.users, result.items) == (60, 60, 40)
    for summary, row in zip(result.rows, systems):
        estimate = summary.metrics["ndcg@10"]
        assert estimate.mean == pytest.approx(row.values["ndcg@10"].mean())
        assert estimate.low < estimate.mean < estimate.high
        assert 0 < summary.metrics["coverage@10"].mean <= 1 and summary.metrics["coverage@10"].low is None
    found = {(c.name, c.metric): c for c in result.comparisons}
    assert {c.name for c in result.comparisons} == {"model"}
    ndcg = found["model", "ndcg@10"]
    assert ndcg.baseline == "good" and ndcg.p < 0.05 and ndcg.low > 0
    assert result.means()["model"]["ndcg@10"] == result.row("model").metrics["ndcg@10"].mean
    table = result.markdown()
    assert "| model | **" in table and table.count("\n") == 4
    with pytest.raises(UserError, match="there are model, good, bad"):
        result.row("nobody")


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_result_survives_json(seed):
    systems, popularity = rows(cases=12, seed=seed)
    systems[0].values["never"] = np.full(12, np.nan)
    result = EvaluationResult.build(systems, popularity, protocol="1+9 uniform seed 0", data="toy", resamples=50)
    text = result.dumps()
    assert "NaN" not in text
    again = EvaluationResult.from_json(json.loads(text))
    assert again.to_json() == result.to_json() and again.protocol == "1+9 uniform seed 0"
    assert again.row("model").metrics["never"].mean is None


def test_result_refuses_what_does_not_fit():
    systems, popularity = rows(cases=12)
    other, _ = rows(cases=11)
    with pytest.raises(UserError, match="12"):
        EvaluationResult.build([systems[0], other[1]], popularity, protocol="full", data="toy")
    with pytest.raises(UserError, match="share a name"):
        EvaluationResult.build([systems[0], systems[0]], popularity, protocol="full", data="toy")
    with pytest.raises(UserError, match="at least one"):
        EvaluationResult.build([], popularity, protocol="full", data="toy")
    with pytest.raises(DataError, match="format 99"):
        EvaluationResult.from_json({"format": 99})
    with pytest.raises(DataError, match="rows"):
        EvaluationResult.from_json({"format": 1})

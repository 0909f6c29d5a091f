"""The baselines that are trained by gradients: what they learn, what they may not see, their loss, their parameters on disk."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from instructrec_jax import retrieval
from instructrec_jax.data.schema import TEST, TRAIN, VALID, Catalogue, SplitData
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.evaluation import metrics
from instructrec_jax.models.heads import Output
from instructrec_jax.retrieval.base import Budget
from instructrec_jax.retrieval.neural import encoders, fitting
from instructrec_jax.retrieval.neural.sequences import batches, newest, windows

ITEMS, EVENTS = 24, 8
SMALL = {"gmf": {"factors": 8}, "mlp": {"factors": 8}, "neumf": {"factors": 8}}
SMALL |= {
    name: {"width": 16, "layers": 1, "length": 8, "dropout": 0.0, "learning_rate": 1e-2}
    for name in ("gru4rec", "sasrec")
}
RATES = {name: {"learning_rate": 1e-2, "batch_size": 128} for name in ("gmf", "mlp", "neumf")}


def circle(users: int = 96) -> SplitData:
    """Users walk around a circle of items from a place of their own: all items are alike popular, the next one is certain."""
    start = np.random.default_rng(0).integers(0, ITEMS, users)
    ids = [f"i{i}" for i in range(ITEMS)]
    return SplitData(
        "circle",
        [f"u{u}" for u in range(users)],
        Catalogue(ids, ids, pa.table({"item_id": ids})),
        np.arange(users + 1) * EVENTS,
        ((start[:, None] + np.arange(EVENTS)) % ITEMS).ravel(),
        np.tile([TRAIN] * (EVENTS - 2) + [VALID, TEST], users),
    )


def make(name: str, **options: object):
    options = {**SMALL[name], **RATES.get(name, {}), **options}
    return retrieval.make(name, **{"budget": Budget(epochs=30, patience=12), **options})


def ndcg(recommender: retrieval.Recommender, data: SplitData, known: bool = True) -> float:
    cases = data.cases(TEST)
    seen = [data.history(int(u), int(e)) for u, e in zip(cases.user, cases.end)]
    ranks = metrics.rank_of_target(recommender.score(seen, cases.user if known else None), cases.target, seen)
    return float(metrics.metrics_at(ranks, (10,))["ndcg@10"].mean())


@pytest.mark.parametrize("name", ["gmf", "mlp", "neumf", "gru4rec", "sasrec"])
def test_it_learns_what_popularity_cannot(name: str) -> None:
    """Neighbours on the circle are known by who has them; which of the two comes next only by the order."""
    data = circle()
    recommender = make(name)
    with pytest.raises(UserError, match="not fitted"):
        recommender.score([np.array([0])])
    recommender.fit(data, include_valid=True)
    assert ndcg(retrieval.make("popularity").fit(data, True), data) < 0.4
    least = 0.95 if name in ("gru4rec", "sasrec") else 0.6
    assert ndcg(recommender, data) > least and ndcg(recommender, data, known=False) > least
    assert recommender.epochs == int(np.argmax(recommender.curve)) + 1 <= 30

    histories = [np.array([0, 1, 2]), np.zeros(0, np.int64), np.array([5])]
    scores = recommender.score(histories)
    assert scores.shape == (3, ITEMS) and scores.dtype == np.float32 and np.isfinite(scores).all()
    np.testing.assert_allclose(scores[2:], recommender.score(histories[2:]), rtol=1e-5, atol=1e-6)
    again = make(name).restore(recommender.arrays())
    np.testing.assert_array_equal(
        again.score(histories, np.array([0, 1, 2])), recommender.score(histories, np.arange(3))
    )
    with pytest.raises(UserError, match="holds item 24"):
        recommender.score([np.array([ITEMS])])


@pytest.mark.parametrize("name", ["neumf", "sasrec"])
def test_a_seed_gives_one_result_and_later_events_are_not_learnt(name: str) -> None:
    data = circle(24)
    hidden = replace(data, item=np.where(data.split == TEST, 0, data.item))
    histories = [np.array([i]) for i in range(ITEMS)]

    def scores(of: SplitData, include_valid: bool, seed: int = 0) -> np.ndarray:
        more = {"dropout": 0.2} if name == "sasrec" else {}
        return make(name, budget=Budget(seed=seed), epochs=2, **more).fit(of, include_valid).score(histories)

    first = scores(data, True)
    np.testing.assert_array_equal(first, scores(hidden, True))
    assert not np.array_equal(first, scores(data, True, seed=1))
    later = replace(data, item=np.where(data.split >= VALID, 0, data.item))
    np.testing.assert_array_equal(scores(data, False), scores(later, False))
    assert not np.array_equal(first, scores(later, True))


def model_of(kind: type[encoders.Encoder], length: int = 6) -> tuple[encoders.Encoder, dict]:
    model = kind(items=128, width=8, layers=2, heads=2, length=length, dropout=0.3)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, length), jnp.int32))


@pytest.mark.parametrize("kind", [encoders.SASRecEncoder, encoders.GRU4RecEncoder])
def test_a_later_event_changes_nothing_earlier(kind: type[encoders.Encoder]) -> None:
    with fitting.one_device():
        model, variables = model_of(kind)
        ids = np.array([[0, 0, 5, 9, 2, 7]], np.int32)
        other = ids.copy()
        other[0, 4] = 30
        read = jax.jit(lambda x: model.apply(variables, x).hidden)  # pyright: ignore
        a, b = (np.asarray(read(x)) for x in (ids, other))
        np.testing.assert_array_equal(a[:, :4], b[:, :4])
        assert np.abs(a[:, 4:] - b[:, 4:]).max(axis=(0, 2)).min() > 1e-4
        shorter = np.asarray(read(np.where(ids == 5, 0, ids)))
        assert np.isfinite(a).all() and np.abs(shorter[:, 3:] - a[:, 3:]).max() > 1e-4


def test_sasrec_is_the_papers_arithmetic() -> None:
    """One layer, one head, in NumPy: arXiv 1808.09781, equations 1 to 5."""
    with fitting.one_device():
        model = encoders.SASRecEncoder(items=128, width=8, layers=1, heads=1, length=5, dropout=0.5)
        variables = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 5), jnp.int32))
        ids = np.array([[0, 4, 7, 1, 9]], np.int32)
        ours = np.asarray(jax.jit(lambda x: model.apply(variables, x).hidden)(ids))[0]  # pyright: ignore
    p = {k: np.asarray(v, np.float64) if not isinstance(v, dict) else v for k, v in variables["params"].items()}

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    x = np.where((ids[0] > 0)[:, None], p["items"][np.maximum(ids[0] - 1, 0)] * np.sqrt(8), 0) + p["positions"]
    q, k, v = norm(x) @ p["query_0"][:, 0], x @ p["key_0"][:, 0], x @ p["value_0"][:, 0]
    scores = np.where(np.tril(np.ones((5, 5))) * (ids > 0), q @ k.T / np.sqrt(8), -np.inf)
    scores[0, 0] = 0  # padding sees itself
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    x = x + weights / weights.sum(-1, keepdims=True) @ v @ p["output_0"][0]
    x = x + np.maximum(norm(x) @ p["up_0"], 0) @ p["down_0"]
    np.testing.assert_allclose(ours, norm(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [1 << 25, 2 * 128])
def test_the_loss_is_cross_entropy_over_the_catalogue(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy, with all scores at one time and with those of one place at a time; padded items have no probability."""
    monkeypatch.setattr(encoders, "_LOGITS", most)
    rng, count = np.random.default_rng(0), 100
    hidden, table = rng.normal(size=(2, 6, 8)).astype(np.float32), rng.normal(size=(128, 8)).astype(np.float32)
    bias = rng.normal(size=128).astype(np.float32)
    targets = np.array([[0, 0, 3, 100, 7, 9], [1, 2, 0, 50, 60, 0]], np.int32)
    with fitting.one_device():
        mesh = jax.sharding.get_mesh()
        put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
        rows = ("replica", "fsdp")
        vectors = put(table, "tensor", None)
        out = Output(put(hidden, rows, None, None), vectors, None, vectors, put(bias, "tensor"), ())  # pyright: ignore
        found = float(jax.jit(encoders.loss, static_argnums=2)(out, put(targets, rows, None), count))
    logits = (hidden.astype(np.float64) @ table.T + bias)[..., :count]
    log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.mean([log_prob[b, s, targets[b, s] - 1] for b, s in zip(*np.nonzero(targets))])
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("length", [1, 3, 5, 20])
def test_windows_hold_every_step_once(length: int, seed: int | None) -> None:
    lengths = [4, 1 + 2, 23, 9]
    offsets = np.cumsum([0, *lengths])
    item = np.arange(offsets[-1]) % ITEMS
    split = np.concatenate([[TRAIN] * (n - 2) + [VALID, TEST] for n in lengths])
    data = replace(circle(4), offsets=offsets, item=item, split=split)
    rng = None if seed is None else np.random.default_rng(seed)
    inputs, targets = windows(data, True, length, rng)
    assert inputs.shape == targets.shape and inputs.shape[1] == length
    assert ((inputs > 0) == (targets > 0)).all() and (inputs > 0).any(axis=1).all()
    found = sorted(zip(inputs[inputs > 0], targets[targets > 0]))
    users = [item[a : b - 1] + 1 for a, b in itertools.pairwise(offsets)]
    assert found == sorted((x, y) for events in users for x, y in itertools.pairwise(events))
    for row in inputs:  # padding on the left, and the user's order
        assert (np.diff(row > 0) >= 0).all()
        assert (np.diff(row[row > 0]) % ITEMS == 1).all()
    if seed is None:
        assert len(inputs) == sum(-(-(len(events) - 1) // length) for events in users)


def test_batches_have_one_size_and_histories_their_newest_events() -> None:
    rows = np.arange(1, 8).reshape(7, 1)
    found = list(batches([rows, rows * 2], 3))
    assert [len(a) for a, _ in found] == [3, 3, 3] and found[2][1].ravel().tolist() == [14, 0, 0]
    shuffled = np.concatenate([a for (a,) in batches([rows], 3, np.random.default_rng(0))]).ravel()
    assert sorted(shuffled) == [0, 0, *range(1, 8)] and shuffled[:7].tolist() != list(range(1, 8))
    assert newest([np.array([1, 2, 3]), np.array([4])], 2, 9).tolist() == [[3, 4], [0, 5]]


def test_early_stopping_keeps_the_best_and_counts_from_it() -> None:
    values = [0.1, 0.3, 0.2, 0.3, 0.1, 0.9]

    def training(include_valid: bool) -> tuple:
        return ({"w": np.array(100 if include_valid else 0)},), lambda state, n: ({"w": state[0]["w"] + 1},)

    validate = lambda params: values[int(params["w"]) - 1]  # noqa: E731
    budget = Budget(epochs=6, patience=3)
    params, epochs, curve = fitting.fitted(training, validate, budget, include_valid=False, epochs=None)
    assert (int(params["w"]), epochs, curve) == (2, 2, values[:5])
    params, epochs, curve = fitting.fitted(training, validate, budget, include_valid=True, epochs=None)
    assert (int(params["w"]), epochs, curve) == (102, 2, values[:5])
    params, epochs, curve = fitting.fitted(training, validate, budget, include_valid=True, epochs=4)
    assert (int(params["w"]), epochs, curve) == (104, 4, [])


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "neumf"])
def test_settings_that_do_not_fit_are_refused(name: str) -> None:
    wrong = [{"layers": 0}] + ([{"heads": 3}, {"dropout": 1.0}] if name == "sasrec" else [])
    for options in wrong:
        with pytest.raises(ConfigError):
            retrieval.make(name, **options)

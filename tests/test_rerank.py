"""The re-ranking head: the formula, its loss, and the scorer's method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from instructrec_jax import prepare, run
from instructrec_jax.config import Config, MeshConfig, ModelConfig
from instructrec_jax.errors import UserError
from instructrec_jax.models.heads import Output, rerank_logits
from instructrec_jax.models.language_model import init_variables, item_logits
from instructrec_jax.scoring import Request
from instructrec_jax.training import loss as losses
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import init_model
from tests.tiny import NUM_ITEMS, SIZES, content, model_of, on_mesh, random_batch, tiny_config, write_slice
from tests.variants import some

CONFIG = ModelConfig(width=32, heads=4, kv_heads=2, head_size=8, mlp_width=32, rerank_head=True, item_dropout=0.0)


def with_head(config: Config) -> Config:
    return replace(config, model=replace(config.model, rerank_head=True))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[run.Session, dict]]:
    tmp = tmp_path_factory.mktemp("rerank")
    write_slice(tmp / "data")
    config = with_head(tiny_config(tmp))
    prepare.prepare(config, lambda _: None)
    with run.session(config) as s:
        params = init_model(config, s.arch, s.sizes, s.content, 3)[0]
        own = params["params"]
        bias = np.random.default_rng(0).normal(size=own["rerank_bias"].shape).astype(np.float32)
        own["rerank_bias"] = jax.device_put(bias, own["rerank_bias"].sharding)
        yield s, params


def test_two_users_and_three_items_by_hand() -> None:
    """θᵀσ(f_i + g_u) + β_i, worked out with numbers that fit on paper."""
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        spread = jax.NamedSharding(jax.sharding.get_mesh(), P("tensor", None))
        vectors = jax.device_put(jnp.asarray([[0.0, 0.0], [np.log(3), 0.0], [0.0, -np.log(3)]], jnp.float32), spread)
        bias = jax.device_put(jnp.asarray([0.0, 0.5, 1.0]), jax.NamedSharding(jax.sharding.get_mesh(), P("tensor")))
        out = Output(vectors, vectors, None, vectors, bias, None, None, jnp.asarray([1.0, 2.0]), bias)  # pyright: ignore[reportArgumentType]
        users = jnp.asarray([[[0.0, 0.0]], [[-np.log(3), np.log(3)]]], jnp.float32)
        found = rerank_logits(users, jnp.asarray([[[0, 1, 2]], [[2, 0, 1]]]), out)
    # σ(0) = 1/2, σ(ln 3) = 3/4, σ(-ln 3) = 1/4
    first = [1 / 2 + 2 / 2, 3 / 4 + 2 / 2 + 0.5, 1 / 2 + 2 / 4 + 1]
    second = [1 / 4 + 2 / 2 + 1, 1 / 4 + 2 * 3 / 4, 1 / 2 + 2 * 3 / 4 + 0.5]
    np.testing.assert_allclose(found[:, 0], [first, second], atol=1e-6)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("teacher", some([0.0, 0.4, 1.0], 0.4))
def test_the_loss_is_the_sum_over_the_hardest_candidates(teacher: float, mesh: tuple[int, int, int]) -> None:
    """−Σ R log P with NumPy, position by position."""
    rows, length, count = 8, 16, 6
    batch = random_batch(rows, length)
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])):
        model = model_of(CONFIG)
        variables = jax.jit(lambda k: init_variables(model.arch, SIZES, CONFIG, k))(jax.random.key(0))
        on = on_mesh(batch)
        out = jax.jit(model.apply)(variables, on, content())
        sums = jax.jit(lambda o, b: losses.rerank_loss(o, b, NUM_ITEMS, count, teacher, 4))(out, on)
        matching = np.asarray(item_logits(out.hidden, out, NUM_ITEMS), np.float64)
        hidden, vectors = np.asarray(out.hidden, np.float64), np.asarray(out.item_vectors, np.float64)
        direction, bias = np.asarray(out.rerank_direction, np.float64), np.asarray(out.rerank_bias, np.float64)
    expected, places = 0.0, np.argwhere(batch["item_target"] > 0)
    for b, s in places:
        target = batch["item_target"][b, s] - 1
        others = [i for i in np.argsort(-matching[b, s]) if i != target][: count - 1]
        listed = [target, *others]
        score = [direction @ (1 / (1 + np.exp(-(vectors[i] + hidden[b, s])))) + bias[i] for i in listed]
        log_p = score - np.logaddexp.reduce(score)
        r = np.exp(matching[b, s][listed] - np.logaddexp.reduce(matching[b, s][listed]))
        expected -= (1 - teacher) * log_p[0] + teacher * (r * log_p).sum()
    assert float(sums.count) == len(places)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)


def test_the_teacher_does_not_learn_from_its_pupil() -> None:
    """The matching head's own parameter, θ_i, gets no gradient from the re-ranking loss."""
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        model = model_of(CONFIG)
        variables = init_variables(model.arch, SIZES, CONFIG, jax.random.key(0))
        batch, features = on_mesh(random_batch(2, 8)), content()

        def loss(params: dict) -> jax.Array:
            out = model.apply({"params": params}, batch, features)
            return losses.rerank_loss(out, batch, NUM_ITEMS, 5, 0.5, 8).loss

        grads = jax.jit(jax.grad(loss))(variables["params"])
    assert not np.asarray(grads["item_bias"]).any()
    for name in ("rerank_direction", "rerank_bias", "item_id"):
        assert np.abs(np.asarray(grads[name])).max() > 1e-4


def test_scores_are_the_formula(parts: tuple) -> None:
    s, params = parts
    scorer = s.scorer(params, batch_size=4)
    prompts = [s.builder.recommend_prompt(list(range(n % 5))) for n in range(7)]
    lists = [[3, 1, 3], [], "all", [5], [0, 2, 4, 6], list(range(150)), [1, 0]]
    scores = scorer.score([Request(p, c) for p, c in zip(prompts, lists)], "rerank")
    hidden = []
    for group in scorer.runner.read([scorer.reader.prompt(p) for p in prompts]):
        hidden += [(int(i), np.asarray(group[1].hidden)[row, 0]) for row, i in enumerate(group[0])]
    own = params["params"]
    vectors = np.asarray(s.content @ np.asarray(own["item_content"]) + np.asarray(own["item_id"]))
    for number, state in hidden:
        wanted = lists[number]
        items = np.arange(s.prepared.data.num_items) if wanted == "all" else np.asarray(wanted, int)
        assert scores[number].shape == items.shape
        if not len(items):
            continue
        logits = 1 / (1 + np.exp(-(vectors[items] + state))) @ np.asarray(own["rerank_direction"])
        logits += np.asarray(own["rerank_bias"])[items]
        np.testing.assert_allclose(scores[number], logits - np.logaddexp.reduce(logits), atol=1e-5)


def test_a_model_without_the_head_says_so(parts: tuple) -> None:
    s, params = parts
    plain = replace(s, config=replace(s.config, model=replace(s.config.model, rerank_head=False)))
    with pytest.raises(UserError, match="no re-ranking head"):
        plain.scorer(params).score([], "rerank")
    with pytest.raises(UserError, match="request 0: the item heads score catalogue items"):
        s.scorer(params).score([Request([1, 2], ["Heat"])], "rerank")


@pytest.mark.slow
def test_it_learns() -> None:
    """Gradient steps on one batch: the targets come to stand before the items that the matching head confuses them with."""
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        model = model_of(CONFIG)
        params = init_variables(model.arch, SIZES, CONFIG, jax.random.key(0))["params"]
        batch, features = on_mesh(random_batch(4, 16)), content()
        tx = optax.adam(1e-2)

        def loss(params: dict) -> jax.Array:
            out = model.apply({"params": params}, batch, features)
            sums = losses.rerank_loss(out, batch, NUM_ITEMS, 20, 0.0, 16)
            return sums.loss / sums.count

        @jax.jit
        def step(params: dict, opt: optax.OptState) -> tuple[dict, optax.OptState, jax.Array]:
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt = tx.update(grads, opt, params)
            return optax.apply_updates(params, updates), opt, value  # pyright: ignore[reportReturnType]

        opt, values = tx.init(params), []
        for _ in range(80):
            params, opt, value = step(params, opt)
            values.append(float(value))
    assert values[0] == pytest.approx(np.log(20), abs=0.1) and values[-1] < 1.5


@pytest.mark.slow
def test_a_run_has_it_in_its_log_and_can_be_scored_with(parts: tuple, tmp_path: Path) -> None:
    s, _ = parts
    config = replace(s.config, train=replace(s.config.train, steps=4))
    run.train_run(config, tmp_path / "run", lambda _: None)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [x["rerank_loss"] for x in lines if "rerank_loss" in x]
    assert len(values) == 2 and np.isfinite(values).all()
    with run.trained(tmp_path / "run") as (again, params, _):
        scores = again.scorer(params).score([Request(again.builder.recommend_prompt([0, 1]), [1, 2, 3])], "rerank")[0]
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)

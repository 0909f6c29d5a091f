"""The scorer: exact against one candidate at a time, and defined on odd requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax import prepare, run
from instructrec_jax.data.tokenise import encode_example, encode_prompt, pad_to
from instructrec_jax.errors import UserError
from instructrec_jax.models.language_model import LanguageModel, item_logits, word_logits
from instructrec_jax.models.sharding import RULES
from instructrec_jax.scoring import Request, Scorer
from instructrec_jax.scoring.buckets import bucket, groups_by_length
from instructrec_jax.scoring.requests import join_words
from instructrec_jax.training.step import init_model
from tests.tiny import tiny_config, write_slice


def by_rows(scorer: Scorer) -> jax.NamedSharding:
    return jax.NamedSharding(jax.sharding.get_mesh(), RULES.ids_bs)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[run.Session, dict, Scorer]]:
    tmp = tmp_path_factory.mktemp("scoring")
    write_slice(tmp / "data")
    config = tiny_config(tmp)
    prepare.prepare(config, lambda _: None)
    with run.session(config) as s:
        params = init_model(config, s.arch, s.sizes, s.content, 3)[0]
        yield s, params, s.scorer(params, batch_size=16)


def prompts(s: run.Session, count: int) -> list:
    return [s.builder.recommend_prompt(list(range(n % 7)), wish="a slow film" if n % 2 else None) for n in range(count)]


def test_likelihood_equals_one_candidate_at_a_time(parts: tuple) -> None:
    """Each candidate's full text in a row of its own, without cache or packing."""
    s, params, scorer = parts
    model = LanguageModel(s.arch, s.sizes, s.config.model)
    asked = prompts(s, 5)
    wanted = [[3, 50, 7, 3], [], list(range(20, 31)), [1], [2, 9]]
    found = scorer.score([Request(p, c) for p, c in zip(asked, wanted)], "likelihood")

    @jax.jit
    def log_probs(params: dict, batch: dict) -> jax.Array:
        out = model.apply(params, batch, s.content)
        return jax.nn.log_softmax(word_logits(out.hidden, out, s.arch))

    for prompt, candidates, scores in zip(asked, wanted, found):
        assert len(scores) == len(candidates)
        for item, score in zip(candidates, scores):
            title = s.prepared.data.catalogue.titles[item]
            arrays = encode_example(prompt._replace(answer=title), s.prepared.text)
            row = pad_to([arrays], 8, 96)  # one width: compiled once
            row["positions"] = np.tile(np.arange(96, dtype=np.int32), (8, 1))
            row["segment_ids"] = np.tile((np.arange(96) < len(arrays["tokens"])).astype(np.int32), (8, 1))
            log = np.asarray(log_probs(params, {k: jax.device_put(v, by_rows(scorer)) for k, v in row.items()}))[0]
            at = np.flatnonzero(arrays["text_target"])
            assert score == pytest.approx(log[at, arrays["text_target"][at] - 1].sum(), abs=1e-4)
    mean = scorer.score([Request(asked[0], wanted[0])], "likelihood", normalise="mean")[0]
    tokens = [len(s.prepared.text.encode(s.prepared.data.catalogue.titles[i])) + 1 for i in wanted[0]]
    np.testing.assert_allclose(mean, found[0] / np.asarray(tokens), rtol=1e-5)


def test_items_are_log_probabilities_over_the_catalogue(parts: tuple) -> None:
    s, params, scorer = parts
    asked = prompts(s, 21)
    scores = scorer.score_all(asked)
    assert scores.shape == (21, s.prepared.data.num_items)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-4)
    arrays = [encode_example(p, s.prepared.text) for p in asked[:1]]
    row = pad_to(arrays, 8, len(arrays[0]["tokens"]))
    row["positions"] = np.tile(np.arange(row["tokens"].shape[1], dtype=np.int32), (8, 1))
    row["segment_ids"] = np.ones_like(row["positions"])
    out = LanguageModel(s.arch, s.sizes, s.config.model).apply(
        params, {k: jax.device_put(v, by_rows(scorer)) for k, v in row.items()}, s.content
    )
    logits = np.asarray(jax.nn.log_softmax(item_logits(out.hidden, out, s.prepared.data.num_items)))[0, -1]
    np.testing.assert_allclose(scores[0], logits[: s.prepared.data.num_items], atol=1e-4)


def test_scores_do_not_depend_on_company(parts: tuple) -> None:
    """Order, batch size and padding of a request list change nothing."""
    s, _, scorer = parts
    asked = prompts(s, 19)
    together = scorer.score_all(asked)
    alone = np.concatenate([scorer.score_all([p]) for p in asked[:6]])
    np.testing.assert_allclose(together[:6], alone, atol=1e-4)
    back = scorer.score_all(asked[::-1])[::-1]
    np.testing.assert_allclose(together, back, atol=1e-4)


def test_candidates_are_read_from_the_catalogue(parts: tuple) -> None:
    s, _, scorer = parts
    prompt = prompts(s, 1)[0]
    whole = scorer.score_all([prompt])[0]
    picked = scorer.score([Request(prompt, [4, 4, 0]), Request(prompt, []), Request(prompt)], "items")
    np.testing.assert_allclose(picked[0], whole[[4, 4, 0]], atol=1e-5)
    assert picked[1].shape == (0,) and picked[2].shape == whole.shape
    assert scorer.score([], "items") == [] and scorer.score([], "likelihood") == []


def test_bad_requests(parts: tuple) -> None:
    s, _, scorer = parts
    prompt = prompts(s, 1)[0]
    with pytest.raises(UserError, match=r"unknown scoring method 'item' \(did you mean 'items'"):
        scorer.score([Request(prompt)], "item")
    with pytest.raises(UserError, match=r"request 1: candidate 99999 is outside the catalogue of \d+ items"):
        scorer.score([Request(prompt), Request(prompt, [99999])])


def test_few_compilations(parts: tuple) -> None:
    """200 requests of mixed lengths and numbers use a handful of shapes."""
    s, params, _ = parts
    scorer = s.scorer(params, batch_size=16)
    r = np.random.default_rng(0)
    for _ in range(20):
        batch = [
            s.builder.recommend_prompt(r.integers(0, 50, r.integers(0, 16)).tolist()) for _ in range(r.integers(1, 30))
        ]
        scorer.score_all(batch)
    assert scorer.runner.kernel.compilations()["items"] <= 12


@given(st.integers(1, 5000), st.sampled_from([1, 8, 16]), st.sampled_from([1, 2]))
def test_buckets_hold_and_waste_little(n: int, smallest: int, steps: int) -> None:
    size = bucket(n, smallest, steps=steps)
    assert size >= n
    assert size == smallest or size <= max(2 * n if steps == 1 else 1.5 * n + 1, smallest)


@given(st.lists(st.integers(1, 99), max_size=50), st.integers(1, 9))
def test_groups_hold_every_index_once(lengths: list[int], batch: int) -> None:
    groups = groups_by_length(lengths, batch)
    assert sorted(int(i) for g in groups for i in g) == list(range(len(lengths)))
    assert all(len(g) <= batch for g in groups)


def test_labels_are_read_from_the_list(parts: tuple) -> None:
    """One forward pass of the prompt with its list; the letters' softmax; shifts averaged."""
    s, params, scorer = parts
    prompt = s.prompts("describe", s.prepared.data.cases(2))[0]
    wanted = [3, 50, 7, 20]
    reader = scorer.reader
    labels = [letter for letter, _ in reader.labels()[:4]]
    found = {k: scorer.score([Request(prompt, wanted), Request(prompt, [])], "labels", shifts=k) for k in (1, 2, 4, 9)}
    assert found[1][1].shape == (0,)
    np.testing.assert_allclose(np.exp(found[1][0]).sum(), 1, rtol=1e-4)
    np.testing.assert_allclose(found[4][0], found[9][0], atol=1e-6)  # no more shifts than candidates
    model = LanguageModel(s.arch, s.sizes, s.config.model)

    @jax.jit
    def logits_of(params: Any, row: dict) -> jax.Array:
        out = model.apply(params, row, s.content)
        return word_logits(out.hidden, out, s.arch)

    def by_hand(order: list[int]) -> np.ndarray:
        example, tokens = reader.listed(reader.check(0, Request(prompt, wanted)), order)
        titles = [s.prepared.data.catalogue.titles[wanted[c]] for c in order]
        assert all(f"{label}. {title}" in example.prompt for label, title in zip(labels, titles))
        arrays = encode_prompt(example, s.prepared.text)
        row = pad_to([arrays], 8, len(arrays["tokens"]))
        row["positions"] = np.tile(np.arange(len(arrays["tokens"]), dtype=np.int32), (8, 1))
        row["segment_ids"] = np.ones_like(row["positions"])
        placed = {k: jax.device_put(v, by_rows(scorer)) for k, v in row.items()}
        logits = np.asarray(logits_of(params, placed))[0, -1, tokens]
        values = np.zeros(4)
        values[order] = logits - np.logaddexp.reduce(logits)
        return values

    np.testing.assert_allclose(found[1][0], by_hand([0, 1, 2, 3]), atol=1e-4)
    shifted = [by_hand(np.roll(np.arange(4), -k).tolist()) for k in range(4)]
    np.testing.assert_allclose(found[4][0], np.mean(shifted, axis=0), atol=1e-4)
    np.testing.assert_allclose(found[2][0], np.mean(shifted[::2], axis=0), atol=1e-4)
    with pytest.raises(UserError, match=r"60 candidates, and \d\d labels of one token"):
        scorer.score([Request(prompt, list(range(60)))], "labels")


def test_yesno_asks_about_each_candidate(parts: tuple) -> None:
    s, params, scorer = parts
    prompt = s.prompts("describe", s.prepared.data.cases(2))[0]
    found = scorer.score([Request(prompt, [3, 50, 3]), Request(prompt, [])], "yesno")
    assert found[1].shape == (0,) and (found[0] < 0).all() and found[0][0] == found[0][2]
    # The question behind the prompt in a row of its own, and the two answers' logits at its end.
    text = s.prepared.text
    title = s.prepared.data.catalogue.titles[50]
    arrays = encode_prompt(prompt, text)
    assert arrays["item"].any(), "the prompt holds soft tokens"
    arrays = join_words(arrays, text.encode(f" Will {title} be next? Yes or no:"))
    row = pad_to([arrays], 8, len(arrays["tokens"]))
    row["positions"] = np.tile(np.arange(len(arrays["tokens"]), dtype=np.int32), (8, 1))
    row["segment_ids"] = np.ones_like(row["positions"])
    out = LanguageModel(s.arch, s.sizes, s.config.model).apply(
        params, {k: jax.device_put(v, by_rows(scorer)) for k, v in row.items()}, s.content
    )
    yes, no = np.asarray(word_logits(out.hidden, out, s.arch))[0, -1, [text.encode(w)[0] for w in ("Yes", "No")]]
    assert found[0][1] == pytest.approx(yes - np.logaddexp(yes, no), abs=1e-4)


def test_a_long_title_gives_way_to_the_question(parts: tuple) -> None:
    s, params, _ = parts
    scorer = s.scorer(params, batch_size=16)
    scorer.reader.max_candidate = 24
    request = Request(s.prompts("describe", s.prepared.data.cases(2))[0], ["word " * 200])
    asked = scorer.reader.asked(scorer.reader.check(0, request))[0]
    end = s.prepared.text.encode(" be next? Yes or no:")
    assert len(asked) == 24 and asked[-len(end) :] == end and scorer.reader.cut
    assert np.isfinite(scorer.score([request], "yesno")[0]).all()

"""Words of a wish: told from the template's, looked up in the catalogue, weighed by validation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from instructrec_jax import evaluate, fit_words, prepare
from instructrec_jax.config import InstructionConfig, WishWordsConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.fit_words import WEIGHTS, check_words
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.example import Feature
from instructrec_jax.instructions.packs import LANGUAGES
from instructrec_jax.instructions.render import Slots
from instructrec_jax.instructions.templates import load_templates
from instructrec_jax.refit import refit_config
from instructrec_jax.run import train_run, trained
from instructrec_jax.scoring.wish_words import WishWords
from tests.test_baselines import toy
from tests.tiny import tiny_config, write_slice


def words(data, weights: tuple[float, float] = (1.0, 2.0)) -> tuple[WishWords, Builder]:
    builder = Builder(data, InstructionConfig(languages=LANGUAGES), "films")
    return WishWords(data, load_templates(LANGUAGES), builder.domain, weights), builder


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_wording_gives_the_wish_back(language: str) -> None:
    match, builder = words(toy())
    wish = "a slow (1990s) western: {no} guns, 慢的。then more"
    seen = 0
    for template in builder.templates:
        if template.language != language or template.task != "T2" or "{intention}" not in template.prompt:
            continue
        slots = Slots(history=[0, 1], preference="Likes: noise.", intention=wish, item=0, features=(Feature(0, 1.0),))
        prompt = builder.example(template, slots, user=-1, target=-1, about_user=True)
        assert match.wish(prompt) == wish, template.id
        seen += 1
    assert seen >= 8


def test_words_count_for_prompts_with_a_wish_and_without_candidates() -> None:
    data = toy()
    match, builder = words(data)
    title = data.catalogue.titles[3]
    alone = builder.recommend_prompt((), title)
    known = builder.recommend_prompt((0, 1), title)
    rest = [
        builder.recommend_prompt((0, 1)),
        builder.recommend_prompt(()),
        alone._replace(task="T3"),
        [1, 2],
    ]
    found = match.scores([alone, known, *rest])
    assert found[0].argmax() == 3 and found[0, 3] > 0
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-6)
    assert not found[2:].any()
    assert not words(data, (0.0, 0.0))[0].scores([alone, known]).any()


def test_what_could_not_be_chosen_is_refused_before_the_first_step() -> None:
    check_words(WishWordsConfig(), by_items=False)
    check_words(WishWordsConfig(True), by_items=True)
    with pytest.raises(ConfigError, match="no item head"):
        check_words(WishWordsConfig(True), by_items=False)
    with pytest.raises(ConfigError, match="weights has 1 numbers"):
        check_words(WishWordsConfig(True, (1.0,)), by_items=True)


def test_a_run_chooses_by_validation_and_its_searches_find_titles(tmp_path: Path) -> None:
    write_slice(tmp_path / "data")
    config = tiny_config(tmp_path, steps=4)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, wish_words=WishWordsConfig(True)))
    prepare.prepare(config, lambda _: None)
    lines: list[str] = []
    run = tmp_path / "run"
    train_run(config, run, lines.append)
    with trained(run) as (s, params, _):
        chosen = tuple(json.loads((run / fit_words.CHOSEN).read_text())["weights"])
        assert set(chosen) <= set(WEIGHTS) and max(chosen) > 0, chosen
        assert any(line.startswith("words of a wish: weights") for line in lines)
        prompt = s.builder.recommend_prompt((), s.prepared.data.catalogue.titles[5])
        with_words, without = s.scorer(params), s.scorer(params, words=False)
        found, bare = with_words.score_all([prompt])[0], without.score_all([prompt])[0]
        np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-4)
        added = (found - bare) - (found - bare).min()
        assert with_words.words is not None
        np.testing.assert_allclose(added, with_words.words.scores([prompt])[0], atol=1e-3)
        assert added.argmax() == 5
    rows = evaluate.evaluate(run, ("--evaluate.likelihood_users", "0"), say=lambda _: None)["search"]["rows"]
    assert "model without word match, wish and history" in {row["name"] for row in rows}
    assert refit_config(run).model.wish_words.weights == chosen

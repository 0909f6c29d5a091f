import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrec_jax.config import InstructionConfig
from instructrec_jax.data.schema import TEST, TRAIN
from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.build import FAMILIES, KINDS, Builder, NothingToSay
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, Feature
from instructrec_jax.instructions.keyed import key, keys
from instructrec_jax.instructions.negatives import listed_negatives, negatives_name, sample_negatives
from instructrec_jax.instructions.packs import Constraint, clean_text, load_domain
from instructrec_jax.instructions.render import Slots, render
from instructrec_jax.instructions.targets import Stage, targets, with_limits
from instructrec_jax.instructions.templates import load_templates
from instructrec_jax.instructions.words import Words
from tests.small_split import small_split

BOTH = InstructionConfig(languages=("en", "zh"), history_items=8, short_history_items=5, candidates=5)
WIDENED = ("turn_around", "relatedness", "reasoning")
MORE = replace(BOTH, rerank_more=2, pointwise_more=2, describe_more=2, pairwise=3, **dict.fromkeys(WIDENED, 2.0))


def template(name, language="en"):
    return next(t for t in load_templates([language]) if t.id == name)


# --------------------------------------------------------------------------------------------------- keys and negatives


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(-1, 2**40), min_size=1, max_size=4))
def test_keys_of_arrays_are_keys_of_numbers(seed, parts):
    assert int(keys(seed, *[np.asarray([p]) for p in parts])[0]) == key(seed, *parts)
    assert key(seed, *parts) != key(seed + 1, *parts)


@st.composite
def negative_cases(draw):
    items = draw(st.integers(5, 60))
    cases = draw(st.integers(1, 8))
    seen = [draw(st.lists(st.integers(0, items - 1), max_size=items // 3)) for _ in range(cases)]
    target = [draw(st.integers(0, items - 1)) for _ in range(cases)]
    counts = draw(st.none() | st.lists(st.integers(1, 1000), min_size=items, max_size=items))
    least = min(items - len({*s, t}) for s, t in zip(seen, target))
    n = draw(st.integers(1, least))
    return items, [np.asarray(s, np.int64) for s in seen], n, np.asarray(target), counts


@settings(max_examples=100, deadline=None)
@given(negative_cases(), st.integers(0, 5))
def test_negatives_are_new_different_and_frozen(case, seed):
    items, seen, n, target, counts = case
    user = np.arange(len(target))
    popularity = None if counts is None else np.asarray(counts)
    drawn = sample_negatives(items, seen, n, seed=seed, user=user, target=target, popularity=popularity)
    assert drawn.shape == (len(target), n) and drawn.dtype == np.int32
    for row, s, t in zip(drawn, seen, target):
        assert len(set(row.tolist())) == n
        assert not set(row.tolist()) & {*s.tolist(), int(t)}
        assert row.min() >= 0 and row.max() < items
    order = np.arange(len(target))[::-1]
    again = sample_negatives(
        items, [seen[i] for i in order], n, seed=seed, user=user[order], target=target[order], popularity=popularity
    )
    np.testing.assert_array_equal(again, drawn[order])
    alone = sample_negatives(items, seen[:1], n, seed=seed, user=user[:1], target=target[:1], popularity=popularity)
    np.testing.assert_array_equal(alone, drawn[:1])


def test_negatives_are_uniform_or_popular():
    cases, items = 4000, 40
    user, target = np.arange(cases), np.zeros(cases, np.int64)
    nothing = [np.zeros(0, np.int64)] * cases
    drawn = sample_negatives(items, nothing, 3, seed=0, user=user, target=target)
    count = np.bincount(drawn.ravel(), minlength=items)
    assert count[0] == 0
    assert np.abs(count[1:] / count[1:].mean() - 1).max() < 0.25
    weights = np.arange(items) ** 2
    first = sample_negatives(items, nothing, 3, seed=0, user=user, target=target, popularity=weights)[:, 0]
    expected = cases * weights / weights.sum()
    popular = expected > 50
    assert np.abs(np.bincount(first, minlength=items)[popular] / expected[popular] - 1).max() < 0.35


def test_too_few_items_names_both_numbers():
    with pytest.raises(ConfigError, match=r"99 negatives .* user 7 has only 6 of 10"):
        sample_negatives(10, [np.asarray([1, 2, 2, 3])], 99, seed=0, user=np.asarray([7]), target=np.asarray([0]))
    with pytest.raises(ConfigError, match="only 1 of 4"):
        counts = np.asarray([5, 5, 0, 0])
        sample_negatives(
            4, [np.zeros(0, int)], 2, seed=0, user=np.asarray([0]), target=np.asarray([0]), popularity=counts
        )


def test_names_of_sampled_metrics():
    assert negatives_name(99, seed=0) == "1+99 uniform seed 0"
    assert negatives_name(9, popularity=True, seed=3) == "1+9 popularity seed 3"


# -------------------------------------------------------------------------------------------------------------- render


def test_items_as_token_title_or_both():
    films, titles = load_domain("films"), ["A", "B", "C"]
    seq, slots = template("seq.p1.a"), Slots(history=(2, 0))
    head = "Recommend the next film. Watched so far, oldest first: "
    made = render(seq, slots, films, titles)
    assert made.prompt == head + ITEM_SLOT * 2 and made.prompt_items == (2, 0) and made.answer == ""
    made = render(seq, slots, films, titles, items_as="title")
    assert made.prompt == head + "C; A" and made.prompt_items == ()
    made = render(seq, slots, films, titles, items_as="both")
    assert made.prompt == f"{head}{ITEM_SLOT} C; {ITEM_SLOT} A" and made.prompt_items == (2, 0)
    assert "C；A" in render(template("seq.p1.a", "zh"), slots, films, titles, items_as="title").prompt


def test_candidates_in_the_text_and_the_answer():
    films, titles = load_domain("films"), ["A", "B", "C"]
    slots = Slots(history=(0,), candidates=(2, 1), answer=1)
    made = render(template("rerank.p1.b"), slots, films, titles, candidates_as="both")
    assert f"1. {ITEM_SLOT} C 2. {ITEM_SLOT} B." in made.prompt
    assert made.prompt_items == (2, 1, 0)  # reading order
    assert made.answer == "B"
    made = render(template("rerank.p1.a"), slots, films, titles, candidates_as="title")
    assert "C; B" in made.prompt and made.prompt_items == (0,)


def test_two_items_in_a_question():
    films, titles = load_domain("films"), ["A", "B", "C"]
    slots = Slots(history=(0,), candidates=(2, 1), answer=1)
    made = render(template("pair.p1.b"), slots, films, titles, candidates_as="title")
    assert made.prompt == f"Two films are left: C and B. Only one of them goes with {ITEM_SLOT}. It is:"
    assert made.answer == "B"
    made = render(template("pair.p1.b", "zh"), slots, films, titles)
    assert made.prompt_items == (2, 1, 0)
    with pytest.raises(ValueError, match="needs 2 candidates, not 3"):
        render(template("pair.p1.a"), slots._replace(candidates=(0, 1, 2)), films, titles)


def test_answers_of_the_widenings():
    films, titles = load_domain("films"), ["A", "B", "C", "D"]
    slots = Slots(history=(0, 1, 2, 3), preference="Enjoys war films.", intention="sad", item=2, answer=2)

    def both(name, language="en"):
        made = render(template(name, language), slots, films, titles, items_as="title")
        return made.prompt, made.answer

    assert both("turn.p0.i2.a") == ("Write the search that leads to C:", "sad")
    assert both("relate.past.p1.i1.a")[1] == "B; C; D"  # the newest three
    assert both("relate.next.p1.i1.a")[1] == "sad. C"
    assert both("relate.next.p1.i2.a", "zh")[1] == "sad：C"
    assert both("reason.p2.a")[1] == "Enjoys war films. C"
    prompt = render(template("reason.p2.a"), Slots(history=(0,)), films, titles)  # somebody new: no answer yet
    assert prompt.answer.strip() == ""


def test_a_sentence_with_the_names_of_the_data():
    """A pack decides what the person is called; a user id is never put there from the data."""
    generic = load_domain("generic")
    words = {language: dict(given) for language, given in generic.words.items()}
    words["zh"]["person"] = "用户 u1 "
    made = render(template("describe.p0.a", "zh"), Slots(answer=0), replace(generic, words=words), ["i1"])
    assert made.prompt + made.answer == "推荐给用户 u1 的物品是 i1。"
    made = render(template("describe.p0.a", "zh"), Slots(answer=0), generic, ["i1"])
    assert made.prompt + made.answer == "推荐给用户的物品是 i1。"


def test_features_in_their_slot_or_before_the_prompt():
    films, features = load_domain("films"), (Feature(3, 0.5), Feature(7, 1.0))
    slots = Slots(history=(0,), features=features)
    made = render(template("seq.p1.a"), slots, films, about_user=True)
    assert made.prompt.startswith(f"About this viewer: {FEATURE_SLOT * 2}. Recommend") and made.features == features
    assert render(template("seq.p1.a"), slots, films).features == ()
    made = render(template("cold.p0.features"), slots, films, about_user=True)
    assert made.prompt.count(FEATURE_SLOT) == 2


def test_slot_characters_never_come_from_user_text():
    films = load_domain("films")
    made = render(template("search.p0.i1.a"), Slots(intention=f"sad {ITEM_SLOT} {FEATURE_SLOT}\n films {{x}}"), films)
    assert made.prompt.endswith("sad films {x}")
    assert clean_text(f"a{ITEM_SLOT}\tb ") == "a b"
    with pytest.raises(ValueError, match="slot character"):
        render(template("seq.p1.a"), Slots(history=(0,)), films, [f"bad {ITEM_SLOT}"], items_as="both")


def test_missing_slots_are_errors():
    films = load_domain("films")
    for name in ("search.p0.i1.a", "taste.p2.a", "rerank.p1.a", "point.p1.a", "cold.p0.features"):
        with pytest.raises(ValueError, match="needs"):
            render(template(name), Slots(history=(0,)), films)


# --------------------------------------------------------------------------------------------------------------- words


def test_taste_reads_only_events_before_the_end():
    data = small_split()
    words, end = Words(data, load_domain("films")), int(data.offsets[3]) + 2
    said = words.preference(3, end, "en")
    assert said and said[0].isupper() and said.endswith(".")
    item = data.item.copy()
    item[end:] = (item[end:] + 7) % data.num_items
    assert Words(replace(data, item=item), load_domain("films")).preference(3, end, "en") == said
    assert words.preference(3, int(data.offsets[3]), "en") is None


def test_taste_names_what_the_history_is_full_of():
    data = small_split(users=2)
    western = [i for i, g in enumerate(data.catalogue.lists("genres")) if "Western" in g][:4]
    item = data.item.copy()
    item[:4] = western
    data = replace(data, item=item, rating=None, tags=[(0, western[3], "Moody"), (1, western[2], "loud")])
    words = Words(data, load_domain("films"))
    said = words.preference(0, 4, "en")
    assert said and "western" in said and "“moody”" in said and "loud" not in said
    said = words.preference(0, 4, "zh")
    assert said and "西部" in said


def test_taste_falls_back_to_title_words_or_brand():
    data = small_split(labelled=False, rated=False)
    products = load_domain("products")
    said = Words(data, products).preference(0, int(data.offsets[0]) + 3, "en")
    assert said and "in the name" in said
    table = data.catalogue.table.append_column("brand", [["Acme"] * data.num_items])
    data = replace(data, catalogue=replace(data.catalogue, table=table))
    said = Words(data, products).preference(0, int(data.offsets[0]) + 3, "en")
    assert said and "products by Acme" in said


def test_wishes_say_what_the_data_says():
    data = small_split()
    words = Words(data, load_domain("films"))
    tagged = {i: t for _, i, t in data.tags if t != "In Netflix queue"}
    item = next(iter(tagged))
    assert any(f"“{t}”" in str(words.intention("I1", item, 0, 0, "en")) for _, i, t in data.tags if i == item)
    assert all("netflix" not in str(words.intention("I1", i, 0, 0, "en")).lower() for i in range(data.num_items))
    for target in range(data.num_items):
        said = words.intention("I2", target, 1, 5, "en")
        assert said and all(g.lower() in said for g in data.catalogue.lists("genres")[target])
        assert f"{words.facets.decades[target]}s" in said
        assert said == words.intention("I2", target, 1, 5, "en")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_wishes_name_what_the_pack_says_of_a_column(language):
    data = small_split()
    prices = [float("nan") if i == 0 else 3.0 + i for i in range(data.num_items)]
    levels = [None if i == 1 else "hard" for i in range(data.num_items)]
    table = data.catalogue.table.append_column("price", [prices]).append_column("level", [levels])
    with_columns = replace(data, catalogue=replace(data.catalogue, table=table))
    words = Words(with_columns, load_domain("courses"))
    plain = Words(data, load_domain("courses"))
    price = {"en": "for at most {}", "zh": "价格不超过{}"}[language]
    for item in range(2, data.num_items):
        said = words.intention("I2", item, 1, 5, language)
        band = next((edge for edge in (0, 20, 50, 100) if edge >= prices[item]), None)
        assert said and "hard" in said and price.format(band) in said
        assert str(plain.intention("I2", item, 1, 5, language)) in said  # only added to
        assert words.intention("I1", item, 1, 5, language) == plain.intention("I1", item, 1, 5, language)
    assert "hard" in str(words.intention("I2", 0, 1, 5, language))
    assert price.format("")[:5] not in str(words.intention("I2", 0, 1, 5, language))
    assert "hard" not in str(words.intention("I2", 1, 1, 5, language))
    assert Words(with_columns, load_domain("generic")).intention("I2", 2, 1, 5, language) == Words(
        data, load_domain("generic")
    ).intention("I2", 2, 1, 5, language)


def test_a_number_beyond_the_last_edge_is_not_said():
    data = small_split()
    table = data.catalogue.table.append_column("pages", [[10.0, 100.0, 100.5] + [7.0] * (data.num_items - 3)])
    data = replace(data, catalogue=replace(data.catalogue, table=table))
    pack = replace(load_domain("films"), constraints=(Constraint("pages", {"en": "<{value}>"}, (50, 100)),))
    facets = Words(data, pack).facets
    assert [facets.limits(item, "en") for item in range(3)] == [["<50>"], ["<100>"], []]
    assert facets.limits(0, "zh") == []
    assert Words(data, replace(pack, constraints=(Constraint("pages", {"en": "{value} p"}),))).facets.limits(
        2, "en"
    ) == ["100.5 p"]


def test_nothing_to_say_is_none_skipped_and_counted():
    data = small_split(labelled=False)
    titles = [f"{chr(97 + i % 26) * 3}{chr(97 + i // 26) * 3}" for i in range(data.num_items)]
    data = replace(data, catalogue=replace(data.catalogue, titles=titles))
    builder = Builder(data, BOTH, "products")
    assert builder.words.intention("I1", 0, 0, 0, "en") is None
    made = list(builder.training_examples())
    assert not [e for e in made if e.intention != "I0" or e.preference == "P2"]
    wanted = round(BOTH.search * builder.num_windows)
    assert builder.skipped["search: nothing to say of the item or the history"] == wanted
    with pytest.raises(NothingToSay):
        builder.evaluation_prompt("search", 0, int(data.offsets[1]) - 1)


# ------------------------------------------------------------------------------------------------------------- builder


@pytest.mark.parametrize("history_items", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("copies", [1, 3])
def test_every_training_item_is_a_dense_target_once_per_copy(history_items, copies):
    data = small_split()
    config = replace(BOTH, history_items=history_items, copies=copies, repeat_targets=False)
    builder = Builder(data, config, "films")
    seen, prompts = Counter(), []
    for example in builder.training_examples():
        if not example.dense:
            continue
        assert len(example.prompt_items) <= history_items and example.target == -1 and not example.answer
        seen.update((example.user, i) for i in example.prompt_items[example.dense_from :])
        prompts.append(example)
    train = [(int(u), int(i)) for u, i, s in zip(data.user, data.item, data.split) if s == TRAIN]
    assert seen == Counter(dict.fromkeys(train, copies))
    assert len(prompts) == copies * builder.num_windows
    if copies > 1:
        first = prompts[:copies]
        assert len({(e.template, e.language) for e in first}) == copies
        assert len({e.prompt_items for e in first}) == 1


def test_repeated_targets_cover_whole_windows():
    data = small_split()
    dense = [e for e in Builder(data, replace(BOTH, repeat_targets=True), "films").training_examples() if e.dense]
    assert all(e.dense_from == 0 for e in dense)
    train = {(int(u), int(i)) for u, i, s in zip(data.user, data.item, data.split) if s == TRAIN}
    assert {(e.user, i) for e in dense for i in e.prompt_items} == train


def test_families_have_the_configured_sizes():
    data = small_split(users=30)
    builder = Builder(data, BOTH, "films")
    made = list(builder.training_examples())
    assert sum(builder.written.values()) == len(made)
    for family in FAMILIES:
        lost = sum(n for k, n in builder.skipped.items() if k.startswith(family + ":"))
        assert builder.written[family] + lost == round(getattr(BOTH, family) * builder.num_windows)
    assert {e.language for e in made} == {"en", "zh"}
    builder = Builder(data, MORE, "films")
    kinds = Counter()
    for example in builder.training_examples():
        kinds[example.task, example.metric == "none"] += 1
    for family in FAMILIES:
        lost = sum(n for k, n in builder.skipped.items() if k.startswith(family + ":"))
        assert builder.written[family] + lost == round(getattr(MORE, family) * builder.num_windows)
    assert kinds["T1", False] == builder.written["pairwise"] > 0
    assert kinds["T2", True] == sum(builder.written[w] for w in WIDENED) > 0
    none = InstructionConfig(search=0, rerank=0, pointwise=0, describe=0, profile=0)
    assert all(e.dense for e in Builder(data, none, "films").training_examples())


def test_examples_are_consistent_and_the_stream_repeats():
    data = small_split(users=30)
    builder = Builder(data, replace(BOTH, rerank=2, pointwise=2, search=3), "films")
    made = list(builder.training_examples())
    assert made == list(builder.training_examples())
    templates = {(t.id, t.language): t for t in load_templates()}
    assert not [e for e in made if templates[e.template, e.language].held_out]
    answers = Counter()
    for example in made:
        assert example.prompt.count(ITEM_SLOT) == len(example.prompt_items)
        assert example.answer.count(ITEM_SLOT) == len(example.answer_items)
        assert not example.features and FEATURE_SLOT not in example.prompt
        if example.task == "T3":
            assert len(set(example.candidates)) == BOTH.candidates and example.target in example.candidates
            assert example.answer == data.catalogue.titles[example.target]
        if example.task == "T0":
            assert example.target == -1
            item = example.prompt_items[-1]
            bought = set(data.history(example.user).tolist())
            assert (item in bought) == (example.answer in ("Yes", "是"))
            answers[example.answer] += 1
    assert min(answers.values()) > 0.15 * sum(answers.values()) and len(answers) == 4


def test_the_default_weights_give_the_data_that_results_were_measured_on():
    """Wordings of these groups, and their order, are part of every preset's prepared data."""
    digest = hashlib.sha256()
    for e in Builder(small_split(), BOTH, "films").training_examples():
        digest.update(f"{e.template}|{e.prompt}|{e.prompt_items}|{e.answer}|{e.target}|{e.candidates}\n".encode())
    assert digest.hexdigest()[:16] == "861ac26bde46f21e"


def test_pairs_and_widenings_are_consistent():
    data = small_split(users=30)
    made = list(Builder(data, MORE, "films").training_examples())
    templates = {(t.id, t.language): t for t in load_templates()}
    seen = set()
    for example in made:
        template = templates[example.template, example.language]
        seen.add((template.kind, *template.aspects))
        assert not template.held_out
        history = data.history(example.user).tolist()
        if example.task == "T1":
            assert len(set(example.candidates)) == 2 and example.target in example.candidates
            assert example.answer == data.catalogue.titles[example.target]
            (other,) = set(example.candidates) - {example.target}
            assert other not in history
        elif "target_item" in template.reads:  # what is shown is not to be predicted
            assert example.target == -1 and example.prompt_items[-1] in history
        elif template.kind in ("relatedness", "reasoning"):
            assert example.target >= 0 and example.answer.endswith(data.catalogue.titles[example.target])
        assert example.answer or template.kind in ("sequential", "search")
        if template.answered_by == {"history_titles"}:
            before = history[: history.index(example.prompt_items[-1])]
            between = {"en": "; ", "zh": "；"}[example.language]
            assert example.answer == between.join(data.catalogue.titles[i] for i in before[-3:])
    trained = {(t.kind, *t.aspects) for t in templates.values() if not t.held_out and "features" not in t.reads}
    assert seen == trained  # every group of the grid is written


def test_training_on_some_families():
    data = small_split(users=30)
    chosen = replace(MORE, families=("seq.p1.b", "search.p0", "rerank.p1.i1", "turn.p2"))
    builder = Builder(data, chosen, "films")
    made = list(builder.training_examples())
    assert {".".join(e.template.split(".")[:2]) for e in made} == {"seq.p1", "search.p0", "rerank.p1", "turn.p2"}
    assert {e.template for e in made if e.template.startswith("seq")} == {"seq.p1.b"}
    assert set(builder.written) == {"sequential", "search", "rerank_more", "turn_around"}
    # A family's weight stays: it is spread over what is left of it.
    lost = builder.skipped["search: nothing to say of the item or the history"]
    assert builder.written["search"] + lost == round(chosen.search * builder.num_windows)
    assert sum(builder.shares("search", "en").values()) == pytest.approx(1)
    end = int(data.offsets[1]) - 1  # what is measured does not change
    assert builder.evaluation_prompt("sequential", 0, end) == Builder(data, MORE, "films").evaluation_prompt(
        "sequential", 0, end
    )
    with pytest.raises(ConfigError, match="did you mean"):
        Builder(data, replace(BOTH, families=("sequ",)), "films")


def test_all_families_named_are_all_families():
    data = small_split()
    every = tuple({t.id.split(".")[0] for t in load_templates() if not t.held_out})
    a, b = (list(Builder(data, c, "films").training_examples()) for c in (MORE, replace(MORE, families=every)))
    assert a == b


def test_a_held_out_wording_is_measured_by_its_id():
    data = small_split()
    builder, end = Builder(data, BOTH, "films"), int(data.offsets[1]) - 1
    plain = builder.evaluation_prompt("rerank-personal-search-vague", 0, end)
    held = builder.evaluation_prompt("rerank-personal-search-vague", 0, end, template="gift.p1.i1.rerank")
    assert (plain.template, held.template) == ("rerank.p1.i1.a", "gift.p1.i1.rerank")
    assert (held.candidates, held.target, held.metric) == (plain.candidates, plain.target, "search")
    with pytest.raises(ConfigError, match=r"no 'en' template of rerank, P1, I1 has the id 'seq\.p1\.a'"):
        builder.evaluation_prompt("rerank-personal-search-vague", 0, end, template="seq.p1.a")


def test_a_template_and_a_pack_of_a_team_are_trained(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "language: en\ntemplates:\n  - {id: our.a, aspects: [P1, I0, T2], reads: [history], metric: next-item, "
        'prompt: "Our {nouns}: {history}"}\n'
    )
    (tmp_path / "p.yaml").write_text(
        "wines:\n  en: {noun: wine, nouns: wines, a_noun: a wine, verb: drink, verb_past: drunk, person: taster, "
        'labelled: "{labels} {nouns}", branded: "{nouns} by {brands}", worded: "{nouns} named {words}"}\n'
    )
    config = InstructionConfig(templates=(str(tmp_path / "t.yaml"),), packs=(str(tmp_path / "p.yaml"),))
    made = list(Builder(small_split(), config, "wines").training_examples())
    ours = [e for e in made if e.template == "our.a"]
    assert ours and ours[0].prompt.startswith("Our wines: ")
    assert not [e for e in made if "film" in e.prompt]
    with pytest.raises(ConfigError, match="has no 'zh'"):
        next(Builder(small_split(), replace(config, languages=("en", "zh")), "wines").training_examples())


def test_another_seed_gives_other_examples():
    data = small_split()
    first, second = (list(Builder(data, replace(BOTH, seed=s), "films").training_examples()) for s in (0, 1))
    assert first != second


def test_titles_only_history_has_one_target_per_window():
    data = small_split()
    for example in Builder(data, BOTH, "films", items_as="title").training_examples():
        assert not example.dense and not example.prompt_items and ITEM_SLOT not in example.prompt
        if example.task != "T0":
            assert example.target >= 0


def test_token_comes_before_its_title():
    data = small_split()
    dense = next(e for e in Builder(data, BOTH, "films", items_as="both").training_examples() if e.dense)
    slots = dense.prompt.split(ITEM_SLOT)
    for place, item in enumerate(dense.prompt_items):
        assert data.catalogue.titles[item] not in "".join(slots[: place + 1])
        assert slots[place + 1].strip().startswith(data.catalogue.titles[item])


def test_features_are_shown_to_most_and_always_in_evaluation():
    data = small_split(users=60)
    config = replace(BOTH, profile=2)
    builder = Builder(data, config, "films", features=lambda user: (Feature(user % 3, 1.0), Feature(3, user / 10)))
    made = list(builder.training_examples())
    for kind in ([e for e in made if e.dense], [e for e in made if not e.dense]):
        assert 0.6 < sum(bool(e.features) for e in kind) / len(kind) < 0.9
    assert all(e.features in ((), (Feature(e.user % 3, 1.0), Feature(3, e.user / 10))) for e in made)
    assert any(e.template == "cold.p0.features" for e in made)
    assert builder.evaluation_prompt("sequential", 4, int(data.offsets[5]) - 1).features
    assert builder.recommend_prompt(features=(Feature(0, 1.0),)).template == "cold.p0.features"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_prompts(kind, language):
    data = small_split()
    builder = Builder(data, BOTH, "films")
    for user, end, target in zip(*(getattr(data.cases(TEST), f) for f in ("user", "end", "target"))):
        example = builder.evaluation_prompt(kind, int(user), int(end), language=language)
        assert example == builder.evaluation_prompt(kind, int(user), int(end), language=language)
        assert example.language == language and (example.task == "T0" or example.target == target)
        if example.preference == "P1" and example.task == "T2":  # valid event is history at test time
            budget = BOTH.history_items if kind == "sequential" else BOTH.short_history_items
            history = data.item[data.offsets[user] : end][-budget:]
            assert list(example.prompt_items) == history.tolist()
        if example.task == "T3":
            assert target in example.candidates and len(set(example.candidates)) == BOTH.candidates
        if example.task == "T1":
            assert target in example.candidates and len(set(example.candidates)) == 2


def test_evaluation_prompt_edges():
    data = small_split()
    builder = Builder(data, BOTH, "films")
    start, stop = int(data.offsets[2]), int(data.offsets[3])
    assert builder.evaluation_prompt("sequential", 2, start).template == "cold.p0.a"
    future = builder.evaluation_prompt("sequential", 2, stop)
    assert future.target == -1 and future.prompt_items[-1] == data.item[stop - 1]
    wished = builder.evaluation_prompt("personal-search-vague", 2, stop, wish="slow and sad")
    assert "slow and sad" in wished.prompt
    own = builder.evaluation_prompt("rerank", 2, stop, candidates=[5, 3])
    assert own.candidates == (5, 3)
    for kind in ("search", "rerank"):
        with pytest.raises(NothingToSay):
            builder.evaluation_prompt(kind, 2, stop)
    with pytest.raises(ConfigError, match="did you mean 'sequential'"):
        builder.evaluation_prompt("sequental", 2, start)
    with pytest.raises(ValueError, match="outside"):
        builder.evaluation_prompt("sequential", 2, stop + 1)


def test_recommend_prompts():
    builder = Builder(small_split(), BOTH, "films")
    ask = builder.recommend_prompt
    made = {
        "seq.p1.a": ask([1, 2]),
        "search.p1.i1.a": ask([1, 2], wish="a slow, sad film"),
        "search.p0.i1.a": ask(wish="a slow, sad film"),
        "cold.p0.a": ask(),
        "taste.p2.a": ask(preference="Likes noir."),
        "taste.p2.history": ask([1], preference="Likes noir."),
        "search.p2.i1.a": ask(wish="sad", preference="Likes noir."),
        "search.p2.i1.history": ask([3], wish="sad", preference="Likes noir."),
    }
    for name, example in made.items():
        assert (example.template, example.user, example.target) == (name, -1, -1)
        assert ("sad" in example.prompt) == (example.intention == "I1")
        assert ("noir" in example.prompt) == (example.preference == "P2")
    assert len(ask(list(range(20))).prompt_items) == BOTH.history_items
    assert ask(wish=f" {ITEM_SLOT} ").template == "cold.p0.a"
    assert ask(wish="悲伤的", language="zh").prompt.endswith("悲伤的")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"languages": ()}, "languages is empty"),
        ({"languages": ("en", "fr")}, "unknown language 'fr'"),
        ({"history_items": 0}, "history_items = 0"),
        ({"short_history_items": 0}, "short_history_items = 0"),
        ({"candidates": 1}, "candidates = 1"),
    ],
)
def test_settings_that_cannot_be_used(change, problem):
    with pytest.raises(ConfigError, match=problem):
        Builder(small_split(), replace(BOTH, **change), "films")
    with pytest.raises(ConfigError, match="did you mean 'films'"):
        Builder(small_split(), BOTH, "filmz")


def test_more_candidates_than_items():
    with pytest.raises(ConfigError, match="59 negatives"):
        list(Builder(small_split(), replace(BOTH, candidates=60), "films").training_examples())


def test_imports_no_jax():
    code = (
        "import sys, instructrec_jax.instructions.build; print(sorted({'jax', 'flax', 'sklearn'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------------- in parts


def thirds(data):
    """The users in three parts, one of which has a single user."""
    return [data.part(0, 4), data.part(4, 5), data.part(5, data.num_users)]


@pytest.mark.parametrize(
    "change", [{}, {"max_per_user": 2, "negatives": "popularity"}, {"search": 40.0, "describe": 0.01}]
)
def test_parts_give_what_the_whole_gives(change):
    data = small_split()
    config = replace(MORE, **change)

    def features(user):
        return (Feature(user, 1.0),) if user % 3 else ()

    whole = Builder(data, config, "films", features)
    expected = list(whole.training_examples())
    parts = Builder(data, config, "films", features)
    assert list(parts.training_examples(lambda: iter(thirds(data)))) == expected
    assert parts.written == whole.written and parts.skipped == whole.skipped
    nobody = Builder(replace(data.part(0, 0), tags=data.tags), config, "films", features)
    assert list(nobody.training_examples(lambda: iter(thirds(data)))) == expected


def test_targets_are_the_events_with_the_smallest_keys():
    data = small_split(users=200, longest=60)
    ordinal = np.arange(len(data.item)) - data.offsets[data.user]
    pool = np.flatnonzero((data.split == TRAIN) & (ordinal >= 1))
    made = keys(7, 5, 0, data.user[pool], ordinal[pool])
    for count in (1, 2, 50, len(pool) // 2, len(pool) - 1, len(pool)):
        stage = with_limits([(Stage("describe", 5, 1), count)], lambda: [data], 7, [0, len(pool)])[0]
        expected = np.sort(pool[np.argsort(made)[:count]])
        np.testing.assert_array_equal(targets(7, stage, data), expected)
    capped = targets(7, stage, data, most=3)
    per_user = np.bincount(data.user[capped], minlength=data.num_users)
    assert (per_user == np.minimum(np.bincount(data.user[pool], minlength=data.num_users), 3)).all()
    lowest = {u: set(np.argsort(made[data.user[pool] == u])[:3]) for u in range(data.num_users)}
    assert all(set(ordinal[capped[data.user[capped] == u]] - 1) == lowest[u] for u in range(data.num_users))


def test_a_cap_keeps_the_newest_windows_and_few_targets_of_a_user():
    data = small_split(users=20, longest=55)
    capped = Builder(data, replace(BOTH, max_per_user=2), "films")
    free = Builder(data, BOTH, "films")
    kept, every = ([e for e in builder.training_examples() if e.dense] for builder in (capped, free))
    for user in range(data.num_users):
        newest = [e for e in every if e.user == user][-2 * BOTH.copies :]
        assert [e for e in kept if e.user == user] == newest
    assert len(kept) < len(every)
    families = Counter((e.user, e.template.split(".")[0]) for e in capped.training_examples() if not e.dense)
    assert max(families.values()) <= 2 * 2, (
        "search and describe write under more than one name, no family more than twice"
    )
    assert capped.num_windows == capped.written["sequential"]


def test_popular_negatives_are_popular():
    data = small_split(users=60)
    popularity = data.train_popularity
    mean = {}
    for kind in ("uniform", "popularity"):
        made = Builder(data, replace(BOTH, rerank=3.0, negatives=kind), "films").training_examples()
        shown = [i for e in made if e.task == "T3" for i in e.candidates if i != e.target]
        mean[kind] = popularity[shown].mean()
    assert mean["popularity"] > mean["uniform"]


# ------------------------------------------------------------------------------------------------------- hard negatives


def test_hard_negatives_come_from_the_list_and_the_rest_is_uniform():
    lists = np.asarray([[5, 3, 9, 5, 1, 7], [0, 1, -1, -1, -1, -1], [-1] * 6])
    seen = [np.asarray([3]), np.asarray([1, 2]), np.asarray([4])]
    user, target = np.arange(3), np.asarray([9, 8, 0])
    settings = {"seed": 0, "user": user, "target": target}
    best, taken = listed_negatives(lists, 12, seen, 3, **settings, best=True)
    assert taken.tolist() == [3, 1, 0] and best[0].tolist() == [5, 1, 7] and best[1][0] == 0
    for row in range(3):
        assert len(set(best[row])) == 3 and not {target[row], *seen[row]} & set(best[row].tolist())
    drawn, _ = listed_negatives(lists, 12, seen, 3, **settings)
    assert set(drawn[0].tolist()) == {5, 1, 7}
    alone, _ = listed_negatives(lists[1:2], 12, seen[1:2], 3, seed=0, user=user[1:2], target=target[1:2])
    assert np.array_equal(drawn[1], alone[0])
    with pytest.raises(ConfigError, match=r"10 negatives .* user 1 has only 9 of 12"):
        listed_negatives(lists, 12, seen, 10, **settings)


def test_hard_negatives_are_drawn_evenly_from_the_list():
    cases = 4000
    lists = np.tile(np.arange(20, 28), (cases, 1))
    found, _ = listed_negatives(
        lists, 50, [np.zeros(0, int)] * cases, 2, seed=1, user=np.arange(cases), target=np.full(cases, 3)
    )
    counts = np.bincount(found.ravel(), minlength=50)
    assert counts[:20].sum() == 0 and (abs(counts[20:28] - 1000) < 5 * 1000**0.5).all()


def test_training_prompts_show_hard_negatives():
    data = small_split()
    builder = Builder(data, replace(BOTH, rerank=2.0, pairwise=1.0, pointwise=2.0, candidates=4), "films")
    # Far items first: every user is offered the same ten.
    builder.lists = np.tile(np.arange(10, 20, dtype=np.int32), (data.num_users, 1))
    made = [e for e in builder.training_examples() if e.candidates]
    assert made and builder.drawn["listed"] > 5 * builder.drawn["uniform"]
    for example in made:
        trained = set(data.history(example.user).tolist())
        others = set(example.candidates) - {example.target}
        assert not others & trained and len(others) == len(example.candidates) - 1
        left = set(range(10, 20)) - trained - {example.target}
        assert len(others & left) == min(len(left), len(others))

import re
from collections import Counter
from dataclasses import replace

import pytest

from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions import aspects
from instructrec_jax.instructions.build import FAMILIES
from instructrec_jax.instructions.packs import (
    LANGUAGES,
    WORD_SLOTS,
    domain_names,
    load_domain,
    load_pack_file,
    load_phrases,
    word_slots,
)
from instructrec_jax.instructions.template import WIDENINGS
from instructrec_jax.instructions.template_file import words_of
from instructrec_jax.instructions.templates import families, in_families, load_template_file, load_templates

GOOD = """\
language: en
templates:
  - id: a
    aspects: [P1, I0, T2]
    reads: [history]
    metric: next-item
    prompt: "Next {noun} after {history}"
"""


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_combination_has_a_wording_to_train_on(language):
    trained = [t for t in load_templates([language]) if not t.held_out]
    count = Counter(t.aspects for t in trained if not t.widening)
    assert set(count) == set(aspects.valid_combinations())
    assert count["P1", "I0", "T2"] >= 5
    # Appendices A, B and C of arXiv 2305.07001: by preference, by intention, by both.
    by_family = Counter(
        "preference" if i == "I0" else "intention" if p == "P0" else "both" for p, i, _ in (t.aspects for t in trained)
    )
    assert by_family["preference"] >= 17 and by_family["intention"] >= 9 and by_family["both"] >= 13
    assert set(WIDENINGS) == {t.widening for t in trained if t.widening}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_kind_has_a_wording_that_is_never_trained(language):
    templates = load_templates([language])
    measured = {t.kind for t in templates if not t.widening}
    assert {t.kind for t in templates if t.held_out} == measured
    gifts = [t for t in templates if t.is_in("gift")]  # an intention that is held out as a whole
    assert {t.aspects for t in gifts} >= {("P1", "I1", "T2"), ("P1", "I1", "T3")} and all(t.held_out for t in gifts)


def test_wordings_differ():
    prompts = Counter((t.language, t.prompt) for t in load_templates())
    assert max(prompts.values()) == 1


def test_every_group_belongs_to_one_family_of_training():
    templates = load_templates()
    for template in (t for t in templates if not t.held_out):
        group = (template.preference, template.intention)
        owners = [
            name
            for name, family in FAMILIES.items()
            if family.kind == template.kind and (family.shares is None or group in family.shares)
        ]
        assert owners or (template.kind, *group) == ("sequential", "P1", "I0")


def test_languages_have_the_same_templates():
    english, chinese = load_templates(["en"]), load_templates(["zh"])
    for a, b in zip(english, chinese, strict=True):
        assert (a.id, a.aspects, a.reads, a.metric, a.held_out) == (b.id, b.aspects, b.reads, b.metric, b.held_out)
        assert bool(a.answer) == bool(b.answer)
        assert re.search(r"[一-鿿]", b.prompt) and not re.search(r"[一-鿿]", a.prompt)


def test_words_of_the_target_make_it_search():
    for template in load_templates():
        assert (template.metric == "none") == bool(template.widening)
        if not template.widening:
            assert (template.metric == "search") == template.reads_target == (template.intention != "I0")


def test_item_answers_follow_the_history():
    for template in load_templates():
        if template.task == "T2" and not template.answer and "history" in template.reads:
            assert template.prompt.endswith("{history}")


def test_combinations():
    assert len(aspects.valid_combinations()) == 36 - 3
    assert aspects.invalid_reason("P0", "I0", "T3") and aspects.invalid_reason("P0", "I0", "T1")
    assert not aspects.invalid_reason("P0", "I0", "T2")


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8")
    return path


def test_good_file(tmp_path):
    (template,) = load_template_file(write(tmp_path, GOOD))
    assert template.kind == "sequential"
    assert template.reads == {"history"}
    assert template.place == (7, 13)
    (named,) = load_template_file(write(tmp_path, GOOD.replace("id: a", "id: Our_shop.p1-店.2")))
    assert named.id == "Our_shop.p1-店.2"
    moved = replace(template, place=(1, 1))  # where it stands is no part of what it is
    assert moved == template and hash(moved) == hash(template)


@pytest.mark.parametrize("style", [">", "|", ">+"])
def test_the_line_break_at_the_end_of_a_block_is_no_part_of_the_text(tmp_path, style):
    block = GOOD.replace(
        'prompt: "Next {noun} after {history}"', f"prompt: {style}\n      Next {{noun}} after {{history}}\n"
    )
    (template,) = load_template_file(write(tmp_path, block))
    assert template.prompt == "Next {noun} after {history}"
    answered = f"{GOOD}    answer: {style}\n      So {{answer_title}}\n"
    (template,) = load_template_file(write(tmp_path, answered))
    assert template.answer == "So {answer_title}"


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("{noun}", "{nuon}", ["line 7, column 19", "{nuon}", "did you mean 'noun'"]),
        ("{history}", "{histroy}", ["line 7, column 32", "did you mean 'history'"]),
        ("[P1, I0, T2]", "[P1, I0]", ["line 4", "3 levels"]),
        ("    aspects: [P1, I0, T2]\n", "", ["line 3", "lacks aspects"]),
        ("[P1, I0, T2]", "[P1, I0, T9]", ["line 4, column 23", "'T9'"]),
        ("[P1, I0, T2]", "[P0, I0, T3]", ["P0 with I0"]),
        ("[P1, I0, T2]", "[P0, I0, T2]", ["{history} does not fit P0"]),
        (" after {history}", "", ["reads declares history"]),
        ("reads: [history]", "reads: []", ["line 7", "does not declare 'history'"]),
        ("reads: [history]", "reads: [histori]", ["line 5, column 13", "did you mean 'history'"]),
        ("reads: [history]", "reads: [history, target_tags]", ["must not declare what it reads of the target"]),
        ("next-item", "recall", ["'recall'"]),
        ("next-item", "search", ["does not read the target, so the metric is 'next-item'"]),
        ("{history}", "{history}!", ["must be the end of the prompt"]),
        ("{history}", "{history", ["brace"]),
        ("prompt:", "promt:", ["line 7, column 5", "did you mean 'prompt'"]),
        ("language: en", "language: eng", ["line 1, column 11", "did you mean 'en'"]),
        ("metric: next-item", "metric: next-item\n    held_out: maybe", ["held_out"]),
        ("id: a", 'id: ""', ["empty"]),
        ("id: a", 'id: "a b/../c"', ["line 3, column 9", "the id 'a b/../c' holds more than letters, digits"]),
        ("id: a", "id: a/b", ["line 3, column 9", "holds more than"]),
        ("id: a", 'id: "a\\n"', ["line 3, column 9", "holds more than"]),
        ("[P1, I0, T2]", "[P1, I0, T3]", ["T3, and only T3, shows {candidates}"]),
        ("  - id: a", "  - id: a\n    id: b", ["twice"]),
        ("[P1, I0, T2]", "[P1, I0, T2", ["not YAML", "line"]),
        (
            "[P1, I0, T2]",
            "[P1, I0, T1]",
            ["T1, and only T1, shows {first} and {second}", "a T1 template needs an answer"],
        ),
        ("after {history}", "{chosen} {history}", ["a leak: {chosen} is the target", "line 7, column 26"]),
        ("reads: [history]", "reads: [history, target_item]", ["reads declares target_item", "metric is 'search'"]),
        ("next-item", "none", ["does not read the target, so the metric is 'next-item'"]),
        ("metric:", "widening: turnaround\n    metric:", ["line 6, column 15", "did you mean 'turn-around'"]),
        ("metric:", "widening: reasoning\n    metric:", ["a widening is a T2 with an answer", "the metric is 'none'"]),
        ('{history}"', '{history}"\n    answer: "{preference}"', ["only a widening is answered by {preference}"]),
        ("Next", "Next " + "very " * 90, ["over-long: 92 words, at most 90"]),
    ],
)
def test_bad_files_name_line_and_remedy(tmp_path, old, new, parts):
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load_template_file(write(tmp_path, GOOD.replace(old, new)))
    for part in ("mine.yaml", *parts):
        assert part in str(error.value)


def test_all_problems_are_told_in_order(tmp_path):
    text = GOOD.replace("{noun}", "{nuon}") + GOOD.split("templates:\n")[1].replace("reads: [history]", "reads: [x]")
    with pytest.raises(ConfigError) as error:
        load_template_file(write(tmp_path, text))
    told = [line for line in str(error.value).splitlines() if "mine.yaml" in line]
    places = [re.search(r"line (\d+), column (\d+)", line) for line in told]
    assert [m and m[1] for m in places] == ["7", "8", "10", "12"]


def test_length_counts_words_and_characters():
    assert words_of("Next {noun} after that: {history}") == 3
    assert words_of("请推荐{noun}，OK") == 2.5  # three characters are 1.5 words, "，OK" is one


def test_files_of_a_team_come_behind_the_built_in_ones(tmp_path):
    path = write(tmp_path, GOOD.replace("id: a", "id: mine.a"))
    assert load_templates(["en"], [str(path)])[-1].id == "mine.a"
    assert not [t for t in load_templates(["zh"], [str(path)]) if t.id == "mine.a"]
    for languages in (["en"], ["zh"]):
        with pytest.raises(ConfigError, match=r"'seq\.p1\.a' is taken"):
            load_templates(languages, [str(write(tmp_path, GOOD.replace("id: a", "id: seq.p1.a")))])


def test_families_are_beginnings_of_ids():
    templates = load_templates(["en"])
    names = families(templates)
    assert {"seq", "seq.p1", "seq.p1.a", "search.p0.i1", "gift"} <= set(names)
    assert in_families(templates, ()) == [t for t in templates if not t.held_out]
    assert {t.id for t in in_families(templates, ("search.p0.i1", "seq.p1.b"))} == {
        "seq.p1.b",
        *(f"search.p0.i1.{x}" for x in "abc"),
    }
    with pytest.raises(ConfigError, match=r"did you mean 'search\.p0'"):
        in_families(templates, ("serch.p0",))
    with pytest.raises(ConfigError, match="no template is in 'sea'"):
        in_families(templates, ("sea",))
    with pytest.raises(ConfigError, match="'gift' are held out"):
        in_families(templates, ("seq", "gift"))


PACK = """\
wines:
  en: {noun: wine, nouns: wines, a_noun: a wine, verb: drink, verb_past: drunk, person: taster,
       labelled: "{labels} {nouns}", branded: "{nouns} by {brands}", worded: "{nouns} named {words}"}
  constraints:
    price: {edges: [5, 10], en: "for at most {value}"}
"""


def test_a_pack_of_a_team(tmp_path):
    path = str(write(tmp_path, PACK))
    wines = load_domain("wines", [path])
    assert word_slots(wines, "en")["Nouns"] == "Wines" and wines.constraints[0].edges == (5, 10)
    with pytest.raises(ConfigError, match="'wines' has no 'zh', only en"):
        word_slots(wines, "zh")
    with pytest.raises(ConfigError, match="did you mean 'wines'"):
        load_domain("wine", [path])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("wines:\n", "films:\n", "the name 'films' is taken"),
        ("verb: drink, ", "", "line 2, column 7: en lacks verb"),
        ("noun: wine,", "noun: '{wine}',", "line 2, column 15: unknown slot {wine}"),
        ("by {brands}", "by them", "{brands} is missing"),
        ("by {brands}", "by {brand}", "did you mean 'brands'"),
        ("[5, 10]", "[10, 5]", "edges must increase"),
        ("[5, 10]", "[5, x]", "'x' is not a number"),
        ("{value}", "{val}", "unknown slot {val}"),
        ("constraints:", "constraint:", "did you mean 'constraints'"),
        ("en:", "de:", "has no language"),
        ('en: "for', 'zh: "for', "constraint 'price' lacks en"),
        ("wines:", "wines: [", "not YAML"),
        ("person: taster", "person: ''", "person is empty"),
    ],
)
def test_bad_packs_name_the_place(tmp_path, old, new, problem):
    assert old in PACK
    with pytest.raises(ConfigError) as error:
        load_pack_file(write(tmp_path, PACK.replace(old, new)), ["films"])
    assert problem in str(error.value) and "mine.yaml" in str(error.value)


def test_p1_needs_a_history(tmp_path):
    text = GOOD.replace(" after {history}", "").replace("reads: [history]", "reads: []")
    with pytest.raises(ConfigError, match=r"P1 needs \{history\}"):
        load_template_file(write(tmp_path, text))


@pytest.mark.parametrize(
    ("reads", "metric", "problem"),
    [
        ("[]", "next-item", "I1 must declare what it reads of the target"),
        ("[target_tags]", "next-item", "reads the target, so the metric is 'search'"),
    ],
)
def test_intentions_declare_the_target(tmp_path, reads, metric, problem):
    text = f"""\
language: en
templates:
  - id: a
    aspects: [P0, I1, T2]
    reads: {reads}
    metric: {metric}
    prompt: "Find {{intention}}"
"""
    with pytest.raises(ConfigError, match=problem):
        load_template_file(write(tmp_path, text))


def test_duplicate_ids(tmp_path):
    with pytest.raises(ConfigError, match=r"line 8, column 9.*'a' is taken"):
        load_template_file(write(tmp_path, GOOD + GOOD.split("templates:\n")[1]))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template_file(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("language: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template_file(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_template_file(tmp_path / "empty.yaml")


def test_domains_fill_every_word():
    names = domain_names()
    assert {"products", "posts", "videos", "music", "games", "courses", "films", "books", "generic"} <= set(names)
    for name in names:
        for language in LANGUAGES:
            slots = word_slots(load_domain(name), language)
            assert set(WORD_SLOTS[language]) <= set(slots)
            assert all(slots.values())
            assert all(language in c.say for c in load_domain(name).constraints)
    assert word_slots(load_domain("films"), "en")["Verb_past"] == "Watched"


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'films'"):
        load_domain("film")
    with pytest.raises(ConfigError, match="unknown language 'de'"):
        load_templates(["de"])
    with pytest.raises(ConfigError, match="unknown language"):
        load_phrases("de")

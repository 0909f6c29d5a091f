import re
from collections import Counter

import pytest

from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions import aspects
from instructrec_jax.instructions.packs import LANGUAGES, WORD_SLOTS, load_domain, load_phrases, word_slots
from instructrec_jax.instructions.templates import load_template_file, load_templates

GOOD = """\
language: en
templates:
  - id: a
    aspects: [P1, I0, T2]
    reads: [history]
    metric: next-item
    prompt: "Next {noun} after {history}"
"""


def test_every_required_combination_has_wordings_in_both_languages():
    count = {lang: Counter(t.aspects for t in load_templates([lang])) for lang in LANGUAGES}
    assert count["en"] == count["zh"]
    assert sum(count["en"].values()) >= 16
    wanted = [c for c in aspects.valid_combinations() if c[2] == "T2"]
    wanted += [("P1", "I0", "T3"), ("P2", "I0", "T3"), ("P1", "I0", "T0"), ("P0", "I1", "T3"), ("P0", "I2", "T3")]
    assert not [c for c in wanted if not count["en"][c]]
    assert count["en"]["P1", "I0", "T2"] >= 5


def test_languages_have_the_same_templates():
    english, chinese = load_templates(["en"]), load_templates(["zh"])
    for a, b in zip(english, chinese, strict=True):
        assert (a.id, a.aspects, a.reads, a.metric, a.held_out) == (b.id, b.aspects, b.reads, b.metric, b.held_out)
        assert bool(a.answer) == bool(b.answer)
        assert re.search(r"[一-鿿]", b.prompt) and not re.search(r"[一-鿿]", a.prompt)


def test_words_of_the_target_make_it_search():
    for template in load_templates():
        assert (template.metric == "search") == template.reads_target == (template.intention != "I0")


def test_item_answers_follow_the_history():
    for template in load_templates():
        if template.task == "T2" and not template.answer and "history" in template.reads:
            assert template.prompt.endswith("{history}")


def test_combinations():
    assert len(aspects.valid_combinations()) == 27 - 2
    assert aspects.invalid_reason("P0", "I0", "T3")
    assert not aspects.invalid_reason("P0", "I0", "T2")


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8")
    return path


def test_good_file(tmp_path):
    (template,) = load_template_file(write(tmp_path, GOOD))
    assert template.kind == "sequential"
    assert template.reads == {"history"}


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("{noun}", "{nuon}", ["line 7, column 19", "{nuon}", "did you mean 'noun'"]),
        ("{history}", "{histroy}", ["line 7, column 32", "did you mean 'history'"]),
        ("[P1, I0, T2]", "[P1, I0]", ["line 4", "3 levels"]),
        ("    aspects: [P1, I0, T2]\n", "", ["line 3", "lacks aspects"]),
        ("[P1, I0, T2]", "[P1, I0, T1]", ["line 4, column 23", "'T1'"]),
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
        ("[P1, I0, T2]", "[P1, I0, T3]", ["T3, and only T3, shows {candidates}"]),
        ("  - id: a", "  - id: a\n    id: b", ["twice"]),
        ("[P1, I0, T2]", "[P1, I0, T2", ["not YAML", "line"]),
    ],
)
def test_bad_files_name_line_and_remedy(tmp_path, old, new, parts):
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load_template_file(write(tmp_path, GOOD.replace(old, new)))
    for part in ("mine.yaml", *parts):
        assert part in str(error.value)


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
    for name in ("films", "games", "products", "generic"):
        for language in LANGUAGES:
            slots = word_slots(load_domain(name), language)
            assert set(WORD_SLOTS[language]) <= set(slots)
            assert all(slots.values())
    assert word_slots(load_domain("films"), "en")["Verb_past"] == "Watched"


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'films'"):
        load_domain("film")
    with pytest.raises(ConfigError, match="unknown language 'de'"):
        load_templates(["de"])
    with pytest.raises(ConfigError, match="unknown language"):
        load_phrases("de")

"""Slots of a template: misspelt ones are told as such alone, widenings do not repeat their prompts."""

import pytest

from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.template_file import check_template_file
from instructrec_jax.instructions.templates import load_template_file
from instructrec_jax.instructions.yaml_file import YamlFile
from tests.test_templates import GOOD, write

WIDE = """\
language: en
templates:
  - id: wide
    aspects: [P1, I1, T2]
    reads: [history, target_item]
    metric: none
    widening: turn-around
    prompt: "{history} then {chosen}. Wish?"
    answer: "{intention}"
"""
RERANK = """\
language: en
templates:
  - id: a
    aspects: [P2, I1, T3]
    reads: [preference, candidates, target_tags]
    metric: search
    prompt: "{preference} {intention} {candidates} {noun}"
    answer: "{answer_title}"
"""
POINTWISE = """\
language: en
templates:
  - id: a
    aspects: [P1, I0, T0]
    reads: [history, item]
    metric: next-item
    prompt: "{history}. {item}?"
    answer: "{verdict}"
"""
PAIR = """\
language: en
templates:
  - id: a
    aspects: [P1, I0, T1]
    reads: [history, pair]
    metric: next-item
    prompt: "{history}. {first} or {second}?"
    answer: "{answer_title}"
"""


def test_half_a_pair_belongs_to_t1_too(tmp_path):
    for text in (PAIR.replace("T1", "T2").replace(" or {second}", ""), PAIR.replace(" or {second}", "")):
        with pytest.raises(ConfigError, match=r"T1, and only T1, shows \{first\} and \{second\}"):
            load_template_file(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "slot", "misspelt"),
    [
        (GOOD, "history", "histroy"),
        (GOOD, "noun", "nuon"),
        (RERANK, "preference", "prefrence"),
        (RERANK, "intention", "intentoin"),
        (RERANK, "candidates", "candidate"),
        (RERANK, "answer_title", "anser_title"),
        (POINTWISE, "history", "histroy"),
        (POINTWISE, "item", "itme"),
        (POINTWISE, "verdict", "verdit"),
        (PAIR, "first", "frist"),
        (PAIR, "second", "secnd"),
        (WIDE, "intention", "intentoin"),
        (WIDE, "chosen", "chosne"),
    ],
)
def test_a_misspelt_slot_is_the_only_problem(tmp_path, text, slot, misspelt):
    assert load_template_file(write(tmp_path, text))
    file = YamlFile(write(tmp_path, text.replace(f"{{{slot}}}", f"{{{misspelt}}}")))
    check_template_file(file)
    assert [p.text for p in file.problems] == [f"unknown slot {{{misspelt}}} (did you mean {slot!r}?)"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", ""),
        ("{intention}", "{answer_title}", "I1 needs {intention}"),
        (", target_item", "", "does not declare 'target_item'"),
        (", target_item", ", target_item, target_tags", "must not declare what it reads of the target"),
        ("T2", "T3", "a widening is a T2"),
        ("P1", "P2", "P2 needs {preference}"),
        ("metric: none", "metric: search", "the metric is 'none'"),
        ("Wish?", "{intention}?", "I1 must declare what it reads of the target"),
    ],
)
def test_widenings_are_checked(tmp_path, old, new, problem):
    path = write(tmp_path, WIDE.replace(old, new))
    if not problem:
        (template,) = load_template_file(path)
        assert (template.kind, template.reads_target) == ("turn_around", True)
        return
    with pytest.raises(ConfigError) as error:
        load_template_file(path)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("aspects", "reads", "prompt", "answer", "leak"),
    [
        ("P0, I0", "target_item", "Of {chosen}:", "It is {answer_title}", "20 answer_title chosen"),
        ("P0, I0", "target_item", "Of {chosen}:", "{answer_item}", "14 answer_item chosen"),
        ("P0, I1", "target_tags", "Want {intention}", "Oh: {intention}", "18 intention intention"),
        ("P2, I0", "preference", "{preference} So?", "{preference} {answer_title}", "14 preference preference"),
        ("P1, I0", "history", "{history}. Last?", "{history_titles}", "14 history_titles history"),
        ("P1, I0", "history", "{history}. Next?", "{answer_title}", ""),
        ("P1, I1", "history, target_tags", "{intention}: {history}", "{answer_title}", ""),
        ("P2, I0", "target_item", "{chosen}?", "{preference}", ""),
    ],
)
def test_no_widening_repeats_its_prompt(tmp_path, aspects, reads, prompt, answer, leak):
    path = write(
        tmp_path,
        f"""\
language: en
templates:
  - id: wide
    aspects: [{aspects}, T2]
    reads: [{reads}]
    metric: none
    widening: reasoning
    prompt: "{prompt}"
    answer: "{answer}"
""",
    )
    if not leak:
        assert load_template_file(path)
        return
    with pytest.raises(ConfigError) as error:
        load_template_file(path)
    column, slot, shown = leak.split()
    assert str(error.value) == (
        f"{path}: line 9, column {column}: a leak: {{{slot}}} repeats what the prompt says by {{{shown}}}"
    )

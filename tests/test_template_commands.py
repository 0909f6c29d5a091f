"""`instructrec templates`: a team's files are checked, wordings shown with real items, the grid counted."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from instructrec_jax import template_commands
from instructrec_jax.cli import cli
from instructrec_jax.config import Config
from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.aspects import valid_combinations
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.templates import load_templates
from tests.small_split import small_split

TEMPLATES = """\
language: en
templates:
  - {id: our.a, aspects: [P1, I0, T2], reads: [history], metric: next-item, prompt: "Our {nouns}: {history}"}
  - {id: our.b, aspects: [P0, I0, T2], reads: [], metric: next-item, prompt: "Any {noun}?"}
"""
PACK = """\
wines:
  en: {noun: wine, nouns: wines, a_noun: a wine, verb: drink, verb_past: drunk, person: taster,
       labelled: "{labels} {nouns}", branded: "{nouns} by {brands}", worded: "{nouns} named {words}"}
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    (tmp_path / "p.yaml").write_text(PACK)
    return tmp_path


def run(*args: str):
    return CliRunner().invoke(cli, ["templates", *args])


def test_good_files(files):
    result = run("check", "t.yaml", "p.yaml")
    assert result.exit_code == 0
    assert result.output == "t.yaml: 2 templates, nothing wrong\np.yaml: 1 domain pack, nothing wrong\n"


def test_every_problem_of_every_file_is_listed(files):
    (files / "t.yaml").write_text(TEMPLATES.replace("{noun}", "{nuon}").replace("[P1, I0, T2]", "[P1, I0]"))
    (files / "p.yaml").write_text(PACK.replace("noun: wine", "nuon: wine"))
    (files / "broken.yaml").write_text("language: [en")
    result = run("check", "t.yaml", "p.yaml", "broken.yaml", "none.yaml", "t.yaml")
    assert result.exit_code == 1
    for part in (
        "t.yaml: line 3, column 26: aspects needs 3 levels",
        "t.yaml: line 4, column 83: unknown slot {nuon} (did you mean 'noun'?)",
        "p.yaml: line 2, column 8: unknown key 'nuon' (did you mean 'noun'?)",
        "p.yaml: line 2, column 7: en lacks noun",
        "broken.yaml: line ",
        "none.yaml: cannot be read",
        "the id 'our.b' is taken",  # the file was given twice
    ):
        assert part in result.output
    assert "9 problems" in result.output


def test_a_file_without_templates_is_told(files):
    (files / "t.yaml").write_text("language: en\ntemplates: []\n")
    result = run("check", "t.yaml")
    assert result.exit_code == 1 and "t.yaml: line 2, column 12: the file holds no template\n1 problem" in result.output


def test_a_built_in_id_is_taken(files):
    (files / "t.yaml").write_text(TEMPLATES.replace("our.a", "seq.p1.a"))
    result = run("check", "t.yaml")
    assert result.exit_code == 1 and "t.yaml: line 3, column 10: the id 'seq.p1.a' is taken" in result.output


def test_tokens_are_counted_with_a_prepared_tokeniser(files):
    from instructrec_jax.data import tokenizer

    (files / "c.yaml").write_text("name: small\ntrain: {sequence_length: 16, logits_chunk: 16}\n")
    result = run("check", "t.yaml", "--tokens-of", "c.yaml")
    assert isinstance(result.exception, ConfigError) and "data prepare" in str(result.exception)
    tokenizer.train(["Our films: Any film?"] * 3, 300, files / "prepared" / "small" / "tokenizer")
    assert run("check", "t.yaml", "--tokens-of", "c.yaml").exit_code == 0
    (files / "t.yaml").write_text(TEMPLATES.replace("Any {noun}", "zxqj kvwz qqpo {noun}"))
    result = run("check", "t.yaml", "--tokens-of", "c.yaml")
    assert result.exit_code == 1
    assert "t.yaml: line 4, column 78: template 'our.b' is over-long: " in result.output
    assert "at most 8 of a row of 16" in result.output


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_grid(language):
    result = run("list", "--language", language)
    assert result.exit_code == 0
    assert f"{language}: {len(load_templates([language]))} templates" in result.output
    rows = [line for line in result.output.splitlines() if line.startswith(("│ P", "│ I"))]
    assert len(rows) == 9
    cells = [cell.strip() for row in rows for cell in row.split("│")[2:6]]
    assert cells.count("–") == 3 and not {"", "0"} & set(cells)
    assert len(cells) - 3 == len(valid_combinations())


def test_further_files_are_counted(files):
    assert (
        f"en: {len(load_templates(['en'])) + 2} templates" in run("list", "--language", "en", "--file", "t.yaml").output
    )


def test_show_without_data(files):
    result = run("show", "--id", "our", "--file", "t.yaml", "--pack", "p.yaml", "--domain", "wines", "--language", "en")
    assert result.exit_code == 0
    assert "our.a [en]  P1, I0, T2  sequential  reads: history  metric: next-item" in result.output
    assert "Our wines: {history}" in result.output and "Any wine?" in result.output
    result = run("show", "--id", "ours", "--file", "t.yaml")
    assert isinstance(result.exception, ConfigError) and "did you mean 'our'" in str(result.exception)


def test_show_with_items_of_the_embedded_data(files):
    result = run("show", "--id", "pair.p0.i2.a", "--example", "--language", "en")
    assert result.exit_code == 0, result.exception
    head, prompt, answer = result.output.splitlines()
    assert head.startswith("pair.p0.i2.a [en]  P0, I2, T1  pairwise")
    assert prompt.startswith("  Searched for: ") and "{" not in prompt
    assert answer.startswith("  → ") and answer[4:] in prompt


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_template_has_an_example(language):
    data = small_split()
    builder = Builder(data, Config().instructions, "films", items_as="title")
    for template in load_templates([language]):
        made = template_commands.example_of(builder, template)
        if "features" in template.reads:
            assert made is None
            continue
        assert made is not None and "{" not in made.prompt + made.answer
        assert made.answer or made.target >= 0


def test_a_misspelt_command_is_answered():
    result = run("chek")
    assert result.exit_code == 2 and "did you mean 'check'" in result.output

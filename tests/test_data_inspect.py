"""What ``data inspect`` says agrees with the records."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import data_inspect, prepare
from instructrec_jax.config import Config
from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import encode_example
from tests.test_prepare import config_of, silent, write_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Config:
    tmp = tmp_path_factory.mktemp("inspect")
    write_folder(tmp / "data")
    config = config_of(tmp, train={"sequence_length": 24}, instructions={"languages": ["en", "zh"]})
    prepare.prepare(config, silent)
    return config


def test_counts_lengths_and_repeats_are_those_of_the_records(made):
    found = data_inspect.inspect(made)
    records = Records(made.prepared_dir / "records")
    examples = [records[i] for i in range(len(records))]
    text = prepare.load(made).text
    lengths = [len(encode_example(e, text)["tokens"]) for e in examples]
    assert found.records == found.sampled == len(examples)
    assert found.by_template == Counter(e.template for e in examples)
    assert found.by_language == Counter(e.language for e in examples)
    assert sum(found.by_aspect.values()) == sum(found.by_task.values()) == len(examples)
    assert sorted(found.lengths.tolist()) == sorted(lengths)
    over = [n - 24 for n in lengths if n > 24]
    assert (found.truncated, found.tokens_cut) == (len(over), sum(over)) and over
    distinct = {(e.prompt, e.prompt_items, e.answer, e.answer_items, e.target) for e in examples}
    assert found.repeated == len(examples) - len(distinct)
    assert len(found.prompts) == 20
    assert len({(p.template, p.language) for p in found.prompts}) == 20  # one of each, before any comes twice
    for p in found.prompts:
        assert not re.search("[\ufff9-\ufffc]", p.prompt + p.answer)


def test_a_sample_is_evenly_spaced(made):
    found = data_inspect.inspect(made, records=10, prompts=3)
    assert found.sampled == 10 < found.records and len(found.prompts) == 3


def test_share_of_the_most_popular():
    assert data_inspect.share_of_top(np.array([1, 7, 2, 0, 0]), 0.2) == 0.7
    assert data_inspect.share_of_top(np.zeros(3, int), 0.5) == 0


def test_page_and_command(made, tmp_path):
    from click.testing import CliRunner

    from instructrec_jax.cli import cli

    (tmp_path / "c.yaml").write_text(configs.dump(made))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["data", "inspect", str(tmp_path / "c.yaml"), "--html", str(page), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["truncated"] > 0 and len(told["prompts"]) == 20
    assert told["prompts"] == [vars(p) for p in data_inspect.inspect(made).prompts]
    html = page.read_text("utf-8")
    assert html.count("<svg") == 2 and "http" not in re.sub(r'http://www.w3.org\S*|http-equiv="', "", html)
    assert "Picture" in html and html == data_inspect.write_html(data_inspect.inspect(made), page).read_text("utf-8")
    shown = CliRunner().invoke(cli, ["data", "inspect", str(tmp_path / "c.yaml"), "--prompts", "2"])
    assert shown.exit_code == 0 and "longer than train.sequence_length" in shown.output
    assert Path(page).exists()
    for count in (2, 0):
        words = ["data", "inspect", str(tmp_path / "c.yaml"), "--prompts", str(count), "--json"]
        assert len(json.loads(CliRunner().invoke(cli, words).stdout)["prompts"]) == count

"""A local model as the teacher: batches that are stored as they come, a budget, and a command that goes on where it was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instructrec_jax import generate
from instructrec_jax.config import Config
from instructrec_jax.errors import ConfigError
from instructrec_jax.generate import Answer
from instructrec_jax.instructions.teacher import budget, local
from instructrec_jax.instructions.teacher.cache import Cache, Usage
from instructrec_jax.models.hf.gguf import convert
from tests.fake_endpoint import good
from tests.gguf_files import write
from tests.test_prepare import write_folder
from tests.test_teacher import lesson, settings

BATCH = 4
ANSWER = tuple(range(10))  # tokens of a fake answer


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("teacher")
    write_folder(tmp / "data")
    return tmp


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(local, "_BATCH", BATCH)


class Fake:
    """A generator whose texts pass; ends at a batch of which it is told, as a person would end it."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.interrupted_at = -1

    def answers(self, prompts: Sequence[str], decoding: Any, *, seed: int) -> list[Answer]:
        if len(self.batches) == self.interrupted_at:
            raise KeyboardInterrupt
        self.batches.append(list(prompts))
        said = [json.loads(good({"messages": [{"content": prompt}]})) for prompt in prompts]
        return [Answer(text, ANSWER, 0.0) for tree in said for text in tree.values()]

    def length(self, prompt: str) -> int:
        return len(prompt.split())

    @property
    def prompts(self) -> list[str]:
        return [prompt for batch in self.batches for prompt in batch]

    @property
    def cost(self) -> int:
        return sum(self.length(prompt) + len(ANSWER) for prompt in self.prompts)


@pytest.fixture
def fake(monkeypatch) -> Fake:
    made = Fake()

    @contextmanager
    def loaded(where):
        yield made

    monkeypatch.setattr(generate, "loaded", loaded)
    return made


def of(source: Path, tmp: Path, **teacher: Any) -> Config:
    return settings(source, tmp, **{"backend": "local", "model": "fake", "repairs": 0, **teacher})


def test_a_model_of_ours_answers_and_is_not_asked_again(source, tmp_path, monkeypatch):
    model = convert(write(tmp_path / "m.gguf"), tmp_path / "model", "float32")
    config = of(source, tmp_path, model=str(model), max_output_tokens=4, temperature=0.0)
    outcome = lesson(config, limit=2, kinds=("intention",))
    assert outcome.asked == 2 and not outcome.unanswered and not outcome.stopped
    stored = sqlite3.connect(outcome.folder / "cache.sqlite").execute("SELECT prompt, answer FROM answers").fetchall()
    assert len(stored) == 2 and all(prompt > 100 and 0 <= answer <= 4 for prompt, answer in stored)
    assert Cache(outcome.folder).spent().total == sum(map(sum, stored))
    before = {p.name: p.read_bytes() for p in outcome.folder.iterdir() if p.suffix in (".parquet", ".jsonl", ".json")}
    monkeypatch.setattr(generate, "loaded", None)
    lesson(config, limit=2, kinds=("intention",))
    assert before == {name: (outcome.folder / name).read_bytes() for name in before}


def test_the_budget_is_used_up_and_never_exceeded(source, tmp_path, fake):
    lesson(of(source, tmp_path / "free"), limit=20)
    everything, cost, wanted = fake.prompts, fake.cost, max(budget.most(p, 120).total for p in fake.prompts)
    fake.batches.clear()
    # Less than a batch at its most, more than most answers at what they cost.
    room = wanted + cost // 2
    assert room < BATCH * wanted
    outcome = lesson(of(source, tmp_path, max_tokens_total=room), limit=20)
    assert "the budget is used up" in outcome.stopped
    assert room - wanted < fake.cost <= room  # another request might have taken more than was left
    assert outcome.unanswered == len(everything) - len(fake.prompts) > 0
    assert Cache(outcome.folder).spent().total == fake.cost
    again = lesson(of(source, tmp_path, max_tokens_total=cost + wanted), limit=20)
    assert not again.stopped and fake.prompts == everything  # in their order, each once


def test_an_interrupted_command_keeps_its_batches_and_goes_on(source, tmp_path, fake):
    fake.interrupted_at = 2
    outcome = lesson(of(source, tmp_path), limit=20)
    assert outcome.stopped == "interrupted" and sum(outcome.kept.values()) == 2 * BATCH == len(fake.prompts)
    spent, first = Cache(outcome.folder).spent().total, fake.cost
    fake.interrupted_at = -1
    again = lesson(of(source, tmp_path), limit=20)
    assert sum(again.kept.values()) + again.without_evidence == again.asked > 3 * BATCH
    assert len(set(fake.prompts)) == len(fake.prompts) == sum(again.kept.values())
    under_way = fake.batches[2]
    assert spent == first + sum(budget.most(prompt, 120).total for prompt in under_way)  # it stays charged, at its most
    assert [len(batch) for batch in fake.batches[:-1]] == [BATCH] * (len(fake.batches) - 1)


def test_no_model(source, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.model is empty"):
        lesson(of(source, tmp_path, model=""))
    assert Cache(tmp_path / "prepared" / "set-teacher").spent() == Usage()

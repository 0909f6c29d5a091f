"""Prompts in, texts out: by ``Generator``, and by the command ``instructrec generate`` for a run and for a published model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from instructrec_jax import config as configs
from instructrec_jax import prepare, run
from instructrec_jax.cli import cli
from instructrec_jax.data.tokenise import encode_prompt
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.generate import Generator, generate
from instructrec_jax.models.generate import Decoding
from instructrec_jax.models.language_model import LanguageModel, apply, word_logits
from instructrec_jax.models.sharding import BATCH
from tests.tiny import tiny_config, write_slice

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps over a slice of real data."""
    tmp = tmp_path_factory.mktemp("generate")
    write_slice(tmp / "data", users=30)
    config = tiny_config(tmp, steps=2, eval_every=2)
    prepare.prepare(config, lambda _: None)
    folder = configs.run_dir(config)
    run.train_run(config, folder, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def opened(run_dir: Path) -> Iterator[tuple[run.Session, Any]]:
    with run.trained(run_dir) as (s, variables, _):
        yield s, variables


def made(opened: tuple[run.Session, Any], **options: Any) -> Generator:
    s, variables = opened
    model = LanguageModel(s.arch, s.sizes, s.config.model)
    return Generator(model, variables, s.prepared.text, content=s.content, **options)


def test_items_in_prompts(opened: tuple[run.Session, Any]) -> None:
    """Prompts with item tokens and of several lengths, against whole rows of prompt and answer."""
    s, variables = opened
    model = LanguageModel(s.arch, s.sizes, s.config.model)
    asked = [s.builder.recommend_prompt(list(range(n)), "a slow film" if n % 2 else None) for n in (0, 3, 6)]
    found = made(opened).answers(asked, Decoding(5))
    assert len({answer.tokens for answer in found}) > 1
    width = 64

    @jax.jit
    def log_probs(variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
        out = apply(model, variables, batch, s.content)
        return jax.reshard(jax.nn.log_softmax(word_logits(out.hidden, out, s.arch)), jax.P())

    sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(BATCH, None))
    for prompt, answer in zip(asked, found):
        part = encode_prompt(prompt, s.prepared.text)
        length, tokens = len(part["tokens"]), [*answer.tokens, s.prepared.text.eos][:5]
        rows = {k: np.zeros((8, width), v.dtype) for k, v in part.items()}
        for key, row in rows.items():
            row[:, :length] = part[key]
        rows["tokens"][:, length : length + len(tokens)] = tokens
        rows["positions"] = np.broadcast_to(np.arange(width, dtype=np.int32), (8, width))
        rows["segment_ids"] = np.ones((8, width), np.int32)
        log = np.asarray(log_probs(variables, {k: jax.device_put(v, sharding) for k, v in rows.items()}))[0]
        places = np.arange(length - 1, length - 1 + len(tokens))
        assert log[places].argmax(1).tolist() == tokens
        assert answer.log_prob == pytest.approx(log[places, tokens].sum(), abs=1e-4)
        assert answer.text == s.prepared.text.decode(answer.tokens)


@pytest.mark.slow
def test_answers_do_not_depend_on_batches(opened: tuple[run.Session, Any]) -> None:
    s, _ = opened
    asked = ["A film about the sea", "Why?", *(s.builder.recommend_prompt(list(range(n % 5))) for n in range(18))]
    how = Decoding(6, temperature=1.0, top_p=0.9)
    together = made(opened, batch_size=32).texts(asked, how, seed=3)
    small = made(opened, batch_size=8).texts(asked, how, seed=3)
    assert together == small and len(set(together)) > 5
    assert made(opened).texts(asked, how, seed=4) != together
    assert made(opened).texts([], how) == []


def test_long_prompts_keep_their_newest_words(opened: tuple[run.Session, Any]) -> None:
    """A prompt that is too long is answered as its head and its end alone."""
    text = opened[0].prepared.text
    words = "one two three four five six seven eight nine ten " * 4
    ids = text.encode(words)
    cut = text.decode(ids[-11:])
    assert text.encode(cut) == ids[-11:]
    short = made(opened, max_prompt=12)
    assert short.answers([words]) == short.answers([cut])


def test_an_empty_prompt_is_named(opened: tuple[run.Session, Any]) -> None:
    s, variables = opened
    bare = dataclasses.replace(s.prepared.text, before=())
    generator = Generator(LanguageModel(s.arch, s.sizes, s.config.model), variables, bare, content=s.content)
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generator.texts(["a", ""])


def call(*words: str) -> str:
    result = CliRunner().invoke(cli, ["generate", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_reads_a_run(run_dir: Path, opened: tuple[run.Session, Any]) -> None:
    prompt = "The user liked slow films."
    assert call(str(run_dir), prompt, "--max-new", "6") == made(opened).texts([prompt], Decoding(6))[0] + "\n"
    warm = [
        call(str(run_dir), prompt, "--temperature", "1", "--top-p", "0.9", "--max-new", "6", "--seed", n) for n in "12"
    ]
    assert warm[0] != warm[1]
    with pytest.raises(UserError, match="a system message needs a chat template"):
        call(str(run_dir), prompt, "--system", "Be brief.")
    with pytest.raises(ConfigError, match=r"beams = 3 with temperature = 0.5"):
        call(str(run_dir), prompt, "--beams", "3", "--temperature", "0.5")


def published(folder: Path, run_dir: Path) -> Path:
    """A model with 512 words and a chat template, as a publisher would lay it out, with the tokeniser of the run."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((GOLDEN / "llama3/config.json").read_text("utf-8")) | {"vocab_size": 512}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(GOLDEN / "llama3/model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = np.random.default_rng(0).normal(size=(512, weights[name].shape[1])).astype(np.float32)
    save_file(weights, folder / "model.safetensors")
    settings = configs.load(run_dir / "config.yaml", ())
    for file in (settings.prepared_dir / "tokenizer").iterdir():
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", encoding="utf-8"
    )
    return folder


def test_the_command_reads_a_published_model(tmp_path: Path, run_dir: Path) -> None:
    folder = published(tmp_path / "model", run_dir)
    plain = call(str(folder), "Slow films", "--max-new", "8", "--beams", "2")
    assert plain == call(str(folder), "Slow films", "--max-new", "8", "--beams", "2")
    how = Decoding(8, beams=2)
    alone, briefed = (generate(folder, ["Slow films"], how, system=system)[0] for system in (None, "Be brief."))
    assert alone.text + "\n" == plain
    assert briefed.log_prob != alone.log_prob  # it reads the message, whatever random weights make of it
    assert (
        call(str(folder), "Slow films", "--max-new", "8", "--beams", "2", "--system", "Be brief.")
        == briefed.text + "\n"
    )
    with pytest.raises(UserError, match="max_new = 512 leaves no room for a prompt in the model's 512 positions"):
        call(str(folder), "Slow films", "--max-new", "512")
    with pytest.raises(UserError, match="is an encoder"):
        call(str(GOLDEN / "bert"), "Slow films")

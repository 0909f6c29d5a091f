"""A published model on the main job: prepared, tuned, scored and measured, for a decoder and an encoder-decoder."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from instructrec_jax import config as configs
from instructrec_jax import evaluate, prepare, run
from instructrec_jax.config import Config
from instructrec_jax.data import tokenizer
from instructrec_jax.data.tokenise import encode_answer, encode_example, encode_prompt
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.models.adapters import join
from instructrec_jax.models.heads import word_log_prob
from instructrec_jax.models.hf.configs import from_hf
from instructrec_jax.models.hf.names import entries, inputs
from instructrec_jax.models.language_model import LanguageModel, Sizes, apply, init_variables, plain_batch
from instructrec_jax.models.rows import split_rows
from instructrec_jax.scoring import Request
from instructrec_jax.training.mesh import make_mesh
from tests.tiny import tiny_config, write_slice

VOCAB = 500
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48,
    "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}  # fmt: skip
WORDS = {"items_as": "title", "search": 0, "profile": 0, "rerank": 0, "pointwise": 0, "describe": 0, "history_items": 5}


def write_model(folder: Path, config: dict[str, Any], texts: list[str]) -> Path:
    """Random weights under published names, with a tokeniser trained on ``texts``."""
    tokenizer.train(texts, VOCAB - 20, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arch = from_hf(config)
    one = configs.MeshConfig(1, 1, 1)
    with jax.set_mesh(make_mesh(one, jax.devices()[:1])):
        sizes, plain = Sizes(VOCAB), configs.ModelConfig(dropout=0.0, item_dropout=0.0)
        params = jax.jit(lambda key: init_variables(arch, sizes, plain, key))(jax.random.key(5))["params"]
    tensors: dict[str, np.ndarray] = {}
    for entry in entries(arch):
        value = params
        for key in entry.path:
            value = value[key]
        value = np.asarray(value)
        for layer in range(entry.layers or 1):
            one_layer = value[layer] if entry.layers else value
            tensors[entry.published(layer)] = np.ascontiguousarray(
                entry.theirs(one_layer, VOCAB if entry.kind == "table" else 0, inputs(entry.path[-1]))
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("pretrained")
    write_slice(tmp / "data", users=25)
    titles = (tmp / "data" / "items.csv").read_text("utf-8").splitlines()
    write_model(tmp / "llama", LLAMA, titles)
    write_model(tmp / "t5", T5, titles)
    return tmp


def config_of(tmp: Path, model: str, instructions: dict | None = None, **changes: Any) -> Config:
    tree = configs.to_dict(tiny_config(tmp, steps=6, batch_size=8, sequence_length=128, learning_rate=3e-3))
    tree["name"] = f"{model}-{abs(hash(str(instructions))) % 1000}"
    tree["instructions"] |= WORDS | {"dense_titles": model != "t5"} | (instructions or {})
    tree["model"] |= {
        "pretrained": str(tmp / model), "dropout": 0.0, "item_dropout": 0.0, "trainable": ["adapter"],
        "adapter": {"rank": 4, "alpha": 8.0}, **changes,
    }  # fmt: skip
    tree["train"] |= {"text_loss_weight": 1.0, "eval_users": 10}
    tree["evaluate"] |= {"likelihood_users": 20, "cutoffs": [1, 3, 5]}
    return configs.from_dict(tree)


@pytest.mark.parametrize("model", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_prepare_train_evaluate(made: Path, model: str) -> None:
    config = config_of(made, model)
    prepare.prepare(config, lambda _: None)
    folder = made / f"run-{model}"
    lines: list[str] = []
    finished = run.train_run(config, folder, lines.append)
    assert finished.step == 6 and "are frozen" in "\n".join(lines)
    losses = [json.loads(x) for x in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    text = [x["text_loss"] for x in losses if "text_loss" in x]
    assert text[-1] < text[0], text
    payload = evaluate.evaluate(folder, say=lines.append)
    systems = [row["name"] for row in payload["next_item"]["rows"]]
    assert systems[:2] == [evaluate.MODEL, evaluate.BEFORE] and "popularity" in systems
    assert payload["protocol"].startswith("1+9") and payload["search"] is None


@pytest.mark.slow
def test_a_mixture_of_titles(made: Path) -> None:
    """Without item tokens: one data set under two names, of which one trains. Both are measured alike."""
    files = {}
    for name, weight in (("first", 1.0), ("second", 0.0)):
        one = dataclasses.replace(config_of(made, "llama"), name=name)
        prepare.prepare(one, lambda _: None)
        (made / f"{name}.yaml").write_text(configs.dump(one), encoding="utf-8")
        files[str(made / f"{name}.yaml")] = weight
    plain = config_of(made, "llama")
    config = dataclasses.replace(
        plain, name="both", mixture=files, data=configs.DataConfig(), instructions=configs.InstructionConfig()
    )
    prepare.prepare(config, lambda _: None)
    run.train_run(config, made / "run-both", lambda _: None)
    first, second = (p["next_item"] for p in evaluate.evaluate_sets(made / "run-both", say=lambda _: None))
    assert (first["data"], second["data"]) == ("first", "second") and first["protocol"].startswith("1+9")
    assert [row["metrics"] for row in first["rows"]] == [row["metrics"] for row in second["rows"]]


@pytest.mark.slow
def test_an_interrupted_run_ends_like_a_whole_one(made: Path) -> None:
    """Only the adapter is in the checkpoints; the published weights are read again."""
    config = config_of(made, "llama", {"seed": 3})
    prepare.prepare(config, lambda _: None)

    def stop_at_four(line: str) -> None:
        if line.startswith("step") and " 4/6 " in line:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run.train_run(config, made / "parts", stop_at_four)
    lines: list[str] = []
    run.train_run(config, made / "parts", lines.append)
    assert "resumed from step 2" in lines
    run.train_run(config, made / "whole", lines.append)
    with run.trained(made / "whole") as (_, whole, _), run.trained(made / "parts") as (_, parts, _):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, parts)


@pytest.mark.slow
def test_training_rows_of_an_encoder_decoder_equal_pairs(made: Path) -> None:
    """A packed row with two instructions gives the log-probabilities of each as a source and a target of its own."""
    config = config_of(made, "t5")
    prepare.prepare(config, lambda _: None)
    with run.session(config) as s:
        variables = join(*s.start())
        model = LanguageModel(s.arch, s.sizes, config.model)
        examples = list(s.builder.training_examples())[:2]
        arrays = [encode_example(e, s.prepared.text) for e in examples]
        row = {k: np.concatenate([a[k] for a in arrays])[None] for k in arrays[0]}
        row["segment_ids"] = np.concatenate([np.full(len(a["tokens"]), n + 1) for n, a in enumerate(arrays)])[None]
        row["positions"] = np.concatenate([np.arange(len(a["tokens"])) for a in arrays])[None]
        batch = {k: jnp.asarray(np.repeat(v, 8, 0)) for k, v in row.items()}
        prompt, answer = split_rows(batch, 0)
        out = apply(model, variables, batch)
        logp = word_log_prob(out.hidden, jnp.maximum(batch["text_target"] - 1, 0), out, s.arch)
        packed = np.asarray(logp * (batch["text_target"] > 0))[0]
        for number, example in enumerate(examples):
            source = np.asarray(encode_prompt(example, s.prepared.text)["tokens"])
            target = np.asarray(encode_answer(example.answer, s.prepared.text))
            seen = np.asarray(prompt["segment_ids"])[0] == number + 1
            np.testing.assert_array_equal(np.asarray(batch["tokens"])[0][seen], source)
            fed = np.asarray(answer["segment_ids"])[0] == number + 1
            np.testing.assert_array_equal(np.asarray(answer["tokens"])[0][fed], [0, *target[:-1]])
            np.testing.assert_array_equal(np.asarray(answer["positions"])[0][fed], np.arange(len(target)))
            expected = pair_log_prob(model, variables, source, target)
            np.testing.assert_allclose(packed[fed], expected, atol=1e-5)


LONGEST = {"source": 256, "target": 64}  # one shape, one compilation


@partial(jax.jit, static_argnums=0)
def _pair_log_prob(model: LanguageModel, variables: Any, pair: dict[str, jax.Array], target: jax.Array) -> jax.Array:
    out = apply(model, variables, pair)
    return word_log_prob(out.hidden, target, out, model.arch)


def pair_log_prob(model: LanguageModel, variables: Any, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """log P of each token of ``target`` after ``source``, in a row of its own, as a source and a target."""

    def rows(values: Any, kind: str) -> np.ndarray:
        padded = np.zeros(LONGEST[kind], np.int32)
        padded[: len(values)] = values
        return np.repeat(padded[None], 8, 0)

    pair = plain_batch(
        rows([model.arch.decoder_start, *target[:-1]], "target"),
        rows(np.ones_like(target), "target"),
        source_tokens=rows(source, "source"),
        source_segment_ids=rows(np.ones_like(source), "source"),
        source_positions=rows(np.arange(len(source)), "source"),
    )
    return np.asarray(_pair_log_prob(model, variables, pair, plain_batch(rows(target, "target"))["tokens"]))[
        0, : len(target)
    ]


@pytest.mark.slow
def test_likelihood_of_an_encoder_decoder(made: Path) -> None:
    config = config_of(made, "t5")
    prepare.prepare(config, lambda _: None)
    with run.session(config) as s:
        variables = join(*s.start())
        scorer = s.scorer(variables, batch_size=8)
        prompts = s.prompts("describe", s.prepared.data.cases(2))[:3]
        found = scorer.score([Request(p, [4, 0, 17]) for p in prompts], "likelihood")
        model = LanguageModel(s.arch, s.sizes, config.model)
        for prompt, scores in zip(prompts, found):
            source = np.asarray(encode_prompt(prompt, s.prepared.text)["tokens"])
            for item, score in zip([4, 0, 17], scores):
                target = np.asarray(encode_answer(s.prepared.data.catalogue.titles[item], s.prepared.text))
                assert score == pytest.approx(pair_log_prob(model, variables, source, target).sum(), abs=1e-4)


@pytest.mark.slow
def test_item_tokens_beside_a_published_model(made: Path) -> None:
    config = config_of(
        made, "llama", {"items_as": "token", "search": 0.5}, trainable=["adapter", "items"], content_features=16
    )
    prepare.prepare(config, lambda _: None)
    lines: list[str] = []
    run.train_run(config, made / "run-items", lines.append)
    with run.trained(made / "run-items") as (s, variables, _):
        scores = s.scorer(variables).score_all(s.sequential_prompts(s.prepared.data.cases(2))[:4])
        assert scores.shape == (4, s.prepared.data.num_items) and np.isfinite(scores).all()
        before = join(*s.start())["params"]
        after = variables["params"]
        assert not np.array_equal(np.asarray(before["item_id"]), np.asarray(after["item_id"]))
        np.testing.assert_array_equal(np.asarray(before["words"]), np.asarray(after["words"]))


def test_validation_by_items_needs_items(made: Path) -> None:
    config = config_of(made, "llama")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_method="items"))
    prepare.prepare(config, lambda _: None)
    with pytest.raises(ConfigError, match="the model has no item head"):
        run.train_run(config, made / "run-no-items", lambda _: None)


@pytest.mark.parametrize(
    ("model", "instructions", "changes", "message"),
    [
        ("llama", {"items_as": "token"}, {}, "no item tokens"),
        ("llama", {"search": 1.0}, {}, "search ask for an item"),
        ("t5", {"dense_titles": True}, {}, "cannot learn at every item"),
        ("llama", {}, {"trainable": ["adaptor"]}, "did you mean 'adapter'"),
        ("llama", {}, {"quantise": "nf4", "trainable": ["all"]}, "quantised weights cannot be trained"),
    ],
)
def test_settings_that_do_not_fit(made: Path, model: str, instructions: dict, changes: dict, message: str) -> None:
    config = config_of(made, model, instructions, **changes)
    prepare.prepare(config, lambda _: None)
    with pytest.raises(ConfigError, match=message), run.session(config):
        pass


def test_a_tokeniser_larger_than_the_word_table(made: Path) -> None:
    other = made / "small"
    write_model(other, LLAMA, (made / "data" / "items.csv").read_text("utf-8").splitlines())
    (other / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 300}), encoding="utf-8")
    config = config_of(made, "small")
    prepare.prepare(config, lambda _: None)
    with (
        pytest.raises(UserError, match=r"has \d+ tokens, the word table \(words, shape \(300, 32\)\) 300 rows"),
        run.session(config),
    ):
        pass


def test_items_begin_at_the_words_of_their_titles(made: Path) -> None:
    """The learned part of an item's vector is its title's mean word vector, as long as a word's; what is written adds nothing yet."""
    own = {"trainable": ["adapter", "items"], "item_start": "titles"}
    config = config_of(made, "llama", {"items_as": "token", "history_items": 8}, **own)
    prepare.prepare(config, lambda _: None)
    with run.session(config) as s:
        trained, frozen = s.start()
        words = np.asarray(join(trained, frozen)["params"]["words"])
        items, long = np.asarray(trained["params"]["item_id"]), np.linalg.norm(words, axis=1).mean()
        for item in (0, 7, s.prepared.data.num_items - 1):
            mean = words[s.prepared.text.ids(s.prepared.data.catalogue.titles[item])].mean(0)
            np.testing.assert_allclose(items[item], mean * long / np.linalg.norm(mean), rtol=1e-5)
        assert not items[s.prepared.data.num_items :].any() and not np.asarray(trained["params"]["item_content"]).any()
    with pytest.raises(ConfigError, match="item_start"), run.session(config_of(made, "llama", item_start="titles")):
        pass


@pytest.mark.slow
def test_a_run_whose_items_begin_at_titles_comes_to_its_end(made: Path) -> None:
    own = {"trainable": ["adapter", "items"], "item_start": "titles"}
    config = config_of(made, "llama", {"items_as": "token", "history_items": 8}, **own)
    prepare.prepare(config, lambda _: None)
    assert run.train_run(config, made / "run-titles", lambda _: None).step == 6

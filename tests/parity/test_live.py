"""Parity with transformers on freshly drawn configs, where PyTorch is installed; goldens cover chosen ones without it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from tests.parity import cases, inputs, reference
from tests.parity.ours import Ours, assert_gradients, assert_logits, one_device

Draw = Callable[[st.SearchStrategy], object]

# An example compiles for seconds: few of them, and a failing one is shown as drawn (shrinking would take many more).
live = settings(
    max_examples=max(3, settings.default.max_examples // 8), phases=[Phase.explicit, Phase.reuse, Phase.generate]
)


def _of(draw: st.DrawFn, *values: object):
    return draw(st.sampled_from(values))


def _sizes(draw: st.DrawFn) -> dict:
    """Sizes of all families but GPT-2 and T5 under their usual names; the width is at least 16 and heads divide it."""
    heads = draw(st.integers(1, 6))
    return {
        "hidden_size": heads * draw(st.integers(-(-16 // heads), -(-16 // heads) + 5)),
        "intermediate_size": draw(st.integers(12, 50)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "vocab_size": draw(st.integers(30, 90)),
    }


def _grouped(draw: st.DrawFn, head_dim: bool = True) -> dict:
    """Sizes with key/value heads and, where the family has it, a head size of its own; rotated halves need it even."""
    sizes = _sizes(draw)
    heads = sizes["num_attention_heads"]
    size = 2 * draw(st.integers(2, 8))
    if not head_dim:
        sizes["hidden_size"] = heads * max(size, 2 * -(-8 // heads))
    else:
        sizes["head_dim"] = size
    sizes["num_key_value_heads"] = _of(draw, *[n for n in range(1, heads + 1) if heads % n == 0])
    sizes["rope_theta"] = _of(draw, 100.0, 10000.0, 1000000.0)
    return sizes


def _rope_scaling(draw: st.DrawFn) -> dict | None:
    llama3 = {
        "rope_type": "llama3",
        "factor": _of(draw, 2.0, 8.0, 32.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": _of(draw, 2.0, 4.0),
        "original_max_position_embeddings": _of(draw, 16, 64),
    }
    return _of(draw, None, {"type": "linear", "factor": _of(draw, 2.0, 5.0)}, llama3)


@st.composite
def gpt2(draw: st.DrawFn) -> dict:
    s = _sizes(draw)
    return cases.gpt2(
        n_embd=s["hidden_size"],
        n_head=s["num_attention_heads"],
        n_layer=s["num_hidden_layers"],
        vocab_size=s["vocab_size"],
        n_inner=_of(draw, None, s["intermediate_size"]),
    )


@st.composite
def llama(draw: st.DrawFn) -> dict:
    return cases.llama(
        **_grouped(draw),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        rope_scaling=_rope_scaling(draw),
    )


@st.composite
def mistral(draw: st.DrawFn) -> dict:
    return cases.llama(
        **_grouped(draw),
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=_of(draw, None, 1, 2, 5, 12, 40),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def qwen2(draw: st.DrawFn) -> dict:
    return cases.qwen(
        2,
        **_grouped(draw, head_dim=False),
        tie_word_embeddings=draw(st.booleans()),
        use_sliding_window=draw(st.booleans()),
        sliding_window=draw(st.integers(1, 12)),
        max_window_layers=draw(st.integers(0, 3)),
    )


@st.composite
def qwen3(draw: st.DrawFn) -> dict:
    return cases.qwen(
        3,
        **_grouped(draw),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        sliding_window=None,
    )


@st.composite
def gemma2(draw: st.DrawFn) -> dict:
    return cases.gemma2(
        **_grouped(draw),
        sliding_window=draw(st.integers(1, 12)),
        query_pre_attn_scalar=draw(st.integers(4, 20)),
        attn_logit_softcapping=_of(draw, None, 1.0, 50.0),
        final_logit_softcapping=_of(draw, None, 2.0, 30.0),
    )


@st.composite
def gemma3(draw: st.DrawFn) -> dict:
    return cases.gemma3(
        **_grouped(draw),
        sliding_window=draw(st.integers(1, 12)),
        sliding_window_pattern=draw(st.integers(1, 4)),
        query_pre_attn_scalar=draw(st.integers(4, 20)),
        rope_scaling=_of(draw, None, {"rope_type": "linear", "factor": 8.0}),
        rope_local_base_freq=_of(draw, 100.0, 10000.0),
    )


@st.composite
def t5(draw: st.DrawFn, model_type: str = "t5") -> dict:
    gated = model_type == "mt5" or draw(st.booleans())
    head = {"tie_word_embeddings": False} if gated else _of(draw, {}, {"tie_word_embeddings": True})
    return cases.t5(
        **head,
        model_type=model_type,
        feed_forward_proj="gated-gelu" if gated else "relu",
        d_model=draw(st.integers(16, 30)),
        d_kv=draw(st.integers(3, 12)),
        d_ff=draw(st.integers(12, 50)),
        num_heads=draw(st.integers(1, 5)),
        num_layers=draw(st.integers(1, 3)),
        num_decoder_layers=draw(st.integers(1, 3)),
        relative_attention_num_buckets=4 * draw(st.integers(2, 8)),
        relative_attention_max_distance=draw(st.integers(34, 128)),
        vocab_size=draw(st.integers(30, 90)),
        decoder_start_token_id=_of(draw, 0, 7),
    )


@st.composite
def bert(draw: st.DrawFn) -> dict:
    return cases.bert(**_sizes(draw), type_vocab_size=draw(st.integers(2, 3)))


DECODERS = {
    "gpt2": gpt2(),
    "llama": llama(),
    "mistral": mistral(),
    "qwen2": qwen2(),
    "qwen3": qwen3(),
    "gemma2": gemma2(),
}
DECODERS["gemma3"] = gemma3()


def _lengths(draw: Draw, longest: int, rows: int = 3) -> list[int]:
    """Row lengths; the last row is full."""
    return [*draw(st.lists(st.integers(2, longest), min_size=rows - 1, max_size=rows - 1)), longest]


@pytest.mark.parametrize("family", DECODERS)
@live
@given(data=st.data(), seed=st.integers(0, 999))
def test_decoder(family: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(DECODERS[family])
    lengths = _lengths(data.draw, 24)
    rng = np.random.default_rng(seed)
    tokens, mask = inputs.random_tokens(rng, config["vocab_size"], 3, 24), inputs.right_mask(lengths, 24)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(one_device()):
        theirs, ours = reference.write_model(config, Path(folder), seed), Ours(Path(folder))
        assert_logits(ours.logits(tokens, mask), reference.decoder_logits(theirs, tokens, mask))
        assert_gradients(ours.arch, ours.gradients(tokens, mask), reference.decoder_gradients(theirs, tokens, mask))


@pytest.mark.parametrize("family", ["t5", "mt5"])
@live
@given(data=st.data(), seed=st.integers(0, 999))
def test_encoder_decoder(family: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(t5(family))
    rng = np.random.default_rng(seed)
    source_mask = inputs.right_mask(_lengths(data.draw, 40), 40)
    target_mask = inputs.right_mask(_lengths(data.draw, 20), 20)
    source, target = (inputs.random_tokens(rng, config["vocab_size"], *m.shape) for m in (source_mask, target_mask))
    target[:, 0] = config["decoder_start_token_id"]
    batch = (source, source_mask, target, target_mask)
    untied = config.get("tie_word_embeddings") is False
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(one_device()):
        theirs, ours = reference.write_model(config, Path(folder), seed, untied), Ours(Path(folder))
        logits = reference.seq2seq_logits(theirs, *batch)
        assert_logits(ours.seq2seq_logits(*batch), logits)
        assert_logits(ours.seq2seq_read_logits(*batch), logits)
        assert_gradients(ours.arch, ours.seq2seq_gradients(*batch), reference.seq2seq_gradients(theirs, *batch))


@live
@given(config=bert(), data=st.data(), seed=st.integers(0, 999))
def test_encoder(config: dict, data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = inputs.right_mask(_lengths(data.draw, 24), 24)
    tokens = inputs.random_tokens(rng, config["vocab_size"], *mask.shape)
    types = rng.integers(0, config["type_vocab_size"], mask.shape, dtype=np.int32)
    direction = rng.standard_normal((3, config["hidden_size"]), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(one_device()):
        theirs, ours = reference.write_model(config, Path(folder), seed), Ours(Path(folder))
        hidden, embedding = reference.encode(theirs, tokens, mask, types)
        assert_logits(ours.hidden(tokens, mask, types), hidden)
        assert_logits(ours.embedding(tokens, mask, types), embedding)
        gradients = reference.encoder_gradients(theirs, tokens, mask, types, direction)
        assert_gradients(ours.arch, ours.encoder_gradients(tokens, mask, types, direction), gradients)


SMOLLM2 = os.environ.get("INSTRUCTREC_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.skipif(
    not SMOLLM2, reason="INSTRUCTREC_SMOLLM2 names no folder with config.json, model.safetensors, tokenizer.json"
)
def test_perplexity_of_smollm2() -> None:
    """SmolLM2-135M on 2,000 tokens of this project's documents: equal to four digits, and a model that reads English."""
    from tokenizers import Tokenizer

    root = Path(__file__).parents[2]
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    )
    folder = Path(SMOLLM2)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:2000]
    tokens = np.asarray([ids], np.int32)
    assert tokens.shape == (1, 2000)
    theirs = np.exp(reference.mean_loss(reference.load_model(folder), tokens))
    with jax.set_mesh(one_device()):
        ours = np.exp(Ours(folder).mean_loss(tokens))
    assert ours == pytest.approx(theirs, rel=5e-5)
    assert theirs < 60  # a wrong order of rotated rows gives hundreds, in both if the file is wrong

"""GGUF files, written by llama.cpp's own writer, become Hugging Face folders with the same values."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFEndian, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from instructrec_jax.errors import ConfigError, DataError, UserError
from instructrec_jax.models.hf import gguf as reading
from instructrec_jax.models.hf import gguf_layout
from instructrec_jax.models.hf.gguf import MANIFEST, complete, convert
from tests.gguf_files import (
    BYTE_TOKENS,
    HEAD,
    HEADS,
    INNER,
    KV,
    LAYERS,
    SPECIAL,
    WIDTH,
    Q,
    as_llama_cpp,
    byte_level,
    config_of,
    random_weights,
    t5,
    tensors_of,
    write,
)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0])
def test_values_are_the_dequantised_ones_in_bfloat16(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(reading, "_BLOCK", 8 * WIDTH)  # several blocks a tensor
    weights = random_weights()
    out = convert(write(tmp_path / "m.gguf", weights, kind=kind), tmp_path / "m")
    got = tensors_of(out)
    for there, here in {
        "token_embd": "model.embed_tokens",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    }.items():
        want = quants.dequantize(quants.quantize(weights[f"{there}.weight"], kind), kind).astype(ml_dtypes.bfloat16)
        assert got[f"{here}.weight"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got[f"{here}.weight"], want)
    np.testing.assert_array_equal(got["model.norm.weight"], weights["output_norm.weight"].astype(ml_dtypes.bfloat16))
    assert len(got) == len(weights)
    assert sum(json.loads((out / MANIFEST).read_text())["quantisation"].values()) == len(weights)


@pytest.mark.parametrize(("kind", "size"), [(Q.Q2_K, 84), (Q.Q3_K, 110), (Q.Q4_K, 144), (Q.Q5_K, 176), (Q.Q6_K, 210)])
def test_k_quants(tmp_path, kind, size):
    # The library cannot make these, so random bytes; every pair of bytes is also a finite float16 (the scales are such).
    random = np.random.default_rng(1)
    data = random.integers(0, 0x3C, (WIDTH, size), dtype=np.uint8)
    raw = {"blk.0.ffn_down.weight": (data, kind)}
    weights = random_weights(inner=256)
    out = convert(write(tmp_path / "m.gguf", weights, raw=raw, inner=256), tmp_path / "m", "float32")
    got = tensors_of(out)["model.layers.0.mlp.down_proj.weight"]
    assert got.shape == (WIDTH, 256) and len(np.unique(got)) > 100
    np.testing.assert_array_equal(got, quants.dequantize(data, kind))


def test_query_and_key_rows_come_back_in_order(tmp_path):
    weights = random_weights(bias=False)
    stored = dict(weights)
    for layer in range(LAYERS):
        for part, heads in (("q", HEADS), ("k", KV)):
            name = f"blk.{layer}.attn_{part}.weight"
            stored[name] = as_llama_cpp(weights[name], heads)
            assert not np.array_equal(stored[name], weights[name])
    got = tensors_of(convert(write(tmp_path / "m.gguf", stored), tmp_path / "m", "float32"))
    for layer in range(LAYERS):
        for part in "qk":
            want = weights[f"blk.{layer}.attn_{part}.weight"]
            np.testing.assert_array_equal(got[f"model.layers.{layer}.self_attn.{part}_proj.weight"], want)


def test_attention_of_both_orders_is_the_same():
    """Interleaved rotation of the stored rows against half-split rotation of the converted ones: equal products."""
    random = np.random.default_rng(2)
    stored = random.standard_normal((2, HEADS * HEAD, WIDTH))
    x = random.standard_normal((5, WIDTH))
    angles = np.arange(5)[:, None] * 10_000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def heads(w: np.ndarray) -> np.ndarray:
        return (x @ w.T).reshape(5, HEADS, HEAD)

    def interleaved(h: np.ndarray) -> np.ndarray:
        a, b = h[..., ::2], h[..., 1::2]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(h.shape)

    def half_split(h: np.ndarray) -> np.ndarray:
        a, b = h[..., : HEAD // 2], h[..., HEAD // 2 :]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def products(turn, w: np.ndarray) -> np.ndarray:
        return np.einsum("shd,thd->hst", turn(heads(w[0])), turn(heads(w[1])))

    converted = np.stack([gguf_layout.unpair(w, HEADS) for w in stored])
    np.testing.assert_allclose(products(half_split, converted), products(interleaved, stored), rtol=1e-10)
    assert not np.allclose(products(half_split, stored), products(interleaved, stored))


@given(heads=st.integers(1, 5), half=st.integers(1, 6), inner=st.integers(0, 3))
def test_unpair_undoes_llama_cpp(heads, half, inner):
    rows = np.arange(heads * half * 2 * max(inner, 1), dtype=np.float32).reshape(
        heads * half * 2, *([inner] if inner else [])
    )
    np.testing.assert_array_equal(gguf_layout.unpair(as_llama_cpp(rows, heads), heads), rows)


def test_gemma_norms_lose_the_one_that_was_added_and_rows_stay(tmp_path):
    weights = random_weights("gemma3")
    folder = convert(write(tmp_path / "m.gguf", weights, "gemma3"), tmp_path / "m", "float32")
    got, config = tensors_of(folder), config_of(folder)
    one = np.float32(1)
    for there, here in {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }.items():
        np.testing.assert_array_equal(got[f"model.layers.1.{here}.weight"], weights[f"blk.1.{there}.weight"] - one)
    np.testing.assert_array_equal(got["model.norm.weight"], weights["output_norm.weight"] - one)
    np.testing.assert_array_equal(got["model.layers.0.self_attn.q_proj.weight"], weights["blk.0.attn_q.weight"])
    assert config["model_type"] == "gemma3_text" and config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["layer_types"] == ["sliding_attention"] * LAYERS and config["sliding_window"] == 32
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 100_000.0
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000.0


@pytest.mark.parametrize(("family", "model_class"), [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")])
def test_qwen_rows_stay(tmp_path, family, model_class):
    weights = random_weights(family, bias=family == "qwen2", tied=False)
    folder = convert(write(tmp_path / "m.gguf", weights, family), tmp_path / "m", "float32")
    got, config = tensors_of(folder), config_of(folder)
    np.testing.assert_array_equal(got["model.layers.0.self_attn.q_proj.weight"], weights["blk.0.attn_q.weight"])
    np.testing.assert_array_equal(got["lm_head.weight"], weights["output.weight"])
    if family == "qwen2":
        np.testing.assert_array_equal(got["model.layers.1.self_attn.k_proj.bias"], weights["blk.1.attn_k.bias"])
    assert config["architectures"] == [model_class] and config["tie_word_embeddings"] is False
    assert len(got) == len(weights)


def test_gpt2_is_transposed(tmp_path):
    random = np.random.default_rng(3)
    rows = len(BYTE_TOKENS)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (rows, WIDTH), "position_embd.weight": (128, WIDTH),
        "output_norm.weight": (WIDTH,), "output_norm.bias": (WIDTH,),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH),
            "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
        }.items():  # fmt: skip
            shapes |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
    weights = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    def extra(writer):
        writer.add_layer_norm_eps(1e-5)

    folder = convert(write(tmp_path / "m.gguf", weights, "gpt2", extra=extra), tmp_path / "m", "float32")
    got = tensors_of(folder)
    np.testing.assert_array_equal(got["transformer.h.1.attn.c_attn.weight"], weights["blk.1.attn_qkv.weight"].T)
    np.testing.assert_array_equal(got["transformer.h.0.mlp.c_proj.bias"], weights["blk.0.ffn_down.bias"])
    np.testing.assert_array_equal(got["transformer.wpe.weight"], weights["position_embd.weight"])
    assert config_of(folder)["n_inner"] == INNER and len(got) == len(weights)


def test_transformers_reads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = convert(write(tmp_path / "m.gguf"), tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama" and config.tie_word_embeddings is True
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (WIDTH, KV, HEAD)
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters["rope_theta"] == 100_000.0
    assert config.vocab_size == len(BYTE_TOKENS) + 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the year 1995\n  <|im_end|>"
    assert tokenizer(text).input_ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == tuple(SPECIAL[i] for i in (1, 2, 0))
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|im_start|>hi<|im_end|>"
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 2


def test_package_reads_the_folder(tmp_path):
    from instructrec_jax.models.hf.configs import from_hf

    for family in ("llama", "gemma3", "qwen3"):
        arch = from_hf(config_of(convert(write(tmp_path / f"{family}.gguf", family=family), tmp_path / family)))
        assert (arch.width, arch.heads, arch.kv_heads, arch.head_size) == (WIDTH, HEADS, KV, HEAD)
        assert arch.tied_head and arch.mlp_width == INNER


def llama3_factors(factor: float) -> np.ndarray:
    """transformers' _compute_llama3_parameters, as divisors."""
    inverse = 1.0 / 100_000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    out = []
    for f in inverse:
        length = 2 * np.pi / f
        if length < 8192 / 4:
            out.append(1.0)
        elif length > 8192:
            out.append(factor)
        else:
            smooth = (8192 / length - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_scaling_is_recognised_or_refused(tmp_path):
    factors = llama3_factors(32.0)
    assert 1 in factors and 32 in factors
    weights = random_weights() | {"rope_freqs.weight": factors}
    rope = config_of(convert(write(tmp_path / "m.gguf", weights), tmp_path / "m"))["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 32.0, 8192)
    weights["rope_freqs.weight"] = factors + np.float32(0.5)
    with pytest.raises(DataError, match="rope_freqs"):
        convert(write(tmp_path / "n.gguf", weights), tmp_path / "n")


def test_conversion_is_kept_if_complete_and_redone_if_not(tmp_path):
    source = write(tmp_path / "m.gguf")
    out = convert(source, tmp_path / "m")
    before = (out / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    convert(source, out, say=said.append)
    assert "already converted" in said[0] and (out / "model.safetensors").stat().st_mtime_ns == before
    good = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(good[:-1])
    assert complete(out) is None
    convert(source, out)
    assert (out / "model.safetensors").read_bytes() == good
    convert(source, out, "float32")
    assert config_of(out)["dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.gguf"]


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "_write_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(write(tmp_path / "m.gguf"), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not made by a conversion"):
        convert(write(tmp_path / "m.gguf"), tmp_path / "m")
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["mine.txt"]


def refused(tmp_path: Path, match: str, **changes) -> None:
    with pytest.raises(DataError, match=match):
        convert(write(tmp_path / "bad.gguf", **changes), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "m")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DataError, match="not a GGUF file"):
        convert(tmp_path / "x.gguf", tmp_path / "m")
    with pytest.raises(ConfigError, match="bfloat16"):
        convert(write(tmp_path / "m.gguf"), tmp_path / "m", "int8")

    good = random_weights()
    refused(
        tmp_path,
        r"blk.1.attn_v.weight .*is missing",
        weights={n: v for n, v in good.items() if n != "blk.1.attn_v.weight"},
    )
    refused(
        tmp_path, "token_embd.weight is missing", weights={n: v for n, v in good.items() if n != "token_embd.weight"}
    )
    refused(tmp_path, r"blk.0.ffn_up.weight has the shape \(64, 96\).*\(96, 64\)",
            weights=good | {"blk.0.ffn_up.weight": good["blk.0.ffn_up.weight"].T.copy()})  # fmt: skip
    refused(
        tmp_path, "blk.0.strange.weight has no place", weights=good | {"blk.0.strange.weight": np.ones(3, np.float32)}
    )
    refused(tmp_path, "output_norm.weight holds values that are not finite",
            weights=good | {"output_norm.weight": np.full(WIDTH, np.nan, np.float32)})  # fmt: skip
    refused(tmp_path, "blk.0.attn_v.weight has the type I32",
            raw={"blk.0.attn_v.weight": (np.ones((KV * HEAD, WIDTH), np.int32), Q.I32)})  # fmt: skip
    refused(tmp_path, "architecture 'rwkv6' is not supported", family="rwkv6")
    refused(tmp_path, "mixture of experts", extra=lambda w: w.add_expert_count(8))
    refused(tmp_path, "one of 3 parts", extra=lambda w: w.add_uint16("split.count", 3))
    refused(tmp_path, "RoPE scaling 'yarn'", extra=lambda w: w.add_string("llama.rope.scaling.type", "yarn"))
    refused(tmp_path, "of 16 dimensions of a head", extra=lambda w: w.add_rope_dimension_count(8))
    refused(tmp_path, "byte order", endianess=GGUFEndian.BIG)
    refused(tmp_path, "pre-tokenizer 'smolm'.*mean 'smollm'", tokenizer=lambda w: byte_level(w, "smolm"))
    refused(tmp_path, "'he' is in tokenizer.ggml.tokens twice",
            tokenizer=lambda w: byte_level(w, tokens=[*BYTE_TOKENS[:-1], "he"]))  # fmt: skip
    refused(
        tmp_path,
        "263 tokens, but the embedding has 9 rows",
        weights=good | {"token_embd.weight": np.ones((9, WIDTH), np.float32)},
    )
    refused(tmp_path, "tokenizer 't5' is not supported", tokenizer=t5)


def test_float16_that_overflows_is_refused(tmp_path):
    weights = random_weights() | {"output_norm.weight": np.full(WIDTH, 1e6, np.float32)}
    source = write(tmp_path / "m.gguf", weights)
    with pytest.raises(DataError, match=r"output_norm\.weight holds values beyond float16"):
        convert(source, tmp_path / "m", "float16")
    convert(source, tmp_path / "m")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("small") / "m.gguf", kind=Q.Q8_0).read_bytes()


def test_cut_in_a_tensor_names_it(tmp_path, small_file):
    (tmp_path / "m.gguf").write_bytes(small_file[:-4000])
    with pytest.raises(DataError, match=r"cut off: tensor blk\.1\.\w+\.weight ends at byte [\d,]+, it has [\d,]+"):
        convert(tmp_path / "m.gguf", tmp_path / "m")


@given(st.data())
@settings(deadline=None)
def test_any_cut_is_found(tmp_path_factory, small_file, data):
    at = data.draw(st.integers(4, len(small_file) - 64))  # the last bytes may be padding
    folder = tmp_path_factory.mktemp("cut")
    (folder / "m.gguf").write_bytes(small_file[:at])
    with pytest.raises(DataError):
        convert(folder / "m.gguf", folder / "m")
    assert not (folder / "m").exists()


@given(st.data())
@settings(deadline=None)
def test_damage_is_an_error_for_the_user_or_harmless(tmp_path_factory, small_file, data):
    damaged = bytearray(small_file)
    header = small_file.index(b"blk.1.ffn_norm") + 100
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(4, header))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damage")
    (folder / "m.gguf").write_bytes(damaged)
    try:
        out = convert(folder / "m.gguf", folder / "m")
    except UserError:
        assert not (folder / "m").exists()
    else:
        assert complete(out) is not None

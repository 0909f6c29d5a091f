"""GGUF files for tests, written by llama.cpp's own writer, and the folders that they become."""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter, quants
from safetensors import safe_open

WIDTH, HEADS, KV, HEAD, INNER, LAYERS = 64, 4, 2, 16, 96, 2
Q = GGMLQuantizationType


def byte_alphabet() -> list[str]:
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(len(others))]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 9"]
BYTE_TOKENS = [*SPECIAL, *byte_alphabet(), "Ġt", "he", "Ġthe", "19"]
BYTE_TYPES = [3] * 3 + [1] * (len(BYTE_TOKENS) - 3)


def byte_level(writer: GGUFWriter, pre: str = "smollm", tokens: list[str] = BYTE_TOKENS) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(BYTE_TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")


def random_weights(
    family: str = "llama", *, tied: bool = True, inner: int = INNER, bias: bool = False
) -> dict[str, np.ndarray]:
    """Values in GGUF's names; llama's query and key rows are as Hugging Face has them."""
    random = np.random.default_rng(0)
    rows = len(BYTE_TOKENS) + 1  # one row of padding
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (rows, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        b = f"blk.{layer}."
        shapes |= {
            b + "attn_q.weight": (HEADS * HEAD, WIDTH), b + "attn_k.weight": (KV * HEAD, WIDTH),
            b + "attn_v.weight": (KV * HEAD, WIDTH), b + "attn_output.weight": (WIDTH, HEADS * HEAD),
            b + "ffn_gate.weight": (inner, WIDTH), b + "ffn_up.weight": (inner, WIDTH),
            b + "ffn_down.weight": (WIDTH, inner),
            b + "attn_norm.weight": (WIDTH,), b + "ffn_norm.weight": (WIDTH,),
        }  # fmt: skip
        if family in ("gemma3", "qwen3"):
            shapes |= {b + "attn_q_norm.weight": (HEAD,), b + "attn_k_norm.weight": (HEAD,)}
        if family == "gemma3":
            shapes |= {b + "post_attention_norm.weight": (WIDTH,), b + "post_ffw_norm.weight": (WIDTH,)}
        if bias:
            sizes = {"q": HEADS * HEAD, "k": KV * HEAD, "v": KV * HEAD}
            shapes |= {f"{b}attn_{part}.bias": (size,) for part, size in sizes.items()}
    if not tied:
        shapes["output.weight"] = (rows, WIDTH)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def as_llama_cpp(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's LlamaModel.permute, as in its converter."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path: Path,
    weights: dict[str, np.ndarray] | None = None,
    family: str = "llama",
    *,
    kind: Q | None = None,
    raw: dict[str, tuple[np.ndarray, Q]] | None = None,
    inner: int = INNER,
    tokenizer=byte_level,
    extra=lambda writer: None,
    endianess: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file; matrices are quantised as ``kind``, the tensors of ``raw`` hold these bytes of this type."""
    writer = GGUFWriter(path, family, endianess=endianess)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    if family == "gemma3":
        writer.add_sliding_window(32)
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
    extra(writer)
    tokenizer(writer)
    for name, values in (random_weights(family, inner=inner) if weights is None else weights).items():
        if raw and name in raw:
            writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
        elif kind is None or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Read by the safetensors library, which checks the header too."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def large() -> dict[str, np.ndarray]:
    """Weights with rows enough for either tokenizer."""
    weights = random_weights()
    return weights | {"token_embd.weight": np.ones((400, WIDTH), np.float32)}


LETTERS = ["▁", *"abcdefgh"]
PIECES = ["ab", "abc", "bc", "cd", "▁a", "▁ab", "ef", "efg", "gh", "fgh", "▁the", "bcd", "abcd", "▁e"]
PIECE_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "  ",
    "   ",
    *(f"<0x{b:02X}>" for b in range(256)),
    *PIECES,
    *LETTERS,
]
PIECE_TYPES = [3, 3, 3, 3, 4, 4, *[6] * 256, *[1] * (len(PIECES) + len(LETTERS))]
PIECE_SCORES = [-1000.0] * 6 + [0.0] * 256 + [-float(n) for n in range(len(PIECES) + len(LETTERS))]


def sentencepiece(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(PIECE_TOKENS)
    writer.add_token_scores(PIECE_SCORES)
    writer.add_token_types(PIECE_TYPES)
    for number, add in enumerate(
        (writer.add_pad_token_id, writer.add_eos_token_id, writer.add_bos_token_id, writer.add_unk_token_id)
    ):
        add(number)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def t5(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("t5")
    writer.add_token_list(BYTE_TOKENS)
    writer.add_token_types(BYTE_TYPES)

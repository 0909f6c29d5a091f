"""The tokenizer inside a GGUF file: text comes back, and pieces are joined as its makers say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from instructrec_jax.models.hf.gguf import convert
from instructrec_jax.models.hf.gguf_tokenizer import merges_of
from tests.gguf_files import PIECE_SCORES, PIECE_TOKENS, PIECE_TYPES, byte_level, large, sentencepiece, write

_made: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def tokenizers_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("bytes", byte_level), ("pieces", sentencepiece)):
        out = convert(write(folder / f"{name}.gguf", tokenizer=tokenizer, weights=large()), folder / name)
        _made[name] = Tokenizer.from_file(str(out / "tokenizer.json"))


@given(st.text())
def test_byte_level_tokenizer_round_trips(text):
    tokenizer = _made["bytes"]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_byte_level_tokenizer_merges_and_cuts():
    tokenizer = _made["bytes"]
    assert tokenizer.encode("the the").tokens == ["t", "he", "Ġthe"]
    assert tokenizer.encode("1995").tokens == ["1", "9", "9", "5"]  # digits stay apart, though there is a merge
    assert tokenizer.encode("a<|im_end|>").ids[-1] == 2
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>").ids) == "a"


@given(st.text())
def test_sentencepiece_tokenizer_round_trips(text):
    text = text.replace("▁", "_")  # it stands for a space
    tokenizer = _made["pieces"]
    encoded = tokenizer.encode(text).ids
    assert encoded[0] == 2  # bos
    assert tokenizer.decode(encoded) == text


@given(st.text(alphabet=" abcdefgh", max_size=30))
def test_sentencepiece_tokenizer_merges_the_best_pair_first(text):
    """Against SentencePiece's own rule: again and again, join the neighbours whose whole has the best score."""
    text = " ".join(text.split(" ")).replace("  ", " a")  # single spaces: runs are tokens of their own, tested below
    scores = {t: s for t, s, y in zip(PIECE_TOKENS, PIECE_SCORES, PIECE_TYPES) if y == 1}
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    assert _made["pieces"].encode(text, add_special_tokens=False).tokens == parts


def test_sentencepiece_user_defined_spaces_come_first():
    tokenizer = _made["pieces"]
    assert tokenizer.encode("   ab", add_special_tokens=False).tokens == ["▁▁▁", "ab"]
    assert tokenizer.encode(" ab", add_special_tokens=False).tokens == ["▁ab"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["<0xC3>", "<0xA9>"]


def test_merges_come_in_the_order_of_the_scores():
    assert merges_of(["a", "b", "ab", "ba", "<s>"], [1, 1, 1, 1, 3], [-9.0, -9.0, -2.0, -1.0, 0.0]) == [
        ("b", "a"),
        ("a", "b"),
    ]

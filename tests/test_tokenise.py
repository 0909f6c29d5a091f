"""From texts with slots to arrays: which positions hold what, which have a loss, what is refused, what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.data import tokenise, tokenizer
from instructrec_jax.data.tokenise import encode_example, encode_prompt, task_of, truncate
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import DataError
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, Feature, InstructionExample
from instructrec_jax.training.loss import NUM_TASKS

I, F = ITEM_SLOT, FEATURE_SLOT  # noqa: E741
CORPUS = ["I watched these films:", "Recommend the next one.", "The Matrix (1999)", "看过的电影", "Heat (1995)"] * 3
CHARS = st.characters(exclude_categories=("Cs",), exclude_characters=(I, F))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    tokenizer.train(CORPUS, 400, folder)
    return folder


@pytest.fixture(scope="module")
def text(folder) -> Text:
    return tokenizer.load(folder)


def example(prompt: str, items: tuple[int, ...] = (), **fields: Any) -> InstructionExample:
    base = InstructionExample("seq.test", "en", "P1", "I0", "T2", "next-item", 0, prompt, items, "")
    return base._replace(**fields)


# ------------------------------------------------------------------------------------------------------- positions


def test_a_prompt_is_bos_words_and_soft_tokens(text):
    arrays = encode_prompt(example(f"a{I}b{F}{I}", (4, 0), features=(Feature(2, -1.5),)), text)
    a, b = text.encode("a"), text.encode("b")
    assert arrays["tokens"].tolist() == [text.bos, *a, text.item, *b, text.feature, text.item]
    assert arrays["item"].tolist() == [0, 0, 5, 0, 0, 1], "catalogue index + 1, so that item 0 is not 'none'"
    assert arrays["feature"].tolist() == [0, 0, 0, 0, 3, 0]
    assert arrays["feature_value"].tolist() == [0, 0, 0, 0, -1.5, 0]
    assert {k: v.dtype for k, v in arrays.items()} == {k: np.dtype(tokenise.FIELDS[k]) for k in arrays}


def test_an_empty_prompt_is_bos(text):
    arrays = encode_example(example(""), text)
    assert {k: v.tolist() for k, v in arrays.items() if k != "task"} == {
        k: [text.bos if k == "tokens" else 0] for k in tokenise.FIELDS if k != "task"
    }


def test_dense_slots_are_predicted_from_the_position_before(text):
    arrays = encode_example(example(f"a{I}b{I}{I}c", (7, 8, 9), dense=True), text)
    slots = np.flatnonzero(arrays["item"])
    assert np.flatnonzero(arrays["item_target"]).tolist() == (slots - 1).tolist()
    assert arrays["item_target"][slots - 1].tolist() == [8, 9, 10]
    assert arrays["item_target"][slots[1]] == 10, "an item token itself predicts the item right after it"
    assert not arrays["text_target"].any()


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_dense_from_leaves_out_the_first_slots(text, first):
    arrays = encode_example(example(f"{I}, {I}, {I}", (7, 8, 9), dense=True, dense_from=first), text)
    assert arrays["item_target"][arrays["item_target"] > 0].tolist() == [8, 9, 10][first:]
    if first == 0:
        assert arrays["item_target"][0] == 8, "<bos> predicts an item at the very start"


def test_dense_from_without_dense_does_nothing(text):
    assert not encode_example(example(f"{I}, {I}", (7, 8)), text)["item_target"].any()


@pytest.mark.parametrize("answer", ["", "Heat (1995)"])
def test_the_target_stands_at_the_last_prompt_position(text, answer):
    made = example(f"next after {I}?", (3,), target=0, answer=answer)
    arrays, prompt = encode_example(made, text), encode_prompt(made, text)
    expected = np.zeros(len(arrays["tokens"]), int)
    expected[len(prompt["tokens"]) - 1] = 1
    assert arrays["item_target"].tolist() == expected.tolist()


def test_dense_and_target_together(text):
    arrays = encode_example(example(f"{I} {I} then", (3, 4), dense=True, target=6), text)
    assert arrays["item_target"][arrays["item_target"] > 0].tolist() == [4, 5, 7]
    assert arrays["item_target"][-1] == 7


def test_the_answer_and_eos_have_a_loss_and_the_prompt_has_none(text):
    made = example("what is next?", answer="Heat (1995)")
    arrays, answer = encode_example(made, text), text.encode("Heat (1995)")
    start = len(encode_prompt(made, text)["tokens"])
    assert arrays["tokens"][start:].tolist() == answer, "<eos> is predicted, never read"
    assert arrays["text_target"].tolist() == [0] * (start - 1) + [t + 1 for t in [*answer, text.eos]]


def test_without_an_answer_nothing_is_predicted_in_words(text):
    arrays = encode_example(example("what is next?", target=3), text)
    assert not arrays["text_target"].any()
    assert len(arrays["tokens"]) == len(encode_prompt(example("what is next?"), text)["tokens"])


def test_items_of_an_answer_are_read_but_not_predicted_as_words(text):
    arrays = encode_example(example("which?", answer=f"{I} or {I}", answer_items=(4, 5), dense=True), text)
    assert arrays["item"][arrays["item"] > 0].tolist() == [5, 6]
    words = (arrays["text_target"][arrays["text_target"] > 0] - 1).tolist()
    assert words == [*text.encode(" or "), text.eos]
    assert not arrays["item_target"].any(), "dense targets are those of the prompt"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "sequential"),
        ({"intention": "I1"}, "search"),
        ({"intention": "I2", "answer": "x"}, "describe"),
        ({"task": "T3", "intention": "I1"}, "rerank"),
        ({"task": "T0", "answer": "Yes"}, "pointwise"),
        ({"task": "T1", "answer": "x"}, "pairwise"),
        ({"metric": "none", "answer": "x"}, "widened"),
    ],
)
def test_the_task_is_numbered_from_one(text, fields, name):
    made = example("a b c", **fields)
    assert task_of(made) == name
    assert set(encode_example(made, text)["task"].tolist()) == {tokenise.TASKS.index(name) + 1}
    assert len(tokenise.TASKS) < NUM_TASKS  # 0 is padding


@given(st.lists(st.one_of(st.text(CHARS, max_size=8), st.sampled_from([I, F])), max_size=10), st.text(CHARS), st.data())
def test_any_example(text, parts, answer, data):
    prompt = "".join(parts)
    items = tuple(data.draw(st.lists(st.integers(0, 50), min_size=prompt.count(I), max_size=prompt.count(I))))
    features = tuple(Feature(i, 0.5) for i in range(prompt.count(F)))
    target = data.draw(st.integers(-1, 50))
    made = example(prompt, items, features=features, answer=answer, target=target, dense=data.draw(st.booleans()))
    arrays = encode_example(made, text)
    assert set(arrays) == set(tokenise.FIELDS)
    assert {len(v) for v in arrays.values()} == {len(arrays["tokens"])}
    assert (arrays["item"][arrays["item"] > 0] - 1).tolist() == list(items)
    assert (arrays["feature"][arrays["feature"] > 0] - 1).tolist() == list(range(len(features)))
    np.testing.assert_array_equal(arrays["tokens"] == text.item, arrays["item"] > 0)
    np.testing.assert_array_equal(arrays["tokens"] == text.feature, arrays["feature"] > 0)
    assert (arrays["tokens"] > 0).all(), "id 0 is padding only"
    size = len(arrays["tokens"])
    start = size - len(text.encode(answer))
    assert not arrays["text_target"][: start - 1].any()
    assert text.decode(t - 1 for t in arrays["text_target"][start - 1 :].tolist() if t) == answer
    assert (arrays["text_target"][-1] == text.eos + 1) == bool(answer)
    wanted = [i + 1 for i in items] if made.dense else []
    if target >= 0:
        wanted = [*wanted, target + 1]
    assert arrays["item_target"][arrays["item_target"] > 0].tolist() == wanted


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompt", "items", "features", "message"),
    [
        (f"{I}{I}", (1,), (), "1 items and 0 features, but slots for 2 and 0"),
        (f"{F}", (), (), "0 items and 0 features, but slots for 0 and 1"),
        (f"{I}", (1, 2), (), "2 items and 0 features, but slots for 1 and 0"),
        ("none", (), (Feature(0, 1.0),), "0 items and 1 features, but slots for 0 and 0"),
    ],
)
def test_slots_that_do_not_match_name_the_template(text, prompt, items, features, message):
    for encode in (encode_prompt, encode_example):
        with pytest.raises(DataError, match=f"seq.test: {message}"):
            encode(example(prompt, items, features=features), text)


def test_slots_of_the_answer_must_match(text):
    with pytest.raises(DataError, match=r"seq\.test: 1 items"):
        encode_example(example("which?", answer="none", answer_items=(4,)), text)


# ---------------------------------------------------------------------------------------------------------- truncation


def test_truncation_keeps_bos_and_the_newest(text):
    made = example(f"{I} {I} {I} next", (1, 2, 3), dense=True, target=9, answer="Heat")
    arrays = encode_example(made, text)
    size = len(arrays["tokens"])
    for length in range(1, size + 3):
        cut, lost = truncate(arrays, length)
        assert lost == max(0, size - length) and len(cut["tokens"]) == min(length, size)
        assert cut["tokens"][0] == text.bos
        for key, values in arrays.items():
            assert cut[key].dtype == values.dtype
            newest = min(length, size) - 1
            np.testing.assert_array_equal(cut[key][1:], values[size - newest :], err_msg=key)
        if lost:
            assert cut["item_target"][0] == cut["text_target"][0] == 0, "what <bos> had to predict is cut"
    assert arrays["item_target"][0] == 2, "the input stays as it was"


def test_truncation_of_a_prompt_without_targets(text):
    arrays = encode_prompt(example(f"{I} {I} next", (1, 2)), text)
    cut, lost = truncate(arrays, 3)
    assert lost == len(arrays["tokens"]) - 3 and set(cut) == set(arrays)


def test_padding_is_zeros_on_the_right(text):
    parts = [encode_prompt(example(p, i), text) for p, i in (("abc", ()), (f"a{I}", (4,)))]
    out = tokenise.pad_to(parts, 3, 8)
    for key, values in out.items():
        assert values.shape == (3, 8) and values.dtype == tokenise.FIELDS[key]
        for row, part in zip(values, parts):
            assert row.tolist() == [*part[key].tolist(), *[0] * (8 - len(part[key]))]
        assert not values[2].any()


# ---------------------------------------------------------------------------------------------------------- tokeniser

SAMPLES = [
    "The Matrix (1999)",
    "看过的电影：千与千寻",
    "👩‍🚀🎬 café",
    "  two  spaces\n\ttab ",
    "日本語 한국어 עברית",
    "don't , stop !",
]


def test_special_tokens_have_fixed_ids(text):
    ids = [text.tokenizer.token_to_id(name) for name in tokenizer.SPECIAL]
    assert ids == list(range(6)) and ids[0] == 0
    assert (text.bos, text.eos, text.item, text.feature) == (1, 2, 3, 4)
    assert text.vocab_size == text.tokenizer.get_vocab_size()


@pytest.mark.parametrize("words", SAMPLES)
def test_transformers_reads_the_folder_with_the_same_ids(folder, text, words):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder)
    assert other.encode(words, add_special_tokens=False) == text.encode(words)
    assert other.decode(text.encode(words)) == words
    assert (other.pad_token_id, other.bos_token_id, other.eos_token_id) == (0, text.bos, text.eos)
    assert other.convert_tokens_to_ids([tokenizer.ITEM, tokenizer.FEATURE]) == [text.item, text.feature]


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_comes_back(text, words):
    ids = text.encode(words)
    assert text.decode(ids) == words
    assert all(i >= len(tokenizer.SPECIAL) for i in ids), "nobody can write a special token"
    assert text.encode_batch([words, "x"]) == [ids, text.encode("x")]


@pytest.mark.parametrize("name", tokenizer.SPECIAL)
def test_a_special_token_in_a_title_is_only_text(text, name):
    ids = text.encode(f"The {name} film")
    assert min(ids) >= len(tokenizer.SPECIAL)
    assert text.decode(ids) == f"The {name} film"


def test_decoding_leaves_special_tokens_out(text):
    assert text.decode([text.bos, *text.encode("Heat"), text.item, text.eos, 0]) == "Heat"


def test_digits_are_single_tokens(text):
    for number in ("1999", "2001", "1234567890"):
        assert len(text.encode(number)) == len(number)
    assert text.encode("1995")[:3] == text.encode("1999")[:3]


def test_frequent_words_become_one_token(text):
    assert len(text.encode(" Matrix")) < len(" Matrix")


def test_training_twice_gives_the_same_files(tmp_path, folder):
    tokenizer.train(iter(CORPUS), 400, tmp_path / "again")
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_training_replaces_a_folder_as_a_whole(tmp_path):
    tokenizer.train(["one"], 300, tmp_path / "t")
    (tmp_path / "t" / "old.txt").write_text("x")
    made = tokenizer.train(["aa aa aa"] * 5, 280, tmp_path / "t")
    assert not (tmp_path / "t" / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert made.vocab_size <= 280


def test_a_missing_or_foreign_tokeniser_is_named(tmp_path):
    with pytest.raises(DataError, match="no tokeniser") as caught:
        tokenizer.load(tmp_path)
    assert caught.value.file == tmp_path / "tokenizer.json"
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"lacks the special tokens.*<bos>.*<feature>"):
        tokenizer.load(tmp_path)

"""Records as they are stored become the tables of their examples, in whatever company and layout they come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructrec_jax.data import tokenise, tokenizer, wire
from instructrec_jax.data.blocks import encode_records
from instructrec_jax.data.tokenise import encode_examples
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import DataError
from instructrec_jax.instructions.example import (
    FEATURE_SLOT,
    ITEM_SLOT,
    TITLE_CLOSE,
    TITLE_OPEN,
    Feature,
    InstructionExample,
)

WORDS = (
    "The Matrix (1999)",
    " ",
    "看过的电影",
    "Солярис (1972)",
    "  two spaces\n",
    " Café",
    "'s it's",
    "<eos>",
    "x" * 200,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    return tokenizer.train([*WORDS, "films of the 1990s"] * 3, 400, tmp_path_factory.mktemp("text") / "tokenizer")


@st.composite
def examples(draw) -> InstructionExample:
    """Any example whose slots are filled."""
    piece = st.sampled_from([*WORDS, ITEM_SLOT, ITEM_SLOT * 40, FEATURE_SLOT, f"{TITLE_OPEN}Heat{TITLE_CLOSE}"])
    prompt = "".join(draw(st.lists(piece, max_size=8)))
    answer = draw(st.sampled_from(["", *WORDS, f"{ITEM_SLOT}or{ITEM_SLOT}"]))
    item = st.integers(0, 2**31 - 2)

    def items(words: str) -> tuple[int, ...]:
        count = words.count(ITEM_SLOT)
        return tuple(draw(st.lists(item, min_size=count, max_size=count)))

    return InstructionExample(
        template="t.a",
        language="en",
        preference="P1",
        intention=draw(st.sampled_from(["I0", "I1"])),
        task=draw(st.sampled_from(["T0", "T1", "T2", "T3"])),
        metric=draw(st.sampled_from(["next-item", "none"])),
        user=draw(st.integers(0, 1 << 20)),
        prompt=prompt,
        prompt_items=items(prompt),
        answer=answer,
        answer_items=items(answer),
        features=tuple(Feature(n, draw(st.floats(width=32, allow_nan=False))) for n in range(prompt.count(FEATURE_SLOT))),
        target=draw(st.integers(-1, 5000)),
        candidates=draw(st.sampled_from([(), (3, 4)])),
        dense=draw(st.booleans()),
        dense_from=draw(st.integers(0, 50)),
    )  # fmt: skip


def turned(record: bytes) -> bytes:
    """The same example in another layout: the last field comes first."""
    at = wire._cut(record)
    return record[: at[0]] + record[at[-2] :] + record[at[0] : at[-2]]


@given(st.lists(st.tuples(examples(), st.booleans()), max_size=6))
def test_records_give_the_tables_of_their_examples(text, made):
    records = [wire.serialise(example) for example, _ in made]
    records = [turned(r) if turn and len(r) < 1 << 14 else r for r, (_, turn) in zip(records, made)]
    expected = [encode_examples([wire.parse(record)], text)[0] for record in records]
    found = encode_records(records, text)
    assert [table.dtype for table in found] == [np.int32] * len(made)
    for table, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(table, wanted)


def test_a_record_as_it_is_written_is_not_parsed_by_itself(text, monkeypatch):
    made = InstructionExample(
        "seq.x", "en", "P1", "I0", "T2", "next-item", 300, f"a {ITEM_SLOT * 2}", (7, 70000), "", target=9
    )
    answered = made._replace(answer="Heat", candidates=(1, 2), dense=True, features=())
    expected = encode_examples([made, answered], text)
    monkeypatch.setattr(wire, "parse", lambda record: pytest.fail("parsed"))
    for table, wanted in zip(encode_records([*map(wire.serialise, (made, answered))], text), expected, strict=True):
        np.testing.assert_array_equal(table, wanted)


def test_a_record_with_other_slots_than_what_fills_them_is_refused_by_name(text):
    made = InstructionExample("seq.x", "en", "P1", "I0", "T2", "next-item", 0, f"a {ITEM_SLOT}", (7,), "")
    wrong: list[dict] = [
        {"prompt_items": (7, 8)},
        {"features": (Feature(0, 1.0),)},
        {"answer": "no slot", "answer_items": (1,)},
        {"answer": f"a feature {FEATURE_SLOT}"},
    ]
    for other in (made._replace(**fields) for fields in wrong):
        with pytest.raises(DataError, match=r"seq\.x: . items and . features, but slots for"):
            encode_records([wire.serialise(made), wire.serialise(other)], text)


def test_what_is_no_record_is_refused_as_by_protobuf(text):
    from google.protobuf.message import DecodeError

    record = wire.serialise(InstructionExample("t", "en", "P1", "I0", "T2", "next-item", 0, "prompt", (), ""))
    with pytest.raises(DecodeError):
        encode_records([record, record[:-3]], text)


def test_layouts_that_are_kept_are_bounded(text, monkeypatch):
    monkeypatch.setattr(tokenise, "_KNOWN", 4)
    for number in range(20):
        example = InstructionExample("t", "en", "P1", "I0", "T2", "next-item", 0, f"prompt {number}", (), "")
        encode_records([wire.serialise(example)], text)
        assert len(text.layouts) <= 4


@given(st.text(st.sampled_from("ab'sд影 1.,\n\t\u00a0\u3000é<eos>\u2028\x1c")))
def test_the_ids_of_a_text_are_those_of_its_words_together(text, words):
    assert text.by_words
    for _ in range(2):  # as it is met first, and as its words are known
        assert text.encode(words) == text.tokenizer.encode(words, add_special_tokens=False).ids

"""Stored records to token tables, many at once: what differs from record to record is cut and decoded for all of them by numpy.

A record is some hundred bytes of seventeen fields (``data/wire.py``), most of which are the same in many records. ``encode_records`` finds
where the fields of every record begin in one pass over all of them, looks up the runs of fields that were met before, and decodes the lists
of items together, so that neither an example nor a tuple of its items is made. A record of another layout is parsed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from instructrec_jax.data import wire
from instructrec_jax.data.tokenise import (
    NEVER,
    NOTHING,
    Block,
    Layout,
    answer_layout,
    encode_examples,
    joined,
    keep,
    new_prompt_layout,
    tables,
    task_number,
)
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.instructions.example import Feature

# Fields that the runs of a record begin with: answer, loss, aspects, items, prompt, target, template, user.
_RUNS = [0, 3, 7, 11, 12, 13, 14, 16]
_AFTER = bytes(64)  # behind the last record: one that is cut short is looked at beyond its end before it is refused


def encode_records(records: Sequence[bytes], text: Text) -> list[Int32[np.ndarray, "tokens fields"]]:
    """The tables of ``tokenise.encode_examples`` for records as they are stored.

    Raises:
        DataError: a text has other numbers of slots than there are items or features.
    """
    content = np.frombuffer(b"".join([*records, _AFTER]), np.uint8)
    cuts, fits, start = _cut(content, np.array([len(record) for record in records], np.int64))
    items = _numbers(content, cuts[11], cuts[12], wire.PROMPT_ITEMS, fits)
    target = _numbers(content, cuts[13], cuts[14], wire.TARGET, items.fits)
    user = _numbers(content, cuts[16], cuts[17], wire.USER, target.fits)  # for its layout alone: no table has it
    fits = user.fits & (target.count == 1) & (user.count == 1)

    rows: list[_Row] = []
    taken = []
    runs = (cuts[_RUNS] - start).T.tolist()
    for record, at, fit, count in zip(records, runs, fits.tolist(), items.count.tolist(), strict=True):
        row = _row(record, at, text) if fit else None
        if row and len(row.prompt.items) == count and len(row.prompt.features) == len(row.features):
            rows.append(row)
            taken.append(True)
        else:
            taken.append(False)
    fits = np.array(taken, bool)
    of_items, of_target = (field.values[np.repeat(fits, field.count)] for field in (items, target))
    found = iter(_tables(rows, of_items, of_target))
    others = iter(encode_examples([wire.parse(record) for record, fit in zip(records, fits) if not fit], text))
    return [next(found if fit else others) for fit in taken]


def _tables(
    rows: list[_Row], items: Int[np.ndarray, " items"], target: Int[np.ndarray, " rows"]
) -> list[Int32[np.ndarray, "tokens fields"]]:
    """The tables of records whose prompts have ``items`` (one record after the other)."""
    if not rows:
        return []
    prompts, answers, answer_items, features, dense_from, task = zip(*rows, strict=True)
    return tables(
        Block(
            prompts, answers, items.astype(np.int32), joined(answer_items), features, target,
            np.array(dense_from, np.int64), np.array(task, np.int32),
        )
    )  # fmt: skip


class _Row(NamedTuple):
    """What the table of a record is made of beside its numbers."""

    prompt: Layout
    answer: Layout
    answer_items: tuple[int, ...]
    features: tuple[Feature, ...]
    dense_from: int
    task: int


def _row(record: bytes, at: list[int], text: Text) -> _Row | None:
    """None if a run does not hold the fields that belong there."""
    try:
        said = record[at[0] : at[1]]
        answer_items, answer, _ = _NO_ANSWER if said == wire.NO_ANSWER else wire.read_answer(said)
        dense, dense_from, features = wire.read_run(record[at[1] : at[2]], wire.LEARNT)
        prompt, unanswered, number = _asked(record[at[2] : at[3]], record[at[4] : at[5]], record[at[6] : at[7]], text)
    except (wire.OtherLayoutError, IndexError):
        return None
    first = dense_from if dense else NEVER
    if not answer:
        return _Row(prompt, NOTHING, (), features, first, unanswered)
    answered = answer_layout(text, answer)
    if len(answered.items) != len(answer_items) or len(answered.features):
        return None
    return _Row(prompt, answered, answer_items, features, first, number)


_NO_ANSWER = (), "", ()  # as ``wire.read_answer`` gives it: of most records


def _asked(wording: bytes, prompt: bytes, asked: bytes, text: Text) -> tuple[Layout, int, int]:
    """The prompt's layout and the task's number without and with an answer in words, by all that says them in a record: one thing to
    look up instead of three."""
    name = (wording, prompt, asked)
    known = text.layouts.get(name)
    if known is None:
        intention, _, metric, _ = wire.read_run(wording, wire.WORDING)
        task, _ = wire.read_run(asked, wire.ASKED)
        unanswered, answered = (task_number(metric, task, said, intention) for said in (False, True))
        known = new_prompt_layout(text, wire.read_prompt(prompt)), unanswered, answered
        keep(text, name, known, len(prompt))
    return known


# ------------------------------------------------------------------------------------------------------- all records at once


def _cut(
    content: UInt8[np.ndarray, " bytes"], size: Int[np.ndarray, " records"]
) -> tuple[Int[np.ndarray, "18 records"], Bool[np.ndarray, " records"], Int[np.ndarray, " records"]]:
    """Where the fields of every record begin, and its end; whether the record is seventeen fields; and where it begins itself."""
    end = np.cumsum(size)
    start = end - size
    at, fits = _inside(content, start, end, wire.FIELD)
    cuts = [at]
    for _ in range(17):
        at = np.minimum(at, end)  # of a record that is cut short
        at = _head(content, at)[1]
        cuts.append(at)
    return np.minimum(cuts, end), fits & (at == end), start


def _head(
    content: UInt8[np.ndarray, " bytes"], at: Int[np.ndarray, " records"]
) -> tuple[Int[np.ndarray, " records"], Int[np.ndarray, " records"]]:
    """Where the content of a message begins whose tag stands at ``at``, and where it ends, of every record.

    A size of more than two bytes is not read as such: what it leads to fits nothing.
    """
    size, more = content[at + 1].astype(np.int64), content[at + 2].astype(np.int64)
    long = size > 127
    begun = at + 2 + long
    return begun, begun + size + long * ((more << 7) - 128)


def _inside(
    content: UInt8[np.ndarray, " bytes"], at: Int[np.ndarray, " records"], end: Int[np.ndarray, " records"], tag: int
) -> tuple[Int[np.ndarray, " records"], Bool[np.ndarray, " records"]]:
    """Where the content of a message begins, and whether it has that tag and reaches to ``end``."""
    begun, ended = _head(content, at)
    return np.minimum(begun, end), (content[at] == tag) & (ended == end)


class _Numbers(NamedTuple):
    """The integers of one field of every record, one record after the other; none of a record that does not fit."""

    values: Int[np.ndarray, " numbers"]
    count: Int[np.ndarray, " records"]
    fits: Bool[np.ndarray, " records"]


def _numbers(
    content: UInt8[np.ndarray, " bytes"],
    at: Int[np.ndarray, " records"],
    end: Int[np.ndarray, " records"],
    key: bytes,
    fits: Bool[np.ndarray, " records"],
) -> _Numbers:
    """The integers of the field between ``at`` and ``end``, of records that ``fits``; it fits if it has that key and is a packed list."""
    letters = np.frombuffer(key, np.uint8)
    at, inside = _inside(content, at, end, wire.FIELD)
    fits = fits & inside & (content[at[:, None] + np.arange(len(key))] == letters).all(axis=1)
    at, inside = _inside(content, at + len(key) - 1, end, wire.VALUE)
    fits &= inside
    at, inside = _inside(content, at, end, wire.INTEGERS)
    fits &= inside
    begun, inside = _inside(content, at, end, wire.FIELD)
    empty = at == end
    fits &= empty | (inside & (content[end - 1] < 128))
    begun = np.where(fits & ~empty, begun, end)
    values, count = _varints(content, begun, end)
    return _Numbers(values, count, fits)


def _varints(
    content: UInt8[np.ndarray, " bytes"], begun: Int[np.ndarray, " runs"], end: Int[np.ndarray, " runs"]
) -> tuple[Int[np.ndarray, " numbers"], Int[np.ndarray, " runs"]]:
    """The numbers in runs of varints (seven bits to a byte, the lowest first; the last byte is below 128), and how many each run has."""
    size = end - begun
    before = np.cumsum(size) - size
    digits = content[np.arange(size.sum()) + np.repeat(begun - before, size)]
    last = np.flatnonzero(digits < 128)
    first = np.concatenate([[0], last[:-1] + 1])[: len(last)]
    values = (digits[first] & 127).astype(np.uint64)
    for place in range(1, 1 + int((last - first).max(initial=0))):
        longer = np.flatnonzero(last - first >= place)
        values[longer] |= (digits[first[longer] + place] & 127).astype(np.uint64) << np.uint64(7 * place)
    reached = np.searchsorted(last, np.append(before, size.sum()))
    return values.view(np.int64), np.diff(reached)

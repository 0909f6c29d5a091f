"""From an instruction example to the arrays that one packed row is made of.

Every array has one entry per token; ``0`` in an index array means "none", so that padding is all zeros:

    tokens          id of the word token, or of ``<item>`` / ``<feature>`` where a soft token stands
    item            catalogue index + 1 of an item token
    feature         feature index + 1 of a feature token, with its ``feature_value``
    text_target     id + 1 of the word that this position must predict (answers and learnt titles only: the loss mask)
    item_target     catalogue index + 1 of the item that this position must predict
    task            1-based number of the task family, for the per-task loss
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

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

FIELDS = {
    "tokens": np.int32,
    "item": np.int32,
    "feature": np.int32,
    "feature_value": np.float32,
    "text_target": np.int32,
    "item_target": np.int32,
    "task": np.int32,
}
_TOKENS, _ITEM, _FEATURE, _VALUE, _TEXT_TARGET, _ITEM_TARGET, _TASK = range(len(FIELDS))  # rows of a table
_SHORT, _KNOWN = 512, 1 << 13  # characters of a text whose layout is kept, and how many
TASKS = ("sequential", "search", "rerank", "pointwise", "describe", "pairwise", "widened")


def task_of(example: InstructionExample) -> str:
    """The task family of an example, as named in the training log."""
    if example.metric == "none":
        return "widened"
    if example.task != "T2":
        return {"T0": "pointwise", "T1": "pairwise", "T3": "rerank"}[example.task]
    if example.answer:
        return "describe"
    return "search" if example.intention != "I0" else "sequential"


_PIECES = re.compile(
    f"({ITEM_SLOT}+|{FEATURE_SLOT}+|{TITLE_OPEN}|{TITLE_CLOSE}|[^{ITEM_SLOT}{FEATURE_SLOT}{TITLE_OPEN}{TITLE_CLOSE}]+)"
)


class _Layout(NamedTuple):
    """A text with slots as tokens. Soft tokens come in runs (place, how many)."""

    tokens: Int32[np.ndarray, " tokens"]  # of words, or what stands where a soft token does
    items: list[tuple[int, int]]
    features: list[tuple[int, int]]
    said: list[tuple[int, int]]  # from, to: titles that are learnt
    slots: tuple[int, int]  # for items, for features


def _laid(text: Text, words: str, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> _Layout:
    """The layout of a text; the ids ``before`` and ``after`` stand around it.

    Short texts are kept: the prompts of many records are the same but for their items.
    """
    name = (words, before, after)
    known = text.layouts.get(name)
    if known is not None:
        return known
    made = _layout(text, words, before, after)
    if len(words) <= _SHORT:
        made.tokens.flags.writeable = False
        if len(text.layouts) >= _KNOWN:
            text.layouts.clear()
        text.layouts[name] = made
    return made


def _layout(text: Text, words: str, before: tuple[int, ...], after: tuple[int, ...]) -> _Layout:
    parts: list[Any] = [before]
    place, opened = len(before), 0
    items: list[tuple[int, int]] = []
    features: list[tuple[int, int]] = []
    said: list[tuple[int, int]] = []
    for piece in _PIECES.findall(words):
        kind = piece[0]
        if kind == TITLE_OPEN:
            opened = place
        elif kind == TITLE_CLOSE:
            said.append((opened, place))
        else:
            if kind == ITEM_SLOT:
                items.append((place, len(piece)))
                ids = np.full(len(piece), text.item)
            elif kind == FEATURE_SLOT:
                features.append((place, len(piece)))
                ids = np.full(len(piece), text.feature)
            else:
                ids = text.ids(piece)
            parts.append(ids)
            place += len(ids)
    tokens = np.concatenate([*parts, after]).astype(np.int32)
    return _Layout(tokens, items, features, said, (sum(n for _, n in items), sum(n for _, n in features)))


def _refuse(layout: _Layout, items: Sequence[int], features: Sequence[Feature], where: str) -> None:
    raise DataError(
        f"{where}: {len(items)} items and {len(features)} features, "
        f"but slots for {layout.slots[0]} and {layout.slots[1]}"
    )


def _fill(table: np.ndarray, start: int, layout: _Layout, items: Sequence[int], features: Sequence[Feature]) -> None:
    """Write a layout and what fills its slots into the columns from ``start`` on."""
    table[_TOKENS, start : start + len(layout.tokens)] = layout.tokens
    if items:
        # By way of bytes, which takes a third of the time of an array of Python's numbers.
        indices, taken = np.frombuffer(struct.pack(f"{len(items)}i", *items), np.int32) + 1, 0
        for place, count in layout.items:
            table[_ITEM, start + place : start + place + count] = indices[taken : taken + count]
            taken += count
    taken = 0
    for place, count in layout.features:
        some = features[taken : taken + count]
        columns = slice(start + place, start + place + count)
        table[_FEATURE, columns] = [f.index + 1 for f in some]
        table[_VALUE, columns] = np.array([f.value for f in some], np.float32).view(np.int32)
        taken += count


def _arrays(table: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a table by name, each in its own kind."""
    arrays = dict(zip(FIELDS, table))
    arrays["feature_value"] = arrays["feature_value"].view(np.float32)
    return arrays


def encode_prompt(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """``<bos>`` + prompt, or the prompt in its chat frame, without targets: what the scorer reads."""
    layout = _prompt(example, text)
    table = np.zeros((_VALUE + 1, len(layout.tokens)), np.int32)
    _fill(table, 0, layout, example.prompt_items, example.features)
    return _arrays(table)


def _prompt(example: InstructionExample, text: Text) -> _Layout:
    """The prompt's layout.

    Raises:
        DataError: it has other numbers of slots than there are items or features.
    """
    layout = _laid(text, example.prompt, text.before, text.after)
    if layout.slots != (len(example.prompt_items), len(example.features)):
        _refuse(layout, example.prompt_items, example.features, example.template)
    return layout


def encode_answer(words: str, text: Text) -> list[int]:
    """Token ids of an answer in words with what ends it: what the scorer sums over."""
    return [*text.encode(words), *text.end]


def encode_example(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """All arrays of one training example, ``<bos>`` prompt answer ``<eos>``.

    Loss is on answer words (and ``<eos>``), on learnt titles of the prompt,
    on the target item at the last prompt position and, for dense examples, on every
    history item from ``dense_from`` at the position before it. An example without a text answer ends with its prompt.
    """
    prompt, answer = _prompt(example, text), None
    end = length = len(prompt.tokens)
    said = prompt.said
    if example.answer:
        answer = _laid(text, example.answer, (), text.end)
        if answer.slots != (len(example.answer_items), 0):
            _refuse(answer, example.answer_items, (), example.template)
        end = length + len(answer.tokens)
        said = [*said, (length, end)]
    table = np.zeros((len(FIELDS), end), np.int32)
    _fill(table, 0, prompt, example.prompt_items, example.features)
    if answer:
        _fill(table, length, answer, example.answer_items, ())
    for start, stop in said:
        first = max(start, 1)  # nothing stands before the first token
        if stop > first:
            table[_TEXT_TARGET, first - 1 : stop - 1] = table[_TOKENS, first:stop] + 1
    if answer:
        for place, count in answer.items:  # soft tokens are predicted by the item head, not as words
            place += length
            table[_TEXT_TARGET, place - 1 : place + count - 1] = 0
        # The last token is a target but not an input: its position would predict nothing.
        table = table[:, :-1]
    if example.dense:
        skipped = example.dense_from
        for place, count in prompt.items:
            new = min(skipped, count)
            skipped -= new
            first, stop = max(place + new, 1), place + count
            if stop > first:
                table[_ITEM_TARGET, first - 1 : stop - 1] = table[_ITEM, first:stop]
    if example.target >= 0:
        table[_ITEM_TARGET, length - 1] = example.target + 1
    table[_TASK] = TASKS.index(task_of(example)) + 1
    return _arrays(table)


def truncate(arrays: dict[str, np.ndarray], length: int, head: int = 1) -> tuple[dict[str, np.ndarray], int]:
    """The newest ``length`` tokens, keeping the first ``head`` (``<bos>``, or what a chat template puts first); and the number of
    tokens cut. Histories are cut by whole items long before.

    After a cut the last kept token of the head has no target: what it had to predict is gone.
    """
    cut = len(arrays["tokens"]) - length
    if cut <= 0:
        return arrays, 0
    head = min(head, length)
    kept = {k: np.concatenate([v[:head], v[cut + head :]]) for k, v in arrays.items()}
    for key in ("text_target", "item_target"):
        if key in kept and head:
            kept[key][head - 1] = 0
    return kept, cut


def pad_to(arrays: list[dict[str, np.ndarray]], rows: int, length: int) -> dict[str, np.ndarray]:
    """Stack encoded prompts into ``[rows, length]`` arrays, padded with zeros on the right."""
    out = {k: np.zeros((rows, length), FIELDS[k]) for k in ("tokens", "item", "feature", "feature_value")}
    for row, part in enumerate(arrays):
        for key, target in out.items():
            target[row, : len(part[key])] = part[key]
    return out

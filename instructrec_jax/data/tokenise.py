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

import functools
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

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
_TOKENS, _ITEM, _FEATURE, _VALUE, _TEXT_TARGET, _ITEM_TARGET, _TASK = range(len(FIELDS))  # columns of a table
_SHORT, _KNOWN = 512, 1 << 13  # characters of a text whose layout is kept, and how many
TASKS = ("sequential", "search", "rerank", "pointwise", "describe", "pairwise", "widened")


def task_of(example: InstructionExample) -> str:
    """The task family of an example, as named in the training log."""
    return TASKS[task_number(example.metric, example.task, bool(example.answer), example.intention) - 1]


@functools.cache
def task_number(metric: str, task: str, answered: bool, intention: str) -> int:
    """The place of a task family in ``TASKS``, from 1."""
    if metric == "none":
        name = "widened"
    elif task != "T2":
        name = {"T0": "pointwise", "T1": "pairwise", "T3": "rerank"}[task]
    elif answered:
        name = "describe"
    else:
        name = "search" if intention != "I0" else "sequential"
    return TASKS.index(name) + 1


_PIECES = re.compile(
    f"({ITEM_SLOT}+|{FEATURE_SLOT}+|{TITLE_OPEN}|{TITLE_CLOSE}|[^{ITEM_SLOT}{FEATURE_SLOT}{TITLE_OPEN}{TITLE_CLOSE}]+)"
)


class Layout(NamedTuple):
    """A text with slots as tokens."""

    tokens: Int32[np.ndarray, " tokens"]  # of words, or what stands where a soft token does
    items: Int[np.ndarray, " items"]  # places of the items' soft tokens
    features: Int[np.ndarray, " features"]
    said: Int[np.ndarray, " said"]  # places of the tokens of titles that are learnt


_NO_PLACES = np.zeros(0, np.int64)
NOTHING = Layout(np.zeros(0, np.int32), _NO_PLACES, _NO_PLACES, _NO_PLACES)


def new_prompt_layout(text: Text, words: str) -> Layout:
    """The layout of a prompt, with what stands around it."""
    return _layout(text, words, text.before, text.after)


def answer_layout(text: Text, words: str) -> Layout:
    """The layout of an answer, with what ends it; nothing for an example without an answer in words."""
    return _laid(text, words, (), text.end) if words else NOTHING


def _laid(text: Text, words: str, before: tuple[int, ...], after: tuple[int, ...]) -> Layout:
    """The layout of a text; the ids ``before`` and ``after`` stand around it.

    Short texts are kept: the prompts of many records are the same but for their items.
    """
    name = (words, before, after)
    known = text.layouts.get(name)
    if known is not None:
        return known
    made = _layout(text, words, before, after)
    for part in made:
        part.flags.writeable = False
    keep(text, name, made, len(words))
    return made


def keep(text: Text, name: tuple, made: Any, size: int) -> None:
    """Keep a layout, or what holds one, for when its name comes again, unless it is large."""
    if size <= _SHORT:
        if len(text.layouts) >= _KNOWN:
            text.layouts.clear()
        text.layouts[name] = made


def _layout(text: Text, words: str, before: tuple[int, ...], after: tuple[int, ...]) -> Layout:
    tokens = list(before)
    opened = 0
    items: list[int] = []
    features: list[int] = []
    said: list[int] = []
    for piece in _PIECES.findall(words):
        kind, place = piece[0], len(tokens)
        if kind == TITLE_OPEN:
            opened = place
        elif kind == TITLE_CLOSE:
            said += range(opened, place)
        elif kind == ITEM_SLOT:
            items += range(place, place + len(piece))
            tokens += [text.item] * len(piece)
        elif kind == FEATURE_SLOT:
            features += range(place, place + len(piece))
            tokens += [text.feature] * len(piece)
        else:
            tokens += text.encode(piece)
    tokens += after
    return Layout(np.array(tokens, np.int32), _places(items), _places(features), _places(said))


def _places(places: list[int]) -> Int[np.ndarray, " places"]:
    return np.array(places, np.int64) if places else _NO_PLACES


def _check(layout: Layout, items: Sequence[int], features: Sequence[Feature], where: str) -> Layout:
    if len(layout.items) != len(items) or len(layout.features) != len(features):
        raise DataError(
            f"{where}: {len(items)} items and {len(features)} features, "
            f"but slots for {len(layout.items)} and {len(layout.features)}"
        )
    return layout


def fields_of(table: Int32[np.ndarray, "tokens fields"]) -> dict[str, np.ndarray]:
    """The columns of a table by name, each in its own kind."""
    arrays = dict(zip(FIELDS, np.ascontiguousarray(table.T)))
    arrays["feature_value"] = arrays["feature_value"].view(np.float32)
    return arrays


def encode_prompt(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """``<bos>`` + prompt, or the prompt in its chat frame, without targets: what the scorer reads.

    Raises:
        DataError: the prompt has other numbers of slots than there are items or features.
    """
    layout = _check(
        _laid(text, example.prompt, text.before, text.after), example.prompt_items, example.features, example.template
    )
    table = np.zeros((len(layout.tokens), _VALUE + 1), np.int32)
    table[:, _TOKENS] = layout.tokens
    table[layout.items, _ITEM] = np.asarray(example.prompt_items, np.int32) + 1
    _fill_features(table, layout.features, [example.features])
    return fields_of(table)


def encode_answer(words: str, text: Text) -> list[int]:
    """Token ids of an answer in words with what ends it: what the scorer sums over."""
    return [*text.encode(words), *text.end]


def encode_example(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """All arrays of one training example; see ``tables``.

    Raises:
        DataError: a text has other numbers of slots than there are items or features.
    """
    return fields_of(encode_examples([example], text)[0])


def encode_examples(examples: Sequence[InstructionExample], text: Text) -> list[Int32[np.ndarray, "tokens fields"]]:
    """The same for several, as ``tables`` gives them."""
    if not examples:
        return []
    prompts = [
        _check(_laid(text, e.prompt, text.before, text.after), e.prompt_items, e.features, e.template) for e in examples
    ]
    answers = [
        _check(answer_layout(text, e.answer), e.answer_items, (), e.template) if e.answer else NOTHING for e in examples
    ]
    block = Block(
        prompts=prompts,
        answers=answers,
        prompt_items=joined([e.prompt_items for e in examples]),
        answer_items=joined([e.answer_items for e in examples if e.answer]),
        features=[e.features for e in examples],
        target=np.array([e.target for e in examples], np.int64),
        dense_from=np.array([e.dense_from if e.dense else NEVER for e in examples], np.int64),
        task=np.array([task_number(e.metric, e.task, bool(e.answer), e.intention) for e in examples], np.int32),
    )
    return tables(block)


def joined(rows: Sequence[Sequence[int]]) -> Int32[np.ndarray, " numbers"]:
    """The numbers of all rows, one after the other."""
    return np.fromiter(chain.from_iterable(rows), np.int32)


class Block(NamedTuple):
    """What the tables of several examples are made of; every layout has as many slots as there is to fill them."""

    prompts: Sequence[Layout]
    answers: Sequence[Layout]  # nothing: the example ends with its prompt
    prompt_items: Int32[np.ndarray, " prompt_items"]  # of all, one example after the other
    answer_items: Int32[np.ndarray, " answer_items"]
    features: Sequence[tuple[Feature, ...]]
    target: Int[np.ndarray, " examples"]
    dense_from: Int[np.ndarray, " examples"]  # ``NEVER``: not dense
    task: Int32[np.ndarray, " examples"]  # number of the family, from 1


NEVER = 1 << 60  # items that no history has


def tables(block: Block) -> list[Int32[np.ndarray, "tokens fields"]]:
    """One row per token of ``<bos>`` prompt answer ``<eos>``, one column per field of ``FIELDS``; numbers that are not whole as their bits.

    Loss is on answer words (and ``<eos>``), on learnt titles of the prompt,
    on the target item at the last prompt position and, for dense examples, on every
    history item from ``dense_from`` at the position before it. An example without a text answer ends with its prompt.

    All examples are written into one table side by side: a dozen operations on long arrays in place of as many for every example.
    """
    prompts, answers = block.prompts, block.answers
    prompt_size = _sizes([p.tokens for p in prompts])
    size = prompt_size + _sizes([a.tokens for a in answers])
    end = np.cumsum(size)
    start = end - size
    answer_start = start + prompt_size
    table = np.zeros((int(end[-1]), len(FIELDS)), np.int32)
    tokens = np.concatenate([layout.tokens for pair in zip(prompts, answers, strict=True) for layout in pair])
    table[:, _TOKENS] = tokens

    slots = _sizes([p.items for p in prompts])
    item_at = np.concatenate([p.items for p in prompts]) + np.repeat(start, slots)
    table[item_at, _ITEM] = block.prompt_items + 1
    answered = [number for number, answer in enumerate(answers) if answer is not NOTHING]
    answer_item_at = _at([answers[n].items for n in answered], answer_start[answered])
    table[answer_item_at, _ITEM] = block.answer_items + 1
    _fill_features(table, _at([p.features for p in prompts], start), block.features)

    # What is to be predicted stands at its own place first, and is then moved to the position before it.
    said = np.zeros(len(tokens), bool)
    said[_at([p.said for p in prompts], start)] = True
    for first, last in zip(answer_start[answered].tolist(), end[answered].tolist()):
        said[first:last] = True
    said[answer_item_at] = False  # soft tokens are predicted by the item head, not as words
    said[start] = False  # nothing stands before the first token
    table[:-1, _TEXT_TARGET] = ((tokens + 1) * said)[1:]
    following = np.zeros(len(tokens), np.int32)
    number = np.arange(len(item_at)) - np.repeat(np.cumsum(slots) - slots, slots)  # of an item in its history
    dense = number >= np.repeat(block.dense_from, slots)
    following[item_at[dense]] = block.prompt_items[dense] + 1
    following[start] = 0
    table[:-1, _ITEM_TARGET] = following[1:]
    aimed = block.target >= 0
    table[answer_start[aimed] - 1, _ITEM_TARGET] = block.target[aimed] + 1
    table[:, _TASK] = np.repeat(block.task, size)

    end[answered] -= 1  # the last token of an answer is a target but not an input: its position would predict nothing
    return [table[first:last] for first, last in zip(start.tolist(), end.tolist())]


def _sizes(arrays: Sequence[np.ndarray]) -> Int[np.ndarray, " arrays"]:
    return np.fromiter(map(len, arrays), np.int64, len(arrays))


def _at(places: Sequence[Int[np.ndarray, " places"]], start: Int[np.ndarray, " texts"]) -> Int[np.ndarray, " all"]:
    """Places in texts as places in the whole table, where the texts begin at ``start``."""
    return np.concatenate([_NO_PLACES, *places]) + np.repeat(start, _sizes(places))


def _fill_features(table: np.ndarray, at: np.ndarray, features: Sequence[Sequence[Feature]]) -> None:
    if not len(at):
        return
    numbers = np.fromiter(chain.from_iterable(chain.from_iterable(features)), np.float64, 2 * len(at))
    table[at, _FEATURE] = numbers[::2] + 1
    table[at, _VALUE] = numbers[1::2].astype(np.float32).view(np.int32)


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

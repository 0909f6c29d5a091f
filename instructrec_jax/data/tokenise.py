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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


class _Part(NamedTuple):
    """A text with slots: how many tokens it has, and what stands where. Soft tokens come in runs (place, how many)."""

    length: int
    words: list[tuple[int, np.ndarray]]  # place, ids
    items: list[tuple[int, int]]
    features: list[tuple[int, int]]
    said: list[tuple[int, int]]  # from, to: titles that are learnt


def _part(
    text: Text,
    words: str,
    items: Sequence[int],
    features: Sequence[Feature],
    where: str,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    start: int = 0,
) -> _Part:
    """A text whose first token has the place ``start``; the ids ``before`` and ``after`` stand around it.

    Raises:
        DataError: other numbers of items or features than slots for them.
    """
    part = _Part(0, [], [], [], [])
    place = start
    if before:
        part.words.append((place, np.asarray(before, np.int32)))
        place += len(before)
    opened = 0
    for piece in _PIECES.findall(words):
        kind = piece[0]
        if kind == ITEM_SLOT:
            part.items.append((place, len(piece)))
            place += len(piece)
        elif kind == FEATURE_SLOT:
            part.features.append((place, len(piece)))
            place += len(piece)
        elif kind == TITLE_OPEN:
            opened = place
        elif kind == TITLE_CLOSE:
            part.said.append((opened, place))
        else:
            ids = text.ids(piece)
            part.words.append((place, ids))
            place += len(ids)
    if after:
        part.words.append((place, np.asarray(after, np.int32)))
        place += len(after)
    found = [sum(n for _, n in runs) for runs in (part.items, part.features)]
    if found != [len(items), len(features)]:
        raise DataError(
            f"{where}: {len(items)} items and {len(features)} features, but slots for {found[0]} and {found[1]}"
        )
    return part._replace(length=place - start)


def _fill(
    arrays: dict[str, np.ndarray], part: _Part, text: Text, items: Sequence[int], features: Sequence[Feature]
) -> None:
    """Write a part into its places."""
    tokens = arrays["tokens"]
    for place, ids in part.words:
        tokens[place : place + len(ids)] = ids
    if part.items:
        indices, taken = np.array(items, np.int32) + 1, 0
        for place, count in part.items:
            tokens[place : place + count] = text.item
            arrays["item"][place : place + count] = indices[taken : taken + count]
            taken += count
    taken = 0
    for place, count in part.features:
        some = features[taken : taken + count]
        tokens[place : place + count] = text.feature
        arrays["feature"][place : place + count] = [f.index + 1 for f in some]
        arrays["feature_value"][place : place + count] = [f.value for f in some]
        taken += count


def _arrays(length: int) -> dict[str, np.ndarray]:
    """All fields of so many tokens, zero; they are rows of one array."""
    table = np.zeros((len(FIELDS), length), np.int32)
    return {key: row if kind is np.int32 else row.view(kind) for (key, kind), row in zip(FIELDS.items(), table)}


def encode_prompt(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """``<bos>`` + prompt, or the prompt in its chat frame, without targets: what the scorer reads."""
    part = _prompt(example, text)
    arrays = _arrays(part.length)
    _fill(arrays, part, text, example.prompt_items, example.features)
    return {key: arrays[key] for key in ("tokens", "item", "feature", "feature_value")}


def _prompt(example: InstructionExample, text: Text) -> _Part:
    return _part(
        text, example.prompt, example.prompt_items, example.features, example.template, text.before, text.after
    )


def encode_answer(words: str, text: Text) -> list[int]:
    """Token ids of an answer in words with what ends it: what the scorer sums over."""
    return [*text.encode(words), *text.end]


def encode_example(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """All arrays of one training example, ``<bos>`` prompt answer ``<eos>``.

    Loss is on answer words (and ``<eos>``), on learnt titles of the prompt,
    on the target item at the last prompt position and, for dense examples, on every
    history item from ``dense_from`` at the position before it. An example without a text answer ends with its prompt.
    """
    part = _prompt(example, text)
    length, said = part.length, part.said
    answer = None
    if example.answer:
        answer = _part(text, example.answer, example.answer_items, (), example.template, after=text.end, start=length)
        said = [*said, (length, length + answer.length)]
    arrays = _arrays(length + answer.length if answer else length)
    _fill(arrays, part, text, example.prompt_items, example.features)
    if answer:
        _fill(arrays, answer, text, example.answer_items, ())
    learnt = arrays["text_target"]
    for start, end in said:
        first = max(start, 1)  # nothing stands before the first token
        if end > first:
            learnt[first - 1 : end - 1] = arrays["tokens"][first:end] + 1
    if answer:
        for place, count in answer.items:  # soft tokens are predicted by the item head, not as words
            learnt[place - 1 : place + count - 1] = 0
        # The last token is a target but not an input: its position would predict nothing.
        arrays = {key: row[:-1] for key, row in arrays.items()}
    if example.dense:
        skipped = example.dense_from
        for place, count in part.items:
            new = min(skipped, count)
            skipped -= new
            first, end = max(place + new, 1), place + count
            if end > first:
                arrays["item_target"][first - 1 : end - 1] = arrays["item"][first:end]
    if example.target >= 0:
        arrays["item_target"][length - 1] = example.target + 1
    arrays["task"][:] = TASKS.index(task_of(example)) + 1
    return arrays


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

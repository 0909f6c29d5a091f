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


def encode_part(
    text: Text,
    words: str,
    items: Sequence[int],
    features: Sequence[Feature],
    where: str,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Token arrays of a text with slots (no targets yet), and ``said``: 1 at the tokens of titles that are learnt.

    The ids ``before`` and ``after`` stand around it.
    """
    tokens: list[int] = [*before]
    item_at: list[int] = []
    feature_at: list[int] = []
    said: list[tuple[int, int]] = []
    opened = 0
    for piece in _PIECES.findall(words):
        kind, start = piece[0], len(tokens)
        if kind == ITEM_SLOT:
            tokens.extend([text.item] * len(piece))
            item_at.extend(range(start, len(tokens)))
        elif kind == FEATURE_SLOT:
            tokens.extend([text.feature] * len(piece))
            feature_at.extend(range(start, len(tokens)))
        elif kind == TITLE_OPEN:
            opened = start
        elif kind == TITLE_CLOSE:
            said.append((opened, start))
        else:
            tokens.extend(text.encode(piece))
    tokens.extend(after)
    if len(item_at) != len(items) or len(feature_at) != len(features):
        raise DataError(
            f"{where}: {len(items)} items and {len(features)} features, but slots for {len(item_at)} and {len(feature_at)}"
        )
    arrays = {key: np.zeros(len(tokens), FIELDS[key]) for key in ("item", "feature", "feature_value")}
    arrays = {"tokens": np.array(tokens, np.int32), **arrays, "said": np.zeros(len(tokens), np.int32)}
    if item_at:
        arrays["item"][item_at] = np.array(items, np.int32) + 1
    if feature_at:
        arrays["feature"][feature_at] = [f.index + 1 for f in features]
        arrays["feature_value"][feature_at] = [f.value for f in features]
    for start, end in said:
        arrays["said"][start:end] = 1
    return arrays


def encode_prompt(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """``<bos>`` + prompt, or the prompt in its chat frame, without targets: what the scorer reads."""
    part = encode_part(
        text, example.prompt, example.prompt_items, example.features, example.template, text.before, text.after
    )
    del part["said"]
    return part


def encode_answer(words: str, text: Text) -> list[int]:
    """Token ids of an answer in words with what ends it: what the scorer sums over."""
    return [*text.encode(words), *text.end]


def encode_example(example: InstructionExample, text: Text) -> dict[str, np.ndarray]:
    """All arrays of one training example, ``<bos>`` prompt answer ``<eos>``.

    Loss is on answer words (and ``<eos>``), on learnt titles of the prompt,
    on the target item at the last prompt position and, for dense examples, on every
    history item from ``dense_from`` at the position before it. An example without a text answer ends with its prompt.
    """
    arrays = encode_part(
        text, example.prompt, example.prompt_items, example.features, example.template, text.before, text.after
    )
    prompt_length = len(arrays["tokens"])
    if example.answer:
        answer = encode_part(text, example.answer, example.answer_items, (), example.template, after=text.end)
        answer["said"][:] = answer["item"] == 0  # soft tokens are predicted by the item head, not as words
        arrays = {k: np.concatenate([v, answer[k]]) for k, v in arrays.items()}
    said, following = arrays.pop("said"), np.zeros_like(arrays["tokens"])
    following[:-1] = np.where(said > 0, arrays["tokens"] + 1, 0)[1:]
    if example.answer:
        # The last token is a target but not an input: its position would predict nothing.
        arrays, following = {k: v[:-1] for k, v in arrays.items()}, following[:-1]
    text_target = following

    item_target = np.zeros(len(arrays["tokens"]), np.int32)
    if example.dense:
        slots = np.flatnonzero(arrays["item"][:prompt_length])[example.dense_from :]
        item_target[slots - 1] = arrays["item"][slots]
    if example.target >= 0:
        item_target[prompt_length - 1] = example.target + 1
    task = np.full(len(item_target), TASKS.index(task_of(example)) + 1, np.int32)
    return {**arrays, "text_target": text_target, "item_target": item_target, "task": task}


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

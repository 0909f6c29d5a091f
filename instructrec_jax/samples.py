"""Examples for people to look at: users with their lists, and prompts with the loss mask."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.config import Config
from instructrec_jax.data.records import Records
from instructrec_jax.data.schema import Cases, SplitData
from instructrec_jax.data.tokenise import encode_example, task_of
from instructrec_jax.evaluation.metrics import TargetRank
from instructrec_jax.prepare import Prepared, load


def sample_users(
    data: SplitData,
    cases: Cases,
    histories: list[Int[np.ndarray, " n"]],
    lists: Int[np.ndarray, "cases k"],
    scores: Float[np.ndarray, "cases k"],
    ranks: TargetRank,
    count: int = 10,
) -> list[dict[str, Any]]:
    """``count`` cases, half of them hits in the list where there are so many, spread over the cases by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(cases))
    hit = ranks.greater[order] < lists.shape[1]
    chosen = np.concatenate([order[hit][: count // 2], order[~hit]])[:count]
    titles = data.catalogue.titles
    return [
        {
            "user_id": data.user_ids[int(cases.user[i])],
            "history": [titles[int(x)] for x in histories[i][-20:]],
            "list": [
                {"title": titles[int(x)], "score": float(v)} for x, v in zip(lists[i][:10], scores[i][:10]) if x >= 0
            ],
            "truth": titles[int(cases.target[i])],
            "rank": float(ranks.expected_rank[i]),
        }
        for i in chosen
    ]


def sample_prompts(prepared: Prepared, each: int = 1) -> list[dict[str, Any]]:
    """``each`` training examples of every task, token by token: what kind it is, and which head is trained there."""
    records = Records(prepared.records)
    seen: dict[str, int] = {}
    out = []
    for index in np.random.default_rng(0).permutation(len(records))[:2000]:
        example = records[int(index)]
        task = task_of(example)
        if seen.get(task, 0) >= each:
            continue
        seen[task] = seen.get(task, 0) + 1
        tokens = _tokens(encode_example(example, prepared.text), prepared)
        out.append({"template": example.template, "task": task, "language": example.language, "tokens": tokens})
    return out


def _tokens(arrays: dict[str, np.ndarray], prepared: Prepared) -> list[dict[str, str]]:
    """Every token as text, what kind it is, and the heads that are trained at its position."""
    tokens = []
    for position, token in enumerate(arrays["tokens"].tolist()):
        item, feature = int(arrays["item"][position]), int(arrays["feature"][position])
        if item:
            text, kind = prepared.data.catalogue.titles[item - 1], "item"
        elif feature:
            text, kind = prepared.users.names[feature - 1], "feature"
        else:
            text, kind = prepared.text.tokenizer.decode([token], skip_special_tokens=False), "word"
        heads = [head for head in ("item", "text") if arrays[f"{head}_target"][position]]
        tokens.append({"text": text, "kind": kind, "loss": "+".join(heads)})
    return tokens


@dataclass(frozen=True)
class PackedRow:
    """A row of a training batch: its segments, each a list of tokens (text, kind, loss), and the places that are padding."""

    segments: list[list[dict[str, str]]]
    padding: int


def packed_batch(config: Config, step: int = 1) -> list[PackedRow]:
    """The batch that a fresh run of a prepared config trains on at ``step`` (from 1)."""
    from instructrec_jax.data.loader import training_iterator

    prepared = load(config)
    train = config.train
    batches = training_iterator(
        prepared.records,
        prepared.text,
        batch_size=train.batch_size,
        sequence_length=train.sequence_length,
        seed=train.seed,
        curriculum=train.curriculum,
        look_ahead=train.look_ahead,
    )
    try:
        batch = next(itertools.islice(batches, step - 1, None))
    finally:
        batches.close()
    rows = []
    for row, ids in enumerate(batch["segment_ids"]):
        parts = [{k: v[row][ids == number] for k, v in batch.items()} for number in range(1, ids.max() + 1)]
        rows.append(PackedRow([_tokens(part, prepared) for part in parts], int((ids == 0).sum())))
    return rows

"""The host's part of scoring: requests of one method, checked, tokenised and grown into trees. No device is touched.

It can run in a thread of its own while the device works on the requests before (``score.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Int

from instructrec_jax.errors import UserError
from instructrec_jax.scoring.forest import Forest
from instructrec_jax.scoring.requests import Reader, Ready, Request, join_words
from instructrec_jax.scoring.rows import Job, Prompt

Normalise = Literal["sum", "mean", "prior"]


@dataclass(frozen=True)
class Prepared:
    """Requests of one method, ready for the device.

    ``prompts`` are those of ``items``, ``rerank`` and whole catalogues, one per request of ``asked``; ``jobs`` are trees behind prompts,
    ``owners`` the index of each job's request, and ``orders`` which candidate stands at which place of a job's list (``labels``).
    """

    method: str
    normalise: Normalise
    ready: list[Ready]
    asked: list[int] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    orders: list[Int[np.ndarray, " C"]] = field(default_factory=list)

    def size(self, number: int, catalogue: int) -> int:
        """Candidates of a request."""
        r = self.ready[number]
        return catalogue if r.everything else len(r)


def prepare(
    reader: Reader, requests: Sequence[Request], method: str, normalise: Normalise, shifts: int, encodes: bool
) -> Prepared:
    """Requests as prompts and trees.

    Args:
        reader: the catalogue's.
        requests, method, normalise, shifts: as in ``Scorer.score``, known names.
        encodes: an encoder reads the prompts.

    Raises:
        UserError: a candidate outside the catalogue, or what a method cannot score.
    """
    out = Prepared(method, normalise, [reader.check(number, request) for number, request in enumerate(requests)])
    if method in ("items", "rerank"):
        _heads(reader, out)
    elif method == "labels":
        _labels(reader, out, shifts)
    elif method == "yesno":
        _verdicts(reader, out, encodes)
    else:
        _likelihood(reader, out)
    return out


def _heads(reader: Reader, out: Prepared) -> None:
    for r in out.ready:
        if r.words is not None:
            raise UserError(f"request {r.number}: the item heads score catalogue items, not texts")
        out.asked.append(r.number)
        out.prompts.append(reader.prompt(r.prompt))


def _likelihood(reader: Reader, out: Prepared) -> None:
    for r in out.ready:
        if r.everything or (out.method == "trie" and r.items is not None and len(r)):
            out.asked.append(r.number)
            out.prompts.append(reader.prompt(r.prompt))
        elif len(r):
            _add(out, r, reader.prompt(r.prompt), reader.sequences(r))


def _verdicts(reader: Reader, out: Prepared, encodes: bool) -> None:
    yes, no = reader.verdicts()
    for r in out.ready:
        prompt, asked = reader.prompt(r.prompt, framed=False), reader.asked(r)
        if encodes:  # the encoder reads the whole question, and the decoder answers: nothing is shared
            for words in asked:
                _add(out, r, join_words(prompt, words), [[yes], [no]])
        else:
            _add(out, r, prompt, [[*words, word] for words in asked for word in (yes, no)])


def _labels(reader: Reader, out: Prepared, shifts: int) -> None:
    if shifts < 1:
        raise UserError(f"shifts = {shifts}: a list is read at least once")
    for r in out.ready:
        size = out.size(r.number, len(reader.titles))
        times = min(shifts, size)
        for k in range(times):
            # Shifts as far apart as they can be: each candidate visits places over the whole list.
            order = np.roll(np.arange(size), -(k * size // times))
            example, tokens = reader.listed(r, order.tolist())
            _add(out, r, reader.prompt(example), [[token] for token in tokens])
            out.orders.append(order)


def _add(out: Prepared, r: Ready, prompt: Prompt, ends: list[list[int]]) -> None:
    out.jobs.append(Job(len(out.jobs), prompt, Forest.build(ends)))
    out.owners.append(r.number)

"""Item memory: a linear item-item model beside the matching head.

The matching head squeezes a history into one vector. What followed one particular item a few times in the logs is easier to remember
than to learn: a sparse matrix B of links between items, from the closed form of ``retrieval/slit.py``, holds it. For a prompt with the
history h_1, ..., h_n (newest last)

    R_i = softmax_i(f_i · g + θ_i + w Σ_k B[h_{n+1−k}, i] / k)                  over the newest ``past`` events

The weight w is chosen on validation, for prompts without and with a wish. A prompt that tells nothing at all, neither history nor wish,
has v log p_i among its logits instead, p being the items' shares of the events: what is best for somebody unknown needs no learning.
Nothing of the language model depends on the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from instructrec_jax.errors import DataError
from instructrec_jax.files import read_arrays, write_arrays
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.retrieval.slit import recent

INTENTIONS = ("I0", "I1", "I2")


@dataclass(frozen=True)
class ItemMemory:
    """Links between the items of a catalogue, and how much they count."""

    links: sp.csr_matrix  # [I, I], float32: row = an item of the history
    past: int
    weights: tuple[float, ...]  # w for prompts of I0, I1 and I2
    prior: Float[np.ndarray, " I"]  # log p
    prior_weight: float  # v

    @property
    def items(self) -> int:
        """I."""
        return len(self.links.indptr) - 1

    def weight(self, prompt: Any) -> float:
        """w of a prompt: 0 where there is no history, or where the prompt shows candidates beside it."""
        if not isinstance(prompt, InstructionExample) or prompt.task != "T2" or not prompt.prompt_items:
            return 0.0
        return self.weights[INTENTIONS.index(prompt.intention)]

    def scores(self, prompts: Sequence[Any]) -> Float[np.ndarray, "B I"]:
        """What is added to the logits of every prompt."""
        weights = [self.weight(p) for p in prompts]
        histories = [np.asarray(p.prompt_items if w else (), np.int64) for p, w in zip(prompts, weights)]
        of_history = sp.diags_array(np.asarray(weights, np.float32)) @ recent(histories, self.items, self.past)
        unknown = np.asarray([self.prior_weight if tells_nothing(p) else 0.0 for p in prompts], np.float32)
        return (of_history @ self.links).toarray().astype(np.float32) + unknown[:, None] * self.prior

    def save(self, path: Path) -> None:
        """Write one file, atomically."""
        links = {name: getattr(self.links, name) for name in ("data", "indices", "indptr")}
        numbers = {"past": self.past, "weights": self.weights, "prior_weight": self.prior_weight}
        write_arrays(path, {**links, "prior": self.prior, **{name: np.asarray(v) for name, v in numbers.items()}})

    @staticmethod
    def load(path: Path, items: int) -> ItemMemory:
        """Read what ``save`` wrote.

        Raises:
            DataError: the file is damaged, or of another catalogue.
        """
        remedy = "remove it and run the same `instructrec train` again"
        found = read_arrays(path, remedy)
        if missing := {"data", "indices", "indptr", "prior", "past", "weights", "prior_weight"} - found.keys():
            raise DataError(f"not an item memory: no {', '.join(sorted(missing))}", file=path, remedy=remedy)
        if len(found["prior"]) != items:
            raise DataError(
                f"item memory of {len(found['prior']):,} items; the catalogue has {items:,}", file=path, remedy=remedy
            )
        links = sp.csr_matrix((found["data"], found["indices"], found["indptr"]), shape=(items, items))
        weights = tuple(found["weights"].tolist())
        return ItemMemory(links, int(found["past"]), weights, found["prior"], float(found["prior_weight"]))


def tells_nothing(prompt: Any) -> bool:
    """Whether a prompt asks for an item and says nothing of whom it is for."""
    if not isinstance(prompt, InstructionExample) or prompt.features:
        return False
    return (prompt.task, prompt.preference, prompt.intention) == ("T2", "P0", "I0")


def log_shares(counts: Int[np.ndarray, " I"]) -> Float[np.ndarray, " I"]:
    """Log shares of events; every item has half an event more, so that none is impossible."""
    return np.log((counts + 0.5) / (counts.sum() + 0.5 * len(counts))).astype(np.float32)


def strongest(weights: Float[np.ndarray, "I I"], keep: int) -> sp.csr_matrix:
    """The ``keep`` weights of each row that are largest in size."""
    if keep >= weights.shape[1]:
        return sp.csr_matrix(weights)
    columns = np.argpartition(-np.abs(weights), keep - 1, axis=1)[:, :keep]
    columns.sort(axis=1)
    values = np.take_along_axis(weights, columns, axis=1)
    return sp.csr_matrix((values.ravel(), columns.ravel(), np.arange(len(weights) + 1) * keep), shape=weights.shape)

"""Item memory: a linear item-item model beside the matching head.

The matching head squeezes a history into one vector. What followed one particular item a few times in the logs is easier to remember
than to learn: a sparse matrix B of links between items, from the closed form of ``retrieval/slit.py``, holds it. For a prompt with the
history h_1, ..., h_n (newest last)

    R_i = softmax_i(f_i · g + θ_i + w Σ_k B[h_{n+1−k}, i] / k)                  over the newest ``past`` events

The weight w is chosen on validation, for prompts without and with a wish. Nothing of the language model depends on it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from instructrec_jax.errors import DataError
from instructrec_jax.files import write_atomic
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.retrieval.slit import recent

INTENTIONS = ("I0", "I1", "I2")


@dataclass(frozen=True)
class ItemMemory:
    """Links between the items of a catalogue, and how much they count."""

    links: sp.csr_matrix  # [I, I], float32: row = an item of the history
    past: int
    weights: tuple[float, ...]  # w for prompts of I0, I1 and I2

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
        """w Σ_k B[h, i] / k of every prompt."""
        weights = [self.weight(p) for p in prompts]
        histories = [np.asarray(p.prompt_items if w else (), np.int64) for p, w in zip(prompts, weights)]
        of_history = sp.diags_array(np.asarray(weights, np.float32)) @ recent(histories, self.items, self.past)
        return (of_history @ self.links).toarray().astype(np.float32)

    def added(self, log_prob: Float[np.ndarray, "B I"], prompts: Sequence[Any]) -> Float[np.ndarray, "B I"]:
        """Log probabilities of the matching head with the memory's scores among the logits."""
        logits = log_prob + self.scores(prompts)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def save(self, path: Path) -> None:
        """Write one file, atomically."""
        out = io.BytesIO()
        about = json.dumps({"past": self.past, "weights": self.weights})
        links = self.links
        np.savez(out, data=links.data, indices=links.indices, indptr=links.indptr, items=self.items, about=about)
        write_atomic(path, out.getvalue())

    @staticmethod
    def load(path: Path, items: int) -> ItemMemory:
        """Read what ``save`` wrote.

        Raises:
            DataError: the file is damaged, or of another catalogue.
        """
        remedy = "remove it and run the same `instructrec train` again"
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                parts = {name: file[name] for name in ("data", "indices", "indptr", "items", "about")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"not an item memory: {error}", file=path, remedy=remedy) from error
        if int(parts["items"]) != items:
            raise DataError(
                f"item memory of {int(parts['items']):,} items; the catalogue has {items:,}", file=path, remedy=remedy
            )
        about = json.loads(str(parts["about"]))
        links = sp.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=(items, items))
        return ItemMemory(links, about["past"], tuple(about["weights"]))


def strongest(weights: Float[np.ndarray, "I I"], keep: int) -> sp.csr_matrix:
    """The ``keep`` weights of each row that are largest in size."""
    if keep >= weights.shape[1]:
        return sp.csr_matrix(weights)
    columns = np.argpartition(-np.abs(weights), keep - 1, axis=1)[:, :keep]
    columns.sort(axis=1)
    values = np.take_along_axis(weights, columns, axis=1)
    return sp.csr_matrix((values.ravel(), columns.ravel(), np.arange(len(weights) + 1) * keep), shape=weights.shape)

"""What every classic recommender offers, and the matrices they learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from instructrec_jax.data.schema import TRAIN, VALID, SplitData
from instructrec_jax.errors import ConfigError, UserError


class Recommender(Protocol):
    """A classic recommender. Fit once, then score any history, also one of a user who was not there at the fit."""

    grid: ClassVar[Mapping[str, Sequence[Any]]]  # option -> the values that tuning may try

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Learn from the training events; with ``include_valid`` also from the validation events (for the test
        split).
        """
        ...

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """float32 scores of the whole catalogue, higher is better. ``histories``: item indices, oldest first, one per
        case.
        """
        ...


@runtime_checkable
class Stored(Protocol):
    """A recommender whose fit is worth keeping. The others are fitted again in seconds."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All that ``score`` needs beside the options."""
        ...

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """Take what ``arrays`` of a fitted one with the same options gave, in place of a fit."""
        ...


@dataclass(frozen=True)
class Budget:
    """What a fit by gradients may take."""

    epochs: int = 200  # most passes over the events
    patience: int = 10  # passes without a better validation NDCG@10 before it ends
    users: int = 2000  # most validation cases after each pass, a fixed sample
    seed: int = 0
    say: Callable[[str], None] | None = None  # takes a line of progress every now and then


def training_events(data: SplitData, include_valid: bool) -> np.ndarray:
    """Mask of the events a recommender may learn from."""
    return (data.split == TRAIN) | (include_valid & (data.split == VALID))


def training_matrix(data: SplitData, include_valid: bool) -> sp.csr_matrix:
    """Binary users x items matrix, float32, of the training (and validation) events; repeats count once."""
    use = training_events(data, include_valid)
    matrix = sp.csr_matrix(
        (np.ones(int(use.sum()), np.float32), (data.user[use], data.item[use])), shape=(data.num_users, data.num_items)
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def history_matrix(histories: Sequence[Int[np.ndarray, " n"]], items: int, last: int | None = None) -> sp.csr_matrix:
    """Binary cases x items matrix, float32, of histories or of their newest ``last`` events."""
    cut = [np.asarray(h, np.int64)[-last:] if last else np.asarray(h, np.int64) for h in histories]
    rows = np.repeat(np.arange(len(cut)), [len(h) for h in cut])
    columns = np.concatenate(cut) if cut else np.zeros(0, np.int64)
    if len(columns) and (columns.min() < 0 or columns.max() >= items):
        bad = int(np.flatnonzero((columns < 0) | (columns >= items))[0])
        raise UserError(f"history {rows[bad]} holds item {columns[bad]}, the catalogue has {items}")
    matrix = sp.csr_matrix((np.ones(len(columns), np.float32), (rows, columns)), shape=(len(cut), items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def not_fitted(name: str) -> UserError:
    """The error of scoring before fitting."""
    return UserError(f"{name} is not fitted", remedy="call fit(data) first")


def check_dense(name: str, items: int, most: int, bytes_a_cell: int) -> None:
    """Refuse a closed form whose dense items x items matrices would not fit.

    Raises:
        ConfigError: the catalogue has more than ``most`` items.
    """
    if items > most:
        now, limit = (bytes_a_cell * n**2 / 1e9 for n in (items, most))
        raise ConfigError(
            f"{name}: {items:,} items need dense {items:,} x {items:,} matrices, about {now:.1f} GB; the limit is {most:,} items "
            f"({limit:.1f} GB)",
            remedy=f"leave {name} out, raise max_items, or raise data.clean.k_core",
        )

"""GMF, MLP and NeuMF (He et al. 2017): a vector per user and per item, and what is learnt to compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from instructrec_jax.config import TrainConfig
from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.retrieval.base import Budget, history_matrix, not_fitted, training_matrix
from instructrec_jax.retrieval.neural.sequences import batches

if TYPE_CHECKING:
    from instructrec_jax.retrieval.neural.towers import Towers

_SCORED = 32  # users in a compiled scoring batch: the MLP's first layer is [32, I, width]
_GRID: Mapping[str, Sequence[Any]] = {
    "factors": (32, 8, 16, 64),
    "learning_rate": (1e-3, 3e-3, 3e-4),
    "weight_decay": (0.0, 0.01, 0.1),
    "batch_size": (1024, 4096),
}


class Collaborative:
    """A model of user ids, trained by binary cross-entropy on events and ``negatives`` drawn items each.

    A user of the fit has a vector of their own, which does not follow later events. Anybody else gets, for each item of the history,
    the mean vector of the users who had it, and the mean of those over the history.
    """

    name: ClassVar[str]
    grid: ClassVar[Mapping[str, Sequence[Any]]]
    parts: ClassVar[tuple[bool, bool]]  # whether there is a product, an MLP

    def __init__(
        self,
        factors: int = 32,
        layers: int = 3,
        negatives: int = 4,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 1024,
        budget: Budget = Budget(),
        epochs: int | None = None,
    ) -> None:
        """Choose the model.

        Args:
            factors: D, the paper's predictive factors.
            layers: of the MLP; the first is 2^(layers - 1) D wide.
            negatives: items without an event, drawn anew in every epoch for each event.
            learning_rate: of Adam, after 100 steps of warm-up.
            weight_decay: AdamW's.
            batch_size: pairs in a step.
            budget: how long to train.
            epochs: exactly so many, without validation; None = until validation NDCG@10 ends to improve.

        Raises:
            ConfigError: a number below 1.
        """
        if min(factors, layers, negatives, batch_size) < 1:
            raise ConfigError(
                f"{self.name}: factors = {factors}, layers = {layers}, negatives = {negatives}, batch_size = {batch_size}: want at "
                "least 1"
            )
        self.factors, self.layers, self.negatives = factors, layers, negatives
        self.batch_size, self.budget, self.epochs = batch_size, budget, epochs
        self._exactly = epochs
        self.train = TrainConfig(
            schedule="constant",
            learning_rate=learning_rate,
            warmup_steps=100,
            weight_decay=weight_decay,
            beta2=0.999,
            clip_norm=5.0,
        )
        self.params: Any = None
        self.curve: list[float] = []  # validation NDCG@10 after every epoch of the fit that chose their number
        self._known = np.zeros(0, bool)
        self._audience = sp.csr_matrix((0, 0))  # [I, U]: row i = a mean over the users of item i
        self._rows = 0, 0

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Train; with ``include_valid`` choose the number of epochs on validation, then start again on all events.

        Raises:
            UserError: there is no training event.
        """
        from instructrec_jax.retrieval.neural.fitting import fitted, one_device, validation

        self._rows = data.num_users, data.num_items
        with one_device():
            self.params, self.epochs, self.curve = fitted(
                lambda with_valid: self._training(data, with_valid),
                validation(data, self._score, self.budget),
                self.budget,
                include_valid=include_valid,
                epochs=self._exactly,
            )
        return self

    def _meet(self, matrix: sp.csr_matrix) -> None:
        self._known = np.diff(matrix.indptr) > 0
        by_item = sp.csr_matrix(matrix.T)
        sizes = np.maximum(np.diff(by_item.indptr), 1)
        self._audience = sp.csr_matrix(sp.diags_array(1 / sizes).astype(np.float32) @ by_item)

    def _training(self, data: SplitData, include_valid: bool) -> tuple[Any, Any]:
        """(first state, function of an epoch)."""
        import jax

        from instructrec_jax.retrieval.neural import towers

        matrix = training_matrix(data, include_valid)
        self._meet(matrix)
        events = matrix.tocoo()
        if not events.nnz:
            raise UserError(f"{self.name}: {data.name} has no training event", remedy="see data.split")
        items, seed = data.num_items, self.budget.seed
        user, item = events.row.astype(np.int64), events.col.astype(np.int64)
        taken = np.sort(user * items + item)
        model, config = self._model(), self.train

        def epoch(state: tuple, number: int) -> tuple:
            rng = np.random.default_rng([seed, number])
            others = np.repeat(user, self.negatives)
            drawn = rng.integers(0, items, len(others))
            # A second draw for those that are events; one that is again an event is left out.
            again = _among(others * items + drawn, taken)
            drawn[again] = rng.integers(0, items, int(again.sum()))
            fine = ~_among(others * items + drawn, taken)
            pairs = np.concatenate([user, others[fine]]), np.concatenate([item, drawn[fine]])
            # Labels are 1 and 2 until ``batches`` has filled up with zeros.
            label = np.repeat([2, 1], [len(user), int(fine.sum())])
            for u, i, y in batches([*pairs, label], self.batch_size, rng):
                arrays = (_put(x.astype(np.int32)) for x in (u, i, y - 1))
                state = towers.step(model, config, *state[:2], *arrays)
            return state

        return towers.start(model, config, jax.random.key(seed)), epoch

    def _model(self) -> Towers:
        from instructrec_jax.retrieval.neural.towers import Towers

        product, perceptron = self.parts
        return Towers(*self._rows, self.factors, product, self.layers if perceptron else 0)

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """``users``: user indices of the fitted data; without them everybody is new. Who is new and has no history gets the mean user."""
        if self.params is None:
            raise not_fitted(self.name)
        from instructrec_jax.retrieval.neural.fitting import one_device

        with one_device():
            return self._score(self.params, histories, users)

    def _score(self, params: Any, histories: Sequence[np.ndarray], users: np.ndarray | None) -> np.ndarray:
        from instructrec_jax.retrieval.neural import towers

        model, who = self._model(), np.zeros(len(histories), np.int64) if users is None else np.asarray(users)
        known = np.zeros(len(who), bool) if users is None else self._known[who]
        names = [name for name, _ in model.vectors]
        fold_in = history_matrix(histories, self._rows[1]) @ self._audience  # [cases, U]
        weight = np.asarray(fold_in.sum(axis=1)).ravel()
        tastes = []
        for name in names:
            table = np.asarray(params[f"{name}_user"])
            mean = table[self._known].mean(axis=0)
            new = (fold_in @ table) / np.where(weight > 0, weight, 1)[:, None]
            new = np.where(weight[:, None] > 0, new, mean)
            tastes.append(np.where(known[:, None], table[who], new).astype(np.float32))
        parts = [
            np.asarray(towers.catalogue(model, params, {n: _put(x) for n, x in zip(names, block)}))
            for block in batches(tastes, _SCORED)
        ]
        return np.concatenate(parts)[: len(who)] if parts else np.zeros((0, self._rows[1]), np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """All parameters by name, and who had what at the fit."""
        if self.params is None:
            raise not_fitted(self.name)
        from instructrec_jax.retrieval.neural.fitting import flat

        a = self._audience
        return {**flat(self.params), "known": self._known, "indptr": a.indptr, "indices": a.indices, "share": a.data}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """See ``base.Stored``."""
        self._known = arrays["known"]
        self._rows = len(self._known), len(arrays["indptr"]) - 1
        self._audience = sp.csr_matrix(
            (arrays["share"], arrays["indices"], arrays["indptr"]), shape=(self._rows[1], self._rows[0])
        )
        ours = ("known", "indptr", "indices", "share")
        self.params = {name: value for name, value in arrays.items() if name not in ours}
        return self


class GMF(Collaborative):
    """Generalised matrix factorisation: a weighted product of two vectors."""

    name, parts, grid = "gmf", (True, False), _GRID


class MLP(Collaborative):
    """A perceptron over two vectors."""

    name, parts, grid = "mlp", (False, True), _GRID


class NeuMF(Collaborative):
    """Both, with vectors of their own, trained together from scratch."""

    name, parts, grid = "neumf", (True, True), _GRID


def _among(keys: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Which keys are in a sorted array."""
    place = np.minimum(np.searchsorted(taken, keys), len(taken) - 1)
    return taken[place] == keys


def _put(rows: np.ndarray) -> Any:
    """Host rows on the current mesh."""
    import jax

    from instructrec_jax.models.sharding import BATCH, put

    spec = jax.P(BATCH, *[None] * (rows.ndim - 1))
    return put(rows, jax.NamedSharding(jax.sharding.get_mesh(), spec))

"""SASRec and GRU4Rec with the softmax over the whole catalogue at every place: what an ordered history says about the next item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.config import TrainConfig
from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.retrieval.base import Budget, not_fitted
from instructrec_jax.retrieval.neural.sequences import batches, newest, windows

if TYPE_CHECKING:
    from instructrec_jax.retrieval.neural.encoders import Encoder

_SCORED = 128  # histories in a compiled scoring batch


class Sequential:
    """A model that reads a history in order. It knows no user ids: known and new users are scored alike."""

    name: ClassVar[str]
    grid: ClassVar[Mapping[str, Sequence[Any]]]

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        heads: int = 1,
        length: int = 50,
        dropout: float = 0.2,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 64,
        budget: Budget = Budget(),
        epochs: int | None = None,
    ) -> None:
        """Choose the model.

        Args:
            width: D.
            layers, heads: of the encoder (a recurrent one has no heads).
            length: S, newest events that are read.
            dropout: chance, wherever the paper has it.
            learning_rate: of Adam, after 100 steps of warm-up.
            weight_decay: AdamW's.
            batch_size: windows in a step.
            budget: how long to train.
            epochs: exactly so many, without validation; None = until validation NDCG@10 ends to improve.

        Raises:
            ConfigError: numbers that do not fit together.
        """
        if min(width, layers, heads, length, batch_size) < 1 or width % heads or not 0 <= dropout < 1:
            raise ConfigError(
                f"{self.name}: width = {width}, layers = {layers}, heads = {heads}, length = {length}, dropout = {dropout}: want "
                "numbers above 0, a width that divides by the heads, and dropout in [0, 1)"
            )
        self.width, self.layers, self.heads, self.length = width, layers, heads, length
        self.dropout, self.batch_size, self.budget, self.epochs = dropout, batch_size, budget, epochs
        self._exactly = epochs
        self.train = TrainConfig(
            schedule="constant",
            learning_rate=learning_rate,
            warmup_steps=100,
            weight_decay=weight_decay,
            beta2=0.98,
            clip_norm=5.0,
        )
        self.params: Any = None
        self.curve: list[float] = []  # validation NDCG@10 after every epoch of the fit that chose their number
        self._items = 0

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Train; with ``include_valid`` choose the number of epochs on validation, then start again on all events.

        Raises:
            UserError: no user has two training events.
        """
        from instructrec_jax.retrieval.neural.fitting import fitted, one_device, validation

        self._items = data.num_items
        with one_device():
            self.params, self.epochs, self.curve = fitted(
                lambda with_valid: self._training(data, with_valid),
                validation(data, lambda params, histories, users: self._score(params, histories), self.budget),
                self.budget,
                include_valid=include_valid,
                epochs=self._exactly,
            )
        return self

    def _training(self, data: SplitData, include_valid: bool) -> tuple[Any, Any]:
        """(first state, function of an epoch)."""
        import jax

        from instructrec_jax.retrieval.neural import encoders

        if not len(windows(data, include_valid, self.length)[0]):
            raise UserError(f"{self.name}: no user of {data.name} has two training events", remedy="see data.split")
        model, config, seed = self._model(train=True), self.train, self.budget.seed

        def epoch(state: tuple, number: int) -> tuple:
            rng = np.random.default_rng([seed, number])
            # The bits of this generator are much cheaper on a CPU than those of the default one.
            key = jax.random.key(int(rng.integers(1 << 31)), impl="unsafe_rbg")
            cut = windows(data, include_valid, self.length, rng)
            for place, batch in enumerate(batches(cut, self.batch_size, rng)):
                state = encoders.step(
                    model, config, data.num_items, *state[:2], jax.random.fold_in(key, place), *map(_put, batch)
                )
            return state

        return encoders.start(self._model(), config, jax.random.key(seed)), epoch

    def _model(self, train: bool = False) -> Encoder:
        from instructrec_jax.models.sharding import padded
        from instructrec_jax.retrieval.neural import encoders

        kind = encoders.SASRecEncoder if self.name == "sasrec" else encoders.GRU4RecEncoder
        return kind(padded(self._items), self.width, self.layers, self.heads, self.length, self.dropout, train)

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """Logits after the newest ``length`` events; an empty history scores 0 everywhere."""
        if self.params is None:
            raise not_fitted(self.name)
        from instructrec_jax.retrieval.neural.fitting import one_device

        with one_device():
            return self._score(self.params, histories)

    def _score(self, params: Any, histories: Sequence[np.ndarray]) -> np.ndarray:
        from instructrec_jax.retrieval.neural import encoders

        model, ids = self._model(), newest(histories, self.length, self._items)
        parts = [
            np.asarray(encoders.last_logits(model, self._items, params, _put(block)))
            for (block,) in batches([ids], _SCORED)
        ]
        scores = np.concatenate(parts)[: len(ids)] if parts else np.zeros((0, self._items), np.float32)
        return np.where(ids[:, -1:] > 0, scores, np.float32(0))

    def arrays(self) -> dict[str, np.ndarray]:
        """All parameters by name, and the number of items."""
        if self.params is None:
            raise not_fitted(self.name)
        from instructrec_jax.retrieval.neural.fitting import flat

        return {**flat(self.params), "count": np.asarray(self._items)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """See ``base.Stored``."""
        from instructrec_jax.retrieval.neural.fitting import nested

        self._items = int(arrays["count"])
        self.params = nested({name: value for name, value in arrays.items() if name != "count"})
        return self


class SASRec(Sequential):
    """Self-attention (Kang and McAuley 2018) with cross-entropy over the catalogue."""

    name = "sasrec"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {
        "width": (64, 128),
        "layers": (2, 1, 3),
        "heads": (1, 2),
        "length": (50, 100, 200),
        "dropout": (0.2, 0.1, 0.3, 0.5),
        "learning_rate": (1e-3, 5e-4, 2e-3),
        "weight_decay": (0.0, 0.01, 0.1),
    }


class GRU4Rec(Sequential):
    """Gated recurrent units with cross-entropy over the catalogue, on the same windows."""

    name = "gru4rec"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {
        "width": (64, 128),
        "layers": (1, 2),
        "length": (50, 100, 200),
        "dropout": (0.2, 0.1, 0.3, 0.5),
        "learning_rate": (1e-3, 5e-4, 2e-3),
        "weight_decay": (0.0, 0.01, 0.1),
    }

    def __init__(self, layers: int = 1, **options: Any) -> None:
        """As ``Sequential``, with one layer."""
        super().__init__(layers=layers, **options)


def _put(ids: np.ndarray) -> Any:
    """Host rows ``[B, S]`` on the current mesh."""
    import jax

    from instructrec_jax.models.sharding import RULES, put

    return put(ids, jax.NamedSharding(jax.sharding.get_mesh(), RULES.ids_bs))

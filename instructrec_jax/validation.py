"""What a run is validated by while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from instructrec_jax.cases import frozen_negatives, rank_cases, rank_first, sample_cases, with_target
from instructrec_jax.data.schema import VALID
from instructrec_jax.errors import UserError
from instructrec_jax.evaluation.metrics import metrics_at
from instructrec_jax.scoring import Request

if TYPE_CHECKING:
    from instructrec_jax.run import Session


class Validation:
    """The validation cases of one data set with their prompts, made once, and the metrics of parameters on them."""

    def __init__(self, s: Session):
        """Raises UserError where the split has no events."""
        self.session, train = s, s.config.train
        self._cases = sample_cases(s.prepared.data.cases(VALID), train.eval_users, train.seed)
        if not len(self._cases):
            where = f" of {s.config.name}" if s.space else ""
            raise UserError(
                f"the validation split{where} is empty", remedy="see data.split and data.clean.min_user_events"
            )
        data = s.prepared.data
        histories = data.histories(self._cases)
        self._exclude = data.left_out(histories)
        self._prompts = s.prompts("sequential" if s.by_items else "describe", self._cases)
        if not s.by_items:
            self._lists = with_target(self._cases, frozen_negatives(s, self._cases, histories, 9)[1])

    def __call__(self, variables: Any, leave: Callable[[], None]) -> dict[str, float]:
        """Means over the cases. ``leave`` is called between device batches."""
        scorer = self.session.scorer(variables, between=leave)
        if self.session.by_items:
            ranks = rank_cases(scorer, self._prompts, self._cases, self._exclude)
        else:
            scores = scorer.score([Request(p, c) for p, c in zip(self._prompts, self._lists)], "likelihood")
            ranks = rank_first(np.stack(scores))
        cutoffs = (10,) if self.session.by_items else (1, 3, 5, 10)
        values = metrics_at(ranks, cutoffs)
        return {f"{m}@{k}": float(values[f"{m}@{k}"].mean()) for k in cutoffs for m in ("ndcg", "hr")}

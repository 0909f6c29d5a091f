"""Settings of ``instructrec baseline``. What is tried for a baseline stands beside it (``retrieval/``, ``grid``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaselineConfig:
    """The tuning budget of every baseline: the same for all, and written into their results."""

    trials: int = 6  # settings tried at most, the defaults first; each is judged by validation NDCG@10, full ranking
    seed: int = 0  # of the draws of settings, and of what is random in a fit
    epochs: int = 200  # trained by gradients: most passes over the events
    patience: int = 10  # trained by gradients: passes without a better validation NDCG@10 before a fit ends
    valid_users: int = 2000  # at most this many validation cases after each pass (a fixed sample); trials use all

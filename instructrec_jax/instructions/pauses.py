"""Time gaps as feature tokens: how long it was before an event of a history, and before the request.

A pause of an hour or more stands as one feature token before the item that ended it, so that whatever is predicted there knows when it
happens; shorter ones leave no token. The pause before the request stands last: the time of a request is known to whoever serves it, and in
an evaluation it is the time of the held-out event (TiSASRec, Li et al., WSDM 2020, reads intervals between events alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from instructrec_jax.config import InstructionConfig
from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.example import Feature

# Least seconds of each pause, and the rows of the feature table that they have.
_HOUR, _DAY = 3600, 24 * 3600
PAUSES = {
    "pause of 1 to 6 hours": _HOUR,
    "pause of 6 to 24 hours": 6 * _HOUR,
    "pause of 1 to 7 days": _DAY,
    "pause of 7 to 30 days": 7 * _DAY,
    "pause of 30 to 180 days": 30 * _DAY,
    "pause of more than 180 days": 180 * _DAY,
}
_EDGES = np.array(list(PAUSES.values()))


class Pauses(NamedTuple):
    """Where the pauses lie in the feature table."""

    first: int  # row of the shortest

    def before(self, time: Int[np.ndarray, " n"], seconds_before: int | None) -> tuple[Feature | None, ...]:
        """The token before each of consecutive events, None where there is none.

        Args:
            time: of the events, in seconds, ascending.
            seconds_before: time of the event before the first one; None = there was none, and no pause.
        """
        start = time[:1] if seconds_before is None else np.array([seconds_before])
        level = np.searchsorted(_EDGES, np.diff(np.concatenate([start, time])), side="right")
        return tuple(Feature(self.first + n - 1, 1.0) if n else None for n in level.tolist())


def pauses_in(names: Sequence[str]) -> Pauses | None:
    """Where the pauses lie among the names of a feature table; None where it has none."""
    return Pauses(names.index(next(iter(PAUSES)))) if set(PAUSES) <= set(names) else None


def check_time_gaps(config: InstructionConfig, data: SplitData) -> None:
    """Refuse time gaps that nothing could show.

    Raises:
        ConfigError: the log has no timestamps, or items stand as titles alone, where no soft token stands.
    """
    if config.time_gaps and data.time is None:
        raise ConfigError(
            f"instructions.time_gaps: the interactions of {data.name} have positions and no timestamps",
            remedy="set instructions.time_gaps: false, or map a timestamp column in data.columns",
        )
    if config.time_gaps and config.items_as == "title":
        raise ConfigError(
            "instructions.time_gaps are soft tokens, and instructions.items_as = title has none",
            remedy="set instructions.items_as: token or both",
        )

"""Where the time of a run went, over all calls that it took: one wall clock, every second of which has one kind.

    init         reading data and weights, the state, restoring
    compile      the first step's call, which traces and compiles
    data         the devices had nothing to do, for the next batch was not there
    step         training: all that is not one of the others
    checkpoint   the loop waited for a save
    evaluate     validation
    lost         what an earlier call spent after the checkpoint that this one resumed from: steps that are done again

A call that was killed left no word after its last line of ``metrics.jsonl``; those seconds, and the time between two calls, are in none.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS: tuple[str, ...] = ("init", "compile", "data", "step", "checkpoint", "evaluate", "lost")
PREFIX = "goodput/"


class Ledger:
    """Seconds by kind. The clock runs from the ledger's making, for ``init`` until something else is asked for."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "init", clock()

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Count what happens inside as ``kind``, and not as what it happens in."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, kind: str) -> str:
        now, before = self._clock(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    def seconds(self) -> dict[str, float]:
        """All kinds until now; their sum is the wall time of all calls."""
        self._switch(self._kind)
        return dict(self._seconds)

    def move(self, seconds: float, source: str, kind: str) -> None:
        """Count some of the seconds of one kind as another."""
        self._seconds[source] -= seconds
        self._seconds[kind] += seconds

    def resume(self, metrics: Path, step: int) -> None:
        """Add what earlier calls wrote to ``metrics.jsonl``: up to ``step`` by kind, beyond it as lost."""
        if not metrics.exists():
            return
        kept, last = dict.fromkeys(KINDS, 0.0), 0.0
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
                seconds = {kind: float(values[PREFIX + kind]) for kind in KINDS}
                at = values["step"]
            except (ValueError, KeyError, TypeError):
                continue  # another kind of line, or one cut off by a kill
            last = sum(seconds.values())
            if at <= step:
                kept = seconds
        for kind, value in kept.items():
            self._seconds[kind] += value
        self._seconds["lost"] += last - sum(kept.values())

    def values(self) -> dict[str, float]:
        """As written to ``metrics.jsonl``."""
        return {PREFIX + kind: seconds for kind, seconds in self.seconds().items()}

    def table(self) -> str:
        """A small table of all kinds that took time."""
        seconds = self.seconds()
        whole = sum(seconds.values()) or 1.0
        rows = [f"{kind:<10} {value:>9.1f} s {100 * value / whole:5.1f} %" for kind, value in seconds.items() if value]
        return "\n".join([f"goodput {100 * seconds['step'] / whole:.1f} % of {whole:.1f} s", *rows])

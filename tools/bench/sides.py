"""Two sides of a comparison, each in a process of its own, taking turns.

In one process the second side finds the first one's threads spinning and its heap in pieces: the same step of ours took 3.5 s beside
PyTorch and 2.4 s alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Work = Callable[[], object]


class Side:
    """One side's work in a process of its own, which runs it when told to and answers with the seconds."""

    def __init__(self, arguments: list[str], *, runs: int = 6, turns: int | None = None, python: str = sys.executable):
        """Start ``python`` with ``arguments``: a script that calls ``serve``. Waits until it has warmed up.

        ``runs``: of one turn. ``turns``: how many it takes at most; None = one in every round.
        """
        self.runs, self.turns = runs, turns
        self.times: list[float] = []  # of every run
        command = [python, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def seconds(self) -> float:
        """A turn: the work ``runs`` times back to back, as training and scoring run it; the median.

        The first run after another process's turn gets its memory from the machine page by page, which is not the work.
        """
        times = [self._once() for _ in range(self.runs)]
        self.times += times
        return statistics.median(times)

    def _once(self) -> float:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> float:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"a side of the benchmark ended with status {self._process.wait()}")


def serve(work: Work, warm_ups: int = 2) -> None:
    """In the side's process: ``warm_ups`` runs that do not count, then one run per line of input."""
    for _ in range(warm_ups):
        work()
    print("seconds 0", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        work()
        print(f"seconds {time.perf_counter() - begun}", flush=True)


def alternate(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    """Median seconds of each side; they take turns, and the order changes every round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            turns = sides[name].turns
            if turns is not None and number >= turns:
                continue
            time.sleep(0.3)  # the other side's threads spin for a while after their work
            times[name].append(sides[name].seconds())
    return {name: statistics.median(values) for name, values in times.items()}

"""A curriculum: tasks that are drawn from a later moment on, as an order of all epochs in which every place is known by itself.

A moment is counted in epochs. In an epoch each example of every task that has begun comes once: a task that begins at 1.25 is not in
epochs 0 and 1 but for the last three quarters of the latter, over which all of its examples are spread. So nothing is lost or
repeated, an epoch before all have begun is shorter, and the order depends on seed, records and moments alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import TASKS, task_of
from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.instructions.keyed import keys

_READ = 4096  # records that are read at one time
_SALT = 0xC0FFEE  # keeps the order apart from other uses of the seed


def begins(records: Records, curriculum: Mapping[str, float]) -> Float[np.ndarray, " n"]:
    """The epoch at which each record is first drawn. Reads all records once.

    Args:
        records: the examples.
        curriculum: task, as named in the training log, to the epoch at which it begins; the others begin at 0.

    Raises:
        ConfigError: an unknown task, a moment below 0, a task that the records lack, or none that begins at 0.
    """
    for task, begin in curriculum.items():
        if task not in TASKS:
            raise ConfigError(
                f"train.curriculum: unknown task {task!r}{did_you_mean(task, TASKS)}", remedy=f"of {', '.join(TASKS)}"
            )
        if begin < 0:
            raise ConfigError(f"train.curriculum.{task} = {begin}", remedy="an epoch, at least 0")
    tasks: list[str] = []
    for start in range(0, len(records), _READ):
        tasks += map(task_of, records.__getitems__(range(start, min(start + _READ, len(records)))))
    if missing := sorted(set(curriculum) - set(tasks)):
        raise ConfigError(
            f"train.curriculum: there is no example of {', '.join(missing)}",
            remedy=f"the records have {', '.join(sorted(set(tasks)))}",
        )
    out = np.asarray([curriculum.get(task, 0.0) for task in tasks])
    if len(out) and out.min() > 0:
        raise ConfigError("train.curriculum: no task begins at 0", remedy="leave one out: it begins at once")
    return out


class Curriculum:
    """Numbers of the records by their place in the order of all epochs."""

    def __init__(self, begins: Float[np.ndarray, " n"], seed: int):
        self._begins, self._seed = begins, seed
        epochs = int(np.ceil(begins.max(initial=0.0)))  # those that lack something
        self._ends = np.cumsum([int((begins < epoch + 1).sum()) for epoch in range(epochs)], dtype=np.int64)
        self._epoch = functools.lru_cache(maxsize=2)(self._order)  # a block of places may lie in two

    def __getitem__(self, place: int) -> int:
        epoch = int(np.searchsorted(self._ends, place, side="right"))
        start = int(self._ends[epoch - 1]) if epoch else 0
        if epoch == len(self._ends):  # from here on all epochs are as long
            further, place = divmod(place - start, len(self._begins))
            return int(self._epoch(epoch + further)[place])
        return int(self._epoch(epoch)[place - start])

    def _order(self, epoch: int) -> Int[np.ndarray, " drawn"]:
        drawn = np.flatnonzero(self._begins < epoch + 1)
        first = np.maximum(self._begins[drawn] - epoch, 0)
        uniform = (keys(self._seed, _SALT, epoch, drawn) >> np.uint64(11)) * 2.0**-53
        return drawn[np.argsort(first + (1 - first) * uniform, kind="stable")]

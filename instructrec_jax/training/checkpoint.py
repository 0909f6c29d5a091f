"""Checkpoints by Orbax: the state, the loader's position and the resolved config, saved together and asynchronously.

A step that was interrupted while saving has no commit marker and is not seen by ``latest``; the run resumes from the last complete one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from pathlib import Path
from typing import Any, cast

import jax

from instructrec_jax.errors import UserError

METRIC = "ndcg@10"


class Checkpoints:
    """The checkpoints of one run: the newest ``keep`` and the best by validation NDCG@10."""

    def __init__(self, folder: str | Path, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every phase of every save at INFO
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        policies = ocp.training.preservation_policies
        keepers = [
            policies.LatestN(keep),
            policies.BestN(get_metric_fn=lambda m: m[METRIC], n=1, keep_checkpoints_without_metrics=False),
        ]
        self._checkpointer = ocp.training.Checkpointer(
            str(self.folder),
            # (Orbax's policies are structural types that its own annotations do not match.)
            save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
            preservation_policy=cast(Any, policies.AnyPreservationPolicy(keepers)),
        )

    def latest(self) -> int | None:
        """The newest complete step, if there is one."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    def best(self) -> int | None:
        """The step with the highest validation NDCG@10; the newest one if none was validated."""
        scored = [(m[METRIC], -step) for step, m in self._all_metrics().items() if METRIC in m]
        return -max(scored)[1] if scored else self.latest()

    def metrics(self, step: int) -> dict[str, float]:
        """Validation metrics recorded with a step."""
        return self._all_metrics().get(step, {})

    def _all_metrics(self) -> dict[int, dict[str, float]]:
        return {int(c.step): dict(cast(Any, c.metrics) or {}) for c in self._checkpointer.checkpoints}

    def save(self, step: int, state: Any, loader: Any, config: dict, metrics: dict[str, float] | None) -> None:
        """Start an asynchronous save (waits for the previous one). A failure surfaces at the next ``save`` or at ``close``."""
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": state, "loader": loader},
            metrics=cast(Any, metrics or None),
            custom_metadata={"config": config},
            force=True,
        )

    def restore(self, step: int, state: Any, loader: Any) -> Any:
        """The state of a step, laid out like ``state`` (real or abstract arrays); ``loader`` is set to the next batch."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        return self._checkpointer.load_checkpointables(step, {"state": abstract, "loader": loader})["state"]

    def restore_params(self, step: int, params: Any, *, ema: bool = False) -> Any:
        """Only the parameters of a step (``ema``: their running mean): no optimiser state is read."""
        from orbax.checkpoint import v1 as ocp

        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            name = "ema" if ema else "params"
            return self._checkpointer.load_checkpointables(step, {"state": {name: abstract}})["state"][name]

    def wait(self) -> None:
        """Block until the save in progress is complete."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Finish the save in progress and release the threads."""
        self._checkpointer.close()


def check_writable(folder: str | Path, needed_bytes: int) -> None:
    """Write and remove a small file, and compare free space with what two checkpoints need: fail before the first step.

    Raises:
        UserError: the folder cannot be written, or the disk has too little room; both numbers are given.
    """
    folder = Path(folder)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}", remedy="choose another folder with --runs"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free; the checkpoints of this run need {needed_bytes / 1e9:.2f} GB",
            remedy="free some space, or lower train.keep",
        )

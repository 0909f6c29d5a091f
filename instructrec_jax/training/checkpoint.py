"""Checkpoints by Orbax: the state, the loader's position and the resolved config, saved together and asynchronously.

A step that was interrupted while saving has no commit marker and is not seen by ``latest``; the run resumes from the last complete one,
on any mesh and any number of processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructrec_jax.errors import UserError
from instructrec_jax.files import in_bucket, path_of, read_json, write_json
from instructrec_jax.training import hosts

METRIC = "ndcg@10"
VALIDATED = "validated.json"  # beside the steps: metrics of those that were saved before their validation was over


class Checkpoints:
    """The checkpoints of one run: the newest ``keep``, the best by validation NDCG@10, and those of every ``keep_every`` steps.

    Args:
        folder: on a disk that all processes see, or in a bucket (``gs://``).
        keep, keep_every: see ``TrainConfig``.
        clean: remove what killed saves have left; only for the one run that writes here.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_every: int = 0, *, clean: bool = False):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every phase of every save at INFO
        self.folder = path_of(folder) if in_bucket(folder) else Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / VALIDATED
        self._later = {int(k): v for k, v in read_json(known, "remove it").items()} if known.exists() else {}
        policies = ocp.training.preservation_policies
        keepers = [policies.LatestN(keep), _Best(self._metrics_of)]
        if keep_every:
            keepers.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            str(self.folder),
            # (Orbax's policies are structural types that its own annotations do not match.)
            save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
            preservation_policy=cast(Any, policies.AnyPreservationPolicy(keepers)),
            cleanup_tmp_directories=clean,
        )

    def latest(self) -> int | None:
        """The newest complete step, if there is one."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    def best(self) -> int | None:
        """The step with the highest validation NDCG@10; the newest one if none was validated."""
        best = best_of(self._metrics_of(self._checkpointer.checkpoints))
        return self.latest() if best is None else best

    def metrics(self, step: int) -> dict[str, float]:
        """Validation metrics recorded with a step."""
        return self._metrics_of(self._checkpointer.checkpoints).get(step, {})

    def _metrics_of(self, checkpoints: Sequence[Any]) -> dict[int, dict[str, float]]:
        return {int(c.step): {**self._later.get(int(c.step), {}), **(c.metrics or {})} for c in checkpoints}

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Record the validation metrics of a step that is saved already. Its checkpoint is not written again: that would leave a moment
        without it.
        """
        self._later[step] = metrics
        if hosts.first():
            write_json(self.folder / VALIDATED, self._later)

    def save(self, step: int, state: Any, loader: Any, config: dict, metrics: dict[str, float] | None) -> None:
        """Start an asynchronous save (waits for the previous one). A failure surfaces at the next ``save`` or at ``close``.

        What is not kept any longer is removed when the new step is complete.
        """
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


def best_of(metrics: dict[int, dict[str, float]]) -> int | None:
    """The step with the highest validation NDCG@10, the earliest of equal ones; None if none was validated."""
    scored = [(m[METRIC], -step) for step, m in metrics.items() if METRIC in m]
    return -max(scored)[1] if scored else None


@dataclass(frozen=True)
class _Best:
    """Orbax's policy that keeps the best step; ``metrics_of`` knows what was recorded after a save, too."""

    metrics_of: Callable[[Sequence[Any]], dict[int, dict[str, float]]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = best_of(self.metrics_of(checkpoints))
        return [int(c.step) == best for c in checkpoints]


def check_writable(folder: str | Path, needed_bytes: int) -> None:
    """Write and remove a small file, and compare free space with what the checkpoints need: fail before the first step.

    Every process calls it, and all of them fail if one does.

    Raises:
        UserError: the folder cannot be written, the disk has too little room (both numbers are given), or the processes do not see
            the same folder.
    """
    folder = path_of(folder)
    problem = _unwritable(folder, needed_bytes)
    failed = hosts.all_agree(problem is None)
    if problem:
        raise problem
    if failed:
        raise UserError(f"process {failed[0]} cannot write its checkpoints", remedy="see what it said")
    if jax.process_count() > 1:
        _check_shared(folder)


def _unwritable(folder: Path, needed_bytes: int) -> UserError | None:
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        return UserError(
            f"cannot write to {folder}: {error.strerror or error}", remedy="choose another folder with --runs"
        )
    except Exception as error:  # of the object store's client, or that there is none
        return UserError(
            f"cannot write to {folder}: {error}",
            remedy="pip install 'instructrec_jax[gcs]', sign in (gcloud auth application-default login), and give the account the "
            "role storage.objectAdmin on the bucket",
        )
    finally:
        with contextlib.suppress(Exception):
            probe.unlink(missing_ok=True)
    if in_bucket(folder):
        return None
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free >= needed_bytes:
        return None
    return UserError(
        f"{folder} has {free / 1e6:,.1f} MB free; the checkpoints of this run need {needed_bytes / 1e6:,.1f} MB",
        remedy="free some space, or lower train.keep",
    )


def _check_shared(folder: Path) -> None:
    """Orbax's processes write parts of one checkpoint: into folders of their own they would write parts of several."""
    token = multihost_utils.broadcast_one_to_all(np.uint32(uuid.uuid4().int & 0xFFFFFFFF))
    mark = folder / f".shared-{int(token):08x}"
    if hosts.first():
        mark.write_bytes(b"x")
    multihost_utils.sync_global_devices("the mark is written")
    blind = hosts.all_agree(mark.exists())
    if hosts.first():
        mark.unlink()
    if blind:
        raise UserError(
            f"{folder} is not one folder for all {jax.process_count()} processes: process {blind[0]} does not see what process 0 writes",
            remedy="choose a folder on a shared disk or in a bucket (gs://...) with --runs",
        )

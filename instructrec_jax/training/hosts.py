"""Several processes as one run: they start together, speak with one voice and stop at one step. One machine needs nothing."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.training import xla_flags

# Google Cloud's standard firewall rule opens this port between the workers of a pod; JAX's own choice, 8482, stays closed.
PORT = 8476
# A process that sends no heartbeat for so long is dead, and the others end too. $INSTRUCTREC_HEARTBEAT_SECONDS changes it.
HEARTBEAT_SECONDS = 60
_MEETING_SECONDS = 3600  # longer than any work that one process does for all
_meetings = itertools.count()  # every process is at all of them, in one order
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # as JAX asks for

Say = Callable[[str], None]


# -------------------------------------------------------------------------------------------------------- start together


def start(*, preemption: bool = False) -> None:
    """Join the other processes of the run, where there are any. To be called before JAX is used; a second call does nothing.

    Args:
        preemption: SIGTERM becomes a notice that ``StopRequest`` sees, instead of ending the process.

    Raises:
        ConfigError: the variables of plain machines are incomplete or contradict each other.
        UserError: the other processes cannot be reached.
    """
    import jax

    xla_flags.apply()  # read when the first backend starts, which is after this function
    if jax.distributed.is_initialized():
        return
    arguments = cluster(os.environ)
    if arguments is None:
        return
    jax.config.update("jax_enable_preemption_service", preemption)
    seconds = _integer(os.environ, "INSTRUCTREC_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=seconds,
            # So long does a process that failed alone wait for the others before it ends, and they with it. (Those that end
            # well have met before.)
            shutdown_timeout_seconds=seconds,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the processes of this run did not find each other: {error}",
            remedy=f"start the command on every machine, and open port {PORT} of the first one to the others",
        ) from error


def cluster(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of ``jax.distributed.initialize`` for this process, or None where it is alone.

    In this order: JAX's own variables (all three); Slurm with more than one task; a Cloud TPU or GKE with TPUs, whose workers JAX
    finds; an indexed job of Kubernetes.

    Raises:
        ConfigError: see ``start``.
    """
    given = [name for name in VARIABLES if environ.get(name)]
    if len(given) == len(VARIABLES):
        return _plain(environ)
    for find in (_slurm, _tpu, _kubernetes):
        if (found := find(environ)) is not None:
            return found
    if given:
        missing = [name for name in VARIABLES if name not in given]
        raise ConfigError(
            f"{len(given)} of the {len(VARIABLES)} variables that name the processes are set: {', '.join(given)}",
            remedy=f"set {' and '.join(missing)} too (on every machine), or none of them on a single machine",
        )
    return None


def _plain(environ: Mapping[str, str]) -> dict[str, Any] | None:
    address = environ["JAX_COORDINATOR_ADDRESS"]
    count, index = _integer(environ, "JAX_NUM_PROCESSES"), _integer(environ, "JAX_PROCESS_ID")
    if count < 1 or not 0 <= index < count:
        raise ConfigError(
            f"JAX_PROCESS_ID = {index} and JAX_NUM_PROCESSES = {count} do not fit together",
            remedy=f"number the {max(count, 1)} processes from 0 to {max(count, 1) - 1}",
        )
    if count == 1:
        return None
    if not re.search(r":\d+$", address):
        address = f"{address}:{PORT}"
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _slurm(environ: Mapping[str, str]) -> dict[str, Any] | None:
    if any(name not in environ for name in _SLURM):  # not inside srun
        return None
    tasks = _integer(environ, "SLURM_NTASKS")
    if tasks == 1:
        return None
    gpus = _integer(environ, "SLURM_GPUS_ON_NODE", 0)
    if gpus and tasks == _integer(environ, "SLURM_STEP_NUM_NODES", 0):
        return {"local_device_ids": list(range(gpus))}  # JAX would take one GPU of each node
    return {}


def _tpu(environ: Mapping[str, str]) -> dict[str, Any] | None:
    platforms = environ.get("JAX_PLATFORMS", "")
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    if not chips or (platforms and "tpu" not in platforms) or importlib.util.find_spec("libtpu") is None:
        return None
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = _integer(environ, "MEGASCALE_NUM_SLICES", 1)
    if slices == 1 and (environ.get("TPU_SKIP_MDS_QUERY") or workers) and len((workers or "").split(",")) == 1:
        return None
    os.environ.setdefault("JAX_COORDINATOR_PORT", str(PORT))
    return {}


def _kubernetes(environ: Mapping[str, str]) -> dict[str, Any] | None:
    index = environ.get("JOB_COMPLETION_INDEX")
    if "KUBERNETES_SERVICE_HOST" not in environ or index is None:
        return None
    if importlib.util.find_spec("kubernetes") is not None:
        return {}
    if index != "0":
        raise ConfigError(
            f"this is pod {index} of an indexed job, and without the package kubernetes it cannot find the others",
            remedy=f"pip install 'jax[k8s]', or set {', '.join(VARIABLES)}",
        )
    return None


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r} is not a whole number", remedy=f"correct or unset {name}") from None


# -------------------------------------------------------------------------------------------------------------- one voice


def first() -> bool:
    """Whether this process writes the logs, reports and messages of the run."""
    import jax

    return jax.process_index() == 0


def voice(say: Say) -> Say:
    """``say`` on the first process, silence on the others."""
    return say if first() else lambda _: None


def name() -> str:
    """``process 3 of 4``, or nothing where there is one. Cheap, and JAX is not imported for it."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}"


def meet(where: str) -> None:
    """Wait until every process of the run is here, however late it comes; one that dies or fails alone ends the waiting ones too.

    Two other places where processes wait for each other lose patience with one that is only slow. JAX's exit aborts all of them after
    ``HEARTBEAT_SECONDS``: also the first process, which may still be writing what a finished run has learnt. And on CPUs the first
    collective between two processes fails after 30 s, a limit of Gloo's that cannot be set.
    """
    if not name():
        return
    from orbax.checkpoint import multihost

    key = f"instructrec {where} {next(_meetings)}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * _MEETING_SECONDS)


def alone(what: str) -> None:
    """Refuse to do on several processes what one can do.

    Raises:
        UserError: there are several.
    """
    import jax

    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes cannot {what} together",
            remedy=f"run it on one machine, without {', '.join(VARIABLES)}; any mesh reads the run's checkpoints",
        )


def all_agree(fine: bool) -> list[int]:
    """The processes on which something is not fine; every process calls it, and all learn the same."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [] if fine else [0]
    return np.flatnonzero(~multihost_utils.process_allgather(np.asarray(fine))).tolist()


# ---------------------------------------------------------------------------------------------------------- stop together


class Stopped(Exception):  # noqa: N818 (not an error)
    """Work between two steps was left, because the run is to stop."""


class StopRequest:
    """SIGTERM, SIGINT or a preemption notice on any process, followed by all of them at the same poll.

    On one machine a flag. Between several, JAX's preemption service hears SIGTERM and carries the notice to the others in threads of
    its own; they settle on the poll after the last that any of them has made. A poll compares two local numbers, so that it costs
    neither the device nor the network anything; but every process must poll equally often. A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        import jax

        self.name = ""
        self._shared, self._polls, self._interrupts = jax.distributed.is_initialized(), 0, 0
        # A Python handler of SIGTERM would take it away from JAX's service.
        signals = (signal.SIGINT,) if self._shared else (signal.SIGTERM, signal.SIGINT)
        self._before = {s: signal.signal(s, self._handle) for s in signals}

    def _handle(self, number: int, _frame: Any) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.name = signal.Signals(number).name

    def poll(self) -> bool:
        """Whether to stop now: the same answer on every process."""
        from jax.experimental import multihost_utils

        self._polls += 1
        if self._shared and not self.name and multihost_utils.reached_preemption_sync_point(self._polls):
            self.name = "SIGTERM or a preemption notice"
        return bool(self.name)

    def leave(self) -> None:
        """For work between two steps: a poll that raises ``Stopped`` instead of returning True."""
        if self.poll():
            raise Stopped

    def release(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

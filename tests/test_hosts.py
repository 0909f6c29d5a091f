"""Several processes as one run: who starts together, what they agree on, and what survives when one of them dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.config import MeshConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.training import hosts
from instructrec_jax.training.mesh import data_slice, make_mesh
from tests.accidents import losses
from tests.tiny import tiny_config, write_slice

PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------- start together


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": "", "HOME": "/home/u"}, None),
        (PLAIN, {"coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 3}),
        (
            {**PLAIN, "JAX_COORDINATOR_ADDRESS": "host:99"},
            {"coordinator_address": "host:99", "num_processes": 4, "process_id": 3},
        ),
        ({**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, {}),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "8"}, {"local_device_ids": list(range(8))}),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "16"}, {}),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # salloc without srun
        ({**SLURM, **PLAIN}, {"coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 3}),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "n1:8476"}, {}),  # JAX reads it itself
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_who_has_company(environ: dict[str, str], expected: dict | None) -> None:
    assert hosts.cluster(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a"}, "1 of the 3 variables.*JAX_COORDINATOR_ADDRESS.*\n.*JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({**PLAIN, "JAX_PROCESS_ID": ""}, "2 of the 3 variables.*\n.*set JAX_PROCESS_ID too"),
        ({**PLAIN, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID = 4 and JAX_NUM_PROCESSES = 4.*\n.*from 0 to 3"),
        ({**PLAIN, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID = -1"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES = 'many' is not a whole number"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}, "pod 2 of an indexed job.*\n.*jax.k8s"),
    ],
)  # fmt: skip
def test_half_a_description_of_the_processes_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hosts.cluster(environ)


def test_tpu_workers_meet_at_the_open_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(hosts.Path, "glob", lambda self, pattern: [self / "accel0"] if "accel" in pattern else [])
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
    assert hosts.cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert hosts.cluster({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None
    assert "JAX_COORDINATOR_PORT" not in os.environ
    for environ in ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}):
        assert hosts.cluster(environ) == {}
    assert os.environ["JAX_COORDINATOR_PORT"] == "8476"
    monkeypatch.delenv("JAX_COORDINATOR_PORT")


def test_one_machine_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLAIN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    hosts.start(preemption=True)
    assert not jax.distributed.is_initialized()
    assert hosts.first() and hosts.name() == "" and hosts.all_agree(True) == [] and hosts.all_agree(False) == [0]
    assert hosts.voice(print) is print
    hosts.alone("sing")
    hosts.meet("here")


# ------------------------------------------------------------------------------------------------------------ stop, alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_seen_at_the_next_poll(number: int) -> None:
    before = signal.getsignal(number)
    stop = hosts.StopRequest()
    try:
        assert not stop.poll()
        stop.leave()
        os.kill(os.getpid(), number)
        assert stop.poll() and stop.poll() and stop.name == signal.Signals(number).name
        with pytest.raises(hosts.Stopped):
            stop.leave()
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(0.1)
    finally:
        stop.release()
    assert signal.getsignal(number) is before


# ------------------------------------------------------------------------------------------------------ several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(
    what: Sequence[str], arguments: Sequence[str], *, devices: int = 2, timeout: int = 900
) -> list[tuple[int, str]]:
    """(exit status, output) of one process per accident, which start together on loopback."""
    # A death is to be noticed soon. Otherwise a busy machine may let one process fail a minute after another, which is no death.
    patience = 30 if {"killed-in-save", "late"} & set(what) else 300
    port = free_port()
    started = []
    for index, accident in enumerate(what):
        environ = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(len(what)),
            "JAX_PROCESS_ID": str(index),
            "INSTRUCTREC_HEARTBEAT_SECONDS": str(patience),
        }
        command = [sys.executable, "-m", "tests.accidents", accident, *arguments]
        root = Path(__file__).parent.parent
        started.append(
            subprocess.Popen(
                command, cwd=root, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    outputs = ["".join(s for s in text.splitlines(True) if not s.startswith("[Gloo]")) for text in outputs]
    return [(process.returncode, output) for process, output in zip(started, outputs)]


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (2, 2, (1, 4, 1)),
        pytest.param(4, 2, (2, 2, 2), marks=pytest.mark.slow),
        pytest.param(2, 1, (1, 1, 2), marks=pytest.mark.slow),  # both hold all rows
        pytest.param(4, 1, (1, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_processes_have_the_losses_of_one(processes: int, devices: int, mesh: tuple[int, int, int]) -> None:
    ended = together(["losses"] * processes, list(map(str, mesh)), devices=devices)
    assert [status for status, _ in ended] == [0] * processes, ended
    assert not any(output.strip().endswith("]") for _, output in ended[1:]), "only the first one speaks"
    found = json.loads(ended[0][1].strip().splitlines()[-1])
    alone = losses(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 20)
    assert len(found) == len(alone) == 20
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def some_mesh(processes: int, devices: int, *shape: int) -> Any:
    """Stands in for a mesh over the devices of several processes."""
    every = [SimpleNamespace(process_index=n // devices) for n in range(processes * devices)]
    names = ("replica", "fsdp", "tensor")
    return SimpleNamespace(devices=np.array(every).reshape(shape), shape=dict(zip(names, shape)))


@pytest.mark.parametrize(
    ("arguments", "slices"),
    [((4, 2, 1, 8, 1), 4), ((4, 2, 2, 2, 2), 4), ((4, 2, 1, 2, 4), 2), ((4, 2, 1, 1, 8), 1), ((1, 8, 2, 2, 2), 1)],
)
def test_processes_that_hold_the_same_rows_read_the_same(arguments: tuple[int, ...], slices: int) -> None:
    assert data_slice(some_mesh(*arguments)) == (0, slices)


def test_a_mesh_that_cuts_the_batch_across_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuts the batch across its 3 processes"):
        data_slice(some_mesh(3, 2, 1, 2, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("hosts")
    write_slice(tmp / "data")
    prepare.prepare(tiny_config(tmp), lambda _: None)
    return tmp


def write_config(data: Path, folder: Path, **train: object) -> str:
    """A config whose validation has ten batches."""
    tree = configs.to_dict(
        tiny_config(data, **{"steps": 12, "checkpoint_every": 4, "eval_every": 6, "log_every": 1, **train})
    )
    tree["evaluate"]["batch_size"] = 4
    path = folder / "config.yaml"
    path.write_text(configs.dump(configs.from_dict(tree)), encoding="utf-8")
    return str(path)


def complete(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def logged(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({line["step"] for line in lines if "loss" in line}) == sum("loss" in line for line in lines)
    return {line["step"]: line for line in lines if "loss" in line}


def given(run: Path, step: int) -> list[dict]:
    """The positions of all processes' loaders in a checkpoint."""
    folder = run / "checkpoints" / str(step) / "loader"
    return [json.loads(p.read_text()) for p in sorted(folder.glob("process_*.json"))]


@pytest.mark.slow
def test_killed_in_a_save_and_continued_by_fewer_processes(data: Path, tmp_path: Path) -> None:
    """Four processes, one of which is killed while the second checkpoint is written; then two, then one with one device."""
    run, config = tmp_path / "run", write_config(data, tmp_path, eval_every=12)
    arguments = ["train", config, "--run", str(run)]
    begun = time.monotonic()
    ended = together(["none", "none", "killed-in-save", "none"], arguments)
    assert ended[2][0] == -signal.SIGKILL, ended[2][1]
    assert all(status != 0 for status, _ in ended), "the others end too"
    assert time.monotonic() - begun < 600
    assert complete(run) == [4], "the step that was being saved is not there"
    assert len(given(run, 4)) == 4

    # Two processes take the last complete step, and one of them is told to stop.
    ended = together(["none", "told-in-step"], [*arguments, "--train.batch_size=16"])
    assert [status for status, _ in ended] == [143, 143], ended
    assert (
        "resumed from step 4" in ended[0][1]
        and "the loader's position is that of 4 slices of the data, there are 2" in ended[0][1]
    )
    stopped = complete(run)[-1]
    assert 4 < stopped < 12 and f"saved step {stopped}" in ended[0][1]
    states = given(run, stopped)
    assert len(states) == 2 and states[0]["start"] > 0 and states[0]["holes"] == states[1]["holes"]

    environ = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    last = subprocess.run(
        [sys.executable, "-m", "instructrec_jax.cli", *arguments], env=environ, capture_output=True, text=True
    )
    assert last.returncode == 0, last.stderr
    assert (
        f"resumed from step {stopped}" in last.stdout and "mesh {'replica': 1, 'fsdp': 1, 'tensor': 1}" in last.stdout
    )
    assert complete(run)[-1] == 12 and sorted(logged(run)) == list(range(1, 13))
    assert not [p.name for p in (run / "checkpoints").iterdir() if not p.name.isdigit()], "what the kill left is gone"


@pytest.mark.slow
def test_the_first_process_is_killed_in_a_save(data: Path, tmp_path: Path) -> None:
    """It is the one that the others talk to: they end by themselves and say why, and the same command goes on."""
    run, config = tmp_path / "run", write_config(data, tmp_path, eval_every=12)
    arguments = ["train", config, "--run", str(run)]
    ended = together(["killed-in-save", "none"], arguments)
    assert ended[0][0] == -signal.SIGKILL, ended[0][1]
    assert ended[1][0] == -signal.SIGABRT and "This most likely indicates that another task died" in ended[1][1], ended[
        1
    ]
    assert complete(run) == [4], "the step that was being saved is not there"

    # The first one has more to do when training is over, and is waited for.
    ended = together(["late", "none"], arguments)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "resumed from step 4" in ended[0][1]
    assert complete(run)[-1] == 12 and sorted(logged(run)) == list(range(1, 13))


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_all_in_the_same_window(data: Path, tmp_path: Path) -> None:
    """One process's chips give garbage after step 5: the loss is one for all, and nobody has to be told."""
    run, config = tmp_path / "run", write_config(data, tmp_path, log_every=3)
    ended = together(["none", "broken-chip"], ["train", config, "--run", str(run)])
    windows = [re.findall(r"became NaN or infinite at step 6 .window 4..6.", output) for _, output in ended]
    assert [status for status, _ in ended] == [2, 2] and len(windows[0]) == 1 and windows[0] == windows[1], ended
    assert complete(run) == [4] and sorted(logged(run)) == [3]


@pytest.mark.slow
def test_told_while_validating(data: Path, tmp_path: Path) -> None:
    """One of two is told to stop between batches of the validation: both save the step; the same command validates it again."""
    config = write_config(data, tmp_path)
    whole = together(["none"] * 2, ["train", config, "--run", str(tmp_path / "whole")])
    assert [status for status, _ in whole] == [0, 0], whole

    run = tmp_path / "run"
    ended = together(["none", "told-in-validation"], ["train", config, "--run", str(run)])
    assert [status for status, _ in ended] == [143, 143], ended
    assert "saved step 6" in ended[0][1] and "validation" not in ended[0][1] and "saved step" not in ended[1][1]
    assert complete(run)[-1] == 6
    ended = together(["none"] * 2, ["train", config, "--run", str(run)])
    assert [status for status, _ in ended] == [0, 0], ended
    assert "resumed from step 6\nstep 6: validation" in ended[0][1]

    # As many processes as before: nothing differs from the run that was not stopped.
    one, two = logged(tmp_path / "whole"), logged(run)
    assert [one[s]["loss"] for s in range(1, 13)] == [two[s]["loss"] for s in range(1, 13)]
    assert (run / "finished.json").read_text() != "" and complete(run) == complete(tmp_path / "whole")

    found = together(["none"] * 2, ["evaluate", str(run), "--evaluate.likelihood_users", "8", "--json"])
    assert [status for status, _ in found] == [0, 0], found
    alone = subprocess.run(
        [sys.executable, "-m", "instructrec_jax.cli", "evaluate", str(run), "--json"], capture_output=True, text=True
    )
    a, b = (json.loads(text.strip().splitlines()[-1]) for text in (found[0][1], alone.stdout))
    assert a == b


@pytest.mark.slow
def test_what_one_process_must_do_alone_is_refused_by_all(data: Path, tmp_path: Path) -> None:
    for status, output in together(["none"] * 2, ["recommend", str(tmp_path)]):
        assert status == 2 and "2 processes cannot recommend together" in output
    outputs = [output for _, output in together(["none"] * 2, ["train", str(tmp_path / "no.yaml")])]
    assert all("no config file" in output for output in outputs)


@pytest.mark.slow
def test_folders_that_are_not_shared_are_refused(data: Path, tmp_path: Path) -> None:
    config = write_config(data, tmp_path)
    ended = together(["none", "elsewhere"], ["train", config, "--run", str(tmp_path / "run")])
    for index, (status, output) in enumerate(ended):
        assert (
            status == 2
            and f"error (process {index} of 2)" in output
            and "is not one folder for all 2 processes" in output
        )

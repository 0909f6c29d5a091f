"""What the launchers run on the machines: worker.sh for real, Slurm's job file against a fake of Slurm, and the Dockerfile."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.cloud import LAUNCH, REPO, Cloud


class Worker:
    """worker.sh in a folder of its own, as on a pod's machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "instructrec"
        self.folder.mkdir()
        shutil.copy(LAUNCH / "worker.sh", self.folder)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", str(self.folder / "worker.sh"), *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        return done.stdout.strip() or done.stderr.strip()

    def wait(self, status: str) -> None:
        for _ in range(200):
            if self("status") == status:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self('status')}, not {status}: {self.log}")

    @property
    def log(self) -> str:
        return (self.folder / "run.log").read_text()


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_a_worker_runs_one_command_and_keeps_its_status(worker: Worker) -> None:
    assert worker("status") == "absent"
    worker("start", sys.executable, "-c", "print('a  b', flush=True); raise SystemExit(7)")
    worker.wait("exited 7")
    assert "a  b" in worker.log
    worker("start", "true")
    worker.wait("exited 0")
    assert worker.log.count("== 20") == 2


SAVES = "trap 'sleep 0.3; echo saved; exit 143' TERM; echo up; while :; do sleep 0.05; done"


def test_stop_lets_the_command_save(worker: Worker) -> None:
    worker("start", "bash", "-c", SAVES)
    while "up" not in worker.log:
        time.sleep(0.02)
    assert "already running" in worker("start", "true", code=2)
    assert worker("stop") == "exited 143"
    assert "saved" in worker.log


def test_a_killed_machine_is_seen(worker: Worker) -> None:
    worker("start", "sleep", "60")
    worker.wait("running")
    os.killpg(int((worker.folder / "run.pid").read_text()), signal.SIGKILL)
    worker.wait("lost")


# ----------------------------------------------------------------------------------------------------------- Slurm's job


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [(143, "RUNNING", True), (143, "COMPLETING", False), (0, "RUNNING", False), (1, "RUNNING", False)],
    ids=["time is up", "cancelled or preempted", "done", "a mistake"],
)
def test_a_job_queues_again_when_it_has_saved_at_the_end_of_its_time(
    tmp_path: Path, status: int, state: str, again: bool
) -> None:
    cloud = Cloud(tmp_path)
    cloud.play({"srun": [("", status)], "squeue": [state]})
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm_gpu.sbatch"), "/venv", "instructrec", "train", "it's mine"],
        env={"PATH": cloud.path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "8"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert cloud.calls[0][-3:] == ["instructrec", "train", "it's mine"] and cloud.calls[0][0] == "srun"
    assert (["scontrol", "requeue", "7"] in cloud.calls) == again


# ---------------------------------------------------------------------------------------------------------- container


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hadolint"), "--no-color", "Dockerfile"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_the_dockerfile_copies_what_there_is_and_installs_extras_that_exist() -> None:
    text = (REPO / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for word in line.split() if word[0] != "-"
    ]
    ignored = (REPO / ".dockerignore").read_text().splitlines()
    assert {"pyproject.toml", "instructrec_jax", "configs"} < set(copied)
    assert all((REPO / name).exists() and f"!{name}" in ignored for name in copied)
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    variants = dict(re.findall(r"^ +(\w+)\) extras=([\w,]+) ;;", text, re.M))
    assert set(variants) == {"tpu", "cuda", "cpu"}
    assert {extra for names in variants.values() for extra in names.split(",")} <= set(extras)

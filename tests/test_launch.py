"""The launchers of tools/launch, against programs that only write down how they were called and play the cloud's states."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
LAUNCH = REPO / "tools" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
STATUS = "worker.sh status"
COMMAND = ["instructrec", "train", "configs/ml_1m.yaml", "--runs", "gs://bucket/it's mine", "--train.steps", "400"]

# Writes down its arguments. What it prints and its exit status come from a queue for calls that hold the key; the last one stays.
FAKE = """#!{python}
import fcntl, json, pathlib, sys
folder = pathlib.Path({folder!r})
line = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "calls.jsonl", "a") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.write(json.dumps(line) + "\\n")
    answers = json.loads((folder / "answers.json").read_text())
    for key, queue in answers.items():
        if key in " ".join(line):
            text, code = queue.pop(0) if len(queue) > 1 else queue[0]
            (folder / "answers.json").write_text(json.dumps(answers))
            print(text)
            sys.exit(code)
"""


@dataclass
class Cloud:
    """A PATH with fakes in front, and what was called."""

    folder: Path
    path: str = field(init=False)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        for name in ("gcloud", "xpk", "kubectl", "sbatch", "docker", "uv"):
            program = programs / name
            program.write_text(FAKE.format(python=sys.executable, folder=str(self.folder)))
            program.chmod(0o755)
        self.path = f"{programs}:/usr/bin:/bin"
        self.play()

    def play(self, answers: dict[str, list[str | tuple[str, int]]] | None = None) -> None:
        """Answers in order, text or (text, exit status), for calls that hold a key; all else succeeds silently."""
        queues = {k: [a if isinstance(a, tuple) else (a, 0) for a in queue] for k, queue in (answers or {}).items()}
        (self.folder / "answers.json").write_text(json.dumps(queues))
        (self.folder / "calls.jsonl").write_text("")

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def actions(self) -> list[str]:
        """The calls of gcloud in short: the verb of queued-resources, and for ssh what it does on the workers."""
        short = []
        for call in self.calls:
            if call[:4] != ["gcloud", "compute", "tpus", "queued-resources"]:
                continue
            command = next((word.split() for word in call if word.startswith("--command=")), [])
            short.append(" ".join([call[4], *(command[2:3] if "instructrec/worker.sh" in command else [])]))
        return short

    def run(self, script: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        # A copy of the tools alone: the repository's own .venv, which the scripts look into first, is not there.
        repo = self.folder / "repo"
        if not repo.exists():
            shutil.copytree(LAUNCH, repo / "tools" / "launch")
            (repo / "configs").mkdir()
            (repo / "instructrec_jax").mkdir()
            shutil.copy(REPO / "instructrec_jax" / "__init__.py", repo / "instructrec_jax")
        done = subprocess.run(
            ["bash", str(repo / "tools" / "launch" / script), *arguments],
            env={"PATH": self.path, "HOME": str(self.folder)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def dry(self, script: str, *arguments: str) -> list[list[str]]:
        """The printed commands as a shell reads them; nothing was called."""
        before = self.calls
        end = arguments.index("--") if "--" in arguments else len(arguments)
        printed = self.run(script, *arguments[:end], "--dry-run", *arguments[end:])
        assert self.calls == before
        return [shlex.split(line) for line in printed.stdout.splitlines()]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


POD = ["pod", "--project", "p", "--zone", "us-west4-a", "--poll", "0"]
CLUSTER = ["hall", "--project", "p", "--zone", "us-west4-a"]

CASES = [
    ("tpu_vm.sh", ["up", *POD, "--", *COMMAND]),
    ("tpu_vm.sh", ["up", *POD, "--slices", "2", "--spot", "--internal-ips", "--network", "n", "--", *COMMAND]),
    ("tpu_vm.sh", ["create", "pod", "--accelerator", "v6e-16", "--reserved", "--poll", "0"]),
    ("tpu_vm.sh", ["install", *POD, "--extras", "tpu"]),
    ("tpu_vm.sh", ["run", *POD, "--", *COMMAND]),
    ("tpu_vm.sh", ["watch", *POD, "--", *COMMAND]),
    ("tpu_vm.sh", ["logs", *POD]),
    ("tpu_vm.sh", ["status", *POD]),
    ("tpu_vm.sh", ["stop", *POD]),
    ("tpu_vm.sh", ["delete", *POD]),
    ("gke_xpk.sh", ["cluster", *CLUSTER, "--slices", "4", "--spot"]),
    ("gke_xpk.sh", ["image", *CLUSTER]),
    ("gke_xpk.sh", ["run", "hall", "first", *CLUSTER[1:], "--slices", "2", "--", *COMMAND]),
    ("gke_xpk.sh", ["logs", "hall", "first", *CLUSTER[1:]]),
    ("gke_xpk.sh", ["status", *CLUSTER]),
    ("gke_xpk.sh", ["stop", "hall", "first", *CLUSTER[1:]]),
    ("gke_xpk.sh", ["delete", *CLUSTER]),
    ("slurm_gpu.sh", ["--nodes", "2", "--venv", "venv", "--sbatch", "--partition=gpu", "--", *COMMAND]),
]


@pytest.mark.parametrize(("script", "arguments"), CASES, ids=[f"{s}-{a[0]}-{i}" for i, (s, a) in enumerate(CASES)])
def test_a_dry_run_prints_what_a_real_run_executes(cloud: Cloud, script: str, arguments: list[str]) -> None:
    (cloud.folder / "venv" / "bin").mkdir(parents=True)
    (cloud.folder / "venv" / "bin" / "python").symlink_to(sys.executable)
    printed = cloud.dry(script, *arguments)
    assert printed
    cloud.play({"describe": ["ACTIVE"], STATUS: ["exited 0"]})
    cloud.run(script, *arguments)
    assert cloud.calls == printed


def test_the_command_reaches_the_workers_as_it_was_given(cloud: Cloud) -> None:
    (start,) = cloud.dry("tpu_vm.sh", "run", *POD, "--", *COMMAND)
    assert "--worker=all" in start and "--node=all" in start
    command = next(word for word in start if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command) == ["bash", "instructrec/worker.sh", "start", *COMMAND]
    (create,) = cloud.dry("gke_xpk.sh", "run", "hall", "first", "--image", "i", "--", *COMMAND)
    command = next(word for word in create if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command) == ["exec", *COMMAND]


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-32", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e")],
)
def test_each_generation_has_its_runtime(cloud: Cloud, accelerator: str, runtime: str) -> None:
    create, _ = cloud.dry("tpu_vm.sh", "create", "pod", "--accelerator", accelerator)
    assert f"--runtime-version={runtime}" in create and f"--accelerator-type={accelerator}" in create


def test_one_slice_has_a_name_and_several_have_a_prefix(cloud: Cloud) -> None:
    one, _ = cloud.dry("tpu_vm.sh", "create", "pod")
    several, _ = cloud.dry("tpu_vm.sh", "create", "pod", "--slices", "3")
    assert "--node-id=pod" in one and "--node-count=3" not in one
    assert {"--node-count=3", "--node-prefix=pod"} < set(several) and "--node-id=pod" not in several


# ------------------------------------------------------------------------------------------------- what happens on the way


def test_create_waits_through_the_queue(cloud: Cloud) -> None:
    cloud.play({"describe": ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]})
    done = cloud.run("tpu_vm.sh", "create", *POD)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    assert cloud.actions() == ["create", *["describe"] * 4]


def test_a_request_that_fails_names_where_the_reason_is(cloud: Cloud) -> None:
    cloud.play({"describe": ["WAITING_FOR_RESOURCES", "FAILED"]})
    done = cloud.run("tpu_vm.sh", "create", *POD, code=2)
    assert (
        "did not become ACTIVE" in done.stderr
        and "remedy: gcloud compute tpus queued-resources describe pod" in done.stderr
    )


INSTALL_AND_START = ["ssh", "scp", "ssh install", "ssh start"]


def test_a_preempted_pod_is_requested_again_and_gets_the_same_command(cloud: Cloud) -> None:
    before, after = ["WAITING_FOR_RESOURCES", "ACTIVE"], ["SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"]
    cloud.play(
        {
            "describe": [*before, "ACTIVE", *after, "ACTIVE"],
            STATUS: ["running", "exited 0"],
            "worker.sh stop": [("no such file", 1)],  # the machines are fresh
        }
    )
    done = cloud.run("tpu_vm.sh", "up", *POD, "--spot", "--", *COMMAND)
    assert cloud.actions() == [
        "create", "describe", "describe", *INSTALL_AND_START,
        "describe", "ssh status",  # it runs
        "describe", "describe", "delete", "create", "describe", "describe", "ssh stop", *INSTALL_AND_START,
        "describe", "ssh status",  # it is done
    ]  # fmt: skip
    starts = [call for call in cloud.calls if any("worker.sh start" in word for word in call)]
    assert len(starts) == 2 and starts[0] == starts[1]
    creates = [call for call in cloud.calls if call[4:5] == ["create"]]
    assert len(creates) == 2 and creates[0] == creates[1] and "--spot" in creates[0]
    assert "done. The TPUs still cost: tpu_vm.sh delete pod" in done.stdout


def test_a_worker_that_saved_and_ended_waits_for_the_state_and_starts_again(cloud: Cloud) -> None:
    cloud.play({"describe": ["ACTIVE"], STATUS: ["running", "exited 143", "exited 143", "running", "exited 0"]})
    cloud.run("tpu_vm.sh", "watch", *POD, "--", *COMMAND)
    actions = cloud.actions()
    assert actions.count("ssh start") == 1 and "delete" not in actions and "create" not in actions
    assert actions.index("ssh start") > actions.index("ssh status") + 3  # it looked twice


@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_is_not_tried_again(cloud: Cloud, code: int) -> None:
    cloud.play({"describe": ["ACTIVE"], STATUS: ["running", f"exited {code}"]})
    done = cloud.run("tpu_vm.sh", "watch", *POD, "--", *COMMAND, code=2)
    assert f"ended with status {code}" in done.stderr and "the TPUs still cost" in done.stderr
    assert "ssh start" not in cloud.actions()


def test_restarts_are_counted(cloud: Cloud) -> None:
    cloud.play({"describe": ["SUSPENDED"]})
    done = cloud.run("tpu_vm.sh", "watch", *POD, "--max-restarts", "3", "--", *COMMAND, code=2)
    assert "started again 3 times" in done.stderr
    assert cloud.actions().count("create") == 3


def test_three_looks_that_fail_are_the_end(cloud: Cloud) -> None:
    cloud.play({"describe": [("", 1), ("", 1), "ACTIVE", ("", 1)], STATUS: ["running"]})
    done = cloud.run("tpu_vm.sh", "watch", *POD, "--", *COMMAND, code=2)
    assert "state of pod cannot be read" in done.stderr
    assert cloud.actions() == [*["describe"] * 3, "ssh status", *["describe"] * 3]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("tpu_vm.sh", ["fly", "pod"], "unknown action fly"),
        ("tpu_vm.sh", ["create"], "needs the name of the TPUs"),
        ("tpu_vm.sh", ["create", "--spot"], "needs the name of the TPUs"),
        ("tpu_vm.sh", ["up", *POD], "up needs a command"),
        ("tpu_vm.sh", ["create", *POD, "--", "ls"], "takes no command"),
        ("tpu_vm.sh", ["create", *POD, "--zone"], "--zone needs a value"),
        ("tpu_vm.sh", ["create", *POD, "--slices", "two"], "--slices two is not a whole number"),
        ("tpu_vm.sh", ["create", *POD, "--slices", "0"], "must be at least 1"),
        ("tpu_vm.sh", ["create", *POD, "--accelerator", "h100-8"], "no runtime version is known"),
        ("tpu_vm.sh", ["create", *POD, "--sopt"], "unknown option --sopt"),
        ("tpu_vm.sh", ["install", *POD, "--wheel", "none.whl"], "there is no wheel none.whl"),
        ("tpu_vm.sh", ["install", *POD, "--copy", "nothing"], "--copy nothing does not exist"),
        ("gke_xpk.sh", ["run", "hall"], "run needs the name of the run"),
        ("gke_xpk.sh", ["run", "hall", "first", "--", "ls"], "no image is named"),
        ("gke_xpk.sh", ["logs", "hall", "first"], "needs the zone"),
        ("gke_xpk.sh", ["cluster", *CLUSTER, "--slices", ""], "is not a whole number"),
        ("slurm_gpu.sh", ["--nodes", "2"], "there is no command to run"),
        ("slurm_gpu.sh", ["--venv", "nothing", "--", "ls"], "nothing is no virtual environment"),
        ("slurm_gpu.sh", ["--gpus", "0", "--", "ls"], "must be at least 1"),
    ],
)  # fmt: skip
def test_a_mistake_says_what_to_do_and_calls_nothing(
    cloud: Cloud, script: str, arguments: list[str], says: str
) -> None:
    done = cloud.run(script, *arguments, code=2)
    assert says in done.stderr and "remedy: " in done.stderr
    assert not cloud.calls


def test_a_missing_program_is_named(cloud: Cloud) -> None:
    cloud.path = cloud.path.split(":", 1)[1]  # without the fakes
    if any(shutil.which("sbatch", path=folder) for folder in ("/usr/bin", "/bin")):
        pytest.skip("this machine has Slurm")
    (cloud.folder / "bin" / "python").symlink_to(sys.executable)
    done = cloud.run("slurm_gpu.sh", "--venv", str(cloud.folder), "--", "ls", code=2)
    assert "sbatch is not on PATH" in done.stderr


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_xpk.sh", "slurm_gpu.sh"])
def test_help_names_every_option(cloud: Cloud, script: str) -> None:
    text = cloud.run(script, "--help").stdout
    options = set(
        re.findall(r"^    (--[a-z-]+)\)|^    (--[a-z-]+(?: \| --[a-z-]+)+)\)", (LAUNCH / script).read_text(), re.M)
    )
    names = {name for pair in options for group in pair for name in group.split(" | ") if name}
    assert len(names) > 6
    assert all(name in text for name in names), names
    assert not text.startswith("#") and "set -euo" not in text and not cloud.calls


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), "--external-sources", "--source-path", str(REPO), str(script)],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


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


# ------------------------------------------------------------------------------------------------- the worker, for real


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

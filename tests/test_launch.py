"""The launchers of tools/launch: what they call, in which order, and what they do when a cloud takes its machines back."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cloud import LAUNCH, REPO, Cloud

STATUS = "worker.sh status"
COMMAND = ["instructrec", "train", "configs/ml_1m.yaml", "--runs", "gs://bucket/it's mine", "--train.steps", "400"]


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


@pytest.mark.parametrize("script", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), "--external-sources", "--source-path", str(REPO), str(script)],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_silence_is_borne_longer_than_a_bad_answer(cloud: Cloud) -> None:
    cloud.play({"describe": ["ACTIVE"], STATUS: [*[("", 255)] * 4, "running", *[("", 255)] * 5, "exited 0"]})
    cloud.run("tpu_vm.sh", "watch", *POD, "--", *COMMAND)
    assert cloud.actions().count("ssh start") == 1
    assert cloud.actions().index("ssh start") > [i for i, a in enumerate(cloud.actions()) if a == "ssh status"][9]


def test_fresh_machines_may_need_a_minute_for_ssh(cloud: Cloud) -> None:
    cloud.play({"describe": ["ACTIVE"], "mkdir": [("publickey", 255), ("publickey", 255), ""], STATUS: ["exited 0"]})
    cloud.run("tpu_vm.sh", "up", *POD, "--", *COMMAND)
    assert cloud.actions()[2:8] == ["ssh", "ssh", "ssh", "scp", "ssh install", "ssh start"]


def test_an_installation_that_fails_at_first_ends_the_launch(cloud: Cloud) -> None:
    cloud.play({"describe": ["ACTIVE"], " scp ": [("", 1)]})
    cloud.run("tpu_vm.sh", "up", *POD, "--", *COMMAND, code=1)
    assert cloud.actions()[-1] == "scp"


def test_a_pod_that_is_taken_away_during_the_installation_is_requested_again(cloud: Cloud) -> None:
    cloud.play(
        {
            "describe": ["SUSPENDED", "SUSPENDED", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"],
            " scp ": [("", 1), ""],
            STATUS: ["running", "exited 0"],
        }
    )
    done = cloud.run("tpu_vm.sh", "watch", *POD, "--", *COMMAND)
    assert "could not be started" in done.stdout
    assert cloud.actions().count("create") == 2 and cloud.actions().count("ssh start") == 1

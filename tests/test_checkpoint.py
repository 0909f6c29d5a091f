"""Checkpoints: which are kept, where and as what they are read again, on a disk and in a bucket."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from instructrec_jax import config as configs
from instructrec_jax.config import MeshConfig
from instructrec_jax.errors import UserError
from instructrec_jax.files import GrowingCopy, path_of, write_atomic
from instructrec_jax.training.checkpoint import Checkpoints, check_writable
from instructrec_jax.training.mesh import make_mesh
from tests.test_hosts import free_port
from tests.tiny import tiny_config, write_slice


class Position:
    """A loader that only counts."""

    def __init__(self, place: int = 0):
        self.place = place

    async def save(self, directory: Any) -> Any:
        async def write(text: str = str(self.place)) -> None:
            ((await directory.await_creation()) / "place").write_text(text)

        return write()

    async def load(self, directory: Any) -> Any:
        async def read() -> None:
            self.place = int((directory / "place").read_text())

        return read()


def state(mesh: jax.sharding.Mesh, dtype: str = "float32", spec: P = P("fsdp", "tensor")) -> dict:
    values = np.arange(64, dtype=np.float32).reshape(8, 8) / 7
    put = jax.device_put(jnp.asarray(values, dtype), jax.NamedSharding(mesh, spec))
    return {"params": {"w": put}, "opt": {"m": put * 2}}


def test_latest_best_and_every_n_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4, clean=True)
    for step, score in zip(range(1, 10), [0.1, 0.2, 0.9, 0.3, None, 0.3, None, 0.1, 0.1]):
        metrics = None if score is None else {"ndcg@10": score}
        checkpoints.save(step, state(make_mesh(MeshConfig())), Position(step), {}, metrics)
    checkpoints.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 4, 8, 9]
    again = Checkpoints(tmp_path)
    assert (again.best(), again.latest(), again.metrics(3)) == (3, 9, {"ndcg@10": 0.9})
    again.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_mesh_and_dtype(tmp_path: Path, dtype: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(make_mesh(MeshConfig(2, 2, 2))), Position(17), {}, None)
    checkpoints.wait()
    for mesh in (make_mesh(MeshConfig(1, 4, 2)), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        wanted, place = state(mesh, dtype, P("tensor", "fsdp")), Position()
        found = checkpoints.restore(1, wanted, place)
        assert place.place == 17
        for key in ("params", "opt"):
            a, b = jax.tree.leaves(found[key])[0], jax.tree.leaves(wanted[key])[0]
            assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(found["params"]["w"], wanted["params"]["w"])
        only = checkpoints.restore_params(1, wanted["params"])
        np.testing.assert_array_equal(only["w"], wanted["params"]["w"])
    checkpoints.close()


def test_a_step_that_is_validated_later_keeps_its_checkpoint(tmp_path: Path) -> None:
    one = state(make_mesh(MeshConfig()))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, one, Position(), {}, {"ndcg@10": 0.1})
    checkpoints.save(2, one, Position(5), {}, None)
    checkpoints.close()

    again = Checkpoints(tmp_path, keep=1)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "2").rglob("*")}
    assert (again.metrics(2), again.best()) == ({}, 1)
    again.add_metrics(2, {"ndcg@10": 0.5})
    assert (again.metrics(2), again.best()) == ({"ndcg@10": 0.5}, 2)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "2").rglob("*")} == files, "nobody touched it"
    again.save(3, one, Position(), {}, {"ndcg@10": 0.4})
    again.close()

    last = Checkpoints(tmp_path)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 3], "the best one is kept"
    assert (last.best(), last.latest(), last.metrics(2)) == (2, 3, {"ndcg@10": 0.5})
    place = Position()
    last.restore(2, one, place)
    assert place.place == 5
    last.close()


@pytest.mark.parametrize("keep", [1, 2])
def test_no_moment_is_without_a_checkpoint(keep: int, tmp_path: Path) -> None:
    """At every change of the folder, by any of the threads, as many steps are complete as are kept, once there were so many."""
    seen = []

    def steps() -> list[int]:
        return sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())

    def watch(event: str, arguments: tuple) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and str(tmp_path) in str(arguments[0]):
            seen.append((event, steps()))

    watching = True
    sys.addaudithook(lambda event, arguments: watch(event, arguments) if watching else None)
    checkpoints = Checkpoints(tmp_path, keep=keep)
    one = state(make_mesh(MeshConfig()))
    for step in range(1, 6):
        checkpoints.save(step, one, Position(), {}, None)
        checkpoints.wait()
        seen.append(("saved", steps()))
    checkpoints.close()
    watching = False
    kinds = {event for event, _ in seen}
    assert {"os.rename", "saved"} < kinds, "it was watched: steps come by a rename, and old ones go"
    assert seen[-1][1] == list(range(6 - keep, 6))
    first = next(i for i, (_, found) in enumerate(seen) if len(found) >= keep)
    assert all(len(found) >= keep for _, found in seen[first:]), seen


def test_what_a_kill_left_is_removed_by_the_run_alone(tmp_path: Path) -> None:
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    reader = Checkpoints(tmp_path)
    assert reader.latest() is None and (tmp_path / "7.orbax-checkpoint-tmp").exists()
    reader.close()
    run = Checkpoints(tmp_path, clean=True)
    patience = time.monotonic() + 30  # it is removed in the background
    while list(tmp_path.iterdir()) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())
    run.close()


def test_a_file_in_the_way_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*run.*\n.*--runs"):
        check_writable(tmp_path / "run", 0)


# -------------------------------------------------------------------------------------------------------------- a bucket


def test_paths_of_buckets_keep_their_slashes() -> None:
    config = tiny_config(Path("x"))
    tree = configs.to_dict(config) | {"runs": "gs://bucket/runs"}
    assert str(configs.run_dir(configs.from_dict(tree))).startswith("gs://bucket/runs/tiny-")
    assert str(path_of("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert path_of("a/b") == Path("a/b")


def test_growing_files_are_copied_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "far"
    write_atomic(folder / "metrics.jsonl", "1\n")
    copy = GrowingCopy(folder, seconds=0)
    with (copy.local / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("2\n")
    copy.update()
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n"
    copy.close()
    assert not copy.local.exists()


def printed(said: str) -> dict[str, Any]:
    """The JSON object of a command, among the client's warnings."""
    return json.loads([line for line in said.splitlines() if line.startswith("{")][-1])


@pytest.mark.slow
def test_a_run_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data prepared, a run told to stop and continued, evaluated, exported: in a bucket of an emulated Google Cloud Storage."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    storage = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    storage.start()
    environ = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",  # arrays
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        "INSTRUCTREC_CACHE": str(tmp_path / "cache"),
    }
    try:
        write_slice(tmp_path / "data")
        tree = configs.to_dict(tiny_config(tmp_path)) | {"prepared": "gs://bucket/prepared"}
        (tmp_path / "config.yaml").write_text(configs.dump(configs.from_dict(tree)), encoding="utf-8")

        def command(accident: str, *arguments: str) -> tuple[int, str]:
            words = [sys.executable, "-m", "tests.accidents", accident, *arguments]
            root = Path(__file__).parent.parent
            done = subprocess.run(words, env=environ, cwd=root, capture_output=True, text=True)
            assert not (root / "gs:").exists(), "a path of a bucket was taken for one of the disk"
            return done.returncode, done.stdout + done.stderr

        status, said = command("none", "train", str(tmp_path / "config.yaml"), "--runs", "gs://bucket/runs")
        assert status == 2 and "there is no prepared data set here" in said, said
        status, said = command("none", "data", "prepare", str(tmp_path / "config.yaml"))
        assert status == 0 and "to gs://bucket/prepared/tiny" in said, said
        own = next((tmp_path / "cache" / "prepared").iterdir())
        shutil.rmtree(own)  # another machine has no copy yet

        train = ("train", str(tmp_path / "config.yaml"), "--runs")
        status, said = command("none", *train, "gs://no-such-bucket/runs")
        assert status == 2 and "cannot write to gs://no-such-bucket/runs" in said and "step" not in said, said
        status, said = command("told-in-step", *train, "gs://bucket/runs")
        assert status == 143 and "saved step 3" in said, said
        status, said = command("none", *train, "gs://bucket/runs")
        assert status == 0 and "resumed from step 3" in said, said
        run = said.splitlines()[0].removeprefix("run: ")
        assert run.startswith("gs://bucket/runs/tiny-")
        status, said = command("none", "evaluate", run, "--json")
        assert status == 0 and "ndcg@10" in printed(said)["model"], said
        assert [p.name for p in own.parent.iterdir()] == [own.name], "one copy for all commands"
        status, said = command("none", "recommend", run, "--item", "1", "-k", "3", "--json")
        assert status == 0 and len(printed(said)["items"]) == 3, said
        status, said = command("none", "export", run, str(tmp_path / "out"), "--to", "hf")
        assert status == 0 and (tmp_path / "out" / "model.safetensors").is_file(), said
        status, said = command("none", "report", run)
        assert status == 0 and f"report: {run}/report.html" in said, said
        status, said = command("none", "data", "forget", str(tmp_path / "config.yaml"), "--user-id", "1")
        assert status == 2 and "gcloud storage cp -r gs://bucket/prepared/tiny ." in said, said
        names = [o["name"] for o in json.load(urlopen(f"http://127.0.0.1:{port}/storage/v1/b/bucket/o"))["items"]]
        results = [name.rsplit("/", 1)[-1] for name in names if "/evaluation/" in name]
        assert {"full.json", "full_model.csv.gz"} <= set(results), names
    finally:
        storage.stop()

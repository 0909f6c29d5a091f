"""The compiler's flags: known to the installed version, never over the user's, and with the effect that they are there for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from instructrec_jax.training import xla_flags


def start(flags: str, code: str = "import jax; jax.numpy.zeros(1)", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_a_process_starts_with_the_flags(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_flags, "_amx", lambda: True)
    environ: dict[str, str] = {}
    assert xla_flags.apply(platform, environ) == environ["XLA_FLAGS"].split()
    done = start(environ["XLA_FLAGS"])
    assert done.returncode == 0, done.stderr


def test_an_unknown_flag_ends_a_process() -> None:
    done = start("--xla_gpu_enable_everything=true")  # why versions that were not tried get none
    assert done.returncode != 0 and "Unknown flag" in done.stderr


def test_what_the_user_has_set_stays() -> None:
    environ = {"XLA_FLAGS": "--xla_dump_to=/tmp/x --xla_gpu_enable_latency_hiding_scheduler=false"}
    added = xla_flags.apply("gpu", environ)
    assert environ["XLA_FLAGS"].split()[:2] == [
        "--xla_dump_to=/tmp/x",
        "--xla_gpu_enable_latency_hiding_scheduler=false",
    ]
    assert len(added) == len(xla_flags.GPU) - 1
    assert xla_flags.apply("gpu", environ) == []


@pytest.mark.parametrize(("flags", "some"), [("fpu sse2 avx512f amx_bf16 amx_tile", True), ("fpu sse2 avx2", False)])
def test_only_a_cpu_with_amx_gets_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, some: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(xla_flags, "_amx", partial(xla_flags._amx, tmp_path / "cpuinfo"))
    environ: dict[str, str] = {"JAX_PLATFORMS": "cpu"}
    assert len(xla_flags.apply(None, environ)) == len(xla_flags.CPU) * some
    assert ("XLA_FLAGS" in environ) == some


def test_a_machine_that_does_not_say_gets_none(tmp_path: Path) -> None:
    assert not xla_flags._amx(tmp_path / "absent")


@pytest.mark.parametrize(
    ("version", "some"), [("0.9.2", False), ("0.10.2", True), ("0.12.0.1", True), ("0.13.0", False)]
)
def test_versions_that_were_not_tried_get_none(monkeypatch: pytest.MonkeyPatch, version: str, some: bool) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert bool(xla_flags.apply("gpu", {})) == some


@pytest.mark.parametrize(
    ("installed", "asked", "expected"),
    [
        ({"libtpu"}, "", "tpu"),
        ({"jax_cuda12_plugin"}, "", "gpu"),
        ({"jax_cuda13_plugin"}, "cuda,cpu", "gpu"),
        ({"libtpu"}, "cpu", "cpu"),
        ({"libtpu", "jax_cuda12_plugin"}, "gpu", "gpu"),
        (set(), "", "cpu"),
    ],
)
def test_the_platform_is_the_one_that_jax_chooses(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], asked: str, expected: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert xla_flags.accelerator({"JAX_PLATFORMS": asked}) == expected


# An embedding's gradient over 16 micro-batches, the table sharded over four chips; says where its all-reduce is.
ACCUMULATE = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(chips), ("d",), axis_types=(AxisType.Auto,))
def gradient(table, ids, weights):
    def add(total, batch):
        return total + jax.grad(lambda t: (t[batch[0]] * batch[1]).sum())(table), None
    return jax.lax.scan(add, jnp.zeros_like(table), (ids, weights))[0]
def of(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P(*spec)))
text = jax.jit(gradient).lower(
    of((96, 35, 256), jnp.float32, "d"), of((16, 8, 8), jnp.int32, None, "d"), of((16, 8, 8, 35, 256), jnp.float32, None, "d")
).compile().as_text()
parts = [part.strip() for part in text.split("\\n\\n") if re.search(r"\\ball-reduce(-start)?\\(", part)]
print(len(parts), sum(part.startswith("ENTRY") for part in parts))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_the_sum_over_devices_stays_in_the_loop_that_accumulates() -> None:
    environ: dict[str, str] = {}
    xla_flags.apply("tpu", environ)
    done = start(environ["XLA_FLAGS"], ACCUMULATE, TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    assert done.returncode == 0, done.stderr
    everywhere, outside = map(int, done.stdout.split())
    assert everywhere > 0 and outside == 0

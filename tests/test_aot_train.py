"""Ahead-of-time check of a training step: collectives of a module, the search for the largest batch, exit status; real compilations."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import aot_check
import aot_train
from aot_train import Compiled, collectives, largest

from instructrec_jax import config as configs
from instructrec_jax.training import xla_flags
from instructrec_jax.training.chips import topology_of

FULL = "configs/aot/qwen3_0.6b_full_v5e16.yaml"

MODULE = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused.1 (p: bf16[2,4]) -> bf16[8,4] {
  ROOT %all-gather.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}

%fused.2 (p: bf16[2,4]) -> bf16[8,4] {
  ROOT %all-gather.2 = bf16[8,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}

%inner.body (s: (s32[], f32[3])) -> (s32[], f32[3]) {
  %all-reduce.7 = (f32[3]{0}, bf16[5]{0}) all-reduce(%x, %y), channel_id=7, to_apply=%add
}

%inner.condition (s: (s32[], f32[3])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[], f32[3])) -> (s32[], f32[3]) {
  %fusion.1 = bf16[8,4] fusion(%w), kind=kCustom, calls=%fused.1
  %fusion.2 = bf16[8,4] fusion(%w), kind=kCustom, calls=%fused.2
  %loop.2 = (s32[], f32[3]) while(%t), condition=%inner.condition, body=%inner.body, metadata={op_name="jit(step)/while"}
}

%condition (s: (s32[], f32[3])) -> pred[] {
  %limit.2 = s32[] constant(28)
  ROOT %lt.2 = pred[] compare(%i, %limit.2), direction=LT
}

%some (p: f32[6]) -> f32[6] {
  %rs = f32[6]{0} reduce-scatter(%p), channel_id=9, dimensions={0}
}

%none (p: f32[6]) -> f32[6] {
  ROOT %same = f32[6] copy(%p)
}

ENTRY %main (p: f32[6]) -> f32[6] {
  %loop.1 = (s32[], f32[3]) while(%t), condition=%condition, body=%body
  %all-to-all = bf16[2,8]{1,0} all-to-all(%p), channel_id=3, dimensions={0}
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), channel_id=4, dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %either = f32[6] conditional(%pred, %p, %p), branch_computations={%some, %none}
}
"""


def test_collectives_are_counted_as_often_as_loops_turn() -> None:
    found = collectives(MODULE)
    # One channel over two fusions is one collective; of a start's tuple the result counts.
    assert found["all-gather"] == {"count": 28 + 1, "bytes": 28 * 64 + 32}
    assert found["all-reduce"] == {"count": 28 * 4, "bytes": 28 * 4 * (12 + 10)}
    assert found["all-to-all"] == {"count": 1, "bytes": 32}
    assert found["reduce-scatter"] == {"count": 1, "bytes": 24}
    assert set(found) == {"all-gather", "all-reduce", "all-to-all", "reduce-scatter"}
    assert (
        collectives("HloModule empty\n\nENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n") == {}
    )


def test_collectives_of_a_module_that_this_compiler_wrote() -> None:
    """On simulated devices: a loop of five sums over the mesh."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):

        def local(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.psum(y, "x") * 0.5, x)

        step = jax.jit(jax.shard_map(local, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False))
        shape = jax.ShapeDtypeStruct((64, 4), "float32", sharding=jax.NamedSharding(mesh, jax.P("x")))
        found = collectives(step.lower(shape).compile().as_text())
    assert found == {"all-reduce": {"count": 5, "bytes": 5 * 8 * 4 * 4}}


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 41, 42, 43, 100])
@pytest.mark.parametrize("known", [(), (4, 16)])
@pytest.mark.parametrize("told", [True, False])
def test_the_largest_batch(limit: int, known: tuple[int, ...], told: bool) -> None:
    asked = []

    def ask(rows: int) -> tuple[bool, int]:
        asked.append(rows)
        return rows <= limit, 20 + 20 * rows if rows <= limit or told else 0

    begin = {rows: ask(rows) for rows in known}
    asked.clear()
    assert largest(ask, begin, 20 + 20 * limit, most=64) == min(limit, 64)
    assert len(asked) == len(set(asked)) <= (2 if known and limit >= 16 else 12)
    assert all(0 < rows <= 64 for rows in asked)


@given(
    slopes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    within=st.sampled_from([0.0, 0.01, 0.1]),
    memory=st.integers(0, 60_000),
)
def test_the_largest_batch_of_bytes_that_bend(slopes: list[int], within: float, memory: int) -> None:
    """Bytes that grow by another slope every 200 sequences: the search ends at the largest, or as near as it is asked to come."""
    size = np.cumsum([slopes[min(n // 200, len(slopes) - 1)] for n in range(1025)])
    asked = []

    def ask(rows: int) -> tuple[bool, int]:
        asked.append(rows)
        return bool(size[rows] <= memory), int(size[rows])

    begin = {rows: (bool(size[rows] <= memory), int(size[rows])) for rows in (4, 16)}
    found = largest(ask, begin, memory, most=1024, within=within)
    true = int(np.searchsorted(size, memory, side="right")) - 1
    assert found <= max(true, 0) <= found * (1 + within)
    assert len(asked) <= 16


def test_exit_status_and_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    memory = topology_of("v5e-16").chip.memory

    def compiled(config: Any, topology: Any, devices: list, rows: int, *_: int) -> Compiled:
        size = 10**9 + 4 * 10**8 * rows
        error = "too much" if size > memory else ""
        return Compiled(rows, 5 * 10**8, 0 if error else size - 5 * 10**8, 0, size, error=error)

    monkeypatch.setattr(aot_train, "compile_step", compiled)
    monkeypatch.setattr(aot_train, "devices_of", lambda topology: [None] * topology.chips)
    monkeypatch.setattr(aot_check, "need_compiler", lambda: None)
    monkeypatch.setattr(aot_check, "version", lambda _: "1")
    whole = [FULL, "--train.accumulate", "1"]
    assert aot_check.main([*whole, "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["ratios"] == {"temp_gb_at_4": 2.1, "temp_gb_at_16": 6.9, "largest_batch": 40}
    assert "| v5e-16 | 16 | 0.500 | 6.900 | 7.400 |" in out and "40 sequences a chip" in out
    assert aot_check.main([*whole, "--train.batch_size", "1024", "--no-search", "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["fits"] and found["ratios"]["temp_gb_at_64"] is None and "largest_batch" not in found["ratios"]

    # Sequences of a step: a quarter of them at a time.
    assert aot_check.main([FULL, "--train.accumulate", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ratios"] == {"temp_gb_at_4": 0.9, "temp_gb_at_16": 2.1, "largest_batch": 160}
    assert aot_check.main([FULL, "--train.accumulate", "4", "--sequences", "6"]) == 2
    assert "6 sequences a chip do not divide into train.accumulate = 4" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "given"), [("", True), ("--xla_disable_hlo_passes=dce", False)])
def test_the_step_is_compiled_with_the_flags_of_a_run(flags: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for chips; a flag that the user has set stays as it is."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    asked = []

    def compiled(*, compiler_options: dict[str, str]) -> Any:
        asked.append(compiler_options)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: enough is known")

    step = SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=compiled))
    monkeypatch.setattr(aot_train, "make_train_step", lambda *_: step)
    monkeypatch.setattr(aot_train.xla_flags, "missing", lambda platform, missing=xla_flags.missing: missing("tpu"))
    config = configs.load(FULL, ["--mesh.fsdp", "8"])
    aot_train.compile_step(config, topology_of("v5e-8"), jax.devices()[:8], 4)
    assert asked == [xla_flags.TPU if given else {}]


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_check, "need_compiler", lambda: None)
    for words, said in (
        (["configs/aot/qwen3.yaml"], "no config file"),
        (["configs/ml_1m.yaml"], "names no chips"),
        ([FULL, "--chips", "v5e-17"], "unknown chips 'v5e-17'"),
        ([FULL, "--train.bach_size", "4"], "did you mean 'batch_size'"),
    ):
        assert aot_check.main(words) == 2
        assert said in capsys.readouterr().err


compiles = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Error reading persistent compilation cache"
    ),  # needs a client, which needs a chip
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, the compiler: pip install -e '.[tpu]'"),
]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(FULL, marks=compiles),
        pytest.param("configs/aot/llama3.1_8b_lora_v5e16.yaml", marks=compiles),
        pytest.param("configs/aot/llama3.1_70b_qlora_v5p128.yaml", marks=compiles),
    ],
)
def test_a_config_compiles_and_fits_as_planned(path: str) -> None:
    config = configs.load(path)
    topology = topology_of(config.mesh.chips)
    found = aot_train.check(config, topology, [], search=False)
    c = found.compiled[found.batch]
    assert found.fits and c.peak <= topology.chip.memory and c.collectives["all-gather"]["count"]
    from instructrec_jax.training.plan import make_plan
    from instructrec_jax.training.shapes import architecture_of

    plan = make_plan(config, *architecture_of(config, 0), topology.chips, topology.chip)
    assert plan.total == pytest.approx(c.peak, rel=0.15)
    assert plan.arguments == pytest.approx(c.arguments, rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, the compiler: pip install -e '.[tpu]'")
def test_two_slices_are_joined_by_replica() -> None:
    config = configs.load(FULL, ["--mesh.replica", "2", "--mesh.fsdp", "16"])
    topology = topology_of("v5e-16x2")
    devices = aot_train.devices_of(topology)
    from instructrec_jax.training.mesh import make_mesh

    mesh = make_mesh(dataclasses.replace(config.mesh), devices)
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]

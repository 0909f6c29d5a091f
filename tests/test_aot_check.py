"""What is compiled ahead of time: the scorer's own calls, and counts that are those of the traced program."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import aot_check
import aot_scorer
from aot_scorer import Call, Compiler, Costs, Count, Workload

from instructrec_jax.config import ModelConfig
from instructrec_jax.errors import UserError
from instructrec_jax.models import attention
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.scoring.forest import Forest
from instructrec_jax.scoring.trees import CHUNK

ARCH = Architecture(vocab=300, width=16, layers=3, heads=4, kv_heads=2, head_size=8, mlp_width=24)
OPTIONS = ModelConfig(dropout=0.0, item_dropout=0.0)
WORK = Workload(requests=2, prefix=20, candidates=7, tokens=5, items=300)


def dots(jaxpr: Any, rounds: list[int]) -> float:
    """Two operations per multiplication and addition of all matrix products; loops of unknown length run ``rounds`` times by depth."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, 1
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
            continue
        deeper = rounds
        if name == "scan":
            inner = eqn.params["length"]
        elif name == "while":
            inner, deeper = rounds[0], rounds[1:]
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            closed = getattr(part, "jaxpr", part)
            if hasattr(closed, "eqns"):
                total += inner * dots(closed, deeper)
    return total


@pytest.mark.parametrize("layout", aot_scorer.LAYOUTS)
def test_operations_are_those_of_the_traced_program(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix product of the kernel's functions, with the true number of layers, chunks and blocks."""
    found: dict[str, tuple[float, float]] = {}

    def counted(self: Compiler, name: str, count: Count, step: Any, given: tuple, static: dict[str, Any]) -> Call:
        group = static.get("group", 1)
        rounds = {
            "packed": lambda: [-(-int(given[3]) // CHUNK)],
            "read": list,
            "blocks": lambda: [int(given[3]) // group, -(-aot_scorer.BLOCK // CHUNK)],
            "every": lambda: [-(-self.blocks_of_trie // group), -(-aot_scorer.BLOCK // CHUNK)],
        }[name]()
        found[name] = (count.operations, dots(step.trace(*given, **static).jaxpr.jaxpr, rounds))
        return Call(name, count)

    monkeypatch.setattr(Compiler, "_compile", counted)
    # The formula counts all pairs of queries and keys; blocks of queries leave some out.
    monkeypatch.setattr(attention, "splits", lambda _: True)
    calls, needed = aot_scorer.run(jax.devices()[0], ARCH, OPTIONS, WORK, layout)
    assert [call.name for call in calls] == {
        "packed": ["packed"],
        "batched": ["read", "blocks"],
        "trie": ["read", "every"],
    }[layout]
    for name, (formula, traced) in found.items():
        assert formula == pytest.approx(traced, rel=1e-9), name
    assert 0 < needed < sum(call.runs * call.count.operations for call in calls)


def test_what_the_scorer_asks_for_compiles() -> None:
    """The same way on a processor, whose compiler is at hand: shapes and shardings are those that the kernel takes."""
    calls, _ = aot_scorer.run(jax.devices()[0], ARCH, OPTIONS, WORK, "batched")
    assert all(call.arguments > 0 and call.output > 0 and not call.error for call in calls)


def test_bytes_by_hand() -> None:
    costs = Costs(ARCH, 384)
    weights = (
        2 * 3 * (16 * 8 * (4 + 2 + 2 + 4) + 3 * 16 * 24)
    )  # bf16, 3 layers: query, key, value, output; gate, up, down
    cache = 2 * 2 * 3 * 2 * 8  # bf16 keys and values of a token
    head = 2 * 384 * 16
    assert costs.read(2, 32).moved == weights + 64 * cache + head
    assert costs.packed(2, 32, 65).moved == weights + 64 * cache + 2 * head
    assert costs.blocks(2, 32, 5, 3, 100).moved == 5 * (weights + 64 * cache + 2 * head)
    assert costs.blocks(2, 32, 5, 3, 100).scores == 5 * 2 * 4 * 3 * 4 * 6 * 100 * 132
    fused = Costs(ARCH, 384, fused=True)
    assert fused.packed(2, 1024, 65).scores == fused.blocks(2, 384, 5, 3, 256).scores == 0
    assert fused.read(2, 192).scores == costs.read(2, 192).scores > 0  # a length that the kernel does not take
    assert fused.blocks(2, 192, 1, 3, 256).scores == 2 * 4 * 3 * 4 * 6 * 256 * 192  # the memory's part alone
    with pytest.raises(UserError, match="counted for decoders"):
        Costs(Architecture(kind="encoder"), 128)


def test_needed_is_what_a_request_cannot_do_without() -> None:
    """A prompt of 3 and the candidates 5 6 7 and 5 8: nodes 5 and 5 6; three distributions are read."""
    forest = Forest.build([[5, 6, 7], [5, 8]])
    pairs = (1 + 2 + 3) + 4 + 5
    layers = 3 * (16 * 8 * 12 + 3 * 16 * 24)
    expected = 2.0 * 5 * layers + 4.0 * pairs * 3 * 4 * 8 + 2.0 * 3 * 16 * 300
    assert aot_scorer.needed(ARCH, 300, 3, forest) == expected


def test_a_program_that_does_not_fit() -> None:
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded by 4.5G."
    assert aot_scorer.exhausted(message) == ("Used 20.25G of 15.75G hbm", int(20.25 * 2**30))
    message = (
        "the total memory required for HLO temporaries (18.63G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert aot_scorer.exhausted(message) == (
        "HLO temporaries (18.63G) exceeds available HBM (15.75G)",
        int(18.63 * 2**30),
    )
    assert aot_scorer.exhausted("RESOURCE_EXHAUSTED:\n other  words") == ("RESOURCE_EXHAUSTED: other words", 0)


def test_times_are_the_longer_of_both_by_call() -> None:
    chip = aot_check.Chip(peak=1e12, bandwidth=1e9, memory=1)
    calls = [Call("a", Count(4e9, 2e6, 1e6)), Call("b", Count(4e8, 5e6, 0), runs=2)]  # 10 and 2 ms; 1 and 5 ms, twice
    found = aot_check.times(calls, chip, Workload(requests=4, candidates=5, items=50), "batched")
    expected = {"compute_ms": 12, "bandwidth_ms": 12, "scores_ms": 13, "longer_ms": 20, "ms_per_100": 100}
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert found["items_per_second"] == pytest.approx(1000)
    assert aot_check.times(calls, chip, Workload(requests=4, items=50), "trie")["ms_per_100"] == pytest.approx(10)


def test_arguments() -> None:
    plain = aot_check.arguments_of(["--scorer"])
    assert (
        plain.topology == ["v5e:1x1", "v6e:1x1"]
        and plain.requests == [1, 16]
        and plain.layout == list(aot_scorer.LAYOUTS)
    )
    own = aot_check.arguments_of(
        ["--scorer", "--topology", "v5p:1x1x1", "--requests", "4", "--layout", "packed", "--rows", "2", "--json"]
    )
    assert (own.topology, own.requests, own.layout, own.rows, own.json) == (["v5p:1x1x1"], [4], ["packed"], 2, True)
    for wrong in ([], ["--scorer", "--prefix", "0"], ["--scorer", "--layout", "tree"]):
        with pytest.raises(SystemExit) as stopped:
            aot_check.arguments_of(wrong)
        assert stopped.value.code == 2


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert aot_check.main(["--scorer", "--topology", "v5x:1x1"]) == 2
    assert "unknown chip 'v5x' (did you mean" in capsys.readouterr().err
    assert aot_check.main(["--scorer", "--model", "qwen3-0.6"]) == 2
    assert "did you mean 'qwen3-0.6b'" in capsys.readouterr().err
    monkeypatch.setattr(aot_check, "find_spec", lambda _: None)
    assert aot_check.main(["--scorer"]) == 2
    assert "pip install -e '.[tpu]'" in capsys.readouterr().err


def test_exit_status_says_whether_it_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    peak = 17 * 2**30  # more than a v5e has, less than a v6e

    def one(*_: Any) -> tuple[list[Call], float]:
        return [Call("packed", Count(1e12, 1e9, 1e9), peak=peak)], 5e11

    monkeypatch.setattr(aot_check, "run", one)
    monkeypatch.setattr(aot_check, "device_of", lambda _: None)
    monkeypatch.setattr(aot_check, "version", lambda _: "1")
    asked = ["--scorer", "--layout", "packed", "--requests", "1", "--json"]
    assert aot_check.main(asked) == 1
    printed = capsys.readouterr().out
    assert "v5e:1x1, packed, 1 at a time: does not fit the memory" in printed and "not measured on a chip" in printed
    found = json.loads(printed.splitlines()[-1])
    assert [row["fits"] for row in found["rows"]] == [False, True] and found["measured"] is False
    assert aot_check.main([*asked, "--topology", "v6e:1x1"]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # needs a client, which needs a chip
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, the compiler: pip install -e '.[tpu]'")
def test_a_small_model_compiles_for_a_v5e() -> None:
    device = aot_check.device_of("v5e:1x1")
    assert device.platform == "tpu" and "v5" in device.device_kind
    options = ModelConfig(dropout=0.0, item_dropout=0.0, dtype="bfloat16", param_dtype="bfloat16")
    for layout in aot_scorer.LAYOUTS:
        calls, _ = aot_scorer.run(device, ARCH, options, WORK, layout)
        for call in calls:
            assert not call.error and call.peak >= call.arguments > np.prod((300, 16))

"""Compile for a TPU on a machine that has none, and say what it takes: bytes, operations, and the time that follows from them.

    python tools/aot_check.py configs/aot/qwen3_0.6b_full_v5e16.yaml         # the training step, on the chips that it names
    python tools/aot_check.py configs/ml_1m.yaml --chips v5e-4 --items 3500  # on others
    python tools/aot_check.py --scorer                                       # Qwen3-0.6B on one chip of v5e and of v6e
    python tools/aot_check.py --scorer --model smollm2-360m --prefix 300 --candidates 10 --tokens 30 --topology v5p:1x1x1

Needs libtpu, which holds the compiler and runs without a chip: ``pip install -e '.[tpu]'``. Weights are shapes, so any model of
``instructrec model show`` can be asked for, and no memory is used but the compiler's.

Of a training step are told: bytes on each chip, the largest batch that fits, and the collectives counted in the module. Bytes are the
compiler's own account of its executable. The scorer's operations and bytes moved are counted (``tools/aot_scorer.py: Costs``), and its
times are computed from them and from the vendors' figures: nothing here was measured on a chip.

Exit status: 0, 1 if something does not fit the chip's memory, 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

# Nothing runs here: without this, jax would look for the chips that libtpu is for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud's metadata server which machine this is
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the lock is for chips

import aot_train
from aot_scorer import LAYOUTS, Call, Workload, run

from instructrec_jax import config as configs
from instructrec_jax.config import ModelConfig
from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.hf.sizes import find
from instructrec_jax.training.chips import CHIPS, GIB, Chip, topology_of

UTILISATION = 0.4  # of the peak that a good kernel reaches in serving
GOAL = ("v6e", 25.0)  # ms of device time for a request of 100 candidates
# SGLang's multi-item scoring (pull request 9748): Qwen3-0.6B, prompts of 300 tokens, 10 items a request, P99 <= 500 ms.
PUBLISHED = {"system": "SGLang multi-item scoring, Qwen3-0.6B, one H100", "items_per_second": 1000.0}


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed and checked arguments; exits with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="of a run: compile its training step")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    train = parser.add_argument_group("a training step", "--section.key value changes a setting of the config")
    train.add_argument("--chips", help="like v5e-16 or v5e-16x2 (default: the config's mesh.chips)")
    train.add_argument("--sequences", type=_positive, nargs="+", default=[4, 16], metavar="N",
                       help="on each chip, beside the config's own batch (default 4 16)")  # fmt: skip
    train.add_argument("--no-search", action="store_true", help="do not look for the largest batch")
    train.add_argument(
        "--users", type=_positive, default=0, help="values of user features, with item tokens (default 0)"
    )
    scorer = parser.add_argument_group("the scorer, on one chip")
    scorer.add_argument("--topology", nargs="+", default=["v5e:1x1", "v6e:1x1"], metavar="CHIP:SHAPE",
                        help="like v5e:1x1, v6e:1x1, v5p:1x1x1 (default: the first two)")  # fmt: skip
    scorer.add_argument("--scorer", action="store_true", help="compile what scoring candidates runs")
    scorer.add_argument("--model", default="qwen3-0.6b", help="known name, or folder with a config.json")
    scorer.add_argument("--prefix", type=_positive, default=300, help="tokens of a prompt (default 300)")
    scorer.add_argument("--candidates", type=_positive, default=100, help="of a request (default 100)")
    scorer.add_argument("--tokens", type=_positive, default=30, help="of a candidate (default 30)")
    scorer.add_argument(
        "--items", type=_positive, default=10_000, help="of the catalogue (layout trie, item tokens; default 10,000)"
    )
    scorer.add_argument("--requests", type=_positive, nargs="+", default=[1, 16],
                        help="that arrive at one time (default 1, and then 16)")  # fmt: skip
    scorer.add_argument("--rows", type=_positive, help="packed rows, and prompts, in a batch (default: the scorer's)")
    scorer.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    arguments, arguments.overrides = parser.parse_known_args(argv)
    if arguments.scorer == bool(arguments.config):
        parser.error("say what to compile: a config, or --scorer")
    if arguments.scorer and arguments.overrides:
        parser.error(f"unrecognized arguments: {' '.join(arguments.overrides)}")
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def chip_of(topology: str) -> str:
    """The chip's name in ``CHIPS``.

    Raises:
        UserError: it is not a TPU that is known.
    """
    name = topology.split(":")[0]
    known = [chip for chip in CHIPS if chip != "h100"]
    if name not in known:
        raise UserError(f"unknown chip {name!r}{did_you_mean(name, known)}", remedy=f"one of {', '.join(known)}")
    return name


def device_of(topology: str) -> Any:
    """The first device of a topology.

    Raises:
        UserError: libtpu is not installed, or does not know the topology.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    need_compiler()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except JaxRuntimeError as error:
        raise UserError(f"{topology}: {error}", remedy="a shape like v5e:1x1 or v5p:1x1x1") from None


def need_compiler() -> None:
    """Raises UserError where libtpu is not installed."""
    if find_spec("libtpu") is None:
        raise UserError("libtpu, which holds the compiler, is not installed", remedy="pip install -e '.[tpu]'")


def times(calls: Sequence[Call], chip: Chip, work: Workload, layout: str) -> dict[str, float]:
    """Computed times of all calls on a chip: milliseconds for the calculation at 40 % of the peak, for the bytes, and for the bytes with
    the attention's scores; the longer of the first two for each call, the same for 100 candidates (and if scores are moved too), and
    candidates (or catalogue items) a second.
    """
    compute = [call.runs * call.count.operations / (UTILISATION * chip.peak) for call in calls]
    moved = [call.runs * call.count.moved / chip.bandwidth for call in calls]
    scores = [call.runs * (call.count.moved + call.count.scores) / chip.bandwidth for call in calls]
    longer = sum(map(max, compute, moved))
    scored = work.requests * (work.items if layout == "trie" else work.candidates)
    return {
        "compute_ms": 1e3 * sum(compute), "bandwidth_ms": 1e3 * sum(moved), "scores_ms": 1e3 * sum(scores),
        "longer_ms": 1e3 * longer, "ms_per_100": 1e5 * longer / scored, "items_per_second": scored / longer,
        "ms_per_100_with_scores": 1e5 * sum(map(max, compute, scores)) / scored,
    }  # fmt: skip


def check(topology: str, arch: Architecture, options: ModelConfig, work: Workload, layout: str) -> dict[str, Any]:
    """One row of the report: what a workload takes on one chip of a topology in a layout."""
    name = chip_of(topology)
    said = lambda line: print(f"  {topology}, {layout}, {work.requests} at a time: {line}", file=sys.stderr)  # noqa: E731
    calls, needed = run(device_of(topology), arch, options, work, layout, said)
    computed = sum(call.runs * call.count.operations for call in calls)
    return {
        "topology": topology, "layout": layout, "requests": work.requests, "candidates": work.candidates,
        "calls": [{**asdict(call), "count": call.count._asdict()} for call in calls],
        "fits": all(not call.error and call.peak <= CHIPS[name].memory for call in calls),
        "operations": computed, "needed": needed / computed,
        "times": {chip: times(calls, CHIPS[chip], work, layout) for chip in (name, "h100")},
    }  # fmt: skip


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables: what the compiler says of every call, and what follows for every layout."""
    lines = [
        "| topology | requests | call | arguments | temporaries | output | peak, GiB | TFLOP | GB moved | GB of scores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    seen = set()
    for row in rows:
        for call in row["calls"]:
            key = (row["topology"], row["requests"], call["name"])
            if key in seen:  # prompts are read alike in two layouts
                continue
            seen.add(key)
            sizes = [f"{call[k] / GIB:.2f}" for k in ("arguments", "temporaries", "output", "peak")]
            if call["error"]:
                sizes = ["", "", "", f"**does not fit**: {call['error']}"]
            name = call["name"] + (f" x {call['runs']}" if call["runs"] > 1 else "")
            work = [f"{call['count']['operations'] / 1e12:,.2f}"]
            work += [f"{call['count'][k] / 1e9:,.1f}" for k in ("moved", "scores")]
            lines.append(f"| {' | '.join([row['topology'], str(row['requests']), name, *sizes, *work])} |")
    lines += [
        "",
        "| chip | requests | layout | needed of computed | at 40 % of peak, ms | bandwidth, ms | with scores, ms | ms per 100 items "
        "| items/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for chip, t in row["times"].items():
            if chip == "h100" and row["topology"] != rows[0]["topology"]:
                continue
            what = [chip, str(row["requests"]), row["layout"], f"{row['needed']:.0%}"]
            numbers = [f"{t[k]:,.1f}" for k in ("compute_ms", "bandwidth_ms", "scores_ms", "ms_per_100")]
            lines.append(f"| {' | '.join([*what, *numbers, format(t['items_per_second'], ',.0f')])} |")
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Beside what is published, and beside our goal."""
    lines = [
        "Computed from counted operations and the vendors' figures; not measured on a chip.",
        f"To beat: {PUBLISHED['system']}: {PUBLISHED['items_per_second']:,.0f} items/s at P99 <= 500 ms (measured, served; "
        "prompts of 300 tokens, 10 items a request).",
    ]
    chip, most = GOAL
    own = [row for row in rows if row["layout"] != "trie" and chip in row["times"] and row["candidates"] >= 100]
    if own:
        best = min(own, key=lambda row: row["times"][chip]["ms_per_100"])
        found = best["times"][chip]["ms_per_100"]
        lines.append(
            f"Goal: at most {most:g} ms of device time for a request of 100 candidates on {chip}: computed {found:.1f} ms "
            f"({best['layout']}, {best['requests']} at a time), {'within' if found <= most else 'over'}; "
            f"{best['times'][chip]['ms_per_100_with_scores']:.1f} ms if the attention's scores go through memory."
        )
    for row in rows:
        if not row["fits"]:
            lines.append(f"{row['topology']}, {row['layout']}, {row['requests']} at a time: does not fit the memory.")
    return lines


def check_training(arguments: argparse.Namespace) -> int:
    """Compile a config's training step and print what it takes; returns the exit status.

    Raises:
        UserError: the config, the chips or the plan is wrong.
    """
    config = configs.load(arguments.config, arguments.overrides)
    name = arguments.chips or config.mesh.chips
    if not name:
        raise UserError(f"{arguments.config} names no chips", remedy="--chips v5e-16, or mesh.chips in the config")
    topology = topology_of(name)
    need_compiler()
    found = aot_train.check(
        config, topology, arguments.sequences, items=arguments.items, users=arguments.users,
        search=not arguments.no_search, say=lambda line: print(f"  {line}", file=sys.stderr),
    )  # fmt: skip
    print(aot_train.report(found))
    if arguments.json:
        compiled = {rows: asdict(c) for rows, c in found.compiled.items()}
        told = {"benchmark": "aot_check", "measured": False, "config": arguments.config, "chips": name}
        versions = {"jax": version("jax"), "libtpu": version("libtpu")}
        print(json.dumps({**told, "fits": found.fits, "compiled": compiled, "ratios": found.ratios, **versions}))
    return 0 if found.fits else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns the exit status."""
    arguments = arguments_of(argv)
    try:
        if arguments.config:
            return check_training(arguments)
        arch = find(arguments.model)
        options = ModelConfig(dropout=0.0, item_dropout=0.0, dtype="bfloat16", param_dtype="bfloat16")
        rows = []
        for topology in arguments.topology:
            for requests in arguments.requests:
                work = Workload(
                    requests, arguments.prefix, arguments.candidates, arguments.tokens, arguments.items, arguments.rows
                )
                rows += [check(topology, arch, options, work, layout) for layout in arguments.layout]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(rows))
    print()
    print("\n".join(verdict(rows)))
    if arguments.json:
        names = ("model", "prefix", "candidates", "tokens", "items", "rows")
        settings = {name: getattr(arguments, name) for name in names}
        found = {"benchmark": "aot_check --scorer", "measured": False, "rows": rows, "published": PUBLISHED}
        print(json.dumps({**found, "settings": settings, "jax": version("jax"), "libtpu": version("libtpu")}))
    return 0 if all(row["fits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

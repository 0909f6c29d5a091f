"""The result tables of several seeds of one config, as Markdown and a picture, from what the runs have written.

A block of a document stands between two marks and is replaced as a whole, so that no figure is ever typed:

    <!-- results: NAME -->
    ...
    <!-- end of results: NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median_low, stdev
from typing import Any

from instructrec_jax import config as configs
from instructrec_jax.config import Config
from instructrec_jax.dotted import leaves
from instructrec_jax.errors import UserError
from instructrec_jax.evaluation.table import Estimate, EvaluationResult
from instructrec_jax.files import path_of, read_json, write_atomic
from instructrec_jax.hard_modes import FILE as HARD_MODES

METRICS = ("ndcg@10", "hr@10", "mrr@10")
SAMPLED_METRICS = ("hr@1", "hr@3", "hr@5", "ndcg@5")
PARTS = ("next_item", "search", "likelihood", "wordings")
HARD = "hard-modes"  # the protocol of ``instructrec hard-modes``, whose tables are in a file of their own
# They differ between machines and seeds, or only measure.
_PLACES = ("data.path", "prepared", "runs", "train.seed", "name")
_OUTSIDE = ("evaluate", "baseline", "mesh", "profile", "teacher")


@dataclass(frozen=True)
class SeedRun:
    """One evaluated run."""

    folder: Path
    config: Config
    payload: dict[str, Any]  # of ``evaluate`` or ``hard-modes``
    seconds: float  # of training, validation included

    def result(self, part: str) -> EvaluationResult | None:
        """One of the evaluation's tables."""
        return EvaluationResult.from_json(self.payload[part]) if self.payload.get(part) else None

    def results(self) -> dict[str, EvaluationResult]:
        """All tables by name."""
        if "tables" in self.payload:
            return {r.protocol: r for r in map(EvaluationResult.from_json, self.payload["tables"])}
        return {part: result for part in PARTS if (result := self.result(part))}


def read_runs(folders: Sequence[str | Path], protocol: str = "full") -> list[SeedRun]:
    """The runs, which must be one config with several seeds.

    Raises:
        UserError: a folder is no evaluated run, two have one seed, or their settings differ; the first differences are named.
    """
    runs = []
    for folder in map(path_of, folders):
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} is not a run: it has no config.yaml")
        if protocol == HARD:
            payload = _read(folder / HARD_MODES, f"run `instructrec hard-modes {folder}`")
        else:
            payload = _read(folder / "evaluation" / f"{protocol}.json", f"run `instructrec evaluate {folder}`")
        end = _read(folder / "finished.json", f"train {folder} to its end")
        runs.append(SeedRun(folder, configs.load(folder / "config.yaml"), payload, sum(end["seconds"].values())))
    if not runs:
        raise UserError("no runs", remedy="give the folders of the seeds' runs")
    first = differing(Config(), runs[0].config)
    for run in runs[1:]:
        other = differing(Config(), run.config)
        if changed := sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k)):
            raise UserError(
                f"{run.folder} and {runs[0].folder} differ in {', '.join(changed[:4])}",
                remedy="one table is one config with several seeds",
            )
    seeds = [run.config.train.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"two runs have the same seed: {seeds}")
    return sorted(runs, key=lambda run: run.config.train.seed)


def _read(file: Path, remedy: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"there is no {file}", remedy=remedy)
    return read_json(file, remedy)


def differing(base: Config, config: Config) -> dict[str, Any]:
    """The settings of ``config`` that decide what is learnt and are not ``base``'s."""
    before, after = leaves(configs.to_dict(base)), leaves(configs.to_dict(config))
    kept = {k: v for k, v in after.items() if k not in _PLACES and k.split(".")[0] not in _OUTSIDE}
    return {k: v for k, v in kept.items() if before.get(k) != v}


def markdown(runs: Sequence[SeedRun], preset: str = "", picture: str = "", only: Sequence[str] = ()) -> str:
    """Commands, training time, and each table (or ``only`` those of some protocols) with seeds, intervals and paired tests.

    Raises:
        UserError: there is no table of such a protocol.
    """
    lines = _commands(runs, preset)
    minutes = [run.seconds / 60 for run in runs]
    steps = ", ".join(str(run.payload["best_step"]) for run in runs)
    lines += [
        "",
        f"{len(runs)} seed(s); best step {steps}; training took {', '.join(f'{m:.0f}' for m in minutes)} minutes, validation included.",
        "",
    ]
    tables = [run.results() for run in runs]
    known = [result.protocol for result in tables[0].values()]
    if unknown := sorted(set(only) - set(known)):
        raise UserError(f"no table is named {unknown[0]!r}", remedy=f"there are {', '.join(known)}")
    for name, result in tables[0].items():
        if all(name in each for each in tables) and (not only or result.protocol in only):
            lines += _table([each[name] for each in tables])
    if picture:
        lines += [f"![{runs[0].config.name}: NDCG@10 of each system with its 95 % interval]({picture})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(runs: Sequence[SeedRun], preset: str) -> list[str]:
    options = ""
    if preset:
        changes = differing(configs.load(preset), runs[0].config)
        options = "".join(f" --{key} {_word(value)}" for key, value in changes.items())
    name = preset or runs[0].config.name
    seeds = " ".join(str(run.config.train.seed) for run in runs)
    return [
        f"    instructrec data prepare {name}{options}",
        f"    for seed in {seeds}; do instructrec train {name}{options} --train.seed $seed; done",
        f"    instructrec {HARD if 'tables' in runs[0].payload else 'evaluate'} RUN_DIR        # for each",
    ]


def _word(value: Any) -> str:
    return f"'{value}'" if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def _shown(table: EvaluationResult) -> list[str]:
    """A table's columns: among ten candidates everybody is in the first ten."""
    names = [m for m in METRICS if m in table.rows[0].metrics]
    return list(SAMPLED_METRICS) if table.protocol.startswith("1+9") or not names else names


def _table(results: Sequence[EvaluationResult]) -> list[str]:
    first = results[0]
    names = _shown(first)
    lines = [f"**{first.data}, {first.protocol}**, {first.split}, {first.cases:,} cases, {first.items:,} items", ""]
    lines += ["| system | " + " | ".join(names) + " | fit s | score s |", "|---|" + "---|" * (len(names) + 2)]
    for row in first.rows:
        cells = [_cell([r.row(row.name).metrics[name] for r in results], row.baseline) for name in names]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {row.seconds_fit:.1f} | {row.seconds_score:.1f} |")
    lines.append("")
    for row in (r for r in first.rows if not r.baseline):
        tests = [c for r in results for c in r.comparisons if c.name == row.name and c.metric == names[0]]
        if tests:
            each = "; ".join(
                f"{c.difference:+.4f} ({c.low or 0:+.4f} to {c.high or 0:+.4f}), p = {c.p:.3f}" for c in tests
            )
            lines += [f"{row.name} − {tests[0].baseline}, {names[0]}, paired over users, by seed: {each}", ""]
    return lines


def _cell(seeds: Sequence[Estimate], baseline: bool) -> str:
    """The mean over seeds with every seed's figure, and the interval over users of the seed in the middle."""
    values = [e.mean or 0.0 for e in seeds]
    middle = seeds[values.index(median_low(values))]
    interval = "" if middle.low is None else f" ({middle.low:.4f} to {middle.high:.4f})"
    if baseline or len(values) == 1:
        return f"{values[0]:.4f}{interval}"
    every = ", ".join(f"{v:.4f}" for v in values)
    return f"**{mean(values):.4f}** ± {stdev(values):.4f} [{every}]{interval}"


def compared(runs: Sequence[SeedRun], others: Sequence[SeedRun]) -> str:
    """The first table's model rows of two configs on the same cases, seed beside seed: what a change of settings costs or gains.

    Raises:
        UserError: the runs were measured on different cases, or the seeds differ.
    """
    ours, theirs = ([next(iter(run.results().values())) for run in side] for side in (runs, others))
    seeds = [[run.config.train.seed for run in side] for side in (runs, others)]
    if seeds[0] != seeds[1]:
        raise UserError(f"the seeds differ: {seeds[0]} and {seeds[1]}", remedy="compare the same seeds")
    about = [(r.protocol, r.split, r.cases, r.items) for r in (ours[0], theirs[0])]
    if about[0] != about[1]:
        raise UserError(
            f"the tables differ: {about[0]} and {about[1]}", remedy="measure both on the same data and protocol"
        )
    names = _shown(ours[0])
    changed = differing(runs[0].config, others[0].config)
    what = ", ".join(f"{key} {_word(value)}" for key, value in changed.items())
    lines = [
        f"**{runs[0].config.name} beside {others[0].config.name}** ({what}), {ours[0].protocol}, {ours[0].cases:,} cases",
        "",
    ]
    lines += ["| system | config | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    differences = []
    for row in (r for r in ours[0].rows if not r.baseline):
        found = []
        for side, results in ((runs, ours), (others, theirs)):
            cells = [[r.row(row.name).metrics[name] for r in results] for name in names]
            found.append([e.mean or 0.0 for e in cells[0]])
            lines.append(f"| {row.name} | {side[0].config.name} | {' | '.join(_cell(cell, False) for cell in cells)} |")
        by_seed = [a - b for a, b in zip(*found)]
        spread = f" ± {stdev(by_seed):.4f}" if len(by_seed) > 1 else ""
        each = ", ".join(f"{d:+.4f}" for d in by_seed)
        differences += ["", f"{row.name}, {names[0]}, first less second: {mean(by_seed):+.4f}{spread} by seed [{each}]"]
    return "\n".join([*lines, *differences]) + "\n"


def draw(runs: Sequence[SeedRun], file: Path) -> None:
    """A dot for each system of the first table, mean over seeds, with its interval over users; PNG."""
    from instructrec_jax.evaluation.figures import require_matplotlib

    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [next(iter(run.results().values())) for run in runs]
    metric = next(m for m in ("ndcg@10", "hr@1") if m in results[0].rows[0].metrics)
    rows = sorted(results[0].rows, key=lambda row: -mean(r.row(row.name).metrics[metric].mean or 0.0 for r in results))
    figure = Figure(figsize=(6.4, 0.9 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, row in enumerate(rows):
        colour = "#8a8f98" if row.baseline else "#1f6feb"
        seeds = [r.row(row.name).metrics[metric] for r in results]
        for estimate in seeds if not row.baseline else seeds[:1]:
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [y, y], color=colour, lw=2, alpha=0.35)
            axes.plot([estimate.mean], [y], "o", color=colour, ms=6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{metric}, {results[0].data}, {results[0].protocol}, {results[0].cases:,} cases")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, metadata={"Software": None})


def put_block(document: Path, name: str, text: str) -> None:
    """Replace the block ``name`` of a document, or put it at the end."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end of results: {name} -->"
    before = document.read_text(encoding="utf-8") if document.is_file() else ""
    block = f"{begin}\n{text.rstrip()}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(before):
        after = pattern.sub(lambda _: block, before)
    else:
        after = f"{before.rstrip()}\n\n{block}\n" if before.strip() else f"{block}\n"
    write_atomic(document, after)

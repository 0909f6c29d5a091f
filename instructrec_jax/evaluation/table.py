"""The result of an evaluation: systems x metrics with intervals and paired tests, as one object that is also JSON.

A ``Row`` holds one system's numbers per case; ``EvaluationResult.build`` turns rows over the same cases into what
people read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.errors import DataError, UserError
from instructrec_jax.evaluation import intervals, metrics

FORMAT = 1
HIGHER_IS_BETTER = ("hr@", "ndcg@", "mrr@", "recall@")


@dataclass(frozen=True)
class Row:
    """One system over the evaluation cases."""

    name: str
    user: Int[np.ndarray, " cases"]  # user index of each case
    values: dict[str, Float[np.ndarray, " cases"]]  # "ndcg@10" -> one number per case
    lists: Int[np.ndarray, "cases k"] | None = None  # top lists, best first (-1 empty, <= -2 not in the catalogue)
    seconds_fit: float = 0.0
    seconds_score: float = 0.0
    baseline: bool = True  # False: a system under test, compared with the best baseline
    notes: dict[str, Any] = field(default_factory=dict)  # JSON-able remarks, e.g. {"users_without_list": 3}

    @staticmethod
    def from_ranks(
        name: str, user: Int[np.ndarray, " cases"], ranks: metrics.TargetRank, cutoffs: Sequence[int], **rest: Any
    ) -> Row:
        """A row with HR, NDCG and MRR at the cutoffs from target ranks."""
        return Row(name, np.asarray(user), metrics.metrics_at(ranks, cutoffs), **rest)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; ``None`` where there is none (a figure of the whole list set, or a single
    user).
    """

    mean: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """One system's line of the table."""

    name: str
    baseline: bool
    metrics: dict[str, Estimate]
    seconds_fit: float = 0.0
    seconds_score: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A system against the best baseline on one metric: mean difference over users, interval, two-sided paired p."""

    name: str
    baseline: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    p: float
    users: int
    changed: int  # users on whom the two differ


@dataclass(frozen=True)
class EvaluationResult:
    """What ``instructrec evaluate`` found. ``protocol`` is part of every metric's meaning: "full", "1+99 uniform seed
    0", ...
    """

    protocol: str
    data: str  # name of the data set
    split: str  # "test" or "valid"
    cases: int
    users: int
    items: int
    rows: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def build(
        rows: Sequence[Row],
        popularity: Int[np.ndarray, " I"],
        *,
        protocol: str,
        data: str,
        split: str = "test",
        list_k: int = 10,
        resamples: int = 2000,
        seed: int = 0,
        notes: dict[str, Any] | None = None,
    ) -> EvaluationResult:
        """Summarise rows over the same cases and compare each system under test with the best baseline.

        Args:
            rows: at least one; all over the same cases in the same order.
            popularity: training interactions per item (for mean popularity and novelty).
            list_k: length of the lists that coverage, Gini, popularity, novelty and the rates are measured on.

        Raises:
            UserError: no rows, two rows with one name, or rows over different cases.
        """
        if not rows:
            raise UserError("an evaluation needs at least one system")
        for row in rows[1:]:
            if not np.array_equal(row.user, rows[0].user):
                raise UserError(
                    f"{row.name!r} ({len(row.user)} cases) and {rows[0].name!r} ({len(rows[0].user)}) differ in cases",
                    remedy="a table compares systems on the same cases: use one split and one protocol",
                )
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            raise UserError(f"two systems of one table share a name: {names}")
        return EvaluationResult(
            protocol=protocol,
            data=data,
            split=split,
            cases=len(rows[0].user),
            users=len(np.unique(rows[0].user)),
            items=len(popularity),
            rows=tuple(summarise(row, popularity, list_k=list_k, resamples=resamples, seed=seed) for row in rows),
            comparisons=tuple(compare(rows, resamples=resamples, seed=seed)),
            notes=dict(notes or {}),
        )

    def row(self, name: str) -> Summary:
        """The line of one system. Raises ``UserError`` if there is none."""
        for summary in self.rows:
            if summary.name == name:
                return summary
        raise UserError(
            f"no system {name!r} in this result", remedy=f"there are {', '.join(s.name for s in self.rows)}"
        )

    def means(self) -> dict[str, dict[str, float | None]]:
        """``{"ease": {"ndcg@10": 0.04, ...}, ...}``: plain means, for one line of JSON."""
        return {s.name: {name: estimate.mean for name, estimate in s.metrics.items()} for s in self.rows}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON-able dictionaries and lists (NaN becomes None)."""
        return _finite({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_json(tree: dict[str, Any]) -> EvaluationResult:
        """The inverse of ``to_json``. Raises ``DataError`` for another format or a missing field."""
        if tree.get("format") != FORMAT:
            raise DataError(
                f"evaluation result of format {tree.get('format')!r}, this version reads {FORMAT}",
                remedy="run `instructrec evaluate` again",
            )
        try:
            rest = {k: v for k, v in tree.items() if k not in ("format", "rows", "comparisons")}
            rows = tuple(
                Summary(**{**row, "metrics": {k: Estimate(**v) for k, v in row["metrics"].items()}})
                for row in tree["rows"]
            )
            return EvaluationResult(rows=rows, comparisons=tuple(Comparison(**c) for c in tree["comparisons"]), **rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not an evaluation result: {error}", remedy="run `instructrec evaluate` again") from error

    def dumps(self) -> str:
        """``to_json`` as text."""
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)

    def markdown(self, names: Sequence[str] = ("ndcg@10", "hr@10", "mrr@10")) -> str:
        """A Markdown table: one line per system, mean and interval per metric, best mean of an accuracy metric in
        bold.
        """
        best = {
            name: max((s.metrics[name].mean or 0.0 for s in self.rows if name in s.metrics), default=None)
            for name in names
            if name.startswith(HIGHER_IS_BETTER)
        }
        lines = ["| system | " + " | ".join(names) + " | fit s | score s |", "|---|" + "---|" * (len(names) + 2)]
        for s in self.rows:
            cells = []
            for name in names:
                estimate = s.metrics.get(name)
                if estimate is None or estimate.mean is None:
                    cells.append("")
                    continue
                mean = f"{estimate.mean:.4f}"
                mean = f"**{mean}**" if best.get(name) == estimate.mean else mean
                cells.append(mean if estimate.low is None else f"{mean} ({estimate.low:.4f} to {estimate.high:.4f})")
            lines.append(f"| {s.name} | {' | '.join(cells)} | {s.seconds_fit:.1f} | {s.seconds_score:.1f} |")
        return "\n".join(lines)


def summarise(
    row: Row, popularity: Int[np.ndarray, " I"], *, list_k: int = 10, resamples: int = 2000, seed: int = 0
) -> Summary:
    """Means over users with bootstrap intervals; with lists also their qualities (``coverage@k`` and ``gini@k`` have no
    interval: a resample of users shows fewer items by construction).
    """
    for name, values in row.values.items():
        if len(values) != len(row.user):
            raise UserError(f"{row.name}: {len(values)} values of {name} for {len(row.user)} cases")
    values = dict(row.values)
    whole: dict[str, Estimate] = {}
    if row.lists is not None:
        k = min(list_k, row.lists.shape[1])
        values |= metrics.list_quality(row.lists, popularity, k)
        counts = metrics.exposure(row.lists, len(popularity), k)
        whole = {
            f"coverage@{k}": Estimate(_number(metrics.coverage(counts))),
            f"gini@{k}": Estimate(_number(metrics.gini(counts))),
        }
    found = intervals.bootstrap_means(values, row.user, resamples=resamples, seed=seed)
    estimates = {name: Estimate(_number(i.mean), _number(i.low), _number(i.high)) for name, i in found.items()}
    return Summary(row.name, row.baseline, estimates | whole, row.seconds_fit, row.seconds_score, dict(row.notes))


def compare(rows: Sequence[Row], *, resamples: int = 2000, seed: int = 0) -> list[Comparison]:
    """Every system under test against the best baseline, for every accuracy metric that both have.

    The best baseline is the one with the highest mean on these same cases, which favours the baseline: the p-value
    errs on the careful side. Several metrics are several tests; p is not corrected for that.
    """
    out = []
    for row in (r for r in rows if not r.baseline):
        for metric in (m for m in row.values if m.startswith(HIGHER_IS_BETTER)):
            rivals = [r for r in rows if r.baseline and metric in r.values]
            if not rivals:
                continue
            best = max(rivals, key=lambda r: intervals.per_user(r.values[metric], r.user).mean())
            test = intervals.paired_test(
                row.values[metric], best.values[metric], row.user, interval_resamples=resamples, seed=seed
            )
            out.append(
                Comparison(
                    row.name,
                    best.name,
                    metric,
                    test.difference,
                    _number(test.low),
                    _number(test.high),
                    test.p,
                    test.users,
                    test.changed,
                )
            )
    return out


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

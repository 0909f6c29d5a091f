"""How the report writes numbers, metrics, statistics and dates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from instructrec_jax.evaluation.table import Estimate, EvaluationResult

_LABELS = {
    "ndcg": "NDCG",
    "hr": "HR",
    "mrr": "MRR",
    "recall": "Recall",
    "coverage": "Coverage",
    "gini": "Gini",
    "popularity": "Popularity",
    "novelty": "Novelty",
    "out_of_catalogue": "Out of catalogue",
    "duplicate": "Duplicates",
    "short": "Short lists",
}
_HELP = {
    "ndcg": "normalised discounted cumulative gain of the first {k} places",
    "hr": "share of cases with the truth among the first {k}",
    "mrr": "mean of 1 / rank where the truth is among the first {k}, else 0",
    "recall": "share of the true items among the first {k}",
    "coverage": "share of the catalogue shown at least once",
    "gini": "0 = all items shown alike, towards 1 = always the same",
    "popularity": "mean training interactions of the items shown",
    "novelty": "mean of −log2 of an item's share of training interactions, in bits",
    "out_of_catalogue": "share of places that hold no catalogue item",
    "duplicate": "share of places that repeat an earlier one",
    "short": "share of lists with fewer than {k} items",
}
_SHARES = ("coverage", "out_of_catalogue", "duplicate", "short")


def metric_label(metric: str) -> str:
    """``NDCG@10`` for ``ndcg@10``, ``NDCG@10/films`` for that of a mixture's set."""
    family, at, k = metric.partition("@")
    return _LABELS.get(family, family) + at + k


def metric_help(metric: str) -> str:
    """What the metric is, in one line; empty for an unknown one."""
    family, _, k = metric.partition("@")
    return _HELP.get(family, "").replace("{k}", k)


def number(value: float | None, metric: str) -> str:
    """A mean with as many digits as its metric deserves; ``–`` where there is none."""
    if value is None:
        return "–"
    family = metric.partition("@")[0]
    if family in _SHARES:
        return f"{100 * value:.1f} %"
    if family in ("popularity", "novelty"):
        return f"{value:,.1f}"
    return f"{value:.3f}" if family == "gini" else f"{value:.4f}"


def interval(estimate: Estimate, metric: str) -> str:
    """``0.0312 to 0.0517``; empty where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low, metric).removesuffix(' %')} to {number(estimate.high, metric)}"


def signed(value: float) -> str:
    """``+0.0123`` or ``−0.0123``."""
    return f"{value:+.4f}".replace("-", "−")


def p_value(p: float) -> str:
    """``p = 0.034`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def score(value: float | None) -> str:
    """A recommender's score: three significant digits."""
    return "" if value is None or not math.isfinite(value) else f"{value:#.3g}".replace("-", "−").removesuffix(".")


def rank(value: float | None) -> str:
    """An expected rank: ``7``, or ``7.5`` among ties; empty where the item is not ranked."""
    return "" if value is None or not math.isfinite(value) else f"{value:,.1f}".removesuffix(".0")


def where(result: EvaluationResult) -> str:
    """What was ranked, for whom."""
    cases = (
        f"{result.cases:,} cases of {result.users:,} users"
        if result.cases != result.users
        else f"{result.users:,} users"
    )
    how = f"all {result.items:,} items" if result.protocol.split()[-1] == "full" else f"{result.protocol} candidates"
    return f"{result.data}, {result.split} split, {cases}, ranking {how}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted name, text) pairs."""
    out: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}: {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            out += flat(value, name)
        else:
            out.append((name.replace("_", " "), plain(value)))
    return out


def plain(value: Any) -> str:
    """Any JSON value for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(v) for v in value) or "–"
    return str(value)


# Statistics that deserve words and units; those not named here are shown under their own name.
_STATISTICS = {
    "users": "users",
    "items": "items",
    "interactions": "interactions",
    "density": "density",
    "first_time": "first event (UTC)",
    "last_time": "last event (UTC)",
    "rating_mean": "mean rating",
    "history_length": "events per user",
    "events": "events per split",
    "items_per_split": "different items per split",
    "users_without_training_events": "users without a training event",
    "tied_last_timestamp": "users whose last timestamp is tied",
    "repeated_pairs": "repeated (user, item) pairs",
    "popularity_gini": "Gini index of item popularity",
    "top_1_percent_share": "interactions on the top 1 % of items",
    "cold_items": "items without a training event",
    "duplicate_titles": "items that share a title",
    "tags": "tags by users",
    "item_columns": "item columns",
    "user_columns": "user columns",
    "title_language": "language of the titles",
}
_PERCENT = ("density", "tied_last_timestamp", "top_1_percent_share")


def statistics_rows(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) pairs; known figures first, in a fixed order, then any others."""
    known = [k for k in _STATISTICS if k in tree]
    return [(_STATISTICS[k], _statistic(k, tree[k])) for k in known] + flat(
        {k: v for k, v in tree.items() if k not in _STATISTICS and k != "name"}
    )


def _statistic(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key in ("first_time", "last_time"):
        try:
            return datetime.fromtimestamp(value, UTC).date().isoformat()
        except (OverflowError, OSError, ValueError):  # not seconds
            return plain(value)
    if key in _PERCENT:
        return f"{100 * value:.3g} %"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(round(v, 1) if isinstance(v, float) else v)}" for name, v in value.items())
    return plain(value)


def training_facts(
    train: Sequence[Mapping[str, float]], best: Mapping[str, float] | None, key: str
) -> list[tuple[str, str]]:
    """Pairs of what the log says about speed and the best step."""
    facts: list[tuple[str, str]] = []
    if train:
        facts += [("steps logged", f"{train[-1]['step']:,}"), ("last loss", f"{train[-1]['loss']:.3f}")]
    if best is not None:
        facts.append(
            ("best validation " + metric_label(key.removeprefix("valid_")), f"{best[key]:.4f} at step {best['step']:,}")
        )
    for name, label, form in (
        ("step_seconds", "median step time", lambda v: f"{1e3 * v:,.0f} ms"),
        ("tokens_per_second", "median speed", lambda v: f"{v:,.0f} tokens/s"),
        ("useful_mfu", "median useful-token MFU", lambda v: f"{100 * v:.1f} %"),
        ("input_stall", "median input stall", lambda v: f"{100 * v:.1f} %"),
    ):
        values = sorted(line[name] for line in train if math.isfinite(line.get(name, math.nan)))
        if values:
            facts.append((label, form(values[len(values) // 2])))
    return facts

"""``RUN_DIR/report.html``: one page that needs no network, no script and no other file.

Reads what the commands left in the run directory: ``config.yaml``, ``metrics.jsonl`` and ``evaluation/*.json``. A part
that is not there yet becomes a sentence with the command that makes it. All text from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from instructrec_jax.errors import DataError
from instructrec_jax.evaluation import figures
from instructrec_jax.evaluation import report_text as text
from instructrec_jax.evaluation.report_run import AGAIN, PARTS, Evaluation, Run, read_run
from instructrec_jax.evaluation.table import HIGHER_IS_BETTER, Comparison, Estimate, EvaluationResult, Summary
from instructrec_jax.files import path_of, write_atomic

REPORT = "report.html"
_SHOWN_HISTORY = 8


def write_report(run_dir: str | Path) -> Path:
    """Write ``run_dir/report.html`` from what is in the run directory and return its path.

    The same files give the same bytes.

    Raises:
        UserError: Matplotlib is missing, or ``run_dir`` is not a run directory.
        DataError: a file of the run is not what the commands write; the message names it.
    """
    run_dir = path_of(run_dir)
    figures.require_matplotlib()
    run = read_run(run_dir)
    path = run_dir / REPORT
    write_atomic(path, render(run))
    return path


def render(run: Run) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    source = resources.files("instructrec_jax.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup  # only for pictures made by figures.py, which escapes what it shows
    page = environment.from_string(source)
    return page.render(
        run=run,
        headline=headline(run),
        training=_training(run),
        protocols=[_protocol(e, i) for i, e in enumerate(run.evaluations)],
        statistics=_checked(run, "statistics", text.statistics_rows),
        steps=_checked(run, "steps", _steps),
        heat_map=_checked(run, "heat_map", _heat_map),
        lorenz=_checked(run, "lorenz", _lorenz),
        prompts=_checked(run, "prompts", _prompts),
        users=_checked(run, "users", lambda users: [_user(u) for u in users]),
    )


# ------------------------------------------------------------------------------------------------------------- headline


def headline(run: Run) -> dict[str, str] | None:
    """The first system under test beside the best baseline on NDCG, in words.

    The verdict is "better" or "worse" where the paired test has p < 0.05, else "open". None where no evaluation has a
    system under test.
    """
    for evaluation in run.evaluations:
        result = evaluation.results.get("next_item")
        system = next((s for s in result.rows if not s.baseline), None) if result else None
        metric = main_metric(result, "ndcg") if result else None
        if result is None or system is None or metric is None or metric not in system.metrics:
            continue
        own = system.metrics[metric]
        words = {
            "system": system.name,
            "metric": text.metric_label(metric),
            "value": text.number(own.mean, metric),
            "interval": text.interval(own, metric),
            "where": text.where(result),
            "verdict": "open",
            "rival": "",
        }
        found = next((c for c in result.comparisons if c.name == system.name and c.metric == metric), None)
        if found is None:
            return words
        rival = result.row(found.baseline).metrics[metric]
        return words | {
            "rival": found.baseline,
            "rival_value": text.number(rival.mean, metric),
            "rival_interval": text.interval(rival, metric),
            **_comparison(found),
        }
    return None


def _comparison(found: Comparison) -> dict[str, str]:
    sure = found.p < 0.05
    return {
        "name": found.name,
        "baseline": found.baseline,
        "metric": text.metric_label(found.metric),
        "difference": text.signed(found.difference),
        "difference_interval": ""
        if found.low is None or found.high is None
        else f"{text.signed(found.low)} to {text.signed(found.high)}",
        "p": text.p_value(found.p),
        "users": f"{found.users:,}",
        "changed": f"{found.changed:,}",
        "verdict": ("better" if found.difference > 0 else "worse") if sure else "open",
    }


# ------------------------------------------------------------------------------------------------------------- training


def _training(run: Run) -> dict[str, Any] | None:
    if not run.train and not run.valid:
        return None
    loss = {
        title: xy
        for key, title in (("loss", "total"), ("item_loss", "items"), ("text_loss", "words"))
        if (xy := _xy(run.train, key))
    }
    tasks = sorted({k for line in run.train for k in line if k.partition("_loss/")[0] in ("item", "text") and "/" in k})
    by_task = {k.replace("_loss/", ", ").replace("item,", "items,").replace("text,", "words,"): k for k in tasks}
    key = next((k for k in ("valid_ndcg@10", *sorted(_keys(run.valid, "valid_ndcg@"))) if _xy(run.valid, k)), "")
    best = max(run.valid, key=lambda line: line.get(key, -math.inf)) if key else None
    valid = {
        text.metric_label(k.removeprefix("valid_")): xy
        for k in _keys(run.valid, "valid_ndcg@", "valid_hr@")
        if (xy := _xy(run.valid, k))
    }
    return {
        "loss": figures.curves(loss, label="Training loss by step", name="loss") if loss else "",
        "valid": figures.curves(
            valid, label="Validation metrics by step", marked=best["step"] if best else None, name="valid"
        )
        if valid
        else "",
        "facts": text.training_facts(run.train, best, key),
        "tasks": [
            (title, f"{xy[1][0]:.3f}", f"{xy[1][-1]:.3f}") for title, k in by_task.items() if (xy := _xy(run.train, k))
        ],
        "thinned": len(run.train) > len(figures.thin(*_xy(run.train, "loss") or ((), ()))[0]),
    }


def _keys(lines: Sequence[Mapping[str, float]], *starts: str) -> list[str]:
    """Keys that start so, in order of first appearance."""
    return list(dict.fromkeys(k for line in lines for k in line if k.startswith(starts)))


def _xy(lines: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]] | None:
    points = [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


# --------------------------------------------------------------------------------------------------------------- tables


def main_metric(result: EvaluationResult, family: str) -> str | None:
    """``family@10`` if a row has it, else the largest cut-off that there is, else None."""
    cutoffs = {int(m.partition("@")[2]) for row in result.rows for m in row.metrics if m.startswith(f"{family}@")}
    return f"{family}@{10 if 10 in cutoffs else max(cutoffs)}" if cutoffs else None


def _protocol(evaluation: Evaluation, number: int) -> dict[str, Any]:
    parts = []
    for key, result in evaluation.results.items():
        main = main_metric(result, "ndcg") or next((m for s in result.rows for m in s.metrics), "")
        columns = [m for f in ("ndcg", "hr", "recall", "mrr") if (m := main_metric(result, f))]
        names = list(dict.fromkeys(m for row in result.rows for m in row.metrics))
        accuracy = [m for m in names if m.startswith(HIGHER_IS_BETTER)]
        bars = [
            figures.Bar(s.name, e.mean, e.low, e.high, not s.baseline)
            for s in result.rows
            if (e := s.metrics.get(main)) and e.mean is not None
        ]
        label = f"{text.metric_label(main)} by system, {evaluation.protocol}, with 95 % intervals"
        parts.append(
            {
                "key": key,
                "title": PARTS[key],
                "result": result,
                "where": text.where(result),
                "main": _table(result, columns),
                "all": _table(result, accuracy),
                "lists": _table(result, [m for m in names if m not in accuracy]),
                "picture": figures.dot_plot(
                    bars, label=label, x_label=text.metric_label(main), name=f"dots-{number}-{key}"
                )
                if bars
                else "",
                "comparisons": [_comparison(c) for c in result.comparisons],
                "notes": [*text.flat(result.notes), *(n for s in result.rows for n in text.flat(s.notes, s.name))],
            }
        )
    return {
        "id": f"protocol-{number}",
        "name": evaluation.protocol,
        "title": (f"{evaluation.of_set}: " if evaluation.of_set else "")
        + ("Full ranking" if evaluation.protocol == "full" else f"Candidates: {evaluation.protocol}")
        + ("" if evaluation.split == "test" else f", {evaluation.split} split"),
        "parts": {p["key"]: p for p in parts},
        "best_step": evaluation.tree.get("best_step"),
    }


def _table(result: EvaluationResult, metrics: Sequence[str]) -> dict[str, Any]:
    """Columns and rows of text; the best mean of an accuracy metric is marked."""
    best = {
        m: max((e.mean for s in result.rows if (e := s.metrics.get(m)) and e.mean is not None), default=None)
        for m in metrics
        if m.startswith(HIGHER_IS_BETTER)
    }

    def cell(system: Summary, metric: str) -> dict[str, Any]:
        estimate = system.metrics.get(metric, Estimate(None))
        top = estimate.mean is not None and estimate.mean == best.get(metric)
        return {
            "mean": text.number(estimate.mean, metric),
            "interval": text.interval(estimate, metric),
            "best": top and len(result.rows) > 1,
        }

    return {
        "columns": [{"label": text.metric_label(m), "help": text.metric_help(m)} for m in metrics],
        "rows": [
            {
                "name": s.name,
                "accent": not s.baseline,
                "cells": [cell(s, m) for m in metrics],
                "fit": f"{s.seconds_fit:.1f}",
                "score": f"{s.seconds_score:.1f}",
            }
            for s in result.rows
        ],
    }


# ---------------------------------------------------------------------------------------------------- parts of the data


def _steps(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def change(pair: Sequence[int]) -> dict[str, str]:
        before, after = pair
        return {"after": f"{after:,}", "change": f"{after - before:+,}".replace("-", "−") if after != before else ""}

    return [
        {"name": s["name"], "detail": s.get("detail") or ""}
        | {key: change(s[key]) for key in ("interactions", "users", "items")}
        for s in steps
    ]


def _heat_map(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Cells with their shade (0 to 100) and margins, which weigh every case alike."""
    ndcg, count = tree["ndcg"], tree["count"]
    if {len(row) for row in (*ndcg, *count)} != {len(tree["columns"])} or not len(ndcg) == len(count) == len(
        tree["rows"]
    ):
        raise ValueError("rows, columns, ndcg and count of the heat map differ in size")
    known = [v for row in ndcg for v in row if v is not None]
    top = max(known, default=0.0) or 1.0

    def cell(value: float | None, cases: int) -> dict[str, Any]:
        shade = 0 if value is None else round(100 * max(value, 0.0) / top)
        return {"value": "" if value is None else f"{value:.3f}", "count": f"{cases:,}", "shade": shade}

    def mean(values: Sequence[float | None], cases: Sequence[int]) -> dict[str, Any]:
        total = sum(cases)
        return cell(sum((v or 0.0) * c for v, c in zip(values, cases)) / total if total else None, total)

    return {
        "columns": tree["columns"],
        "rows": [
            {"label": label, "cells": [cell(v, c) for v, c in zip(v_row, c_row)], "all": mean(v_row, c_row)}
            for label, v_row, c_row in zip(tree["rows"], ndcg, count)
        ],
        "all": [mean([row[j] for row in ndcg], [row[j] for row in count]) for j in range(len(tree["columns"]))],
        "total": mean([v for row in ndcg for v in row], [c for row in count for c in row]),
    }


def _lorenz(tree: Mapping[str, Any]) -> str:
    return figures.lorenz(
        {name: (curve["x"], curve["y"]) for name, curve in tree.items()},
        label="Lorenz curves of how often items are shown, by system",
        name="lorenz",
    )


def _prompts(prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for prompt in prompts:
        tokens = [{"text": t["text"], "kind": t["kind"], "loss": t["loss"]} for t in prompt["tokens"]]
        counts = {loss: sum(loss in t["loss"] for t in tokens) for loss in ("item", "text")}
        out.append({k: prompt[k] for k in ("template", "task", "language")} | {"tokens": tokens, "counts": counts})
    return out


def _user(user: Mapping[str, Any]) -> dict[str, Any]:
    """A user's card; the truth is marked in the list once, at its rank where two items share its title."""
    places = [i for i, entry in enumerate(user["list"]) if entry["title"] == user["truth"]]
    rank = user.get("rank")
    # Ties put an expected rank between two places: the nearest entry with the title is meant.
    hit = min(places, key=lambda i: abs(i + 1 - (rank or 0)), default=None)
    history = list(user["history"])
    return {
        "id": user["user_id"],
        "older": history[:-_SHOWN_HISTORY],
        "newest": history[-_SHOWN_HISTORY:],
        "list": [
            {"title": e["title"], "score": text.score(e.get("score")), "hit": i == hit}
            for i, e in enumerate(user["list"])
        ],
        "truth": user["truth"],
        "rank": text.rank(rank),
        "hit": hit is not None,
    }


def _checked(run: Run, key: str, make: Any) -> Any:
    """``make(part)`` of the first evaluation that has the part, None without; a malformed part names its file."""
    for evaluation in run.evaluations:
        if part := evaluation.tree.get(key):
            try:
                return make(part)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise DataError(f"{key!r} is malformed: {error!r}", file=evaluation.file, remedy=AGAIN) from error
    return None

"""Evaluation of a run: the tuned model beside the classic recommenders, on the same cases, with intervals.

Four tables come out of one call:

* *next item*: history in, ranking of the whole catalogue (``full``) or of frozen candidates (``1+9``, ``1+99``) out;
* *search*: the wish is made from the target's own labels, so this measures finding what was described, not next-item prediction;
* *likelihood*: the paper's method on ``1+9`` frozen candidates, for a fixed sample of cases;
* *wordings*: the first two by wordings of the instruction that were trained on and that were held out (``wordings.py``).

A published language model that is tuned without item tokens has the first table only: titles ranked by likelihood on frozen
candidates, after and before tuning.

Baselines learn from training and validation events when the test split is measured (they have no other use for the latter). Of the
model only the item memory does, unless the run is a refit; the language model sees the validation event in the history.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from instructrec_jax import baseline_store, prepare, retrieval, wordings
from instructrec_jax import config as configs
from instructrec_jax.cases import (
    Measured,
    Ranked,
    ScoreBlock,
    Task,
    against_negatives,
    rank,
    rank_first,
    sample_cases,
    with_target,
)
from instructrec_jax.data.privacy import user_keys
from instructrec_jax.data.schema import SPLIT_NAMES, TEST, Cases, SplitData
from instructrec_jax.errors import UserError
from instructrec_jax.evaluation import metrics, slices
from instructrec_jax.evaluation.recommendations import evaluate_lists, read_recommendations, write_recommendations
from instructrec_jax.evaluation.table import EvaluationResult, Row
from instructrec_jax.files import path_of, write_json
from instructrec_jax.instructions.prompts import NothingToSay
from instructrec_jax.models.adapters import join
from instructrec_jax.retrieval.ease import EASE
from instructrec_jax.run import Say, Session, trained
from instructrec_jax.samples import sample_prompts, sample_users
from instructrec_jax.scoring import Request, Scorer
from instructrec_jax.training import hosts

MODEL = "model"
BEFORE = "model before tuning"
WITHOUT = "model without item memory"
_SEARCH_CASES = 2000


def evaluate(
    run_dir: str | Path, overrides: Sequence[str] = (), *, split: int = TEST, set_name: str = "", say: Say
) -> dict[str, Any]:
    """Evaluate a run's best checkpoint and write ``evaluation/<protocol>.json`` and the model's lists beside it.

    Returns the content of that file (see ``docs/metrics.md``): ``next_item``, ``search``, ``likelihood`` and ``wordings`` are
    ``EvaluationResult`` objects in JSON. Of a mixture ``set_name`` says which set (``evaluate_sets`` takes all).

    Raises:
        UserError: the folder is no trained run, the split has no cases, or a mixture and no name of a set.
    """
    run_dir = path_of(run_dir)
    with trained(run_dir, tuple(overrides)) as (s, params, step):
        return _evaluated(s.one_set(set_name), params, step, run_dir, split, sample_prompts(s.prepared), say)


def evaluate_sets(
    run_dir: str | Path, overrides: Sequence[str] = (), *, split: int = TEST, say: Say
) -> list[dict[str, Any]]:
    """``evaluate`` of every set of a mixture, in the order of its config; of another run of its one data set."""
    run_dir = path_of(run_dir)
    with trained(run_dir, tuple(overrides)) as (s, params, step):
        prompts = sample_prompts(s.prepared)
        return [_evaluated(part, params, step, run_dir, split, prompts, say) for part in s.sets()]


def _evaluated(
    s: Session, params: Any, step: int, run_dir: Path, split: int, prompts: list[dict[str, Any]], say: Say
) -> dict[str, Any]:
    """All tables of one data set, written. ``prompts``: examples of what the run was trained on."""
    settings, data = s.config.evaluate, s.prepared.data
    cases = data.cases(split)
    if not len(cases):
        raise UserError(f"the {SPLIT_NAMES[split]} split has no cases", remedy="see data.split in the config")
    if not s.sizes.items:
        cases = sample_cases(cases, settings.likelihood_users or len(cases), s.config.train.seed + 1)
    task = Task.of(s.prepared.data, cases)
    protocol, wanted = "full", settings.protocol
    if wanted == "full" and not s.sizes.items:
        wanted = "1+9"
        say("the model has no item head: titles are scored by their likelihood, on 1+9 candidates")
    if wanted != "full":
        protocol, task = against_negatives(s, task, int(wanted.removeprefix("1+")))
    scorer = s.scorer(params, memory="all" if split == TEST else "train")
    say(
        f"{data.name}, {SPLIT_NAMES[split]} split, {len(cases):,} cases, {data.num_items:,} items; protocol {protocol}; step {step}"
    )

    fitted = fit_baselines(s, include_valid=split == TEST, say=say)
    next_item, ranked = _next_item(s, params, scorer, task, fitted, protocol, split, say)
    search = likelihood = worded = None
    if s.sizes.items:
        search = _search(s, params, scorer, cases, fitted, split, say)
        likelihood = _likelihood(s, scorer, cases, split, say) if settings.likelihood_users else None
        worded = wordings.measure(s, scorer, cases, split, say) if settings.wording_cases else None

    model = ranked[MODEL]
    value = metrics.metrics_at(model.ranks, (10,))["ndcg@10"]
    lengths = np.asarray([len(h) for h in task.histories])
    heat = slices.heat_map(value, lengths, data.train_popularity[cases.target])
    curves = {name: slices.lorenz(metrics.exposure(r.lists, data.num_items, 10)) for name, r in ranked.items()}
    payload = {
        "protocol": protocol,
        "split": SPLIT_NAMES[split],
        "run": run_dir.name,
        "set": s.space and data.name,
        "best_step": step,
        "next_item": next_item.to_json(),
        "search": search and search.to_json(),
        "likelihood": likelihood and likelihood.to_json(),
        "wordings": worded and worded.to_json(),
        "heat_map": {
            "rows": heat.rows,
            "columns": heat.columns,
            "ndcg": _numbers(heat.mean),
            "count": heat.count.tolist(),
        },
        "lorenz": {name: {"x": x.tolist(), "y": y.tolist()} for name, (x, y) in curves.items()},
        "users": sample_users(data, cases, task.histories, model.lists, model.scores, model.ranks),
        "prompts": prompts,
        "statistics": s.prepared.manifest["statistics"],
        "steps": [asdict(step) for step in data.steps],
    }
    if not hosts.first():
        return payload
    folder = run_dir / "evaluation"
    name = file_name(protocol, split) + (f"_{data.name}" if s.space else "")
    write_json(folder / f"{name}.json", payload)
    write_lists(folder / f"{name}_model.csv.gz", s.prepared.data, cases, model)
    say(f"written: {folder / name}.json and the model's lists beside it")
    return payload


def write_lists(path: Path, data: SplitData, cases: Cases, ranked: Ranked) -> None:
    """One list per user as a recommendation file: that of the user's first case.

    A file is judged against all test events of a user (``evaluate_lists``), so its list may not know any of them; the lists of
    later cases have the earlier test events in their history and leave them out.
    """
    users, first = np.unique(cases.user, return_index=True)
    write_recommendations(path, data, users, ranked.lists[first], ranked.scores[first])


def evaluate_file(run_dir: str | Path, file: str | Path, *, split: int = TEST, set_name: str = "") -> EvaluationResult:
    """Metrics of a recommendation file (user_id, item_id, score) made by anything, on the split of a run's data.

    Raises:
        UserError: the folder is no run, a mixture and no name of a set, or the file cannot be used; the message names the row.
    """
    run_dir = path_of(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not a run: it has no config.yaml", remedy="give the folder that `instructrec train` printed"
        )
    config = configs.load(run_dir / "config.yaml")
    prepared = prepare.load(config)
    config, prepared, _ = prepare.each_set(config, prepared)[prepare.number_of(config, prepared, set_name)]
    data = prepared.data
    cutoffs = config.evaluate.cutoffs
    recommendations = read_recommendations(file, data, k=max(cutoffs), user_key=user_keys(config.data.hash_ids))
    row = evaluate_lists(recommendations, data, split=split, cutoffs=cutoffs)
    return EvaluationResult.build(
        [row],
        data.train_popularity,
        protocol="lists as delivered",
        data=data.name,
        split=SPLIT_NAMES[split],
        resamples=config.evaluate.bootstrap,
    )


def file_name(protocol: str, split: int = TEST) -> str:
    """``full``, ``1_9_uniform_seed_0``, ``full_valid``: the protocol as a file name."""
    name = re.sub(r"\W+", "_", protocol)
    return name if split == TEST else f"{name}_{SPLIT_NAMES[split]}"


def fit_baselines(s: Measured, *, include_valid: bool, say: Say) -> dict[str, tuple[retrieval.Recommender, float]]:
    """The configured baselines, and all that were tuned on these data, fitted, with their fit seconds.

    What was tuned has its tuned settings, and the seconds of its own fit. One that cannot be fitted here is named and left out.
    """
    out: dict[str, tuple[retrieval.Recommender, float]] = {}
    ease: EASE | None = None
    tuned = baseline_store.saved(s.config, s.prepared)
    for name in dict.fromkeys((*s.config.evaluate.baselines, *tuned)):
        begun = time.perf_counter()
        try:
            if name in tuned:
                say(f"  {name}, tuned on {len(tuned[name].result['trials'])} settings")
                fitted = tuned[name].recommender(s.config, s.prepared, include_valid=include_valid)
                out[name] = (fitted, tuned[name].result["seconds"]["fit"])
                continue
            fitted = baseline_store.build(name, {}, s.config, s.prepared)
            if isinstance(fitted, EASE) and ease is not None:
                fitted = ease.with_last(fitted.last)  # the inverse is the same for all of them
            else:
                fitted = fitted.fit(s.prepared.data, include_valid=include_valid)
        except UserError as error:
            say(f"  {name} is left out: {error.message}")
            continue
        if isinstance(fitted, EASE):
            ease = fitted
        out[name] = (fitted, time.perf_counter() - begun)
    return out


def _next_item(
    s: Session, params: Any, scorer: Scorer, task: Task, fitted: dict, protocol: str, split: int, say: Say
) -> tuple[EvaluationResult, dict[str, Ranked]]:
    width = max(10, *s.config.evaluate.cutoffs)
    systems: dict[str, ScoreBlock] = {}
    if s.sizes.items:
        prompts = s.sequential_prompts(task.cases)
        systems[MODEL] = lambda a, b: scorer.score_all(prompts[a:b])
        if scorer.memory is not None:
            bare = s.scorer(params, memory="none")
            systems[WITHOUT] = lambda a, b: bare.score_all(prompts[a:b])
    else:
        systems[MODEL] = _title_likelihood(s, scorer, task)
        if s.config.evaluate.before_tuning:
            systems[BEFORE] = _title_likelihood(s, s.scorer(join(*s.start())), task)
    for name, (recommender, _) in fitted.items():
        systems[name] = lambda a, b, r=recommender: r.score(task.histories[a:b], task.cases.user[a:b])
    ranked = {}
    for name, score in systems.items():
        say(f"  scoring {name}")
        ranked[name] = rank(task, score, width)
    seconds = {name: fit for name, (_, fit) in fitted.items()}
    return _result(s, ranked, task.cases, protocol, split, seconds, {MODEL, BEFORE, WITHOUT}), ranked


def _title_likelihood(s: Session, scorer: Scorer, task: Task) -> ScoreBlock:
    """Scores ``[cases, I]`` of a model without an item head: log P(title | prompt) of the candidates, -inf elsewhere."""
    assert task.candidates is not None
    lists = with_target(task.cases, task.candidates)
    prompts = s.prompts("describe", task.cases)

    def block(start: int, stop: int) -> np.ndarray:
        out = np.full((stop - start, s.prepared.data.num_items), -np.inf, np.float32)
        requests = [Request(prompt, row) for prompt, row in zip(prompts[start:stop], lists[start:stop])]
        scores = np.stack(scorer.score(requests, "likelihood"))
        np.put_along_axis(out, lists[start:stop], scores, axis=1)
        return out

    return block


def _search(
    s: Session, params: Any, scorer: Scorer, cases: Cases, fitted: dict, split: int, say: Say
) -> EvaluationResult | None:
    """The wish is the target's own labels (I2); BM25 reads the same words. None where the catalogue has no words for a wish."""
    sample = sample_cases(cases, _SEARCH_CASES, s.config.train.seed)
    alone, personal, keep = [], [], []
    for number, (user, end) in enumerate(zip(sample.user, sample.end)):
        try:
            wish = s.builder.wish(int(user), int(end), s.language)
            alone.append(s.builder.evaluation_prompt("search", int(user), int(end), wish, s.language))
            personal.append(s.builder.evaluation_prompt("personal-search", int(user), int(end), wish, s.language))
        except NothingToSay:
            continue
        keep.append((number, wish))
    if not keep:
        say("  search: no item of the split has labels to make a wish from")
        return None
    say(f"  search: {len(keep):,} cases with a wish")
    index = np.asarray([number for number, _ in keep], np.int64)
    wishes = [wish for _, wish in keep]
    chosen = Cases(sample.user[index], sample.end[index], sample.target[index])
    task = Task.of(s.prepared.data, chosen)
    plain = s.sequential_prompts(chosen)
    systems: dict[str, ScoreBlock] = {
        "model, wish": lambda a, b: scorer.score_all(alone[a:b]),
        "model, wish and history": lambda a, b: scorer.score_all(personal[a:b]),
        "model, history": lambda a, b: scorer.score_all(plain[a:b]),
    }
    if scorer.words is not None:
        bare = s.scorer(params, memory="all" if split == TEST else "train", words=False)
        systems["model without word match, wish and history"] = lambda a, b: bare.score_all(personal[a:b])
    tested = set(systems)
    if "bm25" in fitted:
        bm25 = fitted["bm25"][0]
        systems["bm25"] = lambda a, b: bm25.score_text(wishes[a:b])
    ranked = {name: rank(task, score, 20) for name, score in systems.items()}
    return _result(s, ranked, chosen, "search full", split, {}, tested)


def _likelihood(s: Session, scorer: Scorer, cases: Cases, split: int, say: Say) -> EvaluationResult | None:
    """1+9 frozen candidates ranked by the likelihood of their titles, beside the item head on the same candidates."""
    sample = sample_cases(cases, s.config.evaluate.likelihood_users, s.config.train.seed + 1)
    task = Task.of(s.prepared.data, sample)
    if s.prepared.data.num_items < 20:
        say("  likelihood: the catalogue is too small for 1+9 candidates")
        return None
    protocol, task = against_negatives(s, task, 9)
    assert task.candidates is not None
    say(f"  likelihood: {len(sample):,} cases, {protocol}")
    lists = with_target(sample, task.candidates)
    prompts = s.prompts("describe", sample)
    begun = time.perf_counter()
    scores = np.stack(scorer.score([Request(p, c) for p, c in zip(prompts, lists)], "likelihood"))
    by_text = rank_first(scores)
    seconds = time.perf_counter() - begun
    items = s.sequential_prompts(sample)
    by_item = rank_first(np.stack(scorer.score([Request(p, c) for p, c in zip(items, lists)], "items")))
    popular = rank_first(s.prepared.data.train_popularity[lists].astype(np.float64))
    cutoffs = [k for k in (1, 3, 5) if k in s.config.evaluate.cutoffs] or [1, 3, 5]
    rows = [
        Row.from_ranks(
            "model, likelihood of the title", sample.user, by_text, cutoffs, baseline=False, seconds_score=seconds
        ),
        Row.from_ranks("model, item head", sample.user, by_item, cutoffs, baseline=False),
        Row.from_ranks("popularity", sample.user, popular, cutoffs),
    ]
    return EvaluationResult.build(
        rows,
        s.prepared.data.train_popularity,
        protocol=protocol,
        data=s.prepared.data.name,
        split=SPLIT_NAMES[split],
        resamples=s.config.evaluate.bootstrap,
    )


def _result(
    s: Session,
    ranked: dict[str, Ranked],
    cases: Cases,
    protocol: str,
    split: int,
    fit_seconds: dict[str, float],
    tested: set[str],
) -> EvaluationResult:
    settings, data = s.config.evaluate, s.prepared.data
    rows = [
        Row.from_ranks(
            name,
            cases.user,
            r.ranks,
            settings.cutoffs,
            lists=r.lists,
            seconds_fit=fit_seconds.get(name, 0.0),
            seconds_score=r.seconds,
            baseline=name not in tested,
        )
        for name, r in ranked.items()
    ]
    return EvaluationResult.build(
        rows,
        data.train_popularity,
        protocol=protocol,
        data=data.name,
        split=SPLIT_NAMES[split],
        resamples=settings.bootstrap,
    )


def _numbers(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in matrix]


def summary_json(payload: dict[str, Any]) -> dict[str, Any]:
    """The one JSON object of ``--json``: plain means by system, search and likelihood beneath their own keys."""
    out: dict[str, Any] = dict(EvaluationResult.from_json(payload["next_item"]).means())
    for part in ("search", "likelihood", "wordings"):
        if payload[part]:
            out[part] = EvaluationResult.from_json(payload[part]).means()
    out["protocol"] = payload["protocol"]
    out["data"] = payload["next_item"]["data"]
    return json.loads(json.dumps(out))

"""What ``instructrec baseline`` does: tune on the validation split, fit on training and validation events, measure on the test split.

Every baseline has the same budget of trials. A trial is a setting from the baseline's grid (``retrieval/``), the defaults first, the
others drawn without repeats by a keyed hash; it is judged by NDCG@10 on full rankings of all validation cases, whatever the protocol of
the test. A baseline that is trained by gradients ends its epochs on the same split; the final fit takes as many.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from instructrec_jax import prepare, retrieval
from instructrec_jax.baseline_store import AGAIN, Saved, build, data_key, folder_of, saved
from instructrec_jax.cases import Ranked, Task, against_negatives, rank
from instructrec_jax.config import Config
from instructrec_jax.data.schema import SPLIT_NAMES, TEST, VALID
from instructrec_jax.errors import UserError
from instructrec_jax.evaluate import file_name, write_lists
from instructrec_jax.evaluation.metrics import metrics_at
from instructrec_jax.evaluation.table import EvaluationResult, Row
from instructrec_jax.files import read_json, sha256, write_arrays, write_json
from instructrec_jax.instructions.keyed import key
from instructrec_jax.prepare import Prepared
from instructrec_jax.retrieval.base import Recommender, Stored

Say = Callable[[str], None]
FORMAT = 1
ALL = tuple(name for name in retrieval.NAMES if name != "ease_last10")  # ease_last has it among its settings
_LIBRARIES = ("instructrec_jax", "numpy", "scipy", "implicit", "bm25s", "jax", "flax", "optax")


@dataclass(frozen=True)
class Data:
    """A config with its prepared data (a ``run.Measured``): no model, no mesh."""

    config: Config
    prepared: Prepared


@dataclass(frozen=True)
class Trial:
    """A setting and what validation said of it."""

    options: dict[str, Any]
    ndcg: float  # NDCG@10 on the validation split, full ranking
    epochs: int | None  # of the best validation figure; None = not trained in epochs
    seconds: float  # of the fit


def baseline(names: Sequence[str], config: Config, say: Say) -> dict[str, Any]:
    """Tune, fit and measure baselines on a config's prepared data, and save each beside it (see ``baseline_store``).

    Returns an ``EvaluationResult`` in JSON with one row per baseline under ``"next_item"``, and the chosen settings by name under
    ``"options"``.

    Args:
        names: of ``retrieval.NAMES``, or ``all``, which leaves out what cannot be fitted on these data.
        config: a config whose data are prepared.
        say: takes lines of progress.

    Raises:
        DataError: the data are not prepared.
        UserError: an unknown name, no cases, or a named baseline cannot be fitted.
    """
    every = "all" in names
    wanted = ALL if every else tuple(dict.fromkeys(names))
    for name in wanted:
        retrieval.class_of(name)
    s = Data(config, prepare.load(config))
    data = s.prepared.data
    protocol, task = _task(s, TEST)
    say(f"{data.name}, test split, {len(task.cases):,} cases, {data.num_items:,} items; protocol {protocol}; at most "
        f"{config.baseline.trials} settings each")  # fmt: skip
    rows, options = [], {}
    for name in wanted:
        try:
            row, result = _one(s, name, protocol, task, say)
        except UserError as error:
            if not every:
                raise
            say(f"{name} is left out: {error.message}")
            continue
        rows.append(row)
        options[name] = result["options"]
    if not rows:
        raise UserError("no baseline can be fitted on these data")
    return {"protocol": protocol, "next_item": _table(s, rows, protocol).to_json(), "options": options}


def _task(s: Data, split: int) -> tuple[str, Task]:
    cases = s.prepared.data.cases(split)
    if not len(cases):
        raise UserError(f"the {SPLIT_NAMES[split]} split has no cases", remedy="see data.split in the config")
    task, wanted = Task.of(s.prepared.data, cases), s.config.evaluate.protocol
    if split == VALID or wanted == "full":
        return "full", task
    return against_negatives(s, task, int(wanted.removeprefix("1+")))


def _one(s: Data, name: str, protocol: str, task: Task, say: Say) -> tuple[Row, dict[str, Any]]:
    """Tune, fit and measure one baseline; its row, and what was saved."""
    folder = folder_of(s.config) / name
    trials = tune(s, name, folder, say)
    chosen = max(range(len(trials)), key=lambda n: trials[n].ndcg)  # the first of equals
    best = trials[chosen]
    recommender, fit_seconds = _fitted(s, name, folder, best, say)
    ranked = _rank(recommender, task, max(10, *s.config.evaluate.cutoffs))
    row = Row.from_ranks(
        name,
        task.cases.user,
        ranked.ranks,
        s.config.evaluate.cutoffs,
        lists=ranked.lists,
        seconds_fit=fit_seconds,
        seconds_score=ranked.seconds,
        notes={"options": best.options},
    )
    before = _before(s, name, best)
    table = _table(s, [row], protocol)
    result = {
        "format": FORMAT,
        "name": name,
        "data": s.prepared.data.name,
        "data_key": data_key(s.prepared),
        "config_hash": s.config.data_hash(),
        "budget": asdict(s.config.baseline),
        "options": best.options,
        "epochs": best.epochs,
        "trial": chosen,
        "valid_ndcg@10": best.ndcg,
        "trials": [asdict(trial) for trial in trials],
        "seconds": {"tune": sum(t.seconds for t in trials), "fit": fit_seconds, "score": ranked.seconds},
        "versions": {library: importlib.metadata.version(library) for library in _LIBRARIES},
        "evaluations": {**(before.result["evaluations"] if before else {}), protocol: table.to_json()},
        "files": {
            file.name: sha256(file) for file in sorted(folder.glob("*.npz")) if not file.name.endswith("ranks.npz")
        },
    }
    write_arrays(
        folder / f"{file_name(protocol)}_ranks.npz",
        {
            "user": task.cases.user,
            "end": task.cases.end,
            "target": task.cases.target,
            "greater": ranked.ranks.greater,
            "ties": ranked.ranks.ties,
        },
    )
    write_lists(folder / "lists.csv.gz", s.prepared.data, task.cases, ranked)
    write_json(folder / "result.json", result)
    figure = table.rows[0].metrics["ndcg@10" if 10 in s.config.evaluate.cutoffs else next(iter(row.values))]
    say(f"  {name}: test ndcg@10 {figure.mean:.4f}; written: {folder}")
    return row, result


def _fitted(s: Data, name: str, folder: Path, best: Trial, say: Say) -> tuple[Recommender, float]:
    """The final fit and its seconds; from its file where the same settings have been fitted before."""
    before = _before(s, name, best)
    if before is not None and "model.npz" in before.result["files"]:
        return before.recommender(s.config, s.prepared, include_valid=True), before.result["seconds"]["fit"]
    recommender = build(name, best.options, s.config, s.prepared, epochs=best.epochs, say=say)
    begun = time.perf_counter()
    recommender.fit(s.prepared.data, include_valid=True)
    seconds = time.perf_counter() - begun
    if isinstance(recommender, Stored):
        write_arrays(folder / "model.npz", recommender.arrays())
    return recommender, seconds


def _before(s: Data, name: str, best: Trial) -> Saved | None:
    """What an earlier command saved of the very same final fit."""
    found = saved(s.config, s.prepared).get(name)
    if found is None or (found.result["options"], found.result["epochs"]) != (best.options, best.epochs):
        return None
    budget = {k: v for k, v in found.result["budget"].items() if k != "trials"}
    return found if budget == _fit_settings(s.config) else None


def _rank(recommender: Recommender, task: Task, k: int) -> Ranked:
    return rank(task, lambda a, b: recommender.score(task.histories[a:b], task.cases.user[a:b]), k)


def _table(s: Data, rows: Sequence[Row], protocol: str) -> EvaluationResult:
    data = s.prepared.data
    return EvaluationResult.build(
        rows,
        data.train_popularity,
        protocol=protocol,
        data=data.name,
        split=SPLIT_NAMES[TEST],
        resamples=s.config.evaluate.bootstrap,
    )


# --------------------------------------------------------------------------------------------------------------- search


def settings(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """At most ``count`` different settings of a baseline's grid: the defaults, then draws by a keyed hash.

    A larger ``count`` begins with the settings of a smaller one.
    """
    grid: Mapping[str, Sequence[Any]] = retrieval.class_of(name).grid
    out = [{option: values[0] for option, values in grid.items()}]
    count, draw = min(count, math.prod(len(values) for values in grid.values())), 0
    while len(out) < count:
        keys = {option: key(seed, draw, zlib.crc32(f"{name}.{option}".encode())) for option in grid}
        drawn = {option: values[keys[option] % len(values)] for option, values in grid.items()}
        draw += 1
        if drawn not in out:
            out.append(drawn)
    return out


def _fit_settings(config: Config) -> dict[str, Any]:
    return {k: v for k, v in asdict(config.baseline).items() if k != "trials"}


def tune(s: Data, name: str, folder: Path, say: Say) -> list[Trial]:
    """One trial for each of ``settings``; what ``folder/trials.json`` already has is not done again."""
    config, file = s.config, folder / "trials.json"
    head = {"data_key": data_key(s.prepared), "settings": _fit_settings(config), "name": name}
    log: list[Trial] = []
    if file.is_file():
        found = read_json(file, f"remove it, then {AGAIN}")
        if {k: found.get(k) for k in head} == head:
            log = [Trial(**trial) for trial in found["trials"]]
    todo = settings(name, config.baseline.trials, config.baseline.seed)
    _, task = _task(s, VALID)
    out: list[Trial] = []
    for number, options in enumerate(todo):
        trial = next((t for t in log if t.options == options), None)
        done = " (done before)" if trial else ""
        if trial is None:
            recommender = build(name, options, config, s.prepared, say=say)
            begun = time.perf_counter()
            recommender.fit(s.prepared.data, include_valid=False)
            seconds = time.perf_counter() - begun
            ranks = _rank(recommender, task, 10).ranks
            figure = float(metrics_at(ranks, (10,))["ndcg@10"].mean())
            trial = Trial(options, figure, getattr(recommender, "epochs", None), seconds)
            if isinstance(recommender, Stored) and all(trial.ndcg > t.ndcg for t in out):
                write_arrays(folder / f"trial_{number}.npz", recommender.arrays())
            log.append(trial)
            write_json(file, {**head, "trials": [asdict(t) for t in log]})
        out.append(trial)
        told = ", ".join(f"{k} {v}" for k, v in options.items()) or "nothing to set"
        epochs = f", {trial.epochs} epochs" if trial.epochs is not None else ""
        say(f"  {name}, trial {number + 1} of {len(todo)}: {told}: validation ndcg@10 {trial.ndcg:.4f}{epochs}, "
            f"{trial.seconds:.1f} s{done}")  # fmt: skip
    best = max(range(len(out)), key=lambda n: out[n].ndcg)
    for old in folder.glob("trial_*.npz"):
        if old.name != f"trial_{best}.npz":
            old.unlink()
    return out

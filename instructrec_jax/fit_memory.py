"""The item memory of a trained run: links in closed form, their ridge and their weight by validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from instructrec_jax.config import Config, ItemMemoryConfig
from instructrec_jax.data.schema import VALID, Cases
from instructrec_jax.errors import ConfigError
from instructrec_jax.evaluation.metrics import metrics_at, rank_of_target
from instructrec_jax.files import write_json
from instructrec_jax.instructions.prompts import NothingToSay
from instructrec_jax.retrieval.slit import SLIT
from instructrec_jax.scoring.item_memory import INTENTIONS, ItemMemory, strongest
from instructrec_jax.training import hosts

if TYPE_CHECKING:
    from instructrec_jax.run import Say, Session

FILES = {"all": "item_memory.npz", "train": "item_memory_train.npz"}  # links of all known events, of training events
CHOSEN = "item_memory.json"
RIDGES = (30.0, 100.0, 300.0, 1000.0)
WEIGHTS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_MANY_ITEMS = 6_000  # beyond, one ridge is solved for: the time grows with the cube of the catalogue
_SEARCHES = 1_000  # validation cases with a wish


def check_memory(settings: ItemMemoryConfig, by_items: bool, items: int) -> None:
    """Refuse, before the first step, an item memory that could not be fitted after the last.

    Raises:
        ConfigError: the model has no item head, the catalogue is too large for the closed form, or weights for other than three
            intentions.
    """
    if len(settings.weights) not in (0, len(INTENTIONS)):
        raise ConfigError(
            f"model.item_memory.weights has {len(settings.weights)} numbers; it wants one for each of {', '.join(INTENTIONS)}",
            remedy="leave it empty: validation chooses them",
        )
    most = SLIT().max_items
    if not by_items or items > most:
        why = (
            f"its closed form is for at most {most:,} items, and there are {items:,}"
            if by_items
            else "there is no item head"
        )
        raise ConfigError(f"model.item_memory: {why}", remedy="set model.item_memory.past: 0")


def fit_memory(s: Session, params: Any, run_dir: Path, say: Say) -> None:
    """Write the item memory of a run whose parameters are final.

    The ridge and the weights are the best by NDCG@10 on the validation cases, with links from training events. Then the links are
    fitted once more with the validation events; the others stay beside them for who measures the validation split.

    Raises:
        ConfigError: the catalogue is too large for the closed form.
    """
    settings, data = s.config.model.item_memory, s.prepared.data
    ridges = (settings.l2,) if settings.l2 else RIDGES if data.num_items <= _MANY_ITEMS else RIDGES[1:2]
    say(f"item memory: links of {data.num_items:,} items")
    model = SLIT(past=settings.past, future=settings.future)
    system = model.system(data, include_valid=False)
    if len(ridges) == 1 and settings.weights:
        ridge, weights, found = ridges[0], settings.weights, []
    else:
        ridge, weights, found = _chosen(s, params, model, system, ridges)
        say(f"item memory: ridge {ridge:g}, weights " + ", ".join(f"{w:g}" for w in weights))
    model.l2 = ridge
    of_training = strongest(model.solved(system), settings.links)
    known = of_training
    if not s.config.data.split.learn_valid:
        known = strongest(model.solved(model.system(data, include_valid=True)), settings.links)
    if not hosts.first():
        return
    for name, links in (("train", of_training), ("all", known)):
        ItemMemory(links, settings.past, weights).save(run_dir / FILES[name])
    write_json(run_dir / CHOSEN, {"l2": ridge, "weights": weights, "tried": found})


def _chosen(
    s: Session, params: Any, model: SLIT, system: tuple[np.ndarray, np.ndarray], ridges: tuple[float, ...]
) -> tuple[float, tuple[float, ...], list[dict[str, float]]]:
    """(ridge, weights for I0, I1 and I2, what was tried)."""
    from instructrec_jax.run import sample_cases

    data = s.prepared.data
    cases = sample_cases(data.cases(VALID), s.config.train.eval_users, s.config.train.seed)
    if not len(cases):
        raise ConfigError(
            "the item memory's weight is chosen on validation, and there is no validation event",
            remedy="set model.item_memory.l2 and .weights, or model.item_memory.past: 0",
        )
    scorer, keep = s.scorer(params), s.config.model.item_memory.links
    prompts = s.sequential_prompts(cases)
    plain = scorer.score_all(prompts)
    tried: list[dict[str, float]] = []
    links = {}
    for model.l2 in ridges:
        links[model.l2] = strongest(model.solved(system), keep)
        linear = ItemMemory(links[model.l2], model.past, (1.0, 1.0, 1.0)).scores(prompts)
        tried += [
            {"l2": model.l2, "weight": w, "ndcg@10": _ndcg(s, plain + w * linear, cases), "intention": 0}
            for w in WEIGHTS
        ]
    best = max(tried, key=lambda t: t["ndcg@10"])

    asked = _with_wishes(s, cases)
    with_wish = 0.0
    if asked:
        chosen = np.asarray([i for i, _ in asked], np.int64)
        some = Cases(cases.user[chosen], cases.end[chosen], cases.target[chosen])
        prompts = [prompt for _, prompt in asked]
        plain = scorer.score_all(prompts)
        linear = ItemMemory(links[best["l2"]], model.past, (1.0, 1.0, 1.0)).scores(prompts)
        searches = [
            {"l2": best["l2"], "weight": w, "ndcg@10": _ndcg(s, plain + w * linear, some), "intention": 2}
            for w in WEIGHTS
        ]
        tried += searches
        with_wish = max(searches, key=lambda t: t["ndcg@10"])["weight"]
    return best["l2"], (best["weight"], with_wish, with_wish), tried


def _ndcg(s: Session, scores: Float[np.ndarray, "cases I"], cases: Cases) -> float:
    from instructrec_jax.run import case_histories

    ranks = rank_of_target(scores, cases.target, case_histories(s, cases))
    return float(metrics_at(ranks, (10,))["ndcg@10"].mean())


def _with_wishes(s: Session, cases: Cases) -> list[tuple[int, Any]]:
    """(number of a case, its search prompt) where the data has words for a wish; none for a model that has not learnt to search."""
    out: list[tuple[int, Any]] = []
    if not s.config.instructions.search:
        return out
    for number, (user, end) in enumerate(zip(cases.user[:_SEARCHES], cases.end[:_SEARCHES])):
        try:
            prompt = s.builder.evaluation_prompt("personal-search", int(user), int(end), language=s.language)
        except NothingToSay:
            continue
        out.append((number, prompt))
    return out


def load_memory(config: Config, run_dir: Path, which: str, items: int) -> ItemMemory | None:
    """A run's item memory; ``which``: "all" or "train". None where the run has none."""
    file = run_dir / FILES[which]
    return ItemMemory.load(file, items) if config.model.item_memory.past and file.is_file() else None

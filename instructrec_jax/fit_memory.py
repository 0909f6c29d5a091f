"""The item memory of a trained run: links in closed form, their ridge and their weight by validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from instructrec_jax.cases import sample_cases
from instructrec_jax.config import Config, ItemMemoryConfig
from instructrec_jax.data.schema import VALID, Cases
from instructrec_jax.errors import ConfigError
from instructrec_jax.evaluation.metrics import metrics_at, rank_of_target
from instructrec_jax.files import write_json
from instructrec_jax.instructions.prompts import NothingToSay
from instructrec_jax.retrieval.base import training_events
from instructrec_jax.retrieval.slit import SLIT
from instructrec_jax.scoring.item_memory import INTENTIONS, ItemMemory, log_shares, strongest
from instructrec_jax.training import hosts

if TYPE_CHECKING:
    from instructrec_jax.run import Say, Session

FILES = {"all": "item_memory.npz", "train": "item_memory_train.npz"}  # links of all known events, of training events
CHOSEN = "item_memory.json"
RIDGES = (30.0, 100.0, 300.0, 1000.0)
WEIGHTS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
PRIOR_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
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

    The ridge and the weights are the best by NDCG over the whole ranking of the validation cases, with links from training events: most
    cases count nothing in NDCG@10, so it tells settings apart with more noise. Then the links are fitted once more with the validation
    events; the others stay beside them for who measures the validation split.

    Raises:
        ConfigError: the catalogue is too large for the closed form.
    """
    settings, data = s.config.model.item_memory, s.prepared.data
    ridges = (settings.l2,) if settings.l2 else RIDGES if data.num_items <= _MANY_ITEMS else RIDGES[1:2]
    say(f"item memory: links of {data.num_items:,} items")
    model = SLIT(past=settings.past, future=settings.future)
    system = model.system(data, include_valid=False)
    if len(ridges) == 1 and settings.weights:
        chosen = Chosen(ridges[0], settings.weights, settings.prior_weight, [])
    else:
        chosen = _chosen(s, params, model, system, ridges)
        weights = ", ".join(f"{w:g}" for w in chosen.weights)
        say(
            f"item memory: ridge {chosen.l2:g}, weights {weights}, of popularity for unknown users {chosen.prior_weight:g}"
        )
    model.l2 = chosen.l2

    def fitted(system: tuple[np.ndarray, np.ndarray], include_valid: bool) -> ItemMemory:
        counts = np.bincount(data.item[training_events(data, include_valid)], minlength=data.num_items)
        links = strongest(model.solved(system), settings.links)
        return ItemMemory(links, settings.past, chosen.weights, log_shares(counts), chosen.prior_weight)

    of_training = known = fitted(system, False)
    if not s.config.data.split.learn_valid:
        known = fitted(model.system(data, include_valid=True), True)
    if not hosts.first():
        return
    of_training.save(run_dir / FILES["train"])
    known.save(run_dir / FILES["all"])
    write_json(run_dir / CHOSEN, chosen._asdict())


class Chosen(NamedTuple):
    """What validation chose."""

    l2: float
    weights: tuple[float, ...]  # for I0, I1 and I2
    prior_weight: float
    tried: list[dict[str, Any]]  # with the NDCG of each


def _chosen(
    s: Session, params: Any, model: SLIT, system: tuple[np.ndarray, np.ndarray], ridges: tuple[float, ...]
) -> Chosen:
    data = s.prepared.data
    cases = sample_cases(data.cases(VALID), s.config.train.eval_users, s.config.train.seed)
    if not len(cases):
        raise ConfigError(
            "the item memory's weight is chosen on validation, and there is no validation event",
            remedy="set model.item_memory.l2 and .weights, or model.item_memory.past: 0",
        )
    scorer, keep = s.scorer(params), s.config.model.item_memory.links
    prior = log_shares(data.train_popularity)
    tried: list[dict[str, Any]] = []

    def best(what: str, prompts: list[Any], some: Cases, links: dict[float, sp.csr_matrix], steps: tuple[float, ...]):
        plain = scorer.score_all(prompts)
        own = []
        for l2, matrix in links.items():
            added = ItemMemory(matrix, model.past, (1.0, 1.0, 1.0), prior, 1.0).scores(prompts)
            own += [{"what": what, "l2": l2, "weight": w, **ndcg(s, plain + w * added, some)} for w in steps]
        tried.extend(own)
        return max(own, key=lambda t: t["ndcg"])

    links = {}
    for model.l2 in ridges:
        links[model.l2] = strongest(model.solved(system), keep)
    usual = best("history", s.sequential_prompts(cases), cases, links, WEIGHTS)
    links = {usual["l2"]: links[usual["l2"]]}
    with_wish = 0.0
    asking, wishes = with_wishes(s, cases, "personal-search")
    if wishes:
        with_wish = best("history and wish", wishes, asking, links, WEIGHTS)["weight"]
    unknown = [s.builder.recommend_prompt((), language=s.language)] * len(cases)
    nothing = best("nothing", unknown, cases, links, PRIOR_WEIGHTS)
    return Chosen(usual["l2"], (usual["weight"], with_wish, with_wish), nothing["weight"], tried)


def ndcg(s: Session, scores: Float[np.ndarray, "cases I"], cases: Cases) -> dict[str, float]:
    """Means over the cases of NDCG over the whole catalogue, cut at 10 (``ndcg@10``) and not cut (``ndcg``)."""
    data = s.prepared.data
    ranks = rank_of_target(scores, cases.target, data.left_out(data.histories(cases)))
    cut = metrics_at(ranks, (10,))["ndcg@10"]
    return {"ndcg@10": float(cut.mean()), "ndcg": float((1 / np.log2(1 + ranks.expected_rank)).mean())}


def with_wishes(s: Session, cases: Cases, kind: str) -> tuple[Cases, list[Any]]:
    """The cases whose data has words for a wish, and their prompts; none for a model that has not learnt to search."""
    kept, prompts = [], []
    if s.config.instructions.search:
        for number, (user, end) in enumerate(zip(cases.user[:_SEARCHES], cases.end[:_SEARCHES])):
            try:
                prompts.append(s.builder.evaluation_prompt(kind, int(user), int(end), language=s.language))
            except NothingToSay:
                continue
            kept.append(number)
    index = np.asarray(kept, np.int64)
    return Cases(cases.user[index], cases.end[index], cases.target[index]), prompts


def load_memory(config: Config, run_dir: Path, which: str, items: int) -> ItemMemory | None:
    """A run's item memory; ``which``: "all" or "train". None where the run has none."""
    file = run_dir / FILES[which]
    return ItemMemory.load(file, items) if config.model.item_memory.past and file.is_file() else None

"""How much a wish's words count beside the matching head: chosen on validation when training is over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from instructrec_jax.cases import sample_cases
from instructrec_jax.config import WishWordsConfig
from instructrec_jax.data.schema import VALID
from instructrec_jax.errors import ConfigError
from instructrec_jax.files import read_json, write_json
from instructrec_jax.fit_memory import load_memory, ndcg, with_wishes
from instructrec_jax.instructions.packs import LANGUAGES
from instructrec_jax.instructions.templates import load_templates
from instructrec_jax.scoring.wish_words import WishWords
from instructrec_jax.training import hosts

if TYPE_CHECKING:
    from instructrec_jax.run import Say, Session

CHOSEN = "wish_words.json"
WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)  # a match of BM25 is worth 1 to 30
KINDS = ("search", "personal-search")  # prompts without and with a history, in the order of the weights


def check_words(settings: WishWordsConfig, by_items: bool) -> None:
    """Refuse, before the first step, what could not be chosen after the last.

    Raises:
        ConfigError: the model has no item head, or weights for other than two kinds of prompts.
    """
    if settings.enabled and not by_items:
        raise ConfigError(
            "model.wish_words: there is no item head",
            remedy="set model.wish_words.enabled: false, or items in trainable",
        )
    if len(settings.weights) not in (0, len(KINDS)):
        raise ConfigError(
            f"model.wish_words.weights has {len(settings.weights)} numbers; it wants one without and one with a history",
            remedy="leave it empty: validation chooses them",
        )


class Chosen(NamedTuple):
    """What validation chose."""

    weights: tuple[float, ...]
    tried: list[dict[str, Any]]  # with the NDCG@10 of each


def fit_words(s: Session, params: Any, run_dir: Path, say: Say) -> None:
    """Choose the weights of a run whose parameters, and whose item memory if it has one, are final: the best by NDCG@10 of searches on
    the validation cases. 0 where the data has no words for a wish.
    """
    settings = s.config.model.wish_words
    chosen = Chosen(settings.weights, []) if settings.weights else _chosen(s, params, run_dir)
    say(f"words of a wish: weights {', '.join(f'{w:g}' for w in chosen.weights)} without and with a history")
    if hosts.first():
        write_json(run_dir / CHOSEN, chosen._asdict())


def _chosen(s: Session, params: Any, run_dir: Path) -> Chosen:
    cases = sample_cases(s.prepared.data.cases(VALID), s.config.train.eval_users, s.config.train.seed)
    memory = load_memory(s.config, run_dir, "train", s.prepared.data.num_items)
    scorer, weights, tried = s.scorer(params, memory="none", words=False), [], []
    words: WishWords | None = None
    for kind in KINDS:
        some, prompts = with_wishes(s, cases, kind)
        if not prompts:
            weights.append(0.0)
            continue
        words = words or _words(s, (1.0, 1.0))
        plain, match = scorer.score_all(prompts), words.scores(prompts)
        if memory is not None:
            plain = plain + memory.scores(prompts)
        own = [{"what": kind, "weight": w, **ndcg(s, plain + w * match, some)} for w in WEIGHTS]
        weights.append(max(own, key=lambda t: t["ndcg@10"])["weight"])
        tried.extend(own)
    return Chosen(tuple(weights), tried)


def load_words(s: Session, run_dir: Path) -> WishWords | None:
    """What a run's validation chose, with the index of its catalogue. None where the words of a wish do not count."""
    file = run_dir / CHOSEN
    if not s.config.model.wish_words.enabled or not file.is_file():
        return None
    without, with_history = read_json(file, "remove it and run the same `instructrec train` again")["weights"]
    return _words(s, (without, with_history))


def _words(s: Session, weights: tuple[float, float]) -> WishWords:
    known = load_templates(LANGUAGES, s.config.instructions.templates)
    return WishWords(s.prepared.data, known, s.builder.domain, weights)

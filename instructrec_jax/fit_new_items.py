"""How high a trained run ranks the items that training has not shown: their bias, chosen on validation when training is over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float

from instructrec_jax.cases import sample_cases
from instructrec_jax.config import Config
from instructrec_jax.data.schema import VALID, Cases
from instructrec_jax.files import read_json, write_json
from instructrec_jax.fit_memory import load_memory, ndcg
from instructrec_jax.models.new_items import with_new_items
from instructrec_jax.training import hosts

if TYPE_CHECKING:
    from instructrec_jax.run import Say, Session

CHOSEN = "new_items.json"
LIFTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # logits
SHARE = 0.1  # of the seen items that play new where no validation event has a new one


class Chosen(NamedTuple):
    """What validation chose."""

    lift: float  # logits above the mean bias of rarely seen items
    playing: int  # seen items that played new; 0 = the validation events have new ones
    tried: list[dict[str, Any]]  # with the NDCG of each


def wants_lift(s: Session) -> bool:
    """Whether there is something to choose: items that training has not shown, an item head, and events to validate on."""
    new = s.learnt == 0
    return (
        s.config.model.new_item_lift is None
        and s.space is None
        and bool(s.sizes.items)
        and bool(new.any() and not new.all())
        and not s.config.data.split.learn_valid
        and len(s.prepared.data.cases(VALID)) > 0
    )


def fit_new_items(s: Session, params: Any, run_dir: Path, say: Say) -> None:
    """Choose the lift of a run whose parameters, and whose item memory if it has one, are final: the best by NDCG over the whole ranking
    of the validation cases.

    Where validation events have new items, they count as often as they come. Where none has (a catalogue whose new items nobody has had
    yet), a tenth of the seen items plays new: without learned part, co-occurrence, bias and links of their own.
    """
    data, popularity = s.prepared.data, s.learnt
    cases = sample_cases(data.cases(VALID), s.config.train.eval_users, s.config.train.seed)
    new, playing = popularity == 0, 0
    if not new[cases.target].any():
        seen = np.flatnonzero(~new)
        actors = np.random.default_rng(s.config.train.seed).permutation(seen)[: max(1, round(SHARE * len(seen)))]
        new[actors], playing = True, len(actors)
    scores = _scores(s, params, run_dir, cases, new)
    tried = []
    for lift in LIFTS:
        tried.append({"lift": lift, **ndcg(s, scores + np.float32(lift) * new, cases)})
    chosen = Chosen(max(tried, key=lambda t: t["ndcg"])["lift"], playing, tried)
    say(
        f"new items: {chosen.lift:g} above the bias of rarely seen ones"
        + (f"; {playing:,} played new" if playing else "")
    )
    if hosts.first():
        write_json(run_dir / CHOSEN, chosen._asdict())


def _scores(
    s: Session, params: Any, run_dir: Path, cases: Cases, new: Bool[np.ndarray, " I"]
) -> Float[np.ndarray, "cases I"]:
    """Logits of the validation cases, item memory included, as if nobody had had the new items."""
    prompts = s.sequential_prompts(cases)
    bare = dataclasses.replace(s, content=_without_cooccurrence(s, new))
    unseen = with_new_items(params, np.where(new, 0, s.learnt))
    scores = bare.scorer(unseen, memory="none", words=False).score_all(prompts)
    memory = load_memory(s.config, run_dir, "train", len(new))
    if memory is None:
        return scores
    kept = sp.diags_array((~new).astype(np.float32))
    return scores + dataclasses.replace(memory, links=sp.csr_matrix(kept @ memory.links @ kept)).scores(prompts)


def _without_cooccurrence(s: Session, new: Bool[np.ndarray, " I"]) -> jax.Array:
    rows, width = s.content.shape
    is_new = np.zeros(rows, bool)
    is_new[: len(new)] = new
    behind = np.arange(width) >= width - s.config.model.cooccurrence_features
    return jax.jit(lambda content: jnp.where(is_new[:, None] & behind, 0, content))(s.content)


def load_lift(config: Config, run_dir: Path) -> float:
    """The lift of a run: the config's own, else what validation chose, else 0."""
    if config.model.new_item_lift is not None:
        return config.model.new_item_lift
    file = run_dir / CHOSEN
    return read_json(file, "remove it and run the same `instructrec train` again")["lift"] if file.is_file() else 0.0

"""How much a run's figures depend on the wording of the instruction: the one trained on beside those that were held out.

A wording that was never trained on shows whether the model has learnt to follow an instruction or a sentence. Each kind of prompt
that has held-out wordings and asks for an item of the catalogue is measured, on the same cases, full ranking.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from instructrec_jax.cases import rank_cases, sample_cases
from instructrec_jax.data.schema import SPLIT_NAMES, Cases
from instructrec_jax.evaluation.table import EvaluationResult, Row
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.prompts import KINDS, NothingToSay
from instructrec_jax.run import Say, Session
from instructrec_jax.scoring import Scorer

_TASKS = {"sequential": "next item", "search": "search"}  # families of templates whose answer is an item
_CUTOFFS = (1, 10)


def measure(s: Session, scorer: Scorer, cases: Cases, split: int, say: Say) -> EvaluationResult | None:
    """One row for each wording, and the mean over those of a task where there are several; None where nothing is held out.

    ``notes`` have number, mean, least and largest NDCG@10 of the wordings by task, trained and held out. At most
    ``evaluate.wording_cases`` cases are asked: those for which the data have words for all of the kinds asked.
    """
    sample = sample_cases(cases, s.config.evaluate.wording_cases, s.config.train.seed + 2)
    asked = {name: _prompts(s, sample, *name) for name in _wordings(s)}
    asked = {name: prompts for name, prompts in asked.items() if any(prompts)}
    keep = np.asarray([n for n, row in enumerate(zip(*asked.values(), strict=True)) if all(row)], np.int64)
    if not len(keep):
        say("  wordings: none is held out that these data could fill")
        return None
    chosen = Cases(sample.user[keep], sample.end[keep], sample.target[keep])
    say(f"  wordings: {len(chosen):,} cases, {len(asked)} wordings")
    data = s.prepared.data
    exclude = data.left_out(data.histories(chosen))
    rows: list[Row] = []
    groups: dict[str, list[Row]] = {}
    for (kind, _), prompts in asked.items():
        kept = [p for n in keep if (p := prompts[n])]
        ranks = rank_cases(scorer, kept, chosen, exclude)
        state = _state(s, kind, kept[0].template)
        rows.append(
            Row.from_ranks(f"{kind}: {kept[0].template}, {state}", chosen.user, ranks, _CUTOFFS, baseline=False)
        )
        groups.setdefault(f"{_TASKS[KINDS[kind][0]]}, {state}", []).append(rows[-1])
    for name, group in groups.items():
        if len(group) > 1:
            values = {m: np.mean([row.values[m] for row in group], axis=0) for m in group[0].values}
            rows.append(Row(f"{name}: mean of {len(group)}", chosen.user, values, baseline=False))
    return EvaluationResult.build(
        rows,
        s.prepared.data.train_popularity,
        protocol="wordings full",
        data=s.prepared.data.name,
        split=SPLIT_NAMES[split],
        resamples=s.config.evaluate.bootstrap,
        notes={name: _spread(group) for name, group in groups.items()},
    )


def _wordings(s: Session) -> list[tuple[str, str]]:
    """(kind of prompt, id of the wording, "" = the evaluation's own) of all kinds that have a held-out one."""
    found = []
    for kind, (family, *aspects) in KINDS.items():
        held = s.builder.group(s.language, family, *aspects, held_out=True) if family in _TASKS else ()
        found += [(kind, name) for name in ("", *(t.id for t in held))] if held else []
    return found


def _prompts(s: Session, cases: Cases, kind: str, template: str) -> list[InstructionExample | None]:
    out: list[InstructionExample | None] = []
    for user, end in zip(cases.user, cases.end):
        try:
            out.append(s.builder.evaluation_prompt(kind, int(user), int(end), language=s.language, template=template))
        except NothingToSay:
            out.append(None)
    return out


def _state(s: Session, kind: str, template: str) -> str:
    family, *aspects = KINDS[kind]
    names = {
        state: {t.id for t in s.builder.group(s.language, family, *aspects, features=True, **{state: True})}
        for state in ("trained", "held_out")
    }
    return next((state.replace("_", " ") for state, ids in names.items() if template in ids), "not trained")


def _spread(rows: list[Row]) -> dict[str, Any]:
    means = [float(row.values["ndcg@10"].mean()) for row in rows]
    return {"wordings": len(means), "ndcg@10 mean": float(np.mean(means)), "least": min(means), "largest": max(means)}

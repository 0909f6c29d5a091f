"""The hard cases of a run: little history, new items, strong rivals, another order of the same events.

One evaluation asks how good a recommender is on the usual case. These tables ask where it stops being good, on the same cases of the
split and beside the same classic recommenders:

* *cold users*: each case again with its newest 0, 1, 3, 5 and 10 events as the whole history;
* *long tail*: NDCG@10 by tenths of the targets, from the least to the most popular;
* *cold items*: targets without a training event, ranked among the items without one (``data.split.kind: cold-items`` makes them);
* *lifted items*: the same targets among all items as new items are lifted (``model.new_item_lift``), and what other targets lose by it;
* *hard negatives*: the target against what the strongest classic recommender ranks highest for the user (InstructRec, Table 9);
* *a named item*: somebody unknown asks for "something like" the newest item of the history;
* *history order*: the same history as it was, reversed, and shuffled;
* *candidate order*: the same ten candidates shown in several orders.

What a ranking leaves out is always the user's whole history, whatever the system is shown of it (nothing where users have items again).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from instructrec_jax import baseline_store, retrieval
from instructrec_jax.cases import Ranked, ScoreBlock, Task, rank, rank_first, sample_cases
from instructrec_jax.data.schema import SPLIT_NAMES, TEST, VALID, Cases
from instructrec_jax.errors import UserError
from instructrec_jax.evaluate import MODEL, fit_baselines
from instructrec_jax.evaluation import metrics, slices
from instructrec_jax.evaluation.table import EvaluationResult, Row
from instructrec_jax.files import path_of, write_json
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.packs import load_phrases
from instructrec_jax.instructions.references import References
from instructrec_jax.instructions.titles import stem
from instructrec_jax.run import Say, Session, trained
from instructrec_jax.scoring import Request, Scorer
from instructrec_jax.training import hosts

FILE = "hard_modes.json"
EVENTS = (0, 1, 3, 5, 10)  # newest events that a cold user is known by
_CASES = 2000  # at most, a fixed sample
_ORDER_CASES = 200
_ORDERS = 5  # of the candidates of one case
_RIVALS = (9, 99)
_LIFTS = (0, 2, 3, 4, 5, 6, 8)  # logits, above where the run has new items


def hard_modes(
    run_dir: str | Path, overrides: Sequence[str] = (), *, split: int = TEST, set_name: str = "", say: Say
) -> dict[str, Any]:
    """Measure the hard cases of a run, write ``RUN_DIR/hard_modes.json`` and return what it holds.

    Of a mixture ``set_name`` says which set, and the file is in ``RUN_DIR/sets/NAME``.

    Raises:
        UserError: the folder is no run, its model has no item head, the split has no cases, or a mixture and no name of a set.
    """
    run_dir = path_of(run_dir)
    with trained(run_dir, tuple(overrides)) as (whole, params, step):
        s = whole.one_set(set_name)
        if not s.sizes.items:
            raise UserError(f"the model of {run_dir} has no item head", remedy="see model.trainable")
        cases = sample_cases(s.prepared.data.cases(split), _CASES, s.config.train.seed)
        if not len(cases):
            raise UserError(f"the {SPLIT_NAMES[split]} split has no cases", remedy="see data.split in the config")
        scorer = s.scorer(params)
        fitted = {name: r for name, (r, _) in fit_baselines(s, include_valid=split == TEST, say=say).items()}
        if "content" not in fitted:  # what a new item has
            fitted["content"] = baseline_store.build("content", {}, s.config, s.prepared).fit(s.prepared.data)
        hard = HardModes(s, scorer, fitted, cases, split, say, s.scorer(params, memory="train"))
        tables = [
            *hard.cold_users(),
            *hard.cold_items(),
            *hard.lifted_items(),
            *hard.hard_negatives(),
            hard.named_item(),
            hard.history_order(),
        ]
        payload = {
            "run": run_dir.name,
            "best_step": step,
            "split": SPLIT_NAMES[split],
            "tables": [table.to_json() for table in tables],
            "long_tail": hard.long_tail(),
            "candidate_order": hard.candidate_order(),
        }
    if hosts.first():
        assert s.run_dir is not None
        write_json(s.run_dir / FILE, payload)
        say(f"written: {s.run_dir / FILE}")
    return payload


class HardModes:
    """The hard cases of one split. Every method says what it does and gives its tables."""

    def __init__(
        self,
        s: Session,
        scorer: Scorer,
        fitted: dict[str, retrieval.Recommender],
        cases: Cases,
        split: int,
        say: Say,
        of_training: Scorer | None = None,
    ):
        """``of_training``: a scorer that knows no validation event (default: ``scorer``)."""
        self.of_training = of_training or scorer
        self.s, self.scorer, self.fitted, self.cases, self.split, self.say = s, scorer, fitted, cases, split, say
        self.data = s.prepared.data
        self.task = Task.of(self.data, cases)

    @cached_property
    def usual(self) -> dict[str, Ranked]:
        """Every system on the whole histories."""
        self.say("  the whole history")
        return self._ranked(self.task, self.task.histories)

    # ------------------------------------------------------------------------------------------------------- the tables

    def cold_users(self) -> list[EvaluationResult]:
        """One table for each number of events, and the usual one at the end."""
        most = self.s.config.instructions.history_items
        tables = []
        for events in EVENTS:
            if events >= most:
                continue
            self.say(f"  cold users: {events} events")
            shown = [h[len(h) - min(events, len(h)) :] for h in self.task.histories]
            tables.append(self._table(self._ranked(self.task, shown), self.cases, f"full, newest {events} events"))
        return [*tables, self._table(self.usual, self.cases, "full")]

    def cold_items(self) -> list[EvaluationResult]:
        """Targets unseen in training among all unseen items; no table where there are none."""
        unseen = np.flatnonzero(self.data.train_popularity == 0)
        chosen = np.flatnonzero(self.data.train_popularity[self.cases.target] == 0)
        if len(unseen) < 2 or not len(chosen):
            return []
        self.say(f"  cold items: {len(chosen):,} cases, {len(unseen):,} items")
        cases = _some(self.cases, chosen)
        task = replace(Task.of(self.data, cases), candidates=np.broadcast_to(unseen, (len(cases), len(unseen))))
        return [self._table(self._ranked(task, task.histories), cases, "among the items unseen in training")]

    def lifted_items(self) -> list[EvaluationResult]:
        """What targets unseen in training gain among all items, and validation targets that were seen lose, as new items are lifted."""
        new, valid = self.data.train_popularity == 0, self.data.cases(VALID)
        unseen = np.flatnonzero(new[self.cases.target])
        if not len(unseen) or new.all():
            return []
        self.say("  lifted items")
        seen = sample_cases(_some(valid, np.flatnonzero(~new[valid.target])), _CASES, self.s.config.train.seed)
        tables = [self._lifted(_some(self.cases, unseen), self.scorer, "new targets")]
        return [*tables, self._lifted(seen, self.of_training, "validation, seen targets")] if len(seen) else tables

    def _lifted(self, cases: Cases, scorer: Scorer, what: str) -> EvaluationResult:
        new, task = self.data.train_popularity == 0, Task.of(self.data, cases)
        prompts = [self._prompt(int(u), h.tolist()) for u, h in zip(cases.user, task.histories)]
        plain = scorer.score_all(prompts)
        up = new.astype(np.float32)
        systems: dict[str, ScoreBlock] = {
            f"{MODEL}, new items + {lift:g}": lambda a, b, lift=lift: plain[a:b] + lift * up for lift in _LIFTS
        }
        systems["content"] = lambda a, b: self.fitted["content"].score(task.histories[a:b])
        ranked = {name: rank(task, score, 10) for name, score in systems.items()}
        return self._table(ranked, cases, f"full, new items lifted: {what}")

    def hard_negatives(self) -> list[EvaluationResult]:
        """The target against the best n of the strongest classic recommender."""
        names = [name for name in self.usual if name != MODEL]
        strength = {name: metrics.metrics_at(self.usual[name].ranks, (10,))["ndcg@10"].mean() for name in names}
        retriever = max(strength, key=strength.__getitem__)
        tables = []
        for n in _RIVALS:
            if self.data.num_items <= n + 1:
                continue
            self.say(f"  hard negatives: {n} by {retriever}")
            task = replace(self.task, candidates=self._rivals(retriever, n))
            protocol = f"1+{n} hard, by {retriever}"
            tables.append(self._table(self._ranked(task, self.task.histories), self.cases, protocol))
        return tables

    def named_item(self) -> EvaluationResult:
        """Somebody unknown wishes for "something like" the newest item: its name read, the words as they are, and others on that item."""
        self.say("  a wish that names an item")
        frame = load_phrases(self.s.language).one["like_item"]
        references, titles = References(self.data, self.s.builder.domain), self.data.catalogue.titles
        wishes = [frame.format(title=stem(titles[h[-1]])) for h in self.task.histories]
        read = [references.read(wish) for wish in wishes]
        ask = partial(self.s.builder.recommend_prompt, language=self.s.language)
        prompts = {
            MODEL: [ask(r.items, r.wish) for r in read],
            f"{MODEL}, words as they are": [ask((), wish) for wish in wishes],
        }
        systems: dict[str, ScoreBlock] = {
            name: lambda a, b, p=asked: self.scorer.score_all(p[a:b]) for name, asked in prompts.items()
        }
        for name, recommender in self.fitted.items():
            systems[name] = lambda a, b, r=recommender: r.score([h[-1:] for h in self.task.histories[a:b]])
        ranked = {name: rank(self.task, score, 10) for name, score in systems.items()}
        right = float(np.mean([r.items == (h[-1],) for r, h in zip(read, self.task.histories)]))
        return self._table(
            ranked, self.cases, f"full, something like the newest item ({right:.0%} of names read right)"
        )

    def history_order(self) -> EvaluationResult:
        """The model on the same histories in three orders; what depends on taste alone would not change."""
        self.say("  history order")
        most = self.s.config.instructions.history_items
        newest = [h[-most:] for h in self.task.histories]
        rng = np.random.default_rng(self.s.config.train.seed)
        orders = {
            "model": newest,
            "model, newest first": [h[::-1] for h in newest],
            "model, shuffled": [rng.permutation(h) for h in newest],
        }
        ranked = {name: rank(self.task, self._model(shown), 10) for name, shown in orders.items()}
        return self._table(ranked, self.cases, "full, order of the history")

    def long_tail(self) -> dict[str, Any]:
        """NDCG@10 of every system by tenths of the cases, by how often the target is in the training split."""
        popularity = self.data.train_popularity[self.cases.target]
        tenths: dict[str, Any] = {"systems": {}}
        for name, ranked in self.usual.items():
            value = metrics.metrics_at(ranked.ranks, (10,))["ndcg@10"]
            found = slices.heat_map(value, np.zeros(len(value), np.int64), popularity, length_edges=(0,), buckets=10)
            tenths["popularity"], tenths["cases"] = found.columns, found.count[0].tolist()
            tenths["systems"][name] = [None if np.isnan(v) else float(v) for v in found.mean[0]]
        return tenths

    def candidate_order(self) -> dict[str, Any]:
        """HR@1 of the same ten candidates in several orders, and how often they agree on the first."""
        sample = sample_cases(self.cases, _ORDER_CASES, self.s.config.train.seed + 1)
        if self.data.num_items < 20:
            return {}
        self.say(f"  candidate order: {len(sample):,} cases x {_ORDERS} orders")
        builder, rng = self.s.builder, np.random.default_rng(self.s.config.train.seed)
        first = [
            builder.evaluation_prompt("rerank", int(u), int(e), language=self.s.language)
            for u, e in zip(sample.user, sample.end)
        ]
        lists = np.asarray([[t, *(c for c in p.candidates if c != t)] for p, t in zip(first, sample.target)])
        hits, chosen = [], []
        for _ in range(_ORDERS):
            shown = rng.permuted(lists, axis=1)
            prompts = [
                builder.evaluation_prompt("rerank", int(u), int(e), language=self.s.language, candidates=row.tolist())
                for u, e, row in zip(sample.user, sample.end, shown)
            ]
            scores = np.stack(self.scorer.score([Request(p, row) for p, row in zip(prompts, lists)], "items"))
            hits.append(float(metrics.metrics_at(rank_first(scores), (1,))["hr@1"].mean()))
            chosen.append(lists[np.arange(len(lists)), scores.argmax(1)])
        same = (np.stack(chosen) == chosen[0]).all(axis=0).mean()
        return {"cases": len(sample), "hr@1": hits, "share_with_one_first_choice": float(same)}

    # ----------------------------------------------------------------------------------------------------------- parts

    def _model(self, shown: Sequence[Int[np.ndarray, " n"]]) -> ScoreBlock:
        prompts = [self._prompt(int(u), h.tolist()) for u, h in zip(self.cases.user, shown)]
        return lambda a, b: self.scorer.score_all(prompts[a:b])

    def _prompt(self, user: int, history: list[int]) -> InstructionExample:
        builder = self.s.builder
        features = builder.features(user) if builder.features else ()
        return builder.recommend_prompt(history, language=self.s.language, features=features)

    def _ranked(self, task: Task, shown: Sequence[Int[np.ndarray, " n"]]) -> dict[str, Ranked]:
        prompts = [self._prompt(int(u), h.tolist()) for u, h in zip(task.cases.user, shown)]
        systems: dict[str, ScoreBlock] = {MODEL: lambda a, b: self.scorer.score_all(prompts[a:b])}
        for name, recommender in self.fitted.items():
            systems[name] = lambda a, b, r=recommender: r.score(shown[a:b])
        return {name: rank(task, score, 10) for name, score in systems.items()}

    def _rivals(self, name: str, n: int) -> Int[np.ndarray, "cases n"]:
        """What a recommender ranks highest beside the target; -1 where the catalogue has no more."""
        blocks = []
        for start in range(0, len(self.cases), 512):
            history, target = self.task.histories[start : start + 512], self.cases.target[start : start + 512]
            scores = self.fitted[name].score(history)
            known = [[t] if self.data.repeats else np.append(h, t) for h, t in zip(history, target)]
            blocks.append(metrics.top_lists(scores, n, known, first_case=start))
        return np.concatenate(blocks)

    def _table(self, ranked: dict[str, Ranked], cases: Cases, protocol: str) -> EvaluationResult:
        cutoffs = (1, 5, 10)
        rows = [
            Row.from_ranks(
                name, cases.user, r.ranks, cutoffs, lists=r.lists, baseline=not name.startswith(MODEL),
                seconds_score=r.seconds,
            )
            for name, r in ranked.items()
        ]  # fmt: skip
        return EvaluationResult.build(
            rows,
            self.data.train_popularity,
            protocol=protocol,
            data=self.data.name,
            split=SPLIT_NAMES[self.split],
            resamples=self.s.config.evaluate.bootstrap,
        )


def _some(cases: Cases, index: Int[np.ndarray, " n"]) -> Cases:
    return Cases(cases.user[index], cases.end[index], cases.target[index])

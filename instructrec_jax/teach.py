"""``instructrec data teach``: ask a teacher for every text that a data set's instructions need, judge the answers, keep what passes.

What is written depends on the cache and the settings alone: the command goes over all places, takes each answer from the cache or, where
it is to ask, asks for it, and writes its files at the end. So it may be stopped, killed or limited by a budget at any time, and run again;
several commands, for one kind each or with other limits, write together what one would.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from instructrec_jax.config import Config
from instructrec_jax.data import sources
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.schema import SplitData
from instructrec_jax.data.splits import split
from instructrec_jax.errors import ConfigError, DataError, UserError
from instructrec_jax.files import sha256, write_atomic, write_json
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.teacher.answers import Unusable, read
from instructrec_jax.instructions.teacher.asks import Ask, Evidence, Evidences, asks
from instructrec_jax.instructions.teacher.budget import Budget
from instructrec_jax.instructions.teacher.cache import Cache
from instructrec_jax.instructions.teacher.endpoint import REMEDY, Endpoint
from instructrec_jax.instructions.teacher.gates import GATES, Duplicates, Gates, Refused
from instructrec_jax.instructions.teacher.local import Local
from instructrec_jax.instructions.teacher.questions import Refusal, Request, form, request
from instructrec_jax.instructions.teacher.texts import MANIFEST, REJECTED, TEXTS, Taught, contents, save
from instructrec_jax.prepare import load

Say = Callable[[str], None]
KINDS = ("preference", "intention")


class Meter(Protocol):
    """Makes a progress display: a context that gives ``advance(note)``, to be called after each answer."""

    def __call__(self, label: str, expected: int) -> Any:
        """The display of one round."""
        ...


class _Backend(Protocol):
    stopped: str

    @property
    def trouble(self) -> str: ...

    def answer(self, requests: Iterator[Request], done: Callable[[], None]) -> None: ...


@dataclass
class Outcome:
    """What a command wrote.

    ``refused`` counts asks whose last answer a gate refused; ``first_refused`` counts first answers that a gate refused, later mended or
    not.
    """

    folder: Path
    asked: int = 0
    kept: Counter[str] = field(default_factory=Counter)  # by kind
    earlier: Counter[str] = field(default_factory=Counter)  # by kind: of earlier commands under the same settings
    left_out: int = 0  # texts that were there and are no more: another model, settings or data wrote them, or a gate refuses them now
    refused: Counter[str] = field(default_factory=Counter)  # by "kind: gate"
    first_refused: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    without_evidence: int = 0
    stopped: str = ""  # why it ended early; "" = everything was asked
    trouble: str = ""  # what went wrong on the way to answers
    spent: str = ""


def folder_of(config: Config) -> Path:
    """Where a config's taught texts are: beside its prepared data, unless ``instructions.teacher`` names a folder."""
    return Path(config.instructions.teacher or Path(config.prepared) / f"{config.name}-teacher")


def teach(
    config: Config,
    *,
    kinds: Sequence[str] = KINDS,
    limit: int | None = None,
    out: Path | None = None,
    say: Say,
    meter: Meter,
) -> Outcome:
    """Write the taught texts of a data set, prepared or not.

    Args:
        config: its ``teacher`` section says who, how and for how much.
        kinds: "preference", "intention", or both.
        limit: most texts to ask for; None = all that the training instructions use. The first ones of a keyed order.
        out: the folder; None = ``folder_of(config)``.
        meter: makes the progress display.

    Raises:
        UserError: another command works on the folder; a library or a model is missing; the endpoint refuses, or answers nothing.
        ConfigError: settings that do not fit together.
        DataError: bad input.
    """
    if config.mixture:
        raise ConfigError(f"{config.name} is a mixture", remedy="teach its sets by their own configs")
    folder = out or folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "records").exists() or (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is a prepared data set or a run", remedy="give another --out folder")
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _Lesson(config, folder, say, meter).run(kinds, limit)
    except Timeout as error:
        raise UserError(f"another command works on {folder}", remedy="wait for it, or give another --out") from error


class _Lesson:
    """One command: data, evidence, gates, cache and budget together."""

    def __init__(self, config: Config, folder: Path, say: Say, meter: Meter):
        self.config, self.teacher, self.folder, self.say, self.meter = config, config.teacher, folder, say, meter
        self.data = _data(config)
        settings = config.instructions
        self.builder = Builder(self.data, settings, config.data.domain, items_as=settings.items_as)
        words = self.builder.words
        self.evidences = Evidences(self.data, words.facets, words.domain, self.teacher.history_items)
        self.gates = Gates(self.evidences, self.teacher)
        self.duplicates = Duplicates(self.teacher.near_duplicate) if self.teacher.near_duplicate > 0 else None
        self.cache = Cache(folder)
        self.budget = Budget(self.teacher, self.cache.spent())

    def run(self, kinds: Sequence[str], limit: int | None) -> Outcome:
        """Ask round after round (an answer that a gate refuses is asked for again), then write the files."""
        self.say("  places of the training instructions")
        places = asks(self.data, self.builder, KINDS, self.teacher.seed)
        wanted = set(islice((ask for ask in places if ask.kind in kinds), limit))
        outcome = Outcome(self.folder, asked=len(wanted))
        backend = self._backend()
        answered = set() if isinstance(backend, _Rules) else self.cache.owners()
        places = [ask for ask in places if ask in wanted or self._owner(ask.user) in answered]
        passed: dict[Ask, str] = {}
        refused: dict[Ask, tuple[Refused, str]] = {}
        before: dict[Ask, Refusal] = {}
        todo = places
        for turn in range(self.teacher.repairs + 1):
            mine = [ask for ask in todo if ask in wanted]
            try:
                if mine and not outcome.stopped:
                    self._ask(backend, mine, before, turn)
                    outcome.stopped = backend.stopped
            except KeyboardInterrupt:
                outcome.stopped = "interrupted"
            again = []
            for ask in todo:
                found = self._judge(ask, before.get(ask))
                if isinstance(found, str):
                    passed[ask] = found
                    refused.pop(ask, None)
                elif found is not None:
                    why, said = refused[ask] = found
                    if turn == 0 and ask in wanted:
                        outcome.first_refused[f"{ask.kind}: {why.gate}"] += 1
                    before[ask] = Refusal(said, why.complaint)
                    again.append(ask)
            todo = again
            # Go on even where the back end has stopped: the cache may hold what was asked again. Rules say the same every time.
            if not todo or isinstance(backend, _Rules):
                break
        outcome.trouble = backend.trouble
        if outcome.trouble and not outcome.stopped and wanted.isdisjoint((*passed, *refused)):
            raise UserError(f"nothing was answered. {outcome.trouble}", remedy=REMEDY)
        self._write(outcome, places, wanted, passed, refused)
        self.cache.close()
        return outcome

    def _backend(self) -> _Backend:
        t = self.teacher
        if t.backend == "rules":
            return _Rules()
        if t.backend == "local":
            return Local(t, self.cache, self.budget, self._owner)
        return Endpoint(t, self.cache, self.budget, self._owner)

    def _owner(self, user: int) -> str:
        return self.data.user_ids[user] if user >= 0 else ""

    def _ask(self, backend: _Backend, todo: Sequence[Ask], before: dict[Ask, Refusal], turn: int) -> None:
        """Have every request answered that the cache does not answer."""
        if isinstance(backend, _Rules):
            return
        requests = (r for ask in todo if (r := self._request(ask, before.get(ask))) is not None)
        label = "  texts" if not turn else f"  asked again ({turn})"
        with self.meter(label, len(todo)) as advance:

            def missing() -> Iterator[Request]:
                for one in requests:
                    if self.cache.get(one.key) is None:
                        yield one
                    else:
                        advance("")

            backend.answer(missing(), lambda: advance(str(self.budget)))

    def _request(self, ask: Ask, refusal: Refusal | None) -> Request | None:
        evidence = self.evidences.of(ask)
        if evidence is None:
            return None
        return request(ask, evidence, self.builder.domain, self.teacher, refusal)

    def _judge(self, ask: Ask, refusal: Refusal | None) -> str | tuple[Refused, str] | None:
        """The text if it passes; why not, and what was said, if it does not; None if there is no answer."""
        evidence = self.evidences.of(ask)
        if evidence is None:
            return None
        if self.teacher.backend == "rules":
            text = self._rule_made(ask)
            if text is None:
                return None
        else:
            reply = self.cache.get(request(ask, evidence, self.builder.domain, self.teacher, refusal).key)
            if reply is None:
                return None
            try:
                text = read(reply.text, ask.kind, form(self.teacher), cut=reply.cut)
            except Unusable as error:
                return Refused("schema", str(error)), reply.text[:1000]
        why = self.gates.judge(ask, evidence, text)
        return text if why is None else (why, text)

    def _rule_made(self, ask: Ask) -> str | None:
        words = self.builder.words
        if ask.kind == "preference":
            return words.preference(ask.user, ask.end, ask.language)
        return words.intention("I1", ask.item, 0, 0, ask.language)

    def _write(
        self,
        outcome: Outcome,
        places: Sequence[Ask],
        wanted: set[Ask],
        passed: dict[Ask, str],
        refused: dict[Ask, tuple[Refused, str]],
    ) -> None:
        kept: list[Taught] = []
        lost: list[str] = []
        for ask in places:
            evidence = self.evidences.of(ask)
            if evidence is None:
                outcome.without_evidence += ask in wanted
                continue
            text, why = passed.get(ask), None
            if text is not None:
                why = self.duplicates.check(text) if self.duplicates else None
            elif ask in refused:
                why, text = refused[ask]
            else:
                outcome.unanswered += ask in wanted
                continue
            taught = self._taught(ask, evidence, text)
            if why is None:
                (outcome.kept if ask in wanted else outcome.earlier)[ask.kind] += 1
                kept.append(taught)
                continue
            if ask in wanted:
                outcome.refused[f"{ask.kind}: {why.gate}"] += 1
            row = {"gate": why.gate, "complaint": why.complaint, **vars(taught)}
            lost.append(json.dumps(row, ensure_ascii=False))
        outcome.left_out = len(contents(self.folder / TEXTS).difference(t.content for t in kept))
        outcome.spent = str(self.budget)
        (self.folder / MANIFEST).unlink(missing_ok=True)  # no manifest beside other texts, at any moment
        save(kept, self.folder / TEXTS, self.teacher.history_items)
        write_atomic(self.folder / REJECTED, "".join(line + "\n" for line in lost))
        write_json(
            self.folder / MANIFEST,
            {
                "name": self.config.name,
                "backend": self.teacher.backend,
                "model": self.teacher.model,
                "asked": outcome.asked,
                "kept": dict(outcome.kept),
                "earlier": dict(outcome.earlier),
                "refused": dict(outcome.refused),
                "first_refused": dict(outcome.first_refused),
                "unanswered": outcome.unanswered,
                "without_evidence": outcome.without_evidence,
                "stopped": outcome.stopped,
                "tokens": dict(self.budget.spent._asdict()),
                "money": self.budget.money(self.budget.spent),
                "texts_sha256": sha256(self.folder / TEXTS),
            },
        )

    def _taught(self, ask: Ask, evidence: Evidence, text: str) -> Taught:
        place = ask.end - int(self.data.offsets[ask.user]) if ask.user >= 0 else -1
        item = self.evidences.facets.titles[ask.item]
        return Taught(ask.kind, ask.language, self._owner(ask.user), place, item, evidence.content, text, evidence.text)


def _data(config: Config) -> SplitData:
    """The prepared split, if it is there and fits; else the source, cleaned and split in memory."""
    if (config.prepared_dir / "manifest.json").is_file():
        try:
            return load(config).data
        except DataError:  # prepared with other settings, or damaged: the source decides
            pass
    return split(clean(sources.read(config.data, config.name), config.data.clean), config.data.split)


class _Rules:
    """The rules as a teacher: they need no asking."""

    stopped = trouble = ""

    def answer(self, requests: Iterator[Request], done: Callable[[], None]) -> None:
        """Nothing to do."""


def rejection_rows(outcome: Outcome) -> list[tuple[str, str, int, int]]:
    """(kind, gate, first answers refused, refused for good) in the order of the gates, without empty ones."""
    return [
        (kind, gate, outcome.first_refused[name], outcome.refused[name])
        for kind in KINDS
        for gate in GATES
        if (name := f"{kind}: {gate}") in outcome.first_refused or name in outcome.refused
    ]

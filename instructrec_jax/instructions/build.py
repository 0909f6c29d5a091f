"""Training instructions from a data set's training events: streamed, deterministic, keyed by (seed, user, event)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy as copy_of
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from instructrec_jax.config import InstructionConfig
from instructrec_jax.data import shards, wire
from instructrec_jax.data.frames import Frames, varints
from instructrec_jax.data.schema import TRAIN, SplitData
from instructrec_jax.instructions.aspects import INTENTIONS, PREFERENCES
from instructrec_jax.instructions.example import Feature, InstructionExample
from instructrec_jax.instructions.keyed import fraction, key, keys, mix_array, pick
from instructrec_jax.instructions.negatives import listed_negatives, sample_negatives
from instructrec_jax.instructions.packs import Domain
from instructrec_jax.instructions.pauses import Pauses
from instructrec_jax.instructions.prompts import KINDS, Features, NothingToSay, Prompter
from instructrec_jax.instructions.render import ItemsAs, Slots
from instructrec_jax.instructions.targets import Parts, Plan, Stage, targets, with_limits
from instructrec_jax.instructions.tastes import Taste
from instructrec_jax.instructions.template import Template
from instructrec_jax.instructions.window_records import window_records
from instructrec_jax.instructions.windows import KeyedWindows, num_windows, windows

__all__ = ["FAMILIES", "KINDS", "Builder", "NothingToSay"]


class Family(NamedTuple):
    """What one weight of ``InstructionConfig`` writes."""

    number: int  # of the key
    kind: str  # of its templates
    shares: dict[tuple[str, str], float] | None = None  # (preference, intention): share; None = see ``Builder.shares``


# Families beside the sequential windows, by the name of their weight.
FAMILIES: dict[str, Family] = {
    "search": Family(
        2,
        "search",
        {
            ("P0", "I1"): 0.225,
            ("P0", "I2"): 0.225,
            ("P1", "I1"): 0.225,
            ("P1", "I2"): 0.225,
            ("P2", "I1"): 0.05,
            ("P2", "I2"): 0.05,
        },
    ),
    "rerank": Family(3, "rerank", {("P1", "I0"): 0.6, ("P2", "I0"): 0.2, ("P0", "I1"): 0.1, ("P0", "I2"): 0.1}),
    "pointwise": Family(4, "pointwise", {("P1", "I0"): 1.0}),
    "describe": Family(5, "describe", {("P1", "I0"): 0.75, ("P2", "I0"): 0.25}),
    "profile": Family(6, "sequential", {("P0", "I0"): 0.5, ("P2", "I0"): 0.5}),
    "rerank_more": Family(7, "rerank"),
    "pointwise_more": Family(8, "pointwise"),
    "describe_more": Family(9, "describe"),
    "pairwise": Family(10, "pairwise"),
    "turn_around": Family(11, "turn_around"),
    "relatedness": Family(12, "relatedness"),
    "reasoning": Family(13, "reasoning"),
}
_SEQUENTIAL = 1  # number of the key
_CHUNK = 1024  # examples whose negatives are drawn together
_SHOW_FEATURES = (
    0.75  # share of training prompts that show the features of users who have some, and of windows that show time gaps
)
_SHOWN_PAUSES = 0x6A95  # keeps that draw apart
# A target without tags or labels may still have words of the other level.
_OTHER_LEVEL = {"I1": ("I1", "I2"), "I2": ("I2", "I1")}


class _Wording(NamedTuple):
    """How an example is said, before its target is looked at."""

    templates: tuple[Template, ...]  # the first that the data has words for
    features: tuple[Feature, ...]
    number: int  # a key for what is left to choose


class Builder(Prompter):
    """Writes the training instructions of a data set. See ``Prompter`` for the arguments and for the other prompts.

    ``written`` and ``skipped`` count what the last ``training_examples`` gave and could not give, by family. ``lists`` are the hard
    negatives of ``instructions.negatives: file``, items of every user ``[U, k]``, and ``drawn`` counts the negatives from there.
    """

    lists: Int[np.ndarray, "U k"] | None = None

    def __init__(
        self,
        data: SplitData,
        config: InstructionConfig,
        domain: Domain | str,
        features: Features | None = None,
        *,
        items_as: ItemsAs = "token",
        candidates_as: ItemsAs | None = None,
        pauses: Pauses | None = None,
    ):
        super().__init__(data, config, domain, features, items_as=items_as, candidates_as=candidates_as, pauses=pauses)
        self.written: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.drawn: Counter[str] = Counter()
        self._frames = Frames()
        self._shares: dict[tuple[str, str, bool], dict[tuple[str, str], float]] = {}

    def over(self, part: SplitData) -> Builder:
        """The same builder for a part of the users. What it writes is counted here too."""
        if part is self.data:
            return self
        other = copy_of(self)
        other.data, other.words = part, self.words.over(part)
        other.train_count = _train_count(part)
        if features := self.features:
            shift = part.first_user - self.data.first_user
            other.features = lambda user: features(shift + user)
        return other

    def plan(self, parts: Parts | None = None) -> Plan:
        """The stages of the training stream of all ``parts`` (default: this data). Reads the events twice."""
        parts = parts or self._whole
        windows, popularity = 0, np.zeros(self.data.num_items, np.int64)
        pool = [0, 0]
        for part in parts():
            count = _train_count(part)
            windows += self._num_windows(count)
            popularity += part.train_popularity
            pool[0] += int(count.sum())
            pool[1] += int(np.maximum(count - 1, 0).sum())
        sized: list[tuple[Stage, int]] = []
        for family, (number, _, _) in FAMILIES.items():
            first = 0 if family == "profile" else 1
            left, turn = round(getattr(self.config, family) * windows), 0
            if not any(self.shares(family, language, features=True) for language in self.config.languages):
                continue
            while left > 0 and pool[first]:
                sized.append((Stage(family, number, first, turn), min(left, pool[first])))
                left, turn = left - pool[first], turn + 1
        stages = with_limits(sized, parts, self.config.seed, pool)
        return Plan((Stage("sequential", _SEQUENTIAL, 0), *stages), windows, popularity)

    def _whole(self) -> tuple[SplitData]:
        return (self.data,)

    def training_examples(self, parts: Parts | None = None) -> Iterator[InstructionExample]:
        """All training examples, family by family; the same stream on every call, whatever the ``parts`` (default: this data).

        Only events of the training split are read. Sequential windows are ``dense``: the prompt is the whole window,
        and item k is to be predicted from the position before it for every k >= ``dense_from``. Over a user's windows
        each training item is a target at least once per copy (exactly once without ``repeat_targets``). With
        ``items_as="title"`` there are no item positions: the prompt is the window without its last item, whose title is the
        answer, and the titles before it carry loss too (``dense_titles``). The other families have one target each and no
        dense positions.

        Raises:
            ConfigError: the catalogue is too small for ``candidates``.
        """
        for builder, stage, plan in self._stages(parts):
            yield from builder.stage(stage, plan)

    def _stages(self, parts: Parts | None) -> Iterator[tuple[Builder, Stage, Plan]]:
        """The stream, piece by piece: each a stage over one part."""
        self.written, self.skipped, self.drawn = Counter(), Counter(), Counter()
        parts = parts or self._whole
        plan = self.plan(parts)
        for stage in plan.stages:
            for part in parts():
                yield self.over(part), stage, plan

    def stage(self, stage: Stage, plan: Plan) -> Iterator[InstructionExample]:
        """What this data, a part of what was planned, adds to a stage of the stream."""
        return self._sequential() if stage.family == "sequential" else self._family(stage, plan)

    def records(self, parts: Parts | None = None) -> Iterator[tuple[str, bytes]]:
        """``training_examples`` as (aspects, record), the same bytes with less work: windows are serialised without an example each."""
        for builder, stage, plan in self._stages(parts):
            yield from builder._stage_records(stage, plan)

    def _stage_records(self, stage: Stage, plan: Plan) -> Iterator[tuple[str, bytes]]:
        """``stage`` as (aspects, record). In one thread alone: what windows have in common is kept for all parts."""
        if stage.family == "sequential" and (groups := self._framed_groups()):
            return self._window_records(groups)
        return ((shards.aspects(example), wire.serialise(example)) for example in self.stage(stage, plan))

    @property
    def num_windows(self) -> int:
        """Sequential windows of all users (each is rendered ``copies`` times)."""
        return self._num_windows(self.train_count)

    def _num_windows(self, train_count: Int[np.ndarray, " users"]) -> int:
        return int(num_windows(train_count, self.config.history_items, self.config.max_per_user).sum())

    # ------------------------------------------------------------------------------------------------------- sequential

    def _sequential_groups(self) -> list[tuple[Template, ...]]:
        kind = "describe" if self.items_as == "title" else "sequential"
        groups = [self.group(language, kind, "P1", "I0", trained=True) for language in self.config.languages]
        return [group for group in groups if group]

    def _sequential(self) -> Iterator[InstructionExample]:
        titles_only = self.items_as == "title"
        groups = self._sequential_groups()
        if not groups:
            return
        shown = -1
        for (user, first, end, dense_from), number, choice, draws in self._window_keys():
            if user != shown:
                shown, start = user, int(self.data.offsets[user])
                events: tuple[int, ...] = tuple(self.data.item[start : start + int(self.train_count[user])].tolist())
                features = self.features(user) if self.features else ()
            items, target = (events[first : end - 1], events[end - 1]) if titles_only else (events[first:end], -1)
            if not items:
                self.skipped["sequential: one item has no history"] += 1
                continue
            new = 0 if self.config.repeat_targets else dense_from
            # The first title follows nothing: only its own frequency could be learnt.
            learnt = max(new, 1) if titles_only and self.config.dense_titles else -1
            pauses: Sequence[Feature | None] = ()
            if self.pauses and fraction(key(number, _SHOWN_PAUSES)) < _SHOW_FEATURES:
                pauses = self.pauses_of(user, start + first, start + first + len(items), request=titles_only)
            slots = Slots(history=items, features=features, answer=target, learnt_from=learnt, pauses=pauses)
            for copy, draw in enumerate(draws):
                group = groups[(number + copy) % len(groups)]
                self.written["sequential"] += 1
                yield self.example(
                    group[(choice + copy // len(groups)) % len(group)],
                    slots,
                    user=user,
                    target=target,
                    dense=not titles_only,
                    dense_from=0 if titles_only else new,
                    about_user=fraction(draw) < _SHOW_FEATURES,
                )

    def _window_keys(self) -> Iterator[tuple[tuple[int, int, int, int], int, int, list[int]]]:
        """((user, first, end, dense_from), key, the key after it, ``key(key, copy)`` per copy) of all windows, some users at a time."""
        for made, *draws in self._keyed_windows():
            places = zip(*(places.tolist() for places in made), strict=True)
            yield from zip(places, *(draw.tolist() for draw in draws), strict=True)

    def _keyed_windows(self) -> Iterator[KeyedWindows]:
        for begun in range(0, self.data.num_users, _CHUNK):
            count = self.train_count[begun : begun + _CHUNK]
            made = windows(count, self.config.history_items, self.config.max_per_user)
            made = made._replace(user=made.user + begun)
            number = keys(self.config.seed, _SEQUENTIAL, self.data.first_user + made.user, made.first)
            after = mix_array(number)
            draws = mix_array(after[:, None] ^ mix_array(np.arange(self.config.copies, dtype=np.uint64)))
            yield KeyedWindows(made, number, after, draws)

    def _framed_groups(self) -> list[tuple[Template, ...]]:
        """The groups of the sequential windows if their texts differ by the numbers of soft tokens alone, else none."""
        groups = self._sequential_groups() if self.items_as == "token" and not self.pauses else []
        framed = all(template.is_soft and "history" in template.reads for group in groups for template in group)
        return groups if framed else []

    def _window_records(self, groups: list[tuple[Template, ...]]) -> Iterator[tuple[str, bytes]]:
        """``_sequential`` as (aspects, record)."""
        of_items = varints(self.data.item)
        for keyed in self._keyed_windows():
            self.written["sequential"] += keyed.draws.size
            yield from window_records(self, groups, keyed, of_items, self._frames, _SHOW_FEATURES)

    # --------------------------------------------------------------------------------------------------- other families

    def shares(self, family: str, language: str, *, features: bool = False) -> dict[tuple[str, str], float]:
        """Share of each (preference, intention) in a family; they sum to 1, or there is none.

        Only what has a wording to train on counts. A family without shares of its own is spread evenly over what no
        earlier family of its kind lists.
        """
        name = (family, language, features)
        if name not in self._shares:
            _, kind, given = FAMILIES[family]
            if given is None:
                listed = {o for f in FAMILIES.values() if f.kind == kind and f.shares for o in f.shares}
                given = {(p, i): 1.0 for p in PREFERENCES for i in INTENTIONS if (p, i) not in listed}
            kept = {o: s for o, s in given.items() if self.group(language, kind, *o, features=features, trained=True)}
            # Complete shares stay as they are: a rounded sum would move examples from one option to the next.
            total = 1.0 if len(kept) == len(FAMILIES[family].shares or ()) else sum(kept.values())
            self._shares[name] = {option: share / total for option, share in kept.items()}
        return self._shares[name]

    def _family(self, stage: Stage, plan: Plan) -> Iterator[InstructionExample]:
        family, kind = stage.family, FAMILIES[stage.family].kind
        chosen = targets(self.config.seed, stage, self.data, self.config.max_per_user)
        for ends in (chosen[at : at + _CHUNK] for at in range(0, len(chosen), _CHUNK)):
            users = self.data.user[ends]
            people = users + self.data.first_user
            number = keys(self.config.seed, stage.number, people, ends - self.data.offsets[users])
            draws = [number]  # each the key after the one before, of all examples at once
            for _ in range(3):
                draws.append(mix_array(draws[-1]))
            numbers = zip(*(draw.tolist() for draw in draws), strict=True)
            shown: list[tuple[int, ...]] = [()] * len(ends)
            if kind in ("rerank", "pairwise", "pointwise"):
                seen = [self._training_items(user) for user in users.tolist()]
                n = {"rerank": self.shown("T3"), "pairwise": self.shown("T1"), "pointwise": 2}[kind]
                others = self._negatives(people, self.data.item[ends], seen, n - 1, plan)
                if kind == "pointwise":
                    shown = [tuple(row) for row in others.tolist()]
                else:
                    shown = self.candidates(ends, seen, n, others)
            wordings = [self._wording(family, user, four) for user, four in zip(users.tolist(), numbers, strict=True)]
            tastes = self._tastes(wordings, users, ends)
            for number, (end, user, candidates) in enumerate(zip(ends.tolist(), users.tolist(), shown, strict=True)):
                made = self._one(wordings[number], kind, user, end, candidates, tastes.get(number))
                if made is None:
                    self.skipped[f"{family}: nothing to say of the item or the history"] += 1
                    continue
                self.written[family] += 1
                yield made

    def _negatives(
        self, user: np.ndarray, target: np.ndarray, seen: list[np.ndarray], n: int, plan: Plan
    ) -> Int[np.ndarray, "cases n"]:
        """The other items of T0, T1 and T3 prompts, by ``instructions.negatives``."""
        items, seed = self.data.num_items, self.config.seed
        if self.lists is not None:
            found, taken = listed_negatives(self.lists[user], items, seen, n, seed=seed, user=user, target=target)
            self.drawn["listed"] += int(taken.sum())
            self.drawn["uniform"] += int(n * len(target) - taken.sum())
            return found
        popularity = plan.popularity if self.config.negatives == "popularity" else None
        return sample_negatives(items, seen, n, seed=seed, user=user, target=target, popularity=popularity)

    def _wording(self, family: str, user: int, numbers: tuple[int, int, int, int]) -> _Wording:
        """``numbers`` are keys for the choices, one after the other."""
        of_language, option, of_features, number = numbers
        language = pick(self.config.languages, of_language)
        features: tuple[Feature, ...] = ()
        if self.features and fraction(of_features) < _SHOW_FEATURES:
            features = self.features(user)
        shares = self.shares(family, language, features=bool(features))
        if not shares:
            return _Wording((), features, number)
        preference, intention = _by_share(shares, fraction(option))
        kind, found = FAMILIES[family].kind, []
        for level in _OTHER_LEVEL.get(intention, (intention,)):
            if group := self.group(language, kind, preference, level, features=bool(features), trained=True):
                found.append(pick(group, number))
        return _Wording(tuple(found), features, number)

    def _tastes(self, wordings: Sequence[_Wording], users: np.ndarray, ends: np.ndarray) -> dict[int, Taste]:
        """What weighs most in the histories whose wordings say it, by their places."""
        told = [n for n, wording in enumerate(wordings) if any(t.tells_taste for t in wording.templates)]
        return dict(zip(told, self.words.tastes(users[told], ends[told]), strict=True)) if told else {}

    def _one(
        self, wording: _Wording, kind: str, user: int, end: int, candidates: tuple[int, ...], taste: Taste | None
    ) -> InstructionExample | None:
        """The example whose target is event ``end``."""
        target = int(self.data.item[end])
        item = -1
        if kind == "pointwise":
            item, candidates = (target if wording.number >> 63 else candidates[0]), ()
        for template in wording.templates:
            slots = self.slots(
                template, user, end, target, candidates=candidates, item=item, features=wording.features, taste=taste
            )
            if slots is not None:
                # What the prompt shows, or answers by yes or no, is not to be predicted from its end.
                aim = -1 if kind == "pointwise" or "target_item" in template.reads else target
                return self.example(template, slots, user=user, target=aim, about_user=True)
        return None

    def _training_items(self, user: int) -> Int[np.ndarray, " n"]:
        start = int(self.data.offsets[user])
        return self.data.item[start : start + int(self.train_count[user])]


def _train_count(data: SplitData) -> Int[np.ndarray, " users"]:
    held_out = np.flatnonzero(data.split != TRAIN)  # few; asked for every part, for every stage
    return np.diff(data.offsets - np.searchsorted(held_out, data.offsets))


def _by_share(shares: dict[tuple[str, str], float], at: float) -> tuple[str, str]:
    """The option on whose stretch of [0, 1) the number lies."""
    for option, share in shares.items():
        at -= share
        if at < 0:
            return option
    return next(iter(shares))

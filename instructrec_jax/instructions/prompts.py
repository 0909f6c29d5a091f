"""Which template, which slots: prompts of a data set's users for evaluation, and of anyone for recommendation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from instructrec_jax.config import InstructionConfig
from instructrec_jax.data.schema import TRAIN, SplitData
from instructrec_jax.errors import ConfigError, UserError, did_you_mean
from instructrec_jax.instructions.example import Feature, InstructionExample
from instructrec_jax.instructions.keyed import keys
from instructrec_jax.instructions.negatives import sample_negatives
from instructrec_jax.instructions.packs import Domain, clean_text, load_domain, word_slots
from instructrec_jax.instructions.pauses import Pauses
from instructrec_jax.instructions.render import ItemsAs, Rendered, Slots, render
from instructrec_jax.instructions.tastes import Taste
from instructrec_jax.instructions.template import Template
from instructrec_jax.instructions.templates import in_families, load_templates
from instructrec_jax.instructions.words import Words

Features = Callable[[int], tuple[Feature, ...]]

# What evaluation may ask for: task family, preference, intention. The first wording of the group is used, unless another one is
# named. Widenings are not here: they are for training only.
KINDS: dict[str, tuple[str, str, str]] = {
    "sequential": ("sequential", "P1", "I0"),
    "taste": ("sequential", "P2", "I0"),
    "cold": ("sequential", "P0", "I0"),
    "search": ("search", "P0", "I2"),
    "search-vague": ("search", "P0", "I1"),
    "personal-search": ("search", "P1", "I2"),
    "personal-search-vague": ("search", "P1", "I1"),
    "describe": ("describe", "P1", "I0"),
    "rerank": ("rerank", "P1", "I0"),
    "rerank-taste": ("rerank", "P2", "I0"),
    "rerank-search": ("rerank", "P0", "I2"),
    "rerank-search-vague": ("rerank", "P0", "I1"),
    "rerank-personal-search": ("rerank", "P1", "I2"),
    "rerank-personal-search-vague": ("rerank", "P1", "I1"),
    "describe-search": ("describe", "P0", "I2"),
    "describe-personal-search": ("describe", "P1", "I2"),
    "pairwise": ("pairwise", "P1", "I0"),
    "pairwise-search": ("pairwise", "P0", "I2"),
    "pointwise": ("pointwise", "P1", "I0"),
    "pointwise-search": ("pointwise", "P0", "I2"),
}
_SOFT = 1 << 13  # texts of soft tokens that are kept
_ORDER_SALT = 0x0D0E  # keeps the order of candidates apart from the draws of the negatives


class NothingToSay(UserError):  # noqa: N818 - a condition that callers handle case by case, not a fault
    """The data holds no words for this user's taste or this item's wish: the case cannot be asked in that way."""


class Prompter:
    """Prompts of one data set.

    Args:
        data: the split data.
        config: languages, history length, candidates, seed, further files of templates and packs.
        domain: a domain pack, or its name.
        features: user index -> soft tokens of the user's features; None = there are none.
        items_as: how items stand in a history: "token", "title" or "both".
        candidates_as: how the candidates of T3 and T1 and the item of T0 stand; None = as in the history.
        pauses: where time gaps lie in the feature table; None = histories have none.

    Raises:
        ConfigError: unknown domain, language or family; a bad file of templates or packs; settings out of range.
    """

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
        if not config.languages:
            raise ConfigError("instructions.languages is empty", remedy="e.g. [en]")
        if config.history_items < 1:
            raise ConfigError(f"instructions.history_items = {config.history_items}; at least 1 is needed")
        if config.candidates < 2:
            raise ConfigError(f"instructions.candidates = {config.candidates}; a choice needs at least 2")
        if config.short_history_items < 1:
            raise ConfigError(f"instructions.short_history_items = {config.short_history_items}; at least 1 is needed")
        self.data, self.config = data, config
        self.domain = load_domain(domain, config.packs) if isinstance(domain, str) else domain
        self.features = features
        self.items_as: ItemsAs = items_as
        self.candidates_as: ItemsAs | None = candidates_as
        self.pauses = pauses
        self.words = Words(data, self.domain, config.seed, history_items=config.history_items)
        self.titles = self.words.facets.titles
        self.templates = load_templates(config.languages, config.templates)
        self._trained = frozenset((t.language, t.id) for t in in_families(self.templates, config.families))
        self._soft: dict[tuple[str, str, bool, int, int], tuple[str, bool, bool]] = {}
        self._groups: dict[tuple[str, str, str, str, bool, bool, bool], tuple[Template, ...]] = {}
        self.train_count: Int[np.ndarray, " users"] = np.bincount(
            data.user[data.split == TRAIN], minlength=data.num_users
        )

    # ------------------------------------------------------------------------------------------------------- evaluation

    def evaluation_prompt(
        self,
        kind: str,
        user: int,
        end: int,
        wish: str | None = None,
        language: str = "en",
        *,
        candidates: Sequence[int] | None = None,
        template: str = "",
    ) -> InstructionExample:
        """The prompt of an evaluation case, with the fixed wording of its kind, or with the one that is named.

        The history is the newest ``history_items`` events before event index ``end``, of any split; a user without
        events before it gets the "cold" prompt in place of "sequential". ``target`` is the item of event ``end``, or
        -1 where ``end`` is past the user's last event. Words of a wish come from the target (metric "search") unless
        ``wish`` gives the user's own.

        Args:
            kind: one of ``KINDS``.
            user: user index.
            end: event index, as in ``Cases.end``.
            wish: words for I1/I2.
            language: "en" or "zh".
            candidates: T3 and T1: the candidates in the order to show; None = frozen uniform negatives and the target.
            template: id of another wording of the same kind, held out or not.

        Raises:
            ConfigError: unknown kind, language or template; too small a catalogue for the candidates.
            NothingToSay: the data holds no words for the taste or the wish.
        """
        if kind not in KINDS:
            raise ConfigError(
                f"unknown kind of prompt {kind!r}{did_you_mean(kind, KINDS)}", remedy=f"one of {', '.join(KINDS)}"
            )
        start, stop = int(self.data.offsets[user]), int(self.data.offsets[user + 1])
        if not start <= end <= stop:
            raise ValueError(f"event index {end} is outside user {user}'s events {start}..{stop}")
        if end == start and kind == "sequential":
            kind = "cold"
        family, preference, intention = KINDS[kind]
        features = self.features(user) if self.features else ()
        if template:
            wording = self._named(template, language, family, preference, intention)
        else:
            wording = self._first(language, family, preference, intention, features=bool(features))
        target = int(self.data.item[end]) if end < stop else -1
        if wish is None and intention != "I0" and target < 0:
            raise NothingToSay(
                f"{kind}: there is no target after the user's last event to take the wish from", remedy="give a wish"
            )
        if wording.task in ("T1", "T3") and candidates is None:
            if target < 0:
                raise NothingToSay(
                    f"{kind}: there is no target after the user's last event", remedy="give the candidates"
                )
            candidates = self.candidates(np.asarray([end]), [self.data.item[start:end]], self.shown(wording.task))[0]
        slots = self.slots(wording, user, end, target, wish=wish, candidates=candidates or (), features=features)
        if slots is None:
            raise NothingToSay(f"{kind}: the data has nothing to say of user {user} or item {target}")
        return self.example(wording, slots, user=user, target=-1 if wording.task == "T0" else target, about_user=True)

    def wish(self, user: int, end: int, language: str = "en", level: str = "I2") -> str:
        """The wish that the target of an evaluation case would be asked for with, from its labels (I2) or tags (I1).

        Raises:
            NothingToSay: the data holds no words for it.
        """
        target = int(self.data.item[end])
        words = self.words.intention(level, target, user, end - int(self.data.offsets[user]), language)
        if not words:
            raise NothingToSay(f"the data has nothing to say of item {target}")
        return words

    # --------------------------------------------------------------------------------------------------- recommendation

    def recommend_prompt(
        self,
        history_items: Sequence[int] = (),
        wish: str | None = None,
        preference: str | None = None,
        language: str = "en",
        *,
        features: tuple[Feature, ...] = (),
        pauses: Sequence[Feature | None] = (),
    ) -> InstructionExample:
        """The prompt for anyone: a history of catalogue indices (newest last), a wish and a taste in words, all
        optional.

        A taste makes it P2, else a history P1, else P0; a wish makes it I1. With neither it is what a newcomer asks.
        ``pauses``: as of ``Slots``, for the whole history.
        """
        wish, preference = clean_text(wish or ""), clean_text(preference or "")
        history = list(history_items)[-self._history_budget("search" if wish else "sequential") :]
        pauses = pauses[-len(history) - 1 :] if history else ()
        level = "P2" if preference else "P1" if history else "P0"
        kind, intention = ("search", "I1") if wish else ("sequential", "I0")
        template = self._first(language, kind, level, intention, features=bool(features), history=bool(history))
        slots = Slots(history=history, preference=preference, intention=wish, features=features, pauses=pauses)
        return self.example(template, slots, user=-1, target=-1, about_user=True)

    # ------------------------------------------------------------------------------------------------------ small parts

    def _history_budget(self, kind: str) -> int:
        """Most history items in a prompt of this kind: those that teach at every item may be longer than the others."""
        return self.config.history_items if kind == "sequential" else self.config.short_history_items

    def group(
        self,
        language: str,
        kind: str,
        preference: str,
        intention: str,
        *,
        features: bool = False,
        held_out: bool = False,
        trained: bool = False,
    ) -> tuple[Template, ...]:
        """Templates of one language, family and aspects, in file order; with ``{features}`` only if there are some;
        ``trained``: only those of the families that the config trains on."""
        name = (language, kind, preference, intention, features, held_out, trained)
        if name not in self._groups:
            self._groups[name] = tuple(
                t
                for t in self._templates(language)
                if (t.language, t.kind, t.preference, t.intention) == name[:4]
                and t.held_out == held_out
                and (features or "features" not in t.reads)
                and (not trained or (t.language, t.id) in self._trained)
            )
        return self._groups[name]

    def _templates(self, language: str) -> list[Template]:
        word_slots(self.domain, language)  # a pack without this language is told before anything is written
        return (
            self.templates if language in self.config.languages else load_templates([language], self.config.templates)
        )

    def _named(self, name: str, language: str, *group: str) -> Template:
        """The template of that id, which must be of the group (kind, preference, intention)."""
        fitting = {
            t.id: t
            for t in self._templates(language)
            if t.language == language and (t.kind, t.preference, t.intention) == group
        }
        if name not in fitting:
            raise ConfigError(
                f"no {language!r} template of {', '.join(group)} has the id {name!r}{did_you_mean(name, fitting)}",
                remedy=f"one of {', '.join(fitting)}",
            )
        return fitting[name]

    def example(
        self,
        template: Template,
        slots: Slots,
        *,
        user: int,
        target: int,
        dense: bool = False,
        dense_from: int = 0,
        about_user: bool = False,
    ) -> InstructionExample:
        """Render to an ``InstructionExample``."""
        text = self._rendered(template, slots, about_user)
        return InstructionExample(
            template.id, template.language, template.preference, template.intention, template.task, template.metric,
            user if user < 0 else self.data.first_user + user,
            text.prompt, text.prompt_items, text.answer, text.answer_items, text.features,
            target, tuple(slots.candidates), dense, dense_from,
        )  # fmt: skip

    def _rendered(self, template: Template, slots: Slots, about_user: bool) -> Rendered:
        """``render``, but for a prompt of soft tokens between the same words, as most are: such texts are kept."""
        soft = self.items_as == "token" and template.is_soft and not slots.pauses
        history, features = slots.history, slots.features
        name = (template.language, template.id, about_user, len(history), len(features))
        if soft and (known := self._soft.get(name)):
            prompt, has_history, has_features = known
            return Rendered(prompt, tuple(history) if has_history else (), "", (), features if has_features else ())
        text = render(
            template,
            slots,
            self.domain,
            self.titles,
            items_as=self.items_as,
            candidates_as=self.candidates_as,
            about_user=about_user,
        )
        if soft and len(text.prompt_items) in (0, len(history)) and len(text.features) in (0, len(features)):
            if len(self._soft) >= _SOFT:
                self._soft.clear()
            self._soft[name] = text.prompt, bool(text.prompt_items), bool(text.features)
        return text

    def _first(
        self, language: str, kind: str, preference: str, intention: str, *, features: bool, history: bool = False
    ) -> Template:
        group = self.group(language, kind, preference, intention, features=features)
        if preference == "P0" and intention == "I0" and features:
            group = tuple(t for t in group if "features" in t.reads) or group
        if preference == "P2":  # with and without the history beside the words
            group = tuple(t for t in group if ("history" in t.reads) == history) or group
        return group[0]

    def slots(
        self,
        template: Template,
        user: int,
        end: int,
        target: int,
        *,
        wish: str | None = None,
        candidates: Sequence[int] = (),
        item: int = -1,
        features: tuple[Feature, ...] = (),
        taste: Taste | None = None,
    ) -> Slots | None:
        """Slots of a template whose target is event ``end``; None if the data has no words for one of them. ``taste``: of the history,
        if it is known."""
        start = int(self.data.offsets[user])
        history: list[int] = []
        pauses: Sequence[Feature | None] = ()
        answered = template.answered_by
        if "history" in template.reads or "history_titles" in answered:
            first = max(start, end - self._history_budget(template.kind))
            history, pauses = self.data.item[first:end].tolist(), self.pauses_of(user, first, end)
        preference: str | None = ""
        if template.tells_taste:
            preference = self.words.preference(user, end, template.language, taste)
        if template.intention != "I0" and wish is None:
            wish = self.words.intention(template.intention, target, user, end - start, template.language)
        if preference is None or (template.intention != "I0" and not (wish and clean_text(wish))):
            return None
        if "history_titles" in answered and not history:
            return None
        item = target if item < 0 else item
        right = item == target
        return Slots(history, preference, wish or "", candidates, item, features, target, right, pauses=pauses)

    def pauses_of(self, user: int, first: int, end: int, request: bool = True) -> Sequence[Feature | None]:
        """The pauses of a history, events ``first`` to ``end`` (exclusive) of a user, as ``Slots`` has them; () without time gaps.

        With ``request`` the last one is that before event ``end``, where there is such an event.
        """
        time = self.data.time
        if self.pauses is None or time is None or first == end:
            return ()
        start, stop = int(self.data.offsets[user]), int(self.data.offsets[user + 1])
        known = request and end < stop
        found = self.pauses.before(time[first : end + known], int(time[first - 1]) if first > start else None)
        return found if known else (*found, None)

    def shown(self, task: str) -> int:
        """How many candidates a prompt of this task shows."""
        return {"T1": 2, "T3": self.config.candidates}.get(task, 0)

    def candidates(
        self,
        ends: Int[np.ndarray, " cases"],
        exclude: Sequence[Int[np.ndarray, " seen"]],
        n: int,
        negatives: Int[np.ndarray, "cases n_minus_1"] | None = None,
    ) -> list[tuple[int, ...]]:
        """The targets at events ``ends`` among n − 1 negatives (frozen uniform ones if none are given), in an order that has
        nothing to do with the target."""
        users, targets = self.data.user[ends], self.data.item[ends]
        ordinals = ends - self.data.offsets[users]
        users = users + self.data.first_user
        if negatives is None:
            negatives = sample_negatives(
                self.data.num_items, exclude, n - 1, seed=self.config.seed, user=users, target=targets
            )
        shown = np.concatenate([targets[:, None], negatives], axis=1)
        order = np.argsort(
            keys(self.config.seed, _ORDER_SALT, users[:, None], ordinals[:, None], np.arange(n)), axis=1, kind="stable"
        )
        return [tuple(row) for row in np.take_along_axis(shown, order, axis=1).tolist()]

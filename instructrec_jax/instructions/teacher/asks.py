"""Which texts a data set's instructions need, and what a teacher may know when it writes one.

A preference is written from the events before the place where it is used, a wish from what the catalogue and the users' training tags
say of the item. No user id, and nothing of the target or of later events, is ever shown.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from instructrec_jax.data.privacy import Scrubber
from instructrec_jax.data.schema import SplitData
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.facets import Facets
from instructrec_jax.instructions.keyed import key
from instructrec_jax.instructions.packs import Domain, clean_text
from instructrec_jax.instructions.tastes import Taste
from instructrec_jax.instructions.words import Words

_LONGEST = 600  # characters of one text column of an item
_TAGS = 8  # most tags of an item


class Ask(NamedTuple):
    """One text that is needed."""

    kind: str  # "preference" or "intention"
    language: str
    user: int  # user index; -1 for an intention
    end: int  # event index: the history ends just before it; -1 for an intention
    item: int  # item of the event ``end`` (which a preference must not tell), or the item that is wished for


class Evidence(NamedTuple):
    """What a text is written from."""

    text: str  # as it is shown, one line per event or fact
    items: tuple[int, ...]  # items that it names
    content: str  # hash of kind, language and text: a taught text stands only for the very evidence it was written from


class _Recorder(Words):
    """Rule-made words that note what they were asked for."""

    def __init__(self, data: SplitData, builder: Builder):
        super().__init__(data, builder.domain, builder.config.seed, history_items=builder.config.history_items)
        self.asked: dict[Ask, None] = {}
        self._events = data.item

    def preference(self, user: int, end: int, language: str, taste: Taste | None = None) -> str | None:
        """As the rules, noted."""
        self.asked.setdefault(Ask("preference", language, user, end, int(self._events[end])))
        return super().preference(user, end, language, taste)

    def intention(self, level: str, target: int, user: int, ordinal: int, language: str) -> str | None:
        """As the rules; vague wishes are noted."""
        if level == "I1":
            self.asked.setdefault(Ask("intention", language, -1, -1, target))
        return super().intention(level, target, user, ordinal, language)


def asks(data: SplitData, builder: Builder, kinds: Sequence[str], seed: int = 0) -> list[Ask]:
    """Every text of the given kinds that the training instructions of ``builder`` use, each once, in a keyed order.

    Only training events are places. The order mixes users and items, so that any first part of the list is a fair sample.
    """
    recorder, rules = _Recorder(data, builder), builder.words
    builder.words = recorder
    try:
        for _ in builder.training_examples():
            pass
    finally:
        builder.words = rules
    kept = [ask for ask in recorder.asked if ask.kind in kinds]
    return sorted(kept, key=lambda a: (key(seed, len(a.kind), len(a.language), a.user, a.end, a.item), a))


class Evidences:
    """Makes the evidence of an ask.

    Args:
        data, facets, domain: the split data, what the catalogue says of its items, and the domain's names of labels.
        history_items: most events that a preference is written from, the newest.
    """

    def __init__(self, data: SplitData, facets: Facets, domain: Domain, history_items: int):
        self.data, self.facets, self.domain, self.history_items = data, facets, domain, history_items
        self.item_tags, self.own_tags = facets.tags(data.tags)
        self._scrub = Scrubber()
        table = data.catalogue.table
        self._columns = {
            f.name: table[f.name].to_pylist()
            for f in table.schema
            if pa.types.is_string(f.type)
            and f.name not in ("item_id", "title", "brand")
            and not f.name.endswith(("_id", "_path", "_url"))
        }

    def over(self, part: SplitData) -> Evidences:
        """The same for a part of the users."""
        other = copy.copy(self)
        other.data = part
        return other

    def of(self, ask: Ask) -> Evidence | None:
        """The evidence; None if the data has nothing to show."""
        if ask.kind == "preference":
            return self.history(ask.user, ask.end, ask.language)
        return self.item(ask.item, ask.language)

    def history(self, user: int, end: int, language: str) -> Evidence | None:
        """The newest events of a user before event index ``end``, oldest first."""
        start = max(int(self.data.offsets[user]), end - self.history_items)
        items: list[int] = self.data.item[start:end].tolist()
        if not items:
            return None
        lines = []
        for event, item in enumerate(items, start):
            line = f"- {self.facets.titles[item]}"
            if labels := self._labels(item, language):
                line += f" ({', '.join(labels)})"
            if self.data.rating is not None and np.isfinite(self.data.rating[event]):
                line += f", rated {self.data.rating[event]:g}"
            if tags := self.own_tags.get((self.data.first_user + user, item)):
                line += f", tagged {', '.join(tags[:3])}"
            lines.append(line)
        return self._evidence("preference", language, lines, items)

    def item(self, item: int, language: str) -> Evidence | None:
        """What the data says of an item; None if that is only its title."""
        lines = []
        if labels := self._labels(item, language):
            lines.append(f"labels: {', '.join(labels)}")
        if brand := self.facets.brands[item]:
            lines.append(f"brand: {brand}")
        if tags := self.item_tags.get(item):
            lines.append(f"people call it: {', '.join(tags[:_TAGS])}")
        for name, values in self._columns.items():
            if text := clean_text(values[item] or ""):
                lines.append(f"{name}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}")
        if not lines:
            return None
        return self._evidence("intention", language, [f"title: {self.facets.titles[item]}", *lines], [item])

    def future(self, ask: Ask) -> tuple[int, ...]:
        """Items that a preference must not tell: the user's events from its place on, less those that came before too."""
        if ask.kind != "preference":
            return ()
        start, stop = int(self.data.offsets[ask.user]), int(self.data.offsets[ask.user + 1])
        later = self.data.item[ask.end : stop]
        return tuple(np.setdiff1d(later, self.data.item[start : ask.end]).tolist())

    def _labels(self, item: int, language: str) -> list[str]:
        names = self.domain.names.get(language, {})
        return [names.get(label.lower(), label) for label in self.facets.labels[item]]

    def _evidence(self, kind: str, language: str, lines: list[str], items: list[int]) -> Evidence:
        # The text goes to somebody else's machine: personal data goes first, whatever data.clean.scrub says. Titles stay.
        text = "\n".join(f"{line[:2]}{self._scrub(line[2:])}" for line in lines)
        content = hashlib.blake2b(f"{kind}\0{language}\0{text}".encode(), digest_size=16).hexdigest()
        return Evidence(text, tuple(items), content)

"""Rule-made words: a user's taste (P2) from the history, a vague (I1) or specific (I2) wish from the target's facets.

Every choice is made by a key of (seed, user, place in the user's events), never of the target, so that nothing of the
target shows in the wording beyond what the template declares.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
from jaxtyping import Int

from instructrec_jax.data.schema import SplitData
from instructrec_jax.instructions.facets import Facets
from instructrec_jax.instructions.keyed import key, mix, pick
from instructrec_jax.instructions.packs import FRAMES, Domain, load_phrases
from instructrec_jax.instructions.tastes import Taste, Tastes

_WISHES = 1 << 14  # items whose specific wish is kept: popular ones are wished for again and again
_FACETS = 3  # most labels in one sentence


class Words:
    """Rule-made preferences and intentions of one data set."""

    def __init__(self, data: SplitData, domain: Domain, seed: int = 0, *, history_items: int = 64):
        self._data, self.domain, self._seed, self._length = data, domain, seed, history_items
        self.facets = Facets(data.catalogue, domain)
        self._specific = lru_cache(_WISHES)(self._specific_words)
        self._vague = lru_cache(_WISHES)(self._vague_words)

    @cached_property
    def _tags(self) -> tuple[dict[int, list[str]], dict[tuple[int, int], list[str]]]:
        return self.facets.tags(self._data.tags)

    @cached_property
    def _tastes(self) -> Tastes:
        return Tastes(self.facets, self._length)

    def over(self, part: SplitData) -> Self:
        """The same words for a part of the users; what the catalogue and everybody's tags say is not worked out again."""
        _ = self._tags, self._tastes
        other = copy.copy(self)
        other._data = part
        return other

    def tastes(self, users: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"]) -> list[Taste]:
        """What weighs most in the users' events before the indices ``ends``, for ``preference``: of many histories at once."""
        return self._tastes.of(self._data, users, ends)

    def preference(self, user: int, end: int, language: str, taste: Taste | None = None) -> str | None:
        """P2: a sentence on the taste that the user's events before index ``end`` show; None if nothing can be said.

        Reads the newest ``history_items`` events and the user's own tags on their items. ``taste``: as ``tastes`` gives it, if it has
        been asked for already.
        """
        taste = taste or self.tastes(np.array([user]), np.array([end]))[0]
        first = int(self._data.offsets[user])
        person = self._data.first_user + user
        number = mix(key(self._seed, person, end - first))
        phrases = load_phrases(language)

        what, frame = "", taste.frame
        if frame:
            top = taste.names[: 2 + number % 2]
            shown = [self._quoted(w, language) if frame == "worded" else self._label(w, language, frame) for w in top]
            what = self._fill(
                self.domain.words[language][frame], language, **{FRAMES[frame]: self._join(shown, language)}
            )

        own = self._tags[1]
        newest = self._data.item[max(first, end - self._length) : end][::-1].tolist() if own else ()
        tags = dict.fromkeys([t for i in newest for t in own.get((person, i), ())])
        said = self._join([self._quoted(t, language) for t in list(tags)[:2]], language)
        if not what:
            return self._fill(phrases.one["taste_tags_only"], language, tags=said) if said else None
        return self._fill(
            pick(phrases.many["taste"], mix(number)),
            language,
            what=what,
            when=self._fill(phrases.one["when"], language, decade=str(taste.decade)) if taste.decade else "",
            said=self._fill(phrases.one["said"], language, tags=said) if said else "",
        )

    def intention(self, level: str, target: int, user: int, ordinal: int, language: str) -> str | None:
        """I1 or I2: a wish that the target answers; None if the data has nothing to say of it.

        I1 is one of the three tags that training users gave it most, else one of its labels, else a title word, said
        vaguely. I2 is all its labels (at most 3; title words where there are none), its decade, its brand and what
        the domain's constraints say of it (at most 3).
        ``ordinal`` is the place of the target among the user's events (0-based).
        """
        number = mix(key(self._seed, self._data.first_user + user, ordinal, int(level[1])))
        phrases, facets = load_phrases(language), self.facets
        if level == "I1":
            frame_key = mix(number)
            if tags := self._tags[0].get(target):
                slot, word = "tag", pick(tags[:3], number)
            elif labels := facets.labels[target]:
                slot, word = "label", pick(labels, number)
            elif words := facets.title_words[target]:
                slot, word = "word", pick(words[:_FACETS], number)
            else:
                return None
            return self._vague(slot, word, pick(phrases.many[f"vague_{slot}"], frame_key), language)

        values = self._specific(target, language)
        return pick(phrases.many["specific"], number).format_map(values) if values else None

    def _vague_words(self, slot: str, word: str, frame: str, language: str) -> str:
        """A frame with a tag, a label or a word of a title in it."""
        said = self._label(word, language, "labelled") if slot == "label" else self._quoted(word, language)
        return self._fill(frame, language, **{slot: said})

    def _specific_words(self, target: int, language: str) -> dict[str, str]:
        """What fills the frames of a specific wish for an item; nothing if the data says nothing of it."""
        phrases, facets = load_phrases(language), self.facets
        labels = [self._label(x, language, "labelled") for x in facets.labels[target][:_FACETS]]
        words = [] if labels else list(facets.title_words[target][:2])
        decade, brand = facets.decades[target], facets.brands[target]
        limits = facets.limits(target, language)[:_FACETS]
        if not (labels or words or brand or limits):
            return {}
        terse = [*labels, *words]
        if decade:
            terse.append(phrases.one["terse_decade"].format(decade=decade))
        if brand:
            terse.append(brand)
        terse.extend(limits)
        named = self.domain.words[language]
        if labels:
            what = self._fill(named["labelled"], language, labels=self._join(labels, language))
        elif words:
            what = self._fill(
                named["worded"], language, words=self._join([self._quoted(w, language) for w in words], language)
            )
        else:
            what = named["nouns"]
        return {
            **named,
            "terse": phrases.one["list_comma"].join(terse),
            "what": what,
            "when": phrases.one["specific_when"].format(decade=decade) if decade else "",
            "brand": phrases.one["specific_brand"].format(brand=brand) if brand else "",
            "limits": "".join(phrases.one["specific_limit"].format(limit=limit) for limit in limits),
        }

    # ------------------------------------------------------------------------------------------------------ small parts

    def _fill(self, frame: str, language: str, **values: str) -> str:
        return frame.format_map({**self.domain.words[language], **values})

    def _label(self, label: str, language: str, frame: str) -> str:
        if frame == "branded":
            return label
        name = self.domain.names.get(language, {}).get(label.lower())
        return name or (label if label.isupper() else label.lower())

    def _quoted(self, text: str, language: str) -> str:
        return load_phrases(language).one["quote"].format(text=text)

    def _join(self, parts: Sequence[str], language: str) -> str:
        one = load_phrases(language).one
        if len(parts) < 2:
            return "".join(parts)
        return one["list_comma"].join(parts[:-1]) + one["list_and"] + parts[-1]

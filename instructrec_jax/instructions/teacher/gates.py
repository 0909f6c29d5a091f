"""What a taught text must pass. The gates are automatic forms of the questions that a person was asked about such texts in
InstructRec (arXiv 2305.07001, Table 3), and of what must never happen.

| gate | refuses |
|---|---|
| length | fewer or more words than allowed |
| form | talk of "I", of the list or of ratings, where a taste or a wish was asked for; a text that repeats itself |
| language | another script than the language's |
| personal | an e-mail address, card, phone number or street address |
| leak | preference: a title, or a rare word of a title, among the target and later events; wish: the item's title |
| invented | a title of the catalogue that the evidence does not hold; a quotation that stands nowhere in it |
| grounded | no label, brand or tag of the evidence (where it has none: no telling word); or a label that nothing in it has |
| near-duplicate | almost the words of an earlier text |
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

from instructrec_jax.config import TeacherConfig
from instructrec_jax.data.privacy import Scrubber
from instructrec_jax.errors import UserError
from instructrec_jax.instructions.teacher.asks import Ask, Evidence, Evidences
from instructrec_jax.instructions.titles import Titles, contains, shingles, stem, tokens

GATES = ("schema", "length", "form", "language", "personal", "leak", "invented", "grounded", "near-duplicate")
_HAN = re.compile("[\u4e00-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")
_QUOTED = re.compile(r"[“\"《「]([^“”\"《》「」]{2,80})[”\"》」]")
# What a model says when it talks about its task instead of doing it.
_TALK = {
    "preference": re.compile(r"\b(?:I|I['’]m|my|your?|lists?|listed|rat(?:ed|ings?))\b|[我你您]|清单|列表|评分"),
    "intention": re.compile(
        r"\b(?:titles?|labels?|lists?|listed|rat(?:ed|ings?))\b|标题|标签|清单|列表|评分", re.IGNORECASE
    ),
}
_DISTINCT = 0.75  # share of a text's three-word runs that differ, at least
_RARE = 3  # titles that hold a rare word, at most
_TELLING = 5  # letters of a word that tells something
_PERMUTATIONS = 128


class Refused(NamedTuple):
    """Why a text did not pass."""

    gate: str
    complaint: str  # as the model is told


class Gates:
    """Judges texts against their evidence. Stateless but for what counts as a near-duplicate: see ``Duplicates``."""

    def __init__(self, evidences: Evidences, config: TeacherConfig):
        self._evidences, self._config = evidences, config
        self._facets = evidences.facets

    @cached_property
    def _titles(self) -> Titles:
        return Titles(self._facets.titles, frozenset(self._all_labels))

    @cached_property
    def _stems(self) -> list[tuple[str, ...]]:
        return [tuple(tokens(stem(title))) for title in self._facets.titles]

    @cached_property
    def _title_words(self) -> Counter[str]:
        return Counter(word for title in self._facets.titles for word in set(tokens(title)))

    @cached_property
    def _all_labels(self) -> set[str]:
        return {label.lower() for labels in self._facets.labels for label in labels}

    def judge(self, ask: Ask, evidence: Evidence, text: str) -> Refused | None:
        """The first gate that refuses the text, or None."""
        for gate in (
            self._length,
            self._form,
            self._language,
            self._personal,
            self._leak,
            self._invented,
            self._grounded,
        ):
            complaint = gate(ask, evidence, text)
            if complaint:
                return Refused(gate.__name__.lstrip("_"), complaint)
        return None

    def _length(self, ask: Ask, evidence: Evidence, text: str) -> str:
        least, most = self._config.min_words, self._config.max_words
        if ask.kind == "intention":
            least, most = min(least, 2), max(least, most // 2)
        words = tokens(text)
        count = sum(0.5 if _HAN.match(w) else 1.0 for w in words)
        return "" if least <= count <= most else f"it has {count:g} words, and {least} to {most} are allowed"

    def _form(self, ask: Ask, evidence: Evidence, text: str) -> str:
        if found := _TALK[ask.kind].search(text):
            return f"it says {found[0]!r} instead of stating the {ask.kind}"
        runs = max(len(tokens(text)) - 2, 1)
        return "it repeats itself" if len(shingles(text)) < _DISTINCT * runs else ""

    def _language(self, ask: Ask, evidence: Evidence, text: str) -> str:
        text = _QUOTED.sub("", text)  # a tag or a title keeps its own script
        for item in evidence.items:
            text = text.replace(stem(self._facets.titles[item]), "")
        letters = len(_LETTER.findall(text))
        share = len(_HAN.findall(text)) / max(letters, 1)
        if ask.language == "zh":
            return "" if share >= 0.5 else "it is not in Chinese"
        return "" if share <= 0.1 and letters else "it is not in English"

    def _personal(self, ask: Ask, evidence: Evidence, text: str) -> str:
        scrub = Scrubber()
        scrub(text)
        return f"it holds personal data ({', '.join(scrub.counts)})" if scrub.counts else ""

    def _grounded(self, ask: Ask, evidence: Evidence, text: str) -> str:
        words, given = ([_singular(w) for w in tokens(t)] for t in (text, evidence.text))
        own = self._known_labels(evidence, ask.language)
        for label in sorted(self._all_labels - own):
            phrase = [_singular(w) for w in tokens(label)]
            if contains(words, phrase) and not contains(given, phrase):
                return f"it speaks of {label}, of which the given facts say nothing"
        facts = own | self._tags(ask, evidence)
        if any(contains(words, [_singular(w) for w in tokens(fact)]) for fact in facts):
            return ""
        if facts and ask.kind == "preference":
            return "it names no kind, brand or tag of the given facts"
        telling = {w for w in given if len(w) >= _TELLING}
        if ask.kind == "intention":
            telling -= {_singular(w) for w in self._stems[ask.item]}
        if telling.intersection(words) or (ask.language == "zh" and shingles(text, 2) & shingles(evidence.text, 2)):
            return ""
        return "nothing in it comes from the given facts"

    def _leak(self, ask: Ask, evidence: Evidence, text: str) -> str:
        said = tokens(text)
        if ask.kind == "intention":
            title = self._stems[ask.item]
            title = title[1:] if title[:1] in (("the",), ("a",), ("an",)) and len(title) > 1 else title
            telling = len(title) > 1 or len("".join(title)) >= 4
            return "it uses the title" if telling and contains(said, title) else ""
        future = set(self._evidences.future(ask))
        known = {self._stems[i] for i in evidence.items}
        for words, items in self._titles.named(text):
            if future.intersection(items) and not known.intersection(self._stems[i] for i in items):
                return f"it names {words!r}, which is not in the list"
        given = set(tokens(evidence.text))
        rare = {
            word
            for item in future
            for word in self._stems[item]
            if len(word) >= _TELLING and self._title_words[word] <= _RARE and word not in given
        }
        told = sorted(rare.intersection(said))
        return f"it uses {told[0]!r}, which is not in the list" if told else ""

    def _invented(self, ask: Ask, evidence: Evidence, text: str) -> str:
        known = {self._stems[i] for i in evidence.items}
        given = tokens(evidence.text)
        for words, items in self._titles.named(text):
            if not known.intersection(self._stems[i] for i in items) and not contains(given, tokens(words)):
                return f"it names {words!r}, which is not in the given facts"
        for match in _QUOTED.finditer(text):
            words = tokens(match[1])
            if words and not contains(given, words) and tuple(words) not in known:
                return f"it quotes {match[1]!r}, which is not in the given facts"
        return ""

    def _known_labels(self, evidence: Evidence, language: str) -> set[str]:
        names = self._evidences.domain.names.get(language, {})
        labels = {label.lower() for i in evidence.items for label in self._facets.labels[i]}
        brands = {self._facets.brands[i].lower() for i in evidence.items if self._facets.brands[i]}
        return labels | brands | {names[x].lower() for x in labels if x in names}

    def _tags(self, ask: Ask, evidence: Evidence) -> set[str]:
        if ask.kind == "intention":
            return set(self._evidences.item_tags.get(ask.item, ()))
        return {tag for i in evidence.items for tag in self._evidences.own_tags.get((ask.user, i), ())}


class Duplicates:
    """Finds near-duplicates by MinHash over runs of three words (datasketch).

    Raises:
        UserError: datasketch is not installed.
    """

    def __init__(self, threshold: float):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise UserError(
                f"near-duplicates need datasketch ({error})",
                remedy="pip install 'instructrec_jax[teacher]', or set teacher.near_duplicate to 0",
            ) from error
        self._minhash: Any = MinHash
        self._index: Any = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._threshold = threshold
        self._hashes: list[Any] = []

    def check(self, text: str) -> Refused | None:
        """Refuse a text that is nearly an earlier one; a text that passes is remembered."""
        own = self._minhash(num_perm=_PERMUTATIONS)
        own.update_batch([s.encode() for s in sorted(shingles(text))])
        if any(own.jaccard(self._hashes[int(i)]) >= self._threshold for i in self._index.query(own)):
            return Refused("near-duplicate", "nearly the words of an earlier text")
        self._index.insert(str(len(self._hashes)), own)
        self._hashes.append(own)
        return None


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word

"""A wish that names items: "something like Heat but funny, for tonight" asks for "funny" by the side of Heat.

The named item says what kind of thing is wanted and is not itself wanted. So it goes into the history, of which recommendations are the
continuation, and its name leaves the wish, whose words are looked up in the catalogue and would find that very item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from instructrec_jax.data.schema import SplitData
from instructrec_jax.instructions.packs import Domain, clean_text, read_template_file
from instructrec_jax.instructions.titles import Titles, stem, token_matches, tokens

_OPEN = re.compile(r"\s*[\"'“‘《「『«]?\s*")
_ARTICLE = r"(?:,\s*(?:The|A|An|Le|La|Les|L'|Il|El|Los|Las|Das|Der|Die)\b(?!\s+\w))?"  # "Godfather, The (1972)", as catalogues write it
_BEHIND = re.compile(_ARTICLE + r"[\"'”’》」』»]?(?:\s*[(（](\d{4})[)）][\"'”’》」』»]?)?")
_PUNCTUATION = re.compile(r"[\s,.;:!?，。；：！？、\-–—\"'“”‘’《》「」『』«»()（）]+")
_LONGEST = 300  # characters of a title
_CHINESE = re.compile("[\u4e00-\u9fff]")  # no space stands before or behind
# Titles that are words of every sentence ("It", "Her") are meant only where they are written as titles.
_COMMON = frozenset(
    "it her him them this that these those me us you he she they what up out now then here there the a an".split()  # noqa: SIM905
)


class Read(NamedTuple):
    """A wish as it is understood."""

    wish: str  # what is asked for beside; "" = nothing
    items: tuple[int, ...] = ()  # the items that it names, as named


class References:
    """Reads the wishes of one catalogue.

    A title, or what stands in it before a colon, counts as named behind words like "like" or "similar to" (``templates/wishes.yaml``); of
    several items of one name the one of the year that stands behind it, else the one that most people had. Titles that stand elsewhere
    are words like others.

    Args:
        data: the catalogue, and how often its items were had.
        domain: whose nouns ("the film ...") may stand before a title, and ask for nothing by themselves.
    """

    def __init__(self, data: SplitData, domain: Domain):
        self._titles, self._popularity = data.catalogue.titles, data.train_popularity
        self._indices = Titles(self._titles), Titles([_before_colon(title) for title in self._titles])
        nouns = [words[slot].lower() for words in domain.words.values() for slot in ("noun", "nouns")]
        like, and_, but, when = (_any(_all(key)) for key in ("like", "and", "but", "when"))
        self._cue = re.compile(like, re.I)
        self._noun = re.compile(rf"(?:the\s+)?(?:{_any(nouns)})\s*", re.I)
        self._filler = re.compile(_any([*_all("filler"), *_all("but"), *nouns]), re.I)
        self._some = re.compile(rf"^(?:{_any(_all('some'))})\s*", re.I)
        self._and = re.compile(rf"(?:[,;，；、&/\s]|{and_})+", re.I)
        self._but = re.compile(rf"(?:[\s,;，；]*(?:{but}))+", re.I)
        self._when = re.compile(rf"[\s,;，；]*(?:{when})[\s.!?。！？]*$", re.I)

    def read(self, wish: str) -> Read:
        """What a wish asks for, and the items that it names."""
        text, items = clean_text(wish), []
        at = 0
        while cue := self._cue.search(text, at):
            at = cue.end()
            if self._title_at(text, cue.start())[1]:  # a title that begins so: "Like Water for Chocolate"
                continue
            end, found = self._named(text, cue.end())
            if not found:
                continue
            items += found
            left, right = text[: cue.start()].rstrip(), text[end:]
            but = self._but.match(right)
            right = right[but.end() :] if but else right
            right = right.lstrip()
            at, text = len(left), left + ("" if _CHINESE.search(left[-1:] + right[:1]) else " ") + right
        if items or self._when.search(text):
            text = self._without_time(text)
        if items and not _PUNCTUATION.sub("", self._filler.sub(" ", text)):
            text = ""
        if items:  # "something funny": a film that has "something" in its title is not meant
            text = self._some.sub("", text)
        return Read(text.strip(" ,;，；、"), tuple(dict.fromkeys(items)))

    def _without_time(self, text: str) -> str:
        while found := self._when.search(text):
            text = text[: found.start()]
        return text

    def _named(self, text: str, at: int) -> tuple[int, list[int]]:
        """Where the titles that begin here end, and their items; one title, or several with "and" between them."""
        items: list[int] = []
        end = start = at
        while True:
            noun = self._noun.match(text, _opened(text, start))
            for begin in dict.fromkeys((start, noun.end() if noun else start)):
                first = _opened(text, begin)
                stop, item = self._title_at(text, first, quoted=bool(text[begin:first].strip()))
                if item:
                    break
            if not item:
                return end, items
            items += item
            end = stop
            between = self._and.match(text, end)
            if between is None or not between[0].strip():
                return end, items
            start = between.end()

    def _title_at(self, text: str, at: int, *, quoted: bool = False) -> tuple[int, list[int]]:
        """(its end with a year and a closing quotation mark, the one item) of the longest title that begins at ``at``; [] for none."""
        found = list(token_matches(text[at : at + _LONGEST]))
        if not found or found[0].start():
            return at, []
        written = [m[0].lower() for m in found]
        for words in (written, ["the", *written]):  # with an article that the wish leaves out
            length, items = self._begins(words)
            told = len(words) - len(found)  # words that do not stand in the wish
            if length > told:
                break
        else:
            return at, []
        if text[at + found[length - 1 - told].end() :].lstrip().startswith(":"):  # how much of a subtitle stands there?
            shared = {item: _shared(words, tokens(stem(self._titles[item]))) for item in items}
            length = max(length, *shared.values())
            items = [item for item, n in shared.items() if n >= length] or items
        if length == 1 and found[0][0] in _COMMON and not quoted:  # a capital letter makes it a title
            return at, []
        behind = _BEHIND.match(text, at + found[length - 1 - told].end())
        assert behind is not None  # it matches nothing, too
        year = behind[1]
        of_year = [i for i in items if year and f"({year})" in self._titles[i]]
        return behind.end(), [max(of_year or items, key=lambda i: (int(self._popularity[i]), -i))]

    def _begins(self, words: Sequence[str]) -> tuple[int, list[int]]:
        """The longest title, or beginning of titles up to a colon, that the words begin with; of two as long the whole title."""
        return max((index.begins(words) for index in self._indices), key=lambda found: found[0])


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """How many words two lists begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _before_colon(title: str) -> str:
    return title.split(":")[0]


def _opened(text: str, at: int) -> int:
    """Behind white space and a quotation mark, if they stand there."""
    found = _OPEN.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _all(key: str) -> list[str]:
    """The entries of all languages: a wish need not be in the prompt's."""
    return [word for words in _wishes().values() for word in words[key]]


def _any(words: Sequence[str]) -> str:
    """A pattern: any of the words, the longest first. Words of letters end where a word ends; Chinese has no such bounds."""
    patterns = []
    for word in sorted(set(words), key=lambda w: (-len(w), w)):
        pattern = r"\s+".join(map(re.escape, word.split()))
        patterns.append(rf"(?<!\w){pattern}(?!\w)" if word.isascii() else pattern)
    return "|".join(patterns)


@cache
def _wishes() -> Mapping[str, Mapping[str, list[str]]]:
    return read_template_file("wishes.yaml")

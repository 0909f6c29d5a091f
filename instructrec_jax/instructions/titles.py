"""Which titles of a catalogue a text names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_TOKEN = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+(?:['’][^\W_\u4e00-\u9fff]+)*")
_PARENTHESES = re.compile(r"[(（][^()（）]*[)）]")
_ARTICLE = re.compile(r"^(.*), (The|A|An|Le|La|Les|L'|Il|El|Los|Las|Das|Der|Die)$")
_LONGEST = 8  # tokens of a title that are compared
_OPEN, _CLOSE = "\"'“‘《「『«", "\"'”’》」』»"


def tokens(text: str) -> list[str]:
    """Words, and single Chinese characters, in lower case."""
    return [match[0].lower() for match in token_matches(text)]


def token_matches(text: str) -> Iterator[re.Match[str]]:
    """Where the tokens of a text stand, as they are written."""
    return _TOKEN.finditer(text)


def stem(title: str) -> str:
    """A title as people say it: "Matrix, The (1999)" is The Matrix."""
    bare = _PARENTHESES.sub("", title).strip() or title
    if match := _ARTICLE.match(bare):
        return f"{match[2]} {match[1]}"
    return bare


class Titles:
    """Finds titles in texts.

    A title counts as named where it stands in quotation marks or before a year; in Chinese from three characters on; otherwise where
    it is written with capitals: a phrase whose first and last word have one, or a single word of at least four letters that does not
    begin a sentence and is no label (``labels``, lower case). So "big" and "the game" are words, "Big (1988)" and "The Game" titles.
    """

    def __init__(self, titles: Sequence[str], labels: frozenset[str] = frozenset()):
        self._labels = labels
        self._items: dict[tuple[str, ...], list[int]] = {}
        for item, title in enumerate(titles):
            words = tuple(tokens(stem(title)))[:_LONGEST]
            if words:
                self._items.setdefault(words, []).append(item)
                if words[0] in ("the", "a", "an") and len(words) > 2:
                    self._items.setdefault(words[1:], []).append(item)

    def begins(self, words: Sequence[str]) -> tuple[int, list[int]]:
        """The longest title that tokens in lower case begin with: its length, and the items of that name; (0, []) for none."""
        for length in range(min(_LONGEST, len(words)), 0, -1):
            if items := self._items.get(tuple(words[:length])):
                return length, items
        return 0, []

    def named(self, text: str) -> list[tuple[str, list[int]]]:
        """(the words, the items that have them as a title) for each title in the text; of overlapping ones the longest."""
        found = list(_TOKEN.finditer(text))
        words = [match[0].lower() for match in found]
        out: list[tuple[str, list[int]]] = []
        at = 0
        while at < len(found):
            step = 1
            for length in range(min(_LONGEST, len(found) - at), 0, -1):
                items = self._items.get(tuple(words[at : at + length]))
                if items and self._is_title(text, found, at, length):
                    out.append((text[found[at].start() : found[at + length - 1].end()], items))
                    step = length
                    break
            at += step
        return out

    def _is_title(self, text: str, found: list[re.Match[str]], at: int, length: int) -> bool:
        start, end = found[at].start(), found[at + length - 1].end()
        before, after = text[:start].rstrip()[-1:], text[end:].lstrip()
        quoted = text[start - 1 : start] in tuple(_OPEN) and text[end : end + 1] in (*_CLOSE, ",", ".", "(", " ")
        if quoted or re.match(r"[(（](?:18|19|20)\d\d[)）]", after):
            return True
        if "\u4e00" <= text[start] <= "\u9fff":
            return length >= 3 and all("\u4e00" <= m[0] <= "\u9fff" for m in found[at : at + length])
        first, last = text[start], found[at + length - 1][0][0]
        if length > 1:
            return all(c.isupper() or c.isdigit() for c in (first, last))
        word = found[at][0]
        return len(word) >= 4 and first.isupper() and before not in ("", *".!?:") and word.lower() not in self._labels


def contains(text: Sequence[str], phrase: Sequence[str]) -> bool:
    """Whether the tokens of a phrase stand one after the other among the tokens of a text."""
    n = len(phrase)
    return n > 0 and any(tuple(text[i : i + n]) == tuple(phrase) for i in range(len(text) - n + 1))


def shingles(text: str, n: int = 3) -> set[str]:
    """Runs of ``n`` tokens; a shorter text is one run."""
    words = tokens(text)
    if len(words) < n:
        return {" ".join(words)}
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}

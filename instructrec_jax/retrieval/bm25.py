"""BM25 over item documents, by the ``bm25s`` library: for a wish in words, and for the next item by likeness of text.

The document of an item is its title, genres or categories, brand, description and the users' training tags. (Robertson
and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; the variant is Lucene's.)
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from instructrec_jax.data.schema import Catalogue, SplitData
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.retrieval.base import not_fitted

TEXT_COLUMNS = ("genres", "categories", "brand", "description")
QUERY_COLUMNS = ("genres", "categories")
# Han, kana and Hangul are written without spaces (or with few): pairs of characters stand in for words.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_PIECES = re.compile(f"[{_CJK}]+|[^\\W_{_CJK}]+(?:'[^\\W_{_CJK}]+)?")
_IS_CJK = re.compile(f"[{_CJK}]")


def tokenise(text: str, stopwords: frozenset[str] = frozenset()) -> list[str]:
    """Lower-case words, and overlapping character pairs of Chinese, Japanese and Korean runs (a single character stays
    alone).

    Text is brought to Unicode NFKC first, so full-width letters equal plain ones.
    """
    out: list[str] = []
    for piece in _PIECES.findall(unicodedata.normalize("NFKC", text).lower()):
        if not _IS_CJK.match(piece):
            if piece not in stopwords:
                out.append(piece)
        elif len(piece) == 1:
            out.append(piece)
        else:
            out.extend(piece[i : i + 2] for i in range(len(piece) - 1))
    return out


class BM25:
    """BM25 over item documents. ``score_text`` ranks for a wish, ``score`` for the next item."""

    name = "bm25"
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"last": (10, 1, 3, 5, 20), "k1": (1.5, 0.9, 2.0), "b": (0.75, 0.4)}

    def __init__(
        self, last: int = 10, k1: float = 1.5, b: float = 0.75, stopwords: bool = True, tags: bool = True
    ) -> None:
        """Choose the model.

        Args:
            last: newest history items whose titles and genres make the query of ``score``.
            k1, b: saturation of term frequency, and weight of document length.
            stopwords: leave out English function words.
            tags: add the users' training tags to the documents that a wish is matched with.

        Raises:
            ConfigError: ``last`` < 1, ``k1`` < 0 or ``b`` outside [0, 1].
        """
        if last < 1 or k1 < 0 or not 0 <= b <= 1:
            raise ConfigError(f"bm25: last = {last}, k1 = {k1}, b = {b}: want last >= 1, k1 >= 0, 0 <= b <= 1")
        self.last, self.k1, self.b, self.tags = last, k1, b, tags
        self.use_stopwords = stopwords
        self._stopwords: frozenset[str] = frozenset()
        self._plain: Any = None  # index without tags, for score
        self._tagged: Any = None  # index with tags, for score_text
        self._queries: list[list[str]] = []  # tokens by which an item of a history speaks

    def fit(self, data: SplitData, include_valid: bool = False) -> Self:
        """Index the catalogue. (Tags in ``data`` are from training events, so ``include_valid`` changes nothing.)

        Raises:
            UserError: no item has a word to index.
        """
        import bm25s
        from bm25s.stopwords import STOPWORDS_EN

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG

        if self.use_stopwords:
            self._stopwords = frozenset(STOPWORDS_EN)

        def index(tags: bool) -> Any:
            documents = [tokenise(text, self._stopwords) for text in item_documents(data, tags)]
            if not any(documents):
                raise UserError(f"{data.name}: no item has a word to index", remedy="give the items table titles")
            out = bm25s.BM25(k1=self.k1, b=self.b)
            out.index(documents, show_progress=False)
            return out

        self._plain = index(tags=False)
        # Tags help to find an item from words; for likeness of items they only make the documents of popular items
        # longer.
        self._tagged = index(tags=True) if self.tags and data.tags else self._plain
        titles = _join([[t] for t in data.catalogue.titles], *(_texts(data.catalogue, c) for c in QUERY_COLUMNS))
        self._queries = [tokenise(text, self._stopwords) for text in titles]
        return self

    def score_text(self, queries: Sequence[str]) -> Float[np.ndarray, "Q I"]:
        """Score the catalogue for wishes in words. A query without a known word scores 0 everywhere."""
        return self._score_tokens(self._tagged, [tokenise(q, self._stopwords) for q in queries])

    def score(
        self, histories: Sequence[Int[np.ndarray, " n"]], users: Int[np.ndarray, " cases"] | None = None
    ) -> Float[np.ndarray, "cases I"]:
        """Score the catalogue by likeness of text to the newest ``last`` items of each history."""
        if self._plain is None:
            raise not_fitted(self.name)
        queries = [[word for item in h[-self.last :] for word in self._queries[int(item)]] for h in histories]
        return self._score_tokens(self._plain, queries)

    def _score_tokens(self, index: Any, queries: list[list[str]]) -> np.ndarray:
        if index is None:
            raise not_fitted(self.name)
        out = np.zeros((len(queries), len(self._queries)), np.float32)
        for row, tokens in enumerate(queries):
            known = index.get_tokens_ids(tokens)
            if known:
                out[row] = index.get_scores_from_ids(known)
        return out


def item_documents(data: SplitData, tags: bool = True) -> list[str]:
    """One text per item: title, genres, categories, brand, description, and the training tags."""
    own_words: list[list[str]] = [[] for _ in range(data.num_items)]
    if tags:
        for _, item, tag in data.tags:
            own_words[item].append(tag)
    columns = (_texts(data.catalogue, column) for column in TEXT_COLUMNS)
    return _join([[title] for title in data.catalogue.titles], *columns, own_words)


def _texts(catalogue: Catalogue, column: str) -> list[list[str]]:
    if column not in catalogue.table.column_names:
        return [[] for _ in catalogue.item_ids]
    cells = catalogue.table[column].to_pylist()
    return [[str(v) for v in c if v] if isinstance(c, list) else [str(c)] if c else [] for c in cells]


def _join(*parts: list[list[str]]) -> list[str]:
    # Line breaks keep character pairs from forming across fields.
    return ["\n".join(word for words in row for word in words) for row in zip(*parts)]

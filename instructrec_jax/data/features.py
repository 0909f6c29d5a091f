"""Numbers about items and users that enter the model as soft tokens.

Item features (one row per catalogue item, float32):

* *content*: TF-IDF of all text of the item (title, lists, descriptions, other text columns, tags from training events), reduced by
  truncated SVD (latent semantic analysis). A new item has them on its first day.
* *co-occurrence* (optional): truncated SVD of the positive pointwise mutual information of items that stand within
  ``WINDOW`` events of each other in training histories, weighted 1/distance (Levy & Goldberg 2014 on item sequences).

* *encoded* (optional): the vectors that a published encoder gives the items' text (``encode.py``).

Each block is scaled to unit standard deviation. User features are described by ``UserFeatures``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from instructrec_jax.data.schema import TRAIN, SplitData
from instructrec_jax.instructions.example import Feature

WINDOW = 10
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def terms(text: str) -> list[str]:
    """Lower-case words; runs of Chinese, Japanese or Korean script as overlapping character pairs."""
    out = []
    for word in _WORD.findall(text.lower()):
        if _CJK.search(word):
            out.extend(word[i : i + 2] for i in range(max(len(word) - 1, 1)))
        else:
            out.append(word)
    return out


def item_terms(data: SplitData) -> list[list[str]]:
    """All terms of each item. List entries and short text columns (brand) also count as one whole term each."""
    table = data.catalogue.table
    rows: list[list[str]] = [terms(title) for title in data.catalogue.titles]
    for name in table.column_names:
        if name in ("item_id", "title") or name.endswith(("_id", "_path", "_url")):
            continue
        kind = table.schema.field(name).type
        if pa.types.is_list(kind):
            for row, values in zip(rows, table[name].to_pylist()):
                for value in filter(None, values or ()):
                    row.append(f"{name}={value.lower()}")
                    row.extend(terms(value))
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            for row, value in zip(rows, table[name].to_pylist()):
                if value:
                    row.extend(terms(value))
                    if len(value) <= 40:
                        row.append(f"{name}={value.lower()}")
    for _, item, tag in data.tags:
        rows[item].append(f"tag={tag.lower()}")
        rows[item].extend(terms(tag))
    return rows


def content_features(data: SplitData, width: int, seed: int = 0) -> Float[np.ndarray, "I Fc"]:
    """TF-IDF + truncated SVD of the items' text; fewer columns when the vocabulary is smaller than ``width``."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = item_terms(data)
    frequent = 2 if len(rows) > 50 else 1
    options: Any = {"analyzer": _identity, "min_df": frequent, "max_features": 50_000, "dtype": np.float32}
    vectorizer = TfidfVectorizer(sublinear_tf=True, **options)
    try:
        matrix = vectorizer.fit_transform(rows)
    except ValueError:  # no term occurs twice: there is nothing that items share
        return np.zeros((len(rows), 0), np.float32)
    rank = min(width, matrix.shape[1] - 1, matrix.shape[0] - 1)
    if rank < 1:
        return np.zeros((len(rows), 0), np.float32)
    return _unit_scale(TruncatedSVD(rank, random_state=seed).fit_transform(matrix))


def cooccurrence_features(data: SplitData, width: int, seed: int = 0) -> Float[np.ndarray, "I Fc"]:
    """PPMI + truncated SVD of items near each other in the training histories. Items without training events have zero rows."""
    import scipy.sparse as sp
    from sklearn.decomposition import TruncatedSVD

    keep = data.split == TRAIN
    item, user = data.item[keep], data.user[keep]
    pairs = []
    for distance in range(1, WINDOW + 1):
        same = user[distance:] == user[:-distance]
        left, right = item[:-distance][same], item[distance:][same]
        pairs.append(sp.coo_matrix((np.full(len(left), 1 / distance), (left, right)), shape=(data.num_items,) * 2))
    counts = sum(p.tocsr() for p in pairs)
    counts = (counts + counts.T).tocoo()
    total, marginal = counts.data.sum(), np.asarray(counts.tocsr().sum(axis=1)).ravel()
    if total == 0:
        return np.zeros((data.num_items, 0), np.float32)
    pmi = np.log(counts.data * total / (marginal[counts.row] * marginal[counts.col]))
    positive = pmi > 0
    ppmi = sp.csr_matrix((pmi[positive], (counts.row[positive], counts.col[positive])), shape=counts.shape)
    rank = min(width, data.num_items - 1)
    if rank < 1 or ppmi.nnz == 0:
        return np.zeros((data.num_items, 0), np.float32)
    return _unit_scale(TruncatedSVD(rank, random_state=seed).fit_transform(ppmi))


def item_sentences(data: SplitData) -> list[str]:
    """The text of each item for an encoder: title, list entries, text columns and tags, each kind as a sentence."""
    table = data.catalogue.table
    rows = [[title] for title in data.catalogue.titles]
    for name in table.column_names:
        if name in ("item_id", "title") or name.endswith(("_id", "_path", "_url")):
            continue
        kind = table.schema.field(name).type
        if pa.types.is_list(kind):
            values = [", ".join(filter(None, entry or ())) for entry in table[name].to_pylist()]
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            values = [value or "" for value in table[name].to_pylist()]
        else:
            continue
        for row, value in zip(rows, values):
            if value:
                row.append(value)
    tags: dict[int, list[str]] = {}
    for _, item, tag in data.tags:
        if tag not in tags.setdefault(item, []):
            tags[item].append(tag)
    for item, words in tags.items():
        rows[item].append(", ".join(words[:20]))
    return [". ".join(row) for row in rows]


def item_features(
    data: SplitData, content: int, cooccurrence: int, encoded: Float[np.ndarray, "I D"] | None = None
) -> Float[np.ndarray, "I Fc"]:
    """All blocks side by side, ``[I, <= D + content + cooccurrence]``; ``encoded`` are an encoder's vectors of ``item_sentences``."""
    blocks = [] if encoded is None else [_unit_scale(encoded - encoded.mean(axis=0))]
    if content:
        blocks.append(content_features(data, content))
    if cooccurrence:
        blocks.append(cooccurrence_features(data, cooccurrence))
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((data.num_items, 0), np.float32)


def _identity(row: list[str]) -> list[str]:
    return row


def _unit_scale(matrix: np.ndarray) -> Float[np.ndarray, "I F"]:
    # A block without variation (all texts alike) has no deviation but rounding: its size is the scale then.
    deviation, size = float(matrix.std()), float(np.abs(matrix).max(initial=0.0))
    return (matrix / (deviation if deviation > 1e-5 * size else size or 1.0)).astype(np.float32)


@dataclass(frozen=True)
class UserFeatures:
    """Feature tokens of every user: token j of user u is row ``index[u, j]`` of the feature table, times ``value[u, j]``.

    A number column has one row and a value standardised with mean and deviation over users that have training events; a category
    column has one row per level seen there, with value 1. ``index = -1`` means absent (missing value or unseen level): no token.
    """

    names: list[str]  # one per row of the feature table, "age" or "gender=F"
    index: Int[np.ndarray, "U J"]
    value: Float[np.ndarray, "U J"]

    def tokens(self, user: int) -> tuple[Feature, ...]:
        """The feature tokens of one user."""
        index, value = self.index[user].tolist(), self.value[user].tolist()
        return tuple([Feature(i, v) for i, v in zip(index, value) if i >= 0])


# A column of codes with more levels than this says who somebody is rather than what they are like (zip codes, names).
MAX_LEVELS = 64


def user_features(data: SplitData) -> UserFeatures:
    """Standardised numbers and categories of the users table, with every statistic from users that have training events."""
    names: list[str] = []
    index: list[np.ndarray] = []
    value: list[np.ndarray] = []
    fit = np.bincount(data.user[data.split == TRAIN], minlength=data.num_users) > 0
    columns = [] if data.users is None else [n for n in data.users.column_names if n != "user_id"]
    for name in columns:
        assert data.users is not None
        column = data.users[name].combine_chunks()
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            numbers = np.asarray(column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False), np.float64)
            known = numbers[fit & np.isfinite(numbers)]
            if len(known) == 0 or np.ptp(known) == 0:  # not std, which rounding may leave above 0
                continue
            present = np.isfinite(numbers)
            index.append(np.where(present, len(names), -1))
            value.append((np.where(present, numbers, known.mean()) - known.mean()) / known.std())
            names.append(name)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            words = np.asarray([w or "" for w in column.to_pylist()], object)
            levels = sorted({str(w) for w in words[fit] if w})
            if not 1 < len(levels) <= MAX_LEVELS:
                continue
            row = {level: len(names) + k for k, level in enumerate(levels)}
            index.append(np.asarray([row.get(str(w), -1) for w in words]))
            value.append(np.ones(len(words)))
            names.extend(f"{name}={level}" for level in levels)
    if not index:
        return UserFeatures([], np.zeros((data.num_users, 0), np.int32), np.zeros((data.num_users, 0), np.float32))
    return UserFeatures(names, np.stack(index, 1).astype(np.int32), np.stack(value, 1).astype(np.float32))

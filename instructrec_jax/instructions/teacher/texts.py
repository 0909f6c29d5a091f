"""Taught texts on disk, and how they stand before the rule-made words.

A folder of ``data teach`` holds ``texts.parquet`` (what passed), ``rejected.jsonl`` (what did not, with the gate), ``manifest.json``
(counts, checksum) and the cache. A text is found by the hash of the evidence that it was written from: where history, labels or
ratings have changed, or belong to somebody else, it does not apply, and the rules speak.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import DataError
from instructrec_jax.files import read_json, sha256, write_atomic
from instructrec_jax.instructions.tastes import Taste
from instructrec_jax.instructions.teacher.asks import Evidences
from instructrec_jax.instructions.words import Words

TEXTS, REJECTED, MANIFEST = "texts.parquet", "rejected.jsonl", "manifest.json"
_AGAIN = "run `instructrec data teach CONFIG` again: answers that are in its cache are not asked again"


@dataclass(frozen=True)
class Taught:
    """One text that passed, with what it was written from."""

    kind: str  # "preference" or "intention"
    language: str
    user: str  # user id as the prepared data have it; "" for an intention
    place: int  # how many of the user's events came before it; -1 for an intention
    item: str  # title of the event at that place, or of what is wished for
    content: str  # hash of the evidence
    text: str
    evidence: str  # as it was shown


_SCHEMA = pa.schema([(name, pa.int64() if name == "place" else pa.string()) for name in Taught.__dataclass_fields__])


def save(texts: Sequence[Taught], file: str | Path, history_items: int) -> None:
    """Write texts as Parquet, atomically. ``history_items``: most events of the evidence of a preference."""
    table = pa.Table.from_pylist([asdict(t) for t in texts], _SCHEMA)
    table = table.replace_schema_metadata({"history_items": str(history_items)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(file, sink.getvalue())


def read(file: str | Path) -> tuple[list[Taught], int]:
    """(the texts, ``history_items``) of a file that ``save`` wrote.

    Raises:
        DataError: the file is missing, or holds something else.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError("there are no taught texts", file=file, remedy="run `instructrec data teach CONFIG` first")
    try:
        table = pq.read_table(file)
        rows = [Taught(**row) for row in table.to_pylist()]
        return rows, int(table.schema.metadata[b"history_items"])
    except (pa.ArrowInvalid, OSError, TypeError, KeyError) as error:
        raise DataError(f"not a file of taught texts: {error}", file=file, remedy=_AGAIN) from error


def contents(file: str | Path) -> set[str]:
    """What the texts of a file were written from, as hashes; none of a file that is missing or damaged, which is to be replaced."""
    with contextlib.suppress(DataError):
        return {t.content for t in read(file)[0]}
    return set()


def verified(folder: str | Path) -> Path:
    """The texts file of a teacher's folder, compared with its manifest.

    Raises:
        DataError: the folder is not finished, or the file is not the one that the manifest lists.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise DataError("no taught texts: the folder is absent or not finished", file=folder / MANIFEST, remedy=_AGAIN)
    expected = read_json(folder / MANIFEST, _AGAIN).get("texts_sha256")
    if not (folder / TEXTS).is_file() or (found := sha256(folder / TEXTS)) != expected:
        there = f"sha256 {found}" if (folder / TEXTS).is_file() else "missing"
        raise DataError(f"{there}, manifest.json says {expected}", file=folder / TEXTS, remedy=_AGAIN)
    return folder / TEXTS


class TaughtWords(Words):
    """Words that a teacher wrote, and the rules' where it wrote none. ``counts`` says how often each spoke.

    Args:
        rules: the rule-made words of the data set.
        data: the split data.
        file: taught texts.
        history_items, seed: as of ``rules``.
    """

    def __init__(self, rules: Words, data: SplitData, file: str | Path, *, seed: int, history_items: int):
        super().__init__(data, rules.domain, seed, history_items=history_items)
        self.facets = rules.facets  # worked out already
        texts, shown = read(file)
        self._texts = {t.content: t.text for t in texts}
        self._kinds = {(t.kind, t.language) for t in texts}
        self._evidences = Evidences(data, rules.facets, rules.domain, shown)
        self.counts: Counter[str] = Counter()

    def over(self, part: SplitData) -> Self:
        """As the rules; the counts go on together."""
        other = super().over(part)
        other._evidences = self._evidences.over(part)
        return other

    def preference(self, user: int, end: int, language: str, taste: Taste | None = None) -> str | None:
        """The teacher's sentence for this very history, else the rules'."""
        if ("preference", language) in self._kinds:
            evidence = self._evidences.history(user, end, language)
            if evidence is not None and evidence.content in self._texts:
                self.counts["preference: teacher"] += 1
                return self._texts[evidence.content]
        self.counts["preference: rules"] += 1
        return super().preference(user, end, language, taste)

    def intention(self, level: str, target: int, user: int, ordinal: int, language: str) -> str | None:
        """The teacher's vague wish for the target, else the rules'; specific wishes are always the rules'."""
        if level == "I1":
            if ("intention", language) in self._kinds:
                evidence = self._evidences.item(target, language)
                if evidence is not None and evidence.content in self._texts:
                    self.counts["intention: teacher"] += 1
                    return self._texts[evidence.content]
            self.counts["intention: rules"] += 1
        return super().intention(level, target, user, ordinal, language)


def without(texts: Iterable[Taught], user: str, own_tags: Mapping[str, Sequence[str]]) -> list[Taught]:
    """The texts that were written neither from this user's events nor, for an item's title, from tags that only they gave it."""
    return [
        t for t in texts if t.user != user and not any(tag in t.evidence.lower() for tag in own_tags.get(t.item, ()))
    ]

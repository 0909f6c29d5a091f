"""What the catalogue and the users' tags say of each item, ready to be put into words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa

from instructrec_jax.data.schema import Catalogue
from instructrec_jax.instructions.packs import Domain, clean_text

_YEAR = re.compile(r"\((\d{4})\)\s*$")
_WORD = re.compile(r"[^\W\d_][\w'’+-]{2,}")
_MAX_LABEL = 40  # characters; longer "labels" are sentences
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """about all and are but can each for from has have her his how into its new not off one our out over pack per
        piece set the their them this than that two was what when who will with you your
        edition volume part series discontinued manufacturer""",
    )
)


class Facets:
    """Labels, brand, decade and telling title words per item, as text; empty where the data has none."""

    def __init__(self, catalogue: Catalogue, domain: Domain):
        self._catalogue, self._domain = catalogue, domain

    @cached_property
    def titles(self) -> list[str]:
        """Titles as they may stand in a prompt."""
        return [clean_text(title) for title in self._catalogue.titles]

    @cached_property
    def labels(self) -> list[tuple[str, ...]]:
        """Genres, categories and any further list column, in the catalogue's order, each label once."""
        table = self._catalogue.table
        columns = [f.name for f in table.schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type)]
        columns.sort(key=lambda c: (c not in ("genres", "categories"), table.column_names.index(c)))
        out: list[dict[str, str]] = [{} for _ in self._catalogue.item_ids]
        for column in columns:
            for seen, values in zip(out, self._catalogue.lists(column), strict=True):
                for value in values:
                    label = clean_text(value or "")
                    if label and len(label) <= _MAX_LABEL and label.lower() not in self._domain.skip_labels:
                        seen.setdefault(label.lower(), label)
        return [tuple(seen.values()) for seen in out]

    @cached_property
    def brands(self) -> list[str]:
        """The ``brand`` column."""
        table = self._catalogue.table
        if "brand" not in table.column_names:
            return [""] * len(self._catalogue)
        brands = (clean_text(str(b)) if b is not None else "" for b in table["brand"].to_pylist())
        return [b if len(b) <= _MAX_LABEL else "" for b in brands]

    @cached_property
    def decades(self) -> list[int]:
        """1990 for a title that ends in "(1995)"; 0 = none."""
        found = (_YEAR.search(title) for title in self.titles)
        years = [int(m.group(1)) if m else 0 for m in found]
        return [year // 10 * 10 if 1870 <= year <= 2050 else 0 for year in years]

    @cached_property
    def title_words(self) -> list[tuple[str, ...]]:
        """Words of the title that at least two other titles have, but no more than a fifth of all, and that are not
        its brand; the most common first, as most titles write them."""
        forms: dict[str, dict[str, int]] = {}
        per_item: list[dict[str, None]] = []
        for title, brand in zip(self.titles, self.brands, strict=True):
            skipped = _COMMON.union(brand.lower().split()) if brand else _COMMON
            words = [(w.lower(), w) for w in _WORD.findall(_YEAR.sub("", title))]
            words = [(low, w) for low, w in words if low not in skipped]
            per_item.append(dict.fromkeys([low for low, _ in words]))
            for low, word in words:
                seen = forms.setdefault(low, {})
                seen[word] = seen.get(word, 0) + 1
        count = Counter(w for words in per_item for w in words)
        written = {w: min(seen, key=lambda s: (-seen[s], s)) for w, seen in forms.items()}
        most = max(3, len(per_item) // 5)
        return [
            tuple(written[w] for w in sorted(words, key=lambda w: (-count[w], w)) if 3 <= count[w] <= most)
            for words in per_item
        ]

    @cached_property
    def document_frequency(self) -> Counter[str]:
        """Items per label, brand or title word (lower case)."""
        count: Counter[str] = Counter()
        for facet in (self.labels, self.title_words):
            count.update(w.lower() for words in facet for w in words)
        count.update(b.lower() for b in self.brands if b)
        return count

    def limits(self, item: int, language: str) -> list[str]:
        """What the pack's constraints say of an item, in the pack's order: a price band, an age, a level, ...

        A number is rounded up to the next edge, and nothing is said of one beyond the last.
        """
        out = []
        for constraint in self._domain.constraints:
            if not (column := self._columns.get(constraint.column)) or language not in constraint.say:
                continue
            value = column[item]
            if isinstance(value, float | int):
                said = _number(float(value), constraint.edges)
            else:  # words where the pack expects a number say nothing
                said = "" if constraint.edges else clean_text(value or "")
            if said and len(said) <= _MAX_LABEL:
                out.append(constraint.say[language].format(value=said))
        return out

    @cached_property
    def _columns(self) -> dict[str, list[float | str | None]]:
        """The catalogue's number and text columns that the pack has constraints on."""
        table = self._catalogue.table
        return {
            c.column: table[c.column].to_pylist()
            for c in self._domain.constraints
            if c.column in table.column_names and not pa.types.is_nested(table.schema.field(c.column).type)
        }

    def tags(self, tags: list[tuple[int, int, str]]) -> tuple[dict[int, list[str]], dict[tuple[int, int], list[str]]]:
        """Usable tags, lower case: per item (most given first), and per (user, item) in the order given.

        A tag is left out when the domain's pack lists it, when it is long, or when it holds the item's whole title.
        """
        by_item: dict[int, Counter[str]] = {}
        by_user: dict[tuple[int, int], list[str]] = {}
        for user, item, raw in tags:
            tag = clean_text(raw).lower()
            stem = _YEAR.sub("", self.titles[item]).strip().lower()
            if (
                not tag
                or len(tag) > _MAX_LABEL
                or tag in self._domain.skip_tags
                or "://" in tag
                or (stem and stem in tag)
            ):
                continue
            by_item.setdefault(item, Counter())[tag] += 1
            own = by_user.setdefault((user, item), [])
            if tag not in own:
                own.append(tag)
        ranked = {i: sorted(c, key=lambda t: (-c[t], t)) for i, c in by_item.items()}
        return ranked, by_user


def _number(value: float, edges: Sequence[float]) -> str:
    """The value, rounded up to the next edge where there are some; empty for none, and beyond the last edge."""
    if edges and not math.isnan(value):
        value = next((edge for edge in edges if edge >= value), math.nan)
    return "" if math.isnan(value) else f"{value:g}"

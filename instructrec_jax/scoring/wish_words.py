"""Words of a wish: BM25 beside the matching head.

A model knows what it has learnt to search by: labels, decades, words that many items share. The name in a title, or a brand that three
items have, it can only look up. So words of the wish that stand in an item's document count by themselves:

    R_i = softmax_i(logit_i + u · BM25(words of the wish, document of i))

The document is that of ``retrieval/bm25.py``: title, labels, brand, description and the users' training tags. The weight u is chosen on
validation, for prompts without and with a history. Nothing of the language model depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from instructrec_jax.data.schema import SplitData
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.packs import Domain
from instructrec_jax.instructions.render import compiled
from instructrec_jax.instructions.template import Template
from instructrec_jax.retrieval.bm25 import BM25


class WishWords:
    """The index of a catalogue's documents, and how much a match counts.

    Args:
        data: the catalogue and its training tags.
        templates, domain: of the prompts: they tell the user's words from the template's.
        weights: u for prompts without and with a history.

    Raises:
        UserError: no item has a word to index.
    """

    def __init__(self, data: SplitData, templates: Iterable[Template], domain: Domain, weights: tuple[float, float]):
        self.weights = weights
        self._templates = {(t.language, t.id): t for t in templates}
        self._domain, self._items = domain, data.num_items
        self._index = BM25().fit(data) if any(weights) else None

    def weight(self, prompt: Any) -> float:
        """u of a prompt: 0 where there is no wish, or where the prompt shows candidates."""
        if not isinstance(prompt, InstructionExample) or prompt.task != "T2" or prompt.intention == "I0":
            return 0.0
        return self.weights[prompt.preference == "P1"]

    def wish(self, prompt: InstructionExample) -> str:
        """The user's words in a prompt."""
        template = self._templates.get((prompt.language, prompt.template))
        found = _pattern(template, self._domain).search(prompt.prompt) if template else None
        return found["wish"] if found else ""

    def scores(self, prompts: Sequence[Any]) -> Float[np.ndarray, "B I"]:
        """What is added to the logits of every prompt."""
        out = np.zeros((len(prompts), self._items), np.float32)
        asked = [(row, u, self.wish(p)) for row, p in enumerate(prompts) if (u := self.weight(p))]
        if asked and self._index is not None:
            rows, weights, wishes = zip(*asked)
            out[list(rows)] = np.asarray(weights, np.float32)[:, None] * self._index.score_text(wishes)
        return out


@lru_cache(maxsize=4096)
def _pattern(template: Template, domain: Domain) -> re.Pattern[str]:
    """What a prompt of the template looks like; the group ``wish`` is its intention. Another prompt may stand before it."""
    parts = []
    for slot, words in compiled(template, domain)[0]:
        parts.append(re.escape(words) if not slot else "(?P<wish>.*?)" if slot == "intention" else ".*?")
    if not any(part.startswith("(?P") for part in parts):
        parts.append("(?P<wish>)")
    return re.compile("".join(parts) + "$", re.DOTALL)

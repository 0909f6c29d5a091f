"""The instruction example: what a template renders to, what a record stores, what the loader tokenises.

Both are named tuples: one is made for every example that is written or read, and a frozen dataclass of as many fields takes
five times as long to make.
"""

from __future__ import annotations

from typing import NamedTuple

# Placeholders inside a rendered text. Cleaning removes both characters from all user text, so they are unambiguous.
ITEM_SLOT = "\ufffc"  # one soft token of a catalogue item
FEATURE_SLOT = "\ufff9"  # one soft token of a user feature
TITLE_OPEN, TITLE_CLOSE = "\ufffa", "\ufffb"  # around a title of the prompt that is learnt as the answer is


class Feature(NamedTuple):
    """One user feature as a soft token: ``table[index] * value``.

    A number has its own row and ``value`` is standardised on the training split; a category has a row per level and value 1.
    """

    index: int
    value: float


class InstructionExample(NamedTuple):
    """One instruction with its answer.

    ``prompt`` and ``answer`` are text; each ``ITEM_SLOT`` in them consumes the next entry of ``prompt_items`` /
    ``answer_items``, each ``FEATURE_SLOT`` in ``prompt`` the next of ``features``. Items are catalogue indices. Words between
    ``TITLE_OPEN`` and ``TITLE_CLOSE`` carry loss like an answer; both characters leave no token.
    """

    template: str  # id of the template, e.g. "seq.p1.next.a"
    language: str  # "en" or "zh"
    preference: str  # P0, P1 or P2
    intention: str  # I0, I1 or I2
    task: str  # T0 pointwise, T1 pairwise, T2 matching, T3 reranking
    metric: str  # what a metric on it may be called: "next-item", "search" where the prompt reads the target, "none": a widening
    user: int  # user index; never enters the text
    prompt: str
    prompt_items: tuple[int, ...]
    answer: str
    answer_items: tuple[int, ...] = ()
    features: tuple[Feature, ...] = ()
    target: int = -1  # catalogue index of the item that the last prompt position must predict; -1 = none
    candidates: tuple[int, ...] = ()  # catalogue indices shown to the model (T1, T3), or scored by it
    dense: bool = False  # also train every history item to predict the next one
    dense_from: int = (
        0  # first history slot (0-based) that is a target, so that windows of one user do not repeat targets
    )

"""The three aspects of an instruction and the combinations that make sense.

An instruction is a preference P, an intention I and a task form T (arXiv 2305.07001, section 2.1). Only facts live
here; the wordings are in ``templates/*.yaml``.
"""

from __future__ import annotations

PREFERENCES = {
    "P0": "nothing is known of the user: a newcomer, or privacy",
    "P1": "the items that the user chose, in order",
    "P2": "the user's taste, said in words",
}
INTENTIONS = {
    "I0": "no wish: the user is only looking around",
    "I1": "a vague wish, such as a mood or one kind",
    "I2": "a specific wish: kinds, brand, decade",
}
TASKS = {
    "T0": "pointwise: does this one item suit? yes or no",
    "T1": "pairwise: which of these two items?",
    "T2": "matching: one item out of the whole catalogue",
    "T3": "reranking: one item out of the candidates shown",
}
LEVELS = {"preference": PREFERENCES, "intention": INTENTIONS, "task": TASKS}


def invalid_reason(preference: str, intention: str, task: str) -> str:
    """Why a combination of levels is not an instruction, or ``""`` if it is one.

    Every combination is valid but (P0, I0) with T0, T1 or T3: with neither taste nor wish there is nothing to judge shown
    items by. (P0, I0, T2) stays: it is what a newcomer asks.
    """
    for name, level in (("preference", preference), ("intention", intention), ("task", task)):
        if level not in LEVELS[name]:
            return f"{level!r} is not a level of {name} ({', '.join(LEVELS[name])})"
    if (preference, intention) == ("P0", "I0") and task != "T2":
        return f"P0 with I0 says nothing to judge items by, so {task} has no answer"
    return ""


def valid_combinations() -> list[tuple[str, str, str]]:
    """All valid (P, I, T), in order."""
    return [(p, i, t) for p in PREFERENCES for i in INTENTIONS for t in TASKS if not invalid_reason(p, i, t)]

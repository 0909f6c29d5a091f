"""What a template is: its text, what it says of itself, and the slots that a text may have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

# slot -> what it reads of the data; "" = nothing that needs to be declared
PROMPT_SLOTS = {
    "history": "history",
    "preference": "preference",
    "intention": "",  # declared by TARGET_WORDS below
    "candidates": "candidates",
    "candidates_numbered": "candidates",
    "first": "pair",
    "second": "pair",
    "item": "item",
    "chosen": "target_item",
    "features": "features",
}
ANSWER_SLOTS = ("answer_title", "answer_item", "verdict", "intention", "preference", "history_titles")
# slot of a prompt -> slots of an answer that would only repeat it
GIVEN_AWAY = {
    "chosen": ("answer_title", "answer_item"),
    "intention": ("intention",),
    "preference": ("preference",),
    "history": ("history_titles",),
}
TARGET_WORDS = ("target_tags", "target_categories", "target_title")  # where the words of an intention come from
READS = ("history", "preference", "features", "candidates", "pair", "item", "target_item", *TARGET_WORDS)
METRICS = ("next-item", "search", "none")
WIDENINGS = ("turn-around", "relatedness", "reasoning")  # arXiv 2305.07001, section 2.2.2
SLOT = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Template:
    """One wording of an instruction."""

    id: str  # the same in every language; what stands before a dot names a family
    language: str
    preference: str  # P0, P1, P2
    intention: str  # I0, I1, I2
    task: str  # T0, T1, T2, T3
    prompt: str
    answer: str  # "" = the item itself is the answer, predicted from the last prompt position
    reads: frozenset[str]  # out of READS
    metric: str  # "next-item"; "search" where the prompt reads the target; "none" = a widening, for training only
    held_out: bool = False  # never trained on
    widening: str = ""  # out of WIDENINGS; "" = the plain task
    place: tuple[int, int] = field(default=(0, 0), compare=False)  # line and column of the prompt in its file

    def __hash__(self) -> int:
        """Equal templates have the same id and language; to hash every field for each example would take longer than to fill it in."""
        return hash((self.language, self.id))

    @property
    def aspects(self) -> tuple[str, str, str]:
        """(P, I, T)."""
        return self.preference, self.intention, self.task

    @property
    def reads_target(self) -> bool:
        """Whether the prompt says something of the target; to show it among others or to ask about it is not that."""
        return "target_item" in self.reads or any(read in self.reads for read in TARGET_WORDS)

    @cached_property
    def answered_by(self) -> frozenset[str]:
        """The slots of the answer."""
        return frozenset(SLOT.findall(self.answer))

    @cached_property
    def tells_taste(self) -> bool:
        """Whether the prompt or the answer says what the user prefers."""
        return "preference" in self.reads or "preference" in self.answered_by

    @cached_property
    def is_soft(self) -> bool:
        """Whether its texts differ by the numbers of soft tokens alone: no words but its own, and the domain's."""
        told = PROMPT_SLOTS.keys() - {"history", "features"}
        return not self.answer and told.isdisjoint(SLOT.findall(self.prompt))

    @cached_property
    def kind(self) -> str:
        """Task family: sequential, search (both answered by an item), describe, rerank, pairwise, pointwise (by words), or
        the widening: turn_around, relatedness, reasoning."""
        if self.widening:
            return self.widening.replace("-", "_")
        if self.task != "T2":
            return {"T0": "pointwise", "T1": "pairwise", "T3": "rerank"}[self.task]
        if self.answer:
            return "describe"
        return "sequential" if self.intention == "I0" else "search"

    def is_in(self, family: str) -> bool:
        """Whether a family, or an id, is this template's: "search", "search.p0", "search.p0.i1", "search.p0.i1.a"."""
        return self.id == family or self.id.startswith(f"{family}.")

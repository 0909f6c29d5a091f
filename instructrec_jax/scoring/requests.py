"""What is asked of the scorer, checked and tokenised: prompts as token arrays, candidates as token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from instructrec_jax.data.mixture import Space, shifted
from instructrec_jax.data.tokenise import encode_prompt, truncate
from instructrec_jax.data.tokenizer import Text
from instructrec_jax.errors import UserError
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, InstructionExample
from instructrec_jax.instructions.packs import load_phrases
from instructrec_jax.scoring.rows import FIELDS, Prompt

Candidates = Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | np.ndarray | Literal["all"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Request:
    """One prompt with any number of candidates, repeats allowed.

    ``prompt``: an instruction, or its token ids as the model reads them (nothing is added). ``candidates``: catalogue indices, texts, or
    token ids (of which none is added: end them yourself); or ``"all"``, the whole catalogue.
    """

    prompt: InstructionExample | Sequence[int] | np.ndarray
    candidates: Candidates = "all"


@dataclass(frozen=True)
class Ready:
    """A request whose candidates were looked at: catalogue indices, or token sequences, or the whole catalogue."""

    number: int
    prompt: InstructionExample | Sequence[int] | np.ndarray
    items: np.ndarray | None = None  # None with no ``words``: the whole catalogue
    words: list[list[int]] | None = None
    texts: list[str] | None = None

    @property
    def everything(self) -> bool:
        """Whether all items are candidates."""
        return self.items is None and self.words is None

    def __len__(self) -> int:
        return 0 if self.everything else len(self.items if self.items is not None else self.words or ())


class Reader:
    """Requests of one catalogue to token arrays.

    Args:
        text: the tokeniser.
        titles: one per item.
        max_prompt: longer prompts keep their frame's head and their newest tokens.
        max_candidate: tokens of a candidate; a longer one is cut before what ends an answer (``cut`` counts them).
        language: of the words that are put behind a prompt.
        space: where a catalogue of a mixture lies in the model's; None = they are the same.
    """

    def __init__(
        self,
        text: Text,
        titles: Sequence[str],
        *,
        max_prompt: int,
        max_candidate: int,
        language: str = "en",
        space: Space | None = None,
    ):
        self.text, self.titles, self._space = text, titles, space
        self.max_prompt, self.max_candidate = max_prompt, max_candidate
        self.cut = 0
        self._phrases = load_phrases(language).one
        self._titles: dict[int, list[int]] = {}
        self._labels: list[tuple[str, int]] | None = None

    def check(self, number: int, request: Request) -> Ready:
        """Raises UserError for a candidate outside the catalogue, or an empty prompt."""
        prompt, given = request.prompt, request.candidates
        if not isinstance(prompt, InstructionExample) and not len(prompt):
            raise UserError(f"request {number}: the prompt has no tokens")
        if isinstance(given, str):
            if given != "all":
                raise UserError(f"request {number}: candidates are {given!r}", remedy='a list, or "all"')
            return Ready(number, prompt)
        if len(given) and isinstance(given[0], str):
            texts = [str(c) for c in given]
            return Ready(number, prompt, words=[self._limited(i, ended=True) for i in self._encode(texts)], texts=texts)
        if len(given) and not np.isscalar(given[0]) and not isinstance(given, np.ndarray):
            rows: Sequence[Any] = given
            return Ready(number, prompt, words=[self._limited([int(t) for t in c], ended=False) for c in rows])
        index = np.asarray(given)
        if len(index) and not np.issubdtype(index.dtype, np.integer):
            raise UserError(
                f"request {number}: candidates of type {index.dtype}", remedy="catalogue indices, texts or token ids"
            )
        index = index.astype(np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= len(self.titles)):
            bad = int(index[(index < 0) | (index >= len(self.titles))][0])
            raise UserError(f"request {number}: candidate {bad} is outside the catalogue of {len(self.titles)} items")
        return Ready(number, prompt, items=index)

    # ---------------------------------------------------------------------------------------------------------- prompts

    def prompt(self, prompt: InstructionExample | Sequence[int] | np.ndarray, *, framed: bool = True) -> Prompt:
        """Token arrays of a prompt. ``framed`` False: without what a chat template puts behind it (the candidate follows first)."""
        if not isinstance(prompt, InstructionExample):
            tokens = np.asarray(prompt, np.int32)
            arrays = {k: np.zeros(len(tokens), v) for k, v in FIELDS.items()} | {"tokens": tokens}
            return truncate(arrays, self.max_prompt, 1)[0]
        if self._space is not None:
            prompt = shifted(prompt, self._space)
        text = self.text if framed else replace(self.text, after=())
        return truncate(encode_prompt(prompt, text), self.max_prompt, len(text.before))[0]

    def empty_prompt(self) -> Prompt:
        """A prompt that says nothing: the frame alone, or what ends an answer where there is no frame."""
        return self.prompt(np.asarray([*self.text.before, *self.text.after] or self.text.end[:1]))

    # ------------------------------------------------------------------------------------------------------- candidates

    def sequences(self, ready: Ready) -> list[list[int]]:
        """Every candidate's tokens with what ends an answer."""
        return ready.words if ready.words is not None else [self.title(int(i)) for i in self._items(ready)]

    def asked(self, ready: Ready) -> list[list[int]]:
        """Every candidate as the end of a yes-or-no question, with what follows a prompt."""
        shown = ready.texts if ready.texts is not None else [self._shown(ready, int(i)) for i in self._items(ready)]
        before, after = self._phrases["ask"].split("{title}")
        end = [*self.text.encode(after), *self.text.after]
        out = []
        for ids in self._encode([f"{before}{title}{after}" for title in shown]):
            whole = [*ids, *self.text.after]
            if len(whole) > self.max_candidate:  # the title gives way, not the question
                self.cut += 1
                whole = [*whole[: self.max_candidate - len(end)], *end]
            out.append(whole)
        return out

    def verdicts(self) -> tuple[int, int]:
        """First tokens of yes and no.

        Raises:
            UserError: they begin with the same token.
        """
        yes, no = (self.text.encode(self._phrases[word])[0] for word in ("yes", "no"))
        if yes == no:
            raise UserError("yes and no begin with the same token", remedy="score by likelihood or by labels")
        return yes, no

    def listed(self, ready: Ready, order: Sequence[int]) -> tuple[InstructionExample, list[int]]:
        """The request's prompt with its candidates under labels, in ``order``, and the token of each place's label.

        Raises:
            UserError: the prompt is token ids, or there are more candidates than labels of one token.
        """
        if not isinstance(ready.prompt, InstructionExample):
            raise UserError(
                f"request {ready.number}: candidates cannot be listed behind token ids", remedy="give the instruction"
            )
        labels = self.labels()
        if len(order) > len(labels):
            raise UserError(
                f"request {ready.number}: {len(order)} candidates, and {len(labels)} labels of one token",
                remedy="rank them by tournament or by sliding windows (scoring/listwise.py)",
            )
        shown = ready.texts or [self._shown(ready, int(i)) for i in self._items(ready)]
        line = self._phrases["label_line"]
        lines = [line.format(label=labels[place][0], title=shown[c]) for place, c in enumerate(order)]
        text = ready.prompt.prompt + self._phrases["label_list"].replace("{list}", " ".join(lines))
        return ready.prompt._replace(prompt=text), [labels[place][1] for place in range(len(order))]

    def labels(self) -> list[tuple[str, int]]:
        """Letters that are one token, with it, no two the same."""
        if self._labels is None:
            found: dict[int, str] = {}
            lead = "" if self.text.after or not self._phrases["label_list"].isascii() else " "
            for letter in LETTERS:
                ids = self.text.encode(lead + letter)
                if len(ids) == 1:
                    found.setdefault(ids[0], letter)
            self._labels = [(letter, token) for token, letter in found.items()]
        return self._labels

    def title(self, item: int) -> list[int]:
        """Tokens of an item's title with what ends an answer."""
        if item not in self._titles:
            self._titles[item] = self._limited(self.text.encode(self.titles[item]), ended=True)
        return self._titles[item]

    def all_titles(self) -> list[list[int]]:
        """``title`` of every item."""
        missing = [i for i in range(len(self.titles)) if i not in self._titles]
        for item, ids in zip(missing, self._encode([self.titles[i] for i in missing])):
            self._titles[item] = self._limited(ids, ended=True)
        return [self._titles[i] for i in range(len(self.titles))]

    def _items(self, ready: Ready) -> np.ndarray:
        return np.arange(len(self.titles)) if ready.items is None else ready.items

    def _shown(self, ready: Ready, item: int) -> str:
        if ready.words is not None:
            raise UserError(
                f"request {ready.number}: token ids cannot stand in a sentence", remedy="give texts or items"
            )
        title = self.titles[item]
        return "".join(c for c in title if c not in (ITEM_SLOT, FEATURE_SLOT))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.text.encode_batch(texts) if texts else []

    def _limited(self, ids: list[int], *, ended: bool) -> list[int]:
        end = list(self.text.end) if ended else []
        if len(ids) + len(end) > self.max_candidate:
            self.cut += 1
            ids = ids[: self.max_candidate - len(end)]
        return [*ids, *end]


def join_words(prompt: Prompt, words: Sequence[int]) -> Prompt:
    """A prompt with words behind it."""
    added = {k: np.zeros(len(words), v.dtype) for k, v in prompt.items()} | {"tokens": np.asarray(words, np.int32)}
    return {k: np.concatenate([prompt[k], added[k]]) for k in FIELDS}

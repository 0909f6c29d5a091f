"""Records of examples that differ in their items, their user and what is learnt alone: what they have in common is serialised once.

A training stream is mostly windows over histories, whose items nobody looks at between the log and the disk. So their varints are made
for many users at once, and the record of a window is put together from slices: no tuple of its items, and no example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from instructrec_jax.data import shards, wire
from instructrec_jax.instructions.example import Feature, InstructionExample


class Varints(NamedTuple):
    """Numbers as varints, one after the other."""

    content: bytes
    at: Int[np.ndarray, " n_plus_1"]  # where each begins, and the end

    def between(self, first: Int[np.ndarray, " slices"], end: Int[np.ndarray, " slices"]) -> list[bytes]:
        """Those of the numbers ``first`` to ``end`` (exclusive), of several slices."""
        return list(map(self.content.__getitem__, map(slice, self.at[first].tolist(), self.at[end].tolist())))


def varints(numbers: Int[np.ndarray, " n"]) -> Varints:
    """Seven bits to a byte, the lowest first; the numbers are at least 0."""
    rest = numbers.astype(np.uint64)
    size = np.ones(len(rest), np.int64)
    for bits in range(7, 64, 7):
        longer = rest >> np.uint64(bits) > 0
        if not longer.any():
            break
        size += longer
    end = np.cumsum(size)
    content = np.zeros(int(end[-1]) if len(end) else 0, np.uint8)
    for place in range(int(size.max(initial=0))):
        longer = np.flatnonzero(size > place)
        digit = (rest[longer] >> np.uint64(7 * place)).astype(np.uint8) & 127
        content[(end - size)[longer] + place] = digit | ((size[longer] > place + 1) << 7)
    return Varints(content.tobytes(), np.append(0, end))


class Frames:
    """What dense examples have in common that are of one kind: with the same wording and as many items and features."""

    def __init__(self) -> None:
        self._number: dict[int, int] = {}  # of a kind
        self._aspects: list[str] = []
        self._before: list[bytes] = []  # the fields between the features and the items
        self._after: list[bytes] = []  # the fields between the items and the user
        self._has_features: list[bool] = []

    def records(
        self,
        kind: Int[np.ndarray, " n"],
        example: Callable[[int], InstructionExample],
        *,
        items: Sequence[bytes],
        learnt: Sequence[int],
        features: Sequence[tuple[Feature, ...]],
        users: Sequence[int],
        person: Int[np.ndarray, " n"],
    ) -> Iterator[tuple[str, bytes]]:
        """(Aspects, record) of some examples without an answer in words.

        Args:
            kind: of each; the caller's numbers, the same on every call.
            example: gives the example at a place, of which a kind is made that was not met before.
            items: of each, as varints.
            learnt: ``dense_from`` of each.
            features, users: of some users.
            person: which one of these each example is of.
        """
        number = self._numbers(kind.tolist(), example)
        shown = np.where(np.array(self._has_features)[number], person + 1, 0).tolist()
        of_user = [wire.user_of(user) for user in users]
        of_features = [wire.NO_FEATURES, *map(wire.features_of, features)]
        known = {first: wire.NO_ANSWER + wire.learnt(True, first) for first in set(learnt)}
        sizes = list(map(len, items))
        heads = {size: wire.before_integers("prompt_items", size) for size in set(sizes)}
        fields = (
            list(map(known.__getitem__, learnt)),
            list(map(of_features.__getitem__, shown)),
            list(map(self._before.__getitem__, number)),
            list(map(heads.__getitem__, sizes)),
            items,
            list(map(self._after.__getitem__, number)),
            list(map(of_user.__getitem__, person.tolist())),
        )
        return zip(map(self._aspects.__getitem__, number), wire.wholes(fields))

    def _numbers(self, kinds: list[int], example: Callable[[int], InstructionExample]) -> list[int]:
        for kind, place in dict(zip(kinds, range(len(kinds)))).items():
            if kind not in self._number:
                made = example(place)
                before, after = wire.around_items(made)
                self._number[kind] = len(self._number)
                self._aspects.append(shards.aspects(made))
                self._before.append(before)
                self._after.append(after)
                self._has_features.append(bool(made.features))
        return list(map(self._number.__getitem__, kinds))

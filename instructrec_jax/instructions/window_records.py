"""Sequential windows whose texts differ by the numbers of soft tokens alone, straight to their records: no example of each is made.

What ``Builder`` gives as examples, and ``data/wire.py`` serialises, in the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from instructrec_jax.data.frames import Frames, Varints
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.prompts import Prompter
from instructrec_jax.instructions.render import Slots
from instructrec_jax.instructions.template import Template
from instructrec_jax.instructions.windows import KeyedWindows


def window_records(
    prompter: Prompter,
    groups: Sequence[Sequence[Template]],
    keyed: KeyedWindows,
    of_items: Varints,
    frames: Frames,
    show_features: float,
) -> Iterator[tuple[str, bytes]]:
    """(Aspects, record) of windows over the events of a prompter's data, every copy of a window after the one before it.

    Args:
        prompter: has no pauses, and shows items as soft tokens.
        groups: wordings of each language, all ``is_soft`` and with the history.
        keyed: the windows.
        of_items: the item of every event.
        frames: of the same groups.
        show_features: share of the prompts that show the features of users who have some.
    """
    copies, languages, data = prompter.config.copies, len(groups), prompter.data
    copy = np.tile(np.arange(copies, dtype=np.uint64), len(keyed.number))
    which = (np.repeat(keyed.number % np.uint64(languages), copies) + copy) % np.uint64(languages)
    wordings = np.array([len(group) for group in groups], np.uint64)[which]
    wording = (np.repeat(keyed.after, copies) % wordings + copy // np.uint64(languages)) % wordings
    about_user = (keyed.draws.ravel() >> np.uint64(11)) * 2.0**-53 < show_features  # as ``keyed.fraction``

    user, first, end, learnt = (np.repeat(places, copies) for places in keyed.windows)
    users, person = np.unique(user, return_inverse=True)
    features = [prompter.features(one) if prompter.features else () for one in users.tolist()]
    shown = np.array([len(found) for found in features], np.int64)[person]
    start = data.offsets[user]

    def example(n: int) -> InstructionExample:
        history = data.item[start[n] + first[n] : start[n] + end[n]].tolist()
        return prompter.example(
            groups[which[n]][wording[n]],
            Slots(history=history, features=features[person[n]]),
            user=0, target=-1, dense=True, about_user=bool(about_user[n]),
        )  # fmt: skip

    kind = shown
    for size, digit in (
        (languages, which),
        (max(map(len, groups)), wording),
        (prompter.config.history_items + 1, end - first),
    ):
        kind = kind * size + digit.astype(np.int64)
    return frames.records(
        2 * kind + about_user,
        example,
        items=of_items.between(start + first, start + end),
        learnt=[0] * len(learnt) if prompter.config.repeat_targets else learnt.tolist(),
        features=features,
        users=(users + data.first_user).tolist(),
        person=person,
    )

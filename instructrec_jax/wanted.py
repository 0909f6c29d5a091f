"""What one person wants, as a prompt: who they are, what they have had, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from instructrec_jax.data.privacy import user_keys
from instructrec_jax.errors import UserError
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.references import References
from instructrec_jax.run import Session


class Wanted(NamedTuple):
    """A prompt, and the items in it by catalogue index."""

    prompt: InstructionExample
    history: tuple[int, ...]  # of the log, and what was added to it; newest last
    like: tuple[int, ...]  # what the wish names: in the prompt they follow the history


class People:
    """The people of one data set, known or new. NumPy and text only: it may be asked in a thread of its own."""

    def __init__(self, s: Session):
        data = s.prepared.data
        self._session = s
        self._user_of = {name: index for index, name in enumerate(data.user_ids)}
        self._key = user_keys(s.config.data.hash_ids)
        self._references = References(data, s.builder.domain)

    def wanted(
        self,
        user: str | None = None,
        items: Sequence[int] = (),
        wish: str | None = None,
        preference: str | None = None,
        language: str | None = None,
    ) -> Wanted:
        """The prompt of a person.

        Args:
            user: id in the data, whose history and features count; None = somebody new.
            items: catalogue indices of further items that they have had, newest last.
            wish: what is wanted, in words; an item that it names ("something like Heat but funny") stands for its kind, as the newest of
                the history (``instructions/references.py``).
            preference: taste in words.
            language: of the prompt; None = the session's.

        Raises:
            UserError: the user is unknown.
        """
        s, data = self._session, self._session.prepared.data
        history: tuple[int, ...] = ()
        features, pauses = (), ()
        if user is not None:
            index = self._user_of.get(self._key(user))
            if index is None:
                raise UserError(
                    f"no user {user!r} among the {data.num_users:,} users of {data.name}",
                    remedy="leave the user out for somebody new, and give what they liked",
                )
            first, last = data.offsets[index : index + 2].tolist()
            history = tuple(data.history(index, last).tolist())
            pauses = s.builder.pauses_of(index, first, last)
            features = s.prepared.users.tokens(index)
        read = self._references.read(wish or "")
        added = (*items, *read.items)
        # What is added now follows the log at an unknown time.
        pauses = (*pauses, *(None for _ in added))
        prompt = s.builder.recommend_prompt(
            [*history, *added], read.wish, preference, language or s.language, features=features, pauses=pauses
        )
        return Wanted(prompt, (*history, *items), tuple(read.items))

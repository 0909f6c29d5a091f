"""What a model has answered, and what that cost: an SQLite file that survives a kill at any moment.

A row of ``charges`` is written before a request goes out, with the most that it can cost, and set to what it did cost when its answer is
stored, in one transaction. So a killed command leaves the charge of whatever was under way, nothing that was answered is asked again,
and the budget counts all commands that ever worked on the folder.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from instructrec_jax.errors import DataError

FILE = "cache.sqlite"


class Usage(NamedTuple):
    """Tokens of a request."""

    prompt: int = 0
    answer: int = 0

    def __add__(self, other: Usage) -> Usage:  # type: ignore[override]
        return Usage(self.prompt + other.prompt, self.answer + other.answer)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.prompt - other.prompt, self.answer - other.answer)

    @property
    def total(self) -> int:
        """Of prompt and answer."""
        return self.prompt + self.answer


class Reply(NamedTuple):
    """What a model said."""

    text: str
    usage: Usage
    cut: bool = False  # it ended because it was too long


class Cache:
    """Answers by the key of their request. One process at a time; the folder's lock sees to that.

    Raises:
        DataError: the file is there and is no such cache.
    """

    def __init__(self, folder: str | Path):
        self.file = Path(folder) / FILE
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Workers of one event loop share it; there are no threads.
            self._db = sqlite3.connect(self.file, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # what is paid for outlives a power cut
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, owner TEXT, text TEXT, prompt INTEGER,"
                " answer INTEGER, cut INTEGER)"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS charges (id INTEGER PRIMARY KEY, at REAL, prompt INTEGER, answer INTEGER)"
            )
        except sqlite3.DatabaseError as error:
            raise DataError(f"not a cache of answers: {error}", file=self.file, remedy="move it away") from error

    def get(self, key: str) -> Reply | None:
        """The answer to a request, if there is one."""
        row = self._db.execute("SELECT text, prompt, answer, cut FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(row[0], Usage(row[1], row[2]), bool(row[3]))

    def owners(self) -> set[str]:
        """Users from whose events something was asked; "" among them where it was asked about an item."""
        return {row[0] for row in self._db.execute("SELECT DISTINCT owner FROM answers")}

    def begin(self, most: Usage) -> int:
        """Note that a request goes out which costs at most this much; gives the number of its charge."""
        row = self._db.execute(
            "INSERT INTO charges (at, prompt, answer) VALUES (?, ?, ?)", (time.time(), most.prompt, most.answer)
        )
        assert row.lastrowid is not None
        return row.lastrowid

    def put(self, key: str, reply: Reply, charge: int, owner: str = "") -> None:
        """Store an answer and what it cost. ``owner``: the user from whose events it was asked, to be forgotten with them."""
        self._db.execute("BEGIN")
        self._db.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            (key, owner, reply.text, *reply.usage, int(reply.cut)),
        )
        self._db.execute("UPDATE charges SET prompt = ?, answer = ? WHERE id = ?", (*reply.usage, charge))
        self._db.execute("COMMIT")

    def release(self, charge: int) -> None:
        """A request was turned away before it cost anything."""
        self._db.execute("DELETE FROM charges WHERE id = ?", (charge,))

    def spent(self) -> Usage:
        """All charges so far, those of requests without an answer at their most."""
        return Usage(
            *self._db.execute("SELECT COALESCE(SUM(prompt), 0), COALESCE(SUM(answer), 0) FROM charges").fetchone()
        )

    def forget(self, owners: Sequence[str], words: Sequence[str] = ()) -> int:
        """Remove the answers asked from these users' events, and answers about items that hold their words; gives their number."""
        gone = sum(self._db.execute("DELETE FROM answers WHERE owner = ?", (owner,)).rowcount for owner in owners)
        about_items = "DELETE FROM answers WHERE owner = '' AND instr(lower(text), ?) > 0"
        gone += sum(self._db.execute(about_items, (word,)).rowcount for word in words)
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("VACUUM")  # deleted rows would stay readable in free pages
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return gone

    def close(self) -> None:
        """Close the file."""
        self._db.close()

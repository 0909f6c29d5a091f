"""Errors that a user can act on: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A mistake in input or configuration. The command line prints it without a traceback and exits with status 2."""

    def __init__(self, message: str, *, remedy: str = ""):
        super().__init__(message if not remedy else f"{message}\n  remedy: {remedy}")
        self.message = message
        self.remedy = remedy


class DataError(UserError):
    """Bad input data. The message names the file, the row (1-based, header = row 1) and the column when they are known."""

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        row: int | None = None,
        column: str | None = None,
        remedy: str = "",
    ):
        where = ", ".join(
            part
            for part in (
                str(file) if file is not None else "",
                f"row {row}" if row is not None else "",
                f"column {column!r}" if column is not None else "",
            )
            if part
        )
        super().__init__(f"{where}: {problem}" if where else problem, remedy=remedy)
        self.file, self.row, self.column = file, row, column


class ConfigError(UserError):
    """A configuration that cannot be used: unknown key, wrong type, values that do not fit together."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that a misspelt one may stand for; empty if none is near."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest known word, or an empty string."""
    near = nearest(word, known)
    return f" (did you mean {near!r}?)" if near else ""

"""Lines of a file of requests, as requests of the scorer.

A request is a JSON object, or a row of a Parquet table with columns of these names:

    id          text or whole number; default: the number of the line
    prompt      an instruction, used as it is; or any of
    user        user id of the data: their history and features
    history     further items, newest last, by id or exact title
    wish        what is wanted, in words; an item that it names joins the history (``wanted.py``)
    preference  the user's taste, in words
    candidates  item ids; "all" or nothing: the whole catalogue
    texts       in place of ``candidates``: texts

``null`` is as good as absent. None of ``prompt`` to ``preference`` is what a newcomer asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from instructrec_jax.errors import DataError, UserError, did_you_mean
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, TITLE_CLOSE, TITLE_OPEN, InstructionExample
from instructrec_jax.run import Session
from instructrec_jax.scoring import Request
from instructrec_jax.wanted import People

FIELDS = ("id", "prompt", "user", "history", "wish", "preference", "candidates", "texts")
SUFFIXES = (".jsonl", ".parquet")
_SLOTS = (ITEM_SLOT, FEATURE_SLOT, TITLE_OPEN, TITLE_CLOSE)


@dataclass(frozen=True)
class Asked:
    """A line that was understood. ``shown``: the candidates as they were given; None = the whole catalogue."""

    line: int  # from 1
    id: str | int
    request: Request
    shown: list[str] | None
    history: Int[np.ndarray, " H"]  # catalogue indices


@dataclass(frozen=True)
class Bad:
    """A line that cannot be scored, and why."""

    line: int  # from 1
    error: str


def check_suffix(path: Path) -> None:
    """Raises UserError for a file that is neither JSON lines nor Parquet by its suffix."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown suffix {path.suffix!r}", remedy=f"one of {', '.join(SUFFIXES)}")


def examine(path: Path) -> tuple[str, int]:
    """(SHA-256, number of requests, bad ones included) of a file of requests.

    Raises:
        UserError: there is no such file, or its suffix is unknown.
        DataError: the file is not Parquet.
    """
    check_suffix(path)
    if not path.is_file():
        raise UserError(f"no file of requests {path}")
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as stream:
        if path.suffix == ".jsonl":
            for line in stream:
                digest.update(line)
                count += bool(line.strip())
            return digest.hexdigest(), count
        digest = hashlib.file_digest(stream, "sha256")
    return digest.hexdigest(), _parquet(path).metadata.num_rows


def lines(path: Path, skip: int = 0) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(line number from 1, JSON text or row) of every request after the first ``skip``; empty lines are none."""
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                if skip:
                    skip -= 1
                    continue
                yield number, line
        return
    number = 0
    for batch in _parquet(path).iter_batches(batch_size=1024):
        if number + len(batch) > skip:
            rows = enumerate(batch.to_pylist(), start=number + 1)
            yield from ((line, row) for line, row in rows if line > skip)
        number += len(batch)


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a Parquet file: {error}", file=path) from error


class Parser:
    """Lines of one data set's requests to prompts and catalogue indices. NumPy and text only: it may run in a thread of its own."""

    def __init__(self, s: Session):
        data = s.prepared.data
        self._item_of = data.catalogue.index
        self._title_of: dict[str, int] = {}
        for index, title in enumerate(data.catalogue.titles):
            self._title_of.setdefault(title, index)
        self._people = People(s)

    def parse(self, line: int, content: bytes | dict[str, Any]) -> Asked | Bad:
        """One line; whatever is wrong with it is in what is returned."""
        try:
            return self._asked(line, _object(content) if isinstance(content, bytes) else content)
        except UserError as error:
            return Bad(line, error.message)

    def _asked(self, line: int, given: dict[str, Any]) -> Asked:
        if unknown := [name for name in given if name not in FIELDS]:
            raise UserError(f"unknown field {unknown[0]!r}{did_you_mean(unknown[0], FIELDS)}")
        fields = {name: value for name, value in given.items() if value is not None}
        name = fields.get("id", line)
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise UserError(f"id is {_kind(name)}; a text or a whole number is needed")
        if isinstance(name, str):
            _encodable(name, "id")
        prompt, history = self._prompt(fields)
        shown, candidates = self._candidates(fields)
        return Asked(line, name, Request(prompt, candidates), shown, np.asarray(history, np.int64))

    def _prompt(self, fields: dict[str, Any]) -> tuple[InstructionExample, list[int]]:
        """The instruction, and all items that the person has had or the wish names."""
        about = [name for name in ("user", "history", "wish", "preference") if name in fields]
        if "prompt" in fields:
            if about:
                raise UserError(f"prompt and {about[0]}: a prompt is used as it is, so give one or the other")
            return plain_prompt(_text(fields, "prompt")), []
        added: list[int] = []
        for name in _texts(fields, "history") if "history" in fields else ():
            item = self._item_of.get(name, self._title_of.get(name))
            if item is None:
                raise UserError(f"history: no item with id or title {name!r}")
            added.append(item)
        user, wish, preference = (_text(fields, k) if k in fields else None for k in ("user", "wish", "preference"))
        prompt, history, like = self._people.wanted(user, added, wish, preference)
        return prompt, [*history, *like]

    def _candidates(self, fields: dict[str, Any]) -> tuple[list[str] | None, Any]:
        """(the candidates as given, as the scorer takes them)."""
        if "texts" in fields:
            if "candidates" in fields:
                raise UserError("candidates and texts: give one or the other")
            texts = _texts(fields, "texts")
            for text in texts:
                _no_slots(text, "texts")
            return texts, texts
        if fields.get("candidates", "all") == "all":
            return None, "all"
        names = _texts(fields, "candidates")
        if missing := [name for name in names if name not in self._item_of]:
            raise UserError(f"candidates: no item with id {missing[0]!r}")
        return names, np.asarray([self._item_of[name] for name in names], np.int64)


def plain_prompt(words: str) -> InstructionExample:
    """Words as an instruction, as they are.

    Raises:
        UserError: there are none, or a character in them stands for an item or a feature.
    """
    if not words.strip():
        raise UserError("prompt is empty")
    _no_slots(words, "prompt")
    return InstructionExample(
        template="prompt", language="", preference="P0", intention="I0", task="T2", metric="", user=-1,
        prompt=words, prompt_items=(), answer="",
    )  # fmt: skip


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{_kind(value)}; a JSON object is needed")
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    if not isinstance(value := fields[name], str):
        raise UserError(f"{name} is {_kind(value)}; a text is needed")
    return _encodable(value, name)


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    value: Sequence[Any] = fields[name]
    all_too = ', or "all"' if name == "candidates" else ""
    if not isinstance(value, list):
        raise UserError(f"{name} is {_kind(value)}; a list of texts is needed{all_too}")
    if wrong := [x for x in value if not isinstance(x, str)]:
        raise UserError(f"{name} holds {_kind(wrong[0])}; a list of texts is needed{all_too}")
    return [_encodable(x, name) for x in value]


def _encodable(text: str, name: str) -> str:
    """JSON can hold half a surrogate pair ("\\ud800"), which neither the tokeniser nor a UTF-8 file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half a surrogate pair at character {error.start + 1}") from error
    return text


def _no_slots(text: str, name: str) -> None:
    if held := [c for c in _SLOTS if c in text]:
        raise UserError(f"{name} holds the character U+{ord(held[0]):04X}, which stands for an item or a feature")


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    kinds = {str: "the text", int: "the number", float: "the number", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    return f"{kind} {str(value)[:40]!r}" if isinstance(value, str) else f"{kind} {value}" if "the" in kind else kind

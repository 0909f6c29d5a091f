"""The text of a rendered chat: a fixed date, and marks that say where the words of each message stand."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": text} each
Span = tuple[int, int]  # characters [start, end)


def copy_of(tokenizer: str) -> Tokenizer:
    """A tokeniser from its JSON text, which gives all tokens of a text: templates are not padded or cut."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer)
    made.no_padding()
    made.no_truncation()
    return made


def pin_date(template: str, date: datetime.date) -> tuple[str, dict[str, Any]]:
    """The template with a ``strftime_now`` that always gives ``date``, and the variables that it reads.

    transformers passes no functions to templates, so the template gets a macro and the texts of all formats that it names.
    """
    if "strftime_now" not in template:
        return template, {}
    formats = re.findall(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)", template)
    macro = (
        "{% macro strftime_now(form) %}{{ fixed_dates[form] if form in fixed_dates else "
        "raise_exception('the date format is not a plain text: ' + form) }}{% endmacro %}\n"  # the block eats this newline
    )
    return macro + template, {"fixed_dates": {form: date.strftime(form) for _, form in formats}}


def with_marks(messages: Messages) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """Messages with a private character before and after their words, and these characters.

    The marks stand inside the white space at both ends, so that a template can still trim it.
    """
    used = {char for message in messages for char in message["content"]}
    free = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in used)
    marked, marks = [], []
    for message in messages:
        words = message["content"]
        lead = len(words) - len(words.lstrip())
        core = words.strip()
        mark = (next(free), next(free))
        marks.append(mark)
        marked.append({**message, "content": words[:lead] + mark[0] + core + mark[1] + words[lead + len(core) :]})
    return marked, marks


def without_marks(text: str, marks: Sequence[tuple[str, str]]) -> tuple[str, list[list[Span]], list[list[int]]]:
    """The text without marks, the spans between each message's pair (none if a mark is missing or out of order), its ends."""
    of = {char: at for at, char in enumerate(char for pair in marks for char in pair)}
    found: list[list[int]] = [[] for _ in of]
    plain: list[str] = []
    for char in text:
        if char in of:
            found[of[char]].append(len(plain))
        else:
            plain.append(char)
    spans = []
    for starts, ends in zip(found[::2], found[1::2], strict=True):
        good = len(starts) == len(ends) and all(map(int.__le__, starts, ends))
        spans.append(list(zip(starts, ends)) if good else [])
    return "".join(plain), spans, found[1::2]

"""A sheet for a person to grade taught texts, with the questions of InstructRec's Table 3, and what the grades say."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from instructrec_jax.errors import DataError
from instructrec_jax.files import write_atomic
from instructrec_jax.instructions.keyed import key
from instructrec_jax.instructions.teacher.texts import Taught

# Column -> question. An answer is y or n.
QUESTIONS = {
    "own_information": "Is it made from the user's (item's) own information?",
    "world_knowledge": "Does it add knowledge of the world that the information lacks?",
    "reflects": "Does it reflect the user's preference (intention)?",
    "related_to_target": "Is it related to the target item?",
}
_GIVEN = ("number", "kind", "language", "written_from", "target", "text")
_YES, _NO = ("y", "yes", "1", "true", "是"), ("n", "no", "0", "false", "否")


def write_sheet(texts: Sequence[Taught], file: str | Path, *, n: int = 100, seed: int = 0) -> int:
    """Write ``n`` texts (all, if there are fewer) with empty columns for the grades; gives their number.

    Args:
        texts: taught texts; a keyed sample is taken, half of each kind where there are both.
        file: the CSV file, with a byte order mark so that spreadsheets read Chinese.
    """
    order = sorted(range(len(texts)), key=lambda i: key(seed, i))
    by_kind = [[i for i in order if texts[i].kind == kind] for kind in ("preference", "intention")]
    turns = [i for pair in zip_longest(*by_kind) for i in pair if i is not None]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*_GIVEN, *QUESTIONS])
    writer.writerow(["", "", "", "", "", "", *QUESTIONS.values()])
    for i in sorted(turns[:n]):
        t = texts[i]
        shown = (t.kind, t.language, t.evidence, t.item, t.text)
        writer.writerow([i, *map(_cell, shown), *[""] * len(QUESTIONS)])
    write_atomic(file, "\ufeff" + out.getvalue())
    return min(n, len(turns))


def read_grades(file: str | Path) -> list[dict[str, Any]]:
    """Per kind and question: yes, graded, share and its 95 % Wilson interval (scipy).

    Raises:
        DataError: no such file, a missing column, an answer that is neither yes nor no (the row is named), or no grade at all.
    """
    from scipy.stats import binomtest

    file = Path(file)
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", file=file, remedy="save the sheet as CSV in UTF-8") from error
    if missing := [c for c in ("number", "kind", *QUESTIONS) if not rows or c not in rows[0]]:
        raise DataError("the column is missing", file=file, column=missing[0], remedy="keep the sheet's header")
    counts: dict[tuple[str, str], list[int]] = {}
    for line, row in enumerate(rows, start=2):
        if not (row["number"] or "").strip():  # the questions
            continue
        for question in QUESTIONS:
            grade = (row[question] or "").strip().lower()
            if not grade:
                continue
            if grade not in _YES + _NO:
                raise DataError(f"{grade!r} is no grade", file=file, row=line, column=question, remedy="y or n")
            counts.setdefault((row["kind"], question), []).append(int(grade in _YES))
    if not counts:
        raise DataError("no cell is graded", file=file, remedy="write y or n under the questions")
    out = []
    for kind in ("preference", "intention"):
        for question in QUESTIONS:
            if given := counts.get((kind, question)):
                interval = binomtest(sum(given), len(given)).proportion_ci(method="wilson")
                out.append(
                    {
                        "kind": kind, "question": question, "yes": sum(given), "graded": len(given),
                        "share": sum(given) / len(given), "low": float(interval.low), "high": float(interval.high),
                    }
                )  # fmt: skip
    return out


def _cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text

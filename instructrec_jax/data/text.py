"""Catalogue text as published is rarely text: HTML, Python lists printed as strings, control characters. Here it
becomes plain.

Three layers, from always to optional:

* ``plain``: control characters and the two slot characters of a prompt (U+FFFC, U+FFF9) go, white space collapses.
  Applied to every text that can enter a prompt, so that no catalogue entry or user can forge a slot.
* ``unfold_list``: ``"['a', 'b']"`` is read safely (``ast.literal_eval``), with unescaped quotes inside by its commas;
  whatever is not a list of words stays the text it was.
* ``clean_text``: both, and HTML: tags of HTML (only those: ``vector<int>`` survives), entities, comments, scripts.

All functions are idempotent.
"""

from __future__ import annotations

import ast
import re
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Control characters, interlinear annotation marks (U+FFF9 to U+FFFB), the object replacement character, byte order
# mark.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufff9-\ufffc\ufeff]+")
_SPACE = re.compile(r"\s+")
_BETWEEN_WORDS = re.compile(r"""(?:'|"), (?:'|")""")

_BLOCK = (
    "address article aside blockquote br caption center dd div dl dt figcaption figure footer h1 h2 h3 h4 h5 h6 "
    "header hr legend li main nav ol option p pre section select table tbody td tfoot th thead title tr ul"
)
_INLINE = (
    "a abbr acronym audio b bdo big body button cite code col colgroup del dfn em embed fieldset font form head html "
    "i iframe img input ins kbd label link meta noscript object param q s samp script small source span strike "
    "strong style sub summary sup svg textarea tt u var video wbr"
)
_BLOCK_TAGS = _BLOCK.split()
_NAMES = "|".join(sorted(f"{_BLOCK} {_INLINE}".split(), key=len, reverse=True))
_TAG = rf"</?(?:{_NAMES})(?:\s[^<>]*|/)?>|<!--"
_ENTITY = r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);"
_MARKUP = re.compile(f"{_TAG}|{_ENTITY}", re.IGNORECASE)
_NOT_A_TAG = re.compile(rf"<(?!/?(?:{_NAMES})(?:\s[^<>]*|/)?>|!--)", re.IGNORECASE)
_NOT_AN_ENTITY = re.compile(f"&(?!{_ENTITY[1:]})", re.IGNORECASE)

# Values that none of the rules can change do not match this (RE2; a superset is enough).
_SUSPECT = (
    r"[\x00-\x1f\x7f-\x{a0}\x{fff9}-\x{fffc}\x{feff}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}<&]"
    r"|^ | $|  |^[\[(]"
)


def plain(text: str) -> str:
    """Text without control and slot characters, white space collapsed to single spaces and trimmed."""
    return _SPACE.sub(" ", _CONTROL.sub(" ", text)).strip()


def unfold_list(text: str) -> list[str] | None:
    """The words of a list printed as Python (``"['a', 'b']"``), or None if the text is not such a list."""
    text = text.strip()
    if len(text) < 2 or text[0] + text[-1] not in ("[]", "()") or (text[1:2] not in "\"'u" and text[1:-1].strip()):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" inside a description is not worth a SyntaxWarning
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return _unfold_broken(text)
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        return None
    return list(value)


def _unfold_broken(text: str) -> list[str] | None:
    """Published lists often hold unescaped quotes (``['a user's guide', 'b']``): cut where one quoted word ends and
    another begins.
    """
    inner = text[1:-1].strip()
    if len(inner) < 2 or inner[0] not in "\"'" or inner[-1] not in "\"'":
        return None
    return [word.replace("\\n", " ") for word in _BETWEEN_WORDS.split(inner[1:-1])]


def clean_text(text: str, *, html: bool = True) -> str:
    """Plain text of a catalogue entry. With ``html``, lists are unfolded (joined by spaces) and HTML is removed too."""
    text = plain(text)
    while html:  # a fixed point: entities are often escaped twice, and every change makes the text shorter
        before = text
        words = unfold_list(text)
        if words is not None:
            text = " ".join(words)
        if _MARKUP.search(text):
            text = _strip_html(text)
        text = plain(text)
        if text == before or len(text) > len(before):
            return text
    return text


def _strip_html(text: str) -> str:
    from bs4 import BeautifulSoup

    # What only looks like markup ("a < b", "vector<int>", "R&D") is escaped first: the parser would swallow it.
    safe = _NOT_A_TAG.sub("&lt;", _NOT_AN_ENTITY.sub("&amp;", text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bs4 warns about text that resembles a URL
        soup = BeautifulSoup(safe, "html.parser")
    for tag in soup(["script", "style"]):
        tag.decompose()
    for tag in soup(_BLOCK_TAGS):
        tag.insert_before(" ")
        tag.insert_after(" ")
    return soup.get_text()


def clean_array(values: pa.Array | pa.ChunkedArray, *, html: bool = True) -> tuple[pa.Array, int]:
    """``clean_text`` over a string column [n]; only values that some rule could change are touched.

    Returns:
        The cleaned column [n] (nulls stay null) and how many values changed.
    """
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    suspect = pc.fill_null(pc.match_substring_regex(column, _SUSPECT), False)
    index = np.flatnonzero(suspect.to_numpy(zero_copy_only=False))
    if not len(index):
        return column, 0
    old = column.take(pa.array(index)).to_pylist()
    new = [clean_text(value, html=html) for value in old]
    changed = sum(a != b for a, b in zip(old, new))
    return pc.replace_with_mask(column, suspect, pa.array(new, column.type)), changed


def split_list(text: str, separator: str) -> list[str]:
    """A list column's cell as words: ``"a|b"``, ``"['a', 'b']"`` or ``"'a', 'b'"``; empty words and "(no genres
    listed)" go.
    """
    words = unfold_list(text)
    if words is None and text[:1] in "\"'" and text[:1] == text[-1:]:
        words = unfold_list(f"[{text}]")
    if words is None:
        words = text.split(separator)
    return [w for w in (word.strip() for word in words) if w and w.lower() != "(no genres listed)"]

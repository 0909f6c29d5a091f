"""Personal data in free text, and user ids that are nobody's name.

``Scrubber`` replaces e-mail addresses, payment cards (with a valid Luhn digit), phone numbers and street addresses by a mark such as
``[e-mail]`` and counts each kind. Patterns find what has a form; names of people have none, which is what presidio is for.
``user_keys`` makes keyed hashes of user ids.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from instructrec_jax.errors import ConfigError

_STREET = (
    r"Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Terrace|Square|Sq|Highway|Hwy|Parkway|Pkwy"
)
# In this order: a card's digits would also pass for a phone number.
_PATTERNS: dict[str, re.Pattern[str]] = {
    "e-mail": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "card": re.compile(r"(?<![\d.-])[2-6](?:[ -]?\d){12,18}(?![\d-])"),
    "phone": re.compile(
        r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){5,12}(?!\d)"  # international
        r"|(?<![\w.-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\d-])"  # North America
        r"|(?<![\dA-Za-z.-])1[3-9]\d(?:[ -]?\d{4}){2}(?![\d-])"  # Chinese mobile numbers
        r"|(?<![\dA-Za-z.-])0\d{2,3}-\d{7,8}(?![\d-])"  # and land lines
    ),
    "address": re.compile(
        rf"\b\d{{1,5}}[A-Za-z]?,? (?:[A-Z][\w'’.-]* ){{1,4}}(?:{_STREET})\b\.?(?:,? (?:Apt|Suite|Unit|Floor|#)\.? ?\w+)?"
        r"|\bP\.? ?O\.? Box \d+"
        r"|[\u4e00-\u9fff]{1,12}(?:路|街|大道|巷|弄|胡同)\d{1,5}号(?:[\u4e00-\u9fff\d]{0,10}(?:室|楼|单元))?"
    ),
}
KINDS = tuple(_PATTERNS)
# Not its e-mail addresses: for them it looks for a list on the network, and the pattern above finds them.
_PRESIDIO_KINDS = {
    "CREDIT_CARD": "card", "PHONE_NUMBER": "phone", "LOCATION": "address", "PERSON": "person",
    "IP_ADDRESS": "ip", "IBAN_CODE": "iban", "US_SSN": "ssn",
}  # fmt: skip
_PRESIDIO_MODELS = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")
_LEAST_SCORE = 0.4  # what presidio gives a pattern without further evidence in the text
_LEAST_SECRET = 16  # characters


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    doubled = [int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits))]
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


class Scrubber:
    """Replaces personal data in texts. ``counts`` holds what was replaced so far, by kind; ``engine`` says by what.

    Raises:
        ConfigError: presidio is asked for and not installed.
    """

    def __init__(self, engine: str = "patterns"):
        self.counts: Counter[str] = Counter()
        self.engine = engine
        self._presidio: Any = None
        if engine == "presidio":
            self._presidio, model = _presidio()
            self.engine = (
                f"presidio with {model}" if model else "presidio without a language model: no names, no places"
            )

    def __call__(self, text: str) -> str:
        """The text with every find replaced. Idempotent for the patterns: no mark looks like personal data."""
        if self._presidio is not None:
            text = self._by_presidio(text)
        for kind, pattern in _PATTERNS.items():
            text = pattern.sub(lambda match, kind=kind: self._mark(kind, match[0]), text)
        return text

    def column(self, values: pa.Array | pa.ChunkedArray) -> pa.Array:
        """A string column [n], scrubbed; nulls stay null."""
        column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if self._presidio is None:  # whatever the patterns find holds a digit or "@"
            suspect = pc.fill_null(pc.match_substring_regex(column, "[0-9@]"), False)
        else:
            suspect = pc.is_valid(column)
        index = np.flatnonzero(suspect.to_numpy(zero_copy_only=False))
        if not len(index):
            return column
        new = [self(value) for value in column.take(pa.array(index)).to_pylist()]
        return pc.replace_with_mask(column, suspect, pa.array(new, column.type))

    def _mark(self, kind: str, found: str) -> str:
        if kind == "card" and not luhn(re.sub(r"\D", "", found)):
            return found
        self.counts[kind] += 1
        return f"[{kind}]"

    def _by_presidio(self, text: str) -> str:
        finds = self._presidio.analyze(
            text, language="en", entities=list(_PRESIDIO_KINDS), score_threshold=_LEAST_SCORE
        )
        end = len(text) + 1
        for find in sorted(finds, key=lambda f: (-f.end, f.start)):  # from the back, so that places stay right
            if find.end <= end:
                text = text[: find.start] + f"[{_PRESIDIO_KINDS[find.entity_type]}]" + text[find.end :]
                self.counts[_PRESIDIO_KINDS[find.entity_type]] += 1
                end = find.start
        return text


def _presidio() -> tuple[Any, str]:
    """(presidio's analyser, the spaCy model it uses; "" = none is installed, so only its patterns work)."""
    try:
        import spacy  # pyright: ignore[reportMissingImports]
        from presidio_analyzer import AnalyzerEngine  # pyright: ignore[reportMissingImports]
        from presidio_analyzer.nlp_engine import SpacyNlpEngine  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"data.clean.scrub = presidio needs presidio ({error})", remedy="pip install 'instructrec_jax[privacy]'"
        ) from error
    model = next((name for name in _PRESIDIO_MODELS if spacy.util.is_package(name)), "")
    # Its own default would download a model when it is first used.
    engine: Any = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": model or _PRESIDIO_MODELS[0]}])
    engine.nlp = {"en": spacy.load(model) if model else spacy.blank("en")}
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"]), model


def user_keys(variable: str) -> Callable[[str], str]:
    """How the data name a user: as the log does (``variable`` = ""), or by a keyed BLAKE2b hash of 128 bits.

    Args:
        variable: name of the environment variable that holds the secret (``data.hash_ids``).

    Raises:
        ConfigError: the variable is not set, or shorter than 16 characters.
    """
    if not variable:
        return lambda name: name
    secret = os.environ.get(variable, "")
    if len(secret) < _LEAST_SECRET:
        raise ConfigError(
            f"data.hash_ids: the environment variable {variable} holds {len(secret)} characters, "
            f"at least {_LEAST_SECRET} are needed",
            remedy=f"set it to the secret the data were prepared with, or to a new one: {variable}=$(openssl rand -hex 32)",
        )
    key = hashlib.blake2b(secret.encode(), digest_size=64).digest()  # whatever its length
    return lambda name: hashlib.blake2b(name.encode(), key=key, digest_size=16, person=b"user").hexdigest()


def hashed_column(values: pa.ChunkedArray | pa.Array, key: Callable[[str], str]) -> pa.Array:
    """A column of user ids [n] as their keys; each distinct id is hashed once."""
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = column.dictionary_encode()
    names = pa.array([key(name) for name in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)

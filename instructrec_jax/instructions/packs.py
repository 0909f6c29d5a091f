"""Domain packs (the nouns and verbs of films, games, products, ...) and the phrases of each language, from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, TITLE_CLOSE, TITLE_OPEN

FOLDER = Path(__file__).parent / "templates"
LANGUAGES = ("en", "zh")
_WORDS = ("noun", "nouns", "a_noun", "verb", "verb_past", "person")
WORD_SLOTS = {"en": _WORDS, "zh": (*_WORDS, "measure")}  # slots that a domain fills, per language
_FRAMES = ("labelled", "branded", "worded")
_STRIP = str.maketrans("", "", ITEM_SLOT + FEATURE_SLOT + TITLE_OPEN + TITLE_CLOSE)


def clean_text(text: str) -> str:
    """User text as it may stand in a prompt: without the slot characters, white space as single spaces."""
    return " ".join(text.translate(_STRIP).split())


@dataclass(frozen=True, eq=False)
class Domain:
    """One domain: ``words[language][slot]``, and what it knows about labels and tags."""

    name: str
    words: Mapping[str, Mapping[str, str]]
    skip_labels: frozenset[str] = frozenset()  # lower case
    skip_tags: frozenset[str] = frozenset()  # lower case
    names: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict
    )  # language -> lower-case label -> its name there


@dataclass(frozen=True, eq=False)
class Phrases:
    """Frames of one language: ``one[key]`` single texts, ``many[key]`` wordings that say the same."""

    language: str
    one: Mapping[str, str]
    many: Mapping[str, tuple[str, ...]]


def load_domain(name: str) -> Domain:
    """The domain pack of that name.

    Raises:
        ConfigError: no such domain (the nearest name is given), or a pack lacks a word.
    """
    domains = _domains()
    if name not in domains:
        raise ConfigError(
            f"unknown domain {name!r}{did_you_mean(name, domains)}",
            remedy=f"data.domain is one of {', '.join(domains)}",
        )
    return domains[name]


def load_phrases(language: str) -> Phrases:
    """The phrases of a language. Raises ConfigError for a language that has none."""
    phrases = _phrases()
    if language not in phrases:
        raise ConfigError(
            f"unknown language {language!r}{did_you_mean(language, phrases)}",
            remedy=f"instructions.languages holds {', '.join(phrases)}",
        )
    return phrases[language]


def word_slots(domain: Domain, language: str) -> dict[str, str]:
    """Slot -> word, and the same with a capital first letter: ``{nouns}`` films, ``{Nouns}`` Films."""
    plain = {slot: domain.words[language][slot] for slot in WORD_SLOTS[language]}
    return plain | {capital(slot): capital(word) for slot, word in plain.items()}


def capital(text: str) -> str:
    """The text with its first letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


@cache
def _domains() -> dict[str, Domain]:
    out = {}
    for name, pack in _read("domains.yaml").items():
        words = {}
        for language in LANGUAGES:
            given = pack.get(language, {})
            missing = [key for key in (*WORD_SLOTS[language], *_FRAMES) if not given.get(key)]
            if missing:
                raise ConfigError(f"domains.yaml: {name}.{language} lacks {', '.join(missing)}")
            words[language] = dict(given)
        out[name] = Domain(
            name=name,
            words=words,
            skip_labels=frozenset(str(x).lower() for x in pack.get("skip_labels", ())),
            skip_tags=frozenset(str(x).lower() for x in pack.get("skip_tags", ())),
            names={k: {str(a).lower(): str(b) for a, b in v.items()} for k, v in pack.get("names", {}).items()},
        )
    return out


@cache
def _phrases() -> dict[str, Phrases]:
    tree = _read("phrases.yaml")
    keys = set.union(*(set(frames) for frames in tree.values()))
    for language, frames in tree.items():
        if missing := sorted(keys - set(frames)):
            raise ConfigError(f"phrases.yaml: {language} lacks {', '.join(missing)}")
    return {
        language: Phrases(
            language=language,
            one={k: v for k, v in frames.items() if isinstance(v, str)},
            many={k: tuple(v) for k, v in frames.items() if isinstance(v, list)},
        )
        for language, frames in tree.items()
    }


def _read(name: str) -> dict[str, Any]:
    return yaml.load((FOLDER / name).read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))

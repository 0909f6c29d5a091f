"""Domain packs (the nouns and verbs of films, games, products, ...) and the phrases of each language, from YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, TITLE_CLOSE, TITLE_OPEN
from instructrec_jax.instructions.template import SLOT
from instructrec_jax.instructions.yaml_file import YamlFile

FOLDER = Path(__file__).parent / "templates"
LANGUAGES = ("en", "zh")
_WORDS = ("noun", "nouns", "a_noun", "verb", "verb_past", "person")
WORD_SLOTS = {"en": _WORDS, "zh": (*_WORDS, "measure")}  # slots that a domain fills, per language
# Frames of a domain, what a taste is best said by first, each with its own slot.
FRAMES = {"labelled": "labels", "branded": "brands", "worded": "words"}
_STRIP = str.maketrans("", "", ITEM_SLOT + FEATURE_SLOT + TITLE_OPEN + TITLE_CLOSE)


def clean_text(text: str) -> str:
    """User text as it may stand in a prompt: without the slot characters, white space as single spaces."""
    if not text.isascii():
        text = text.translate(_STRIP)
    return " ".join(text.split())


@dataclass(frozen=True)
class Constraint:
    """How a column of the catalogue becomes part of a specific wish."""

    column: str  # price, minutes, age, level, ...
    say: Mapping[str, str]  # language -> phrase with {value}
    edges: tuple[float, ...] = ()  # number columns: the value is rounded up to one of them; () = a text column


@dataclass(frozen=True, eq=False)
class Domain:
    """One domain: ``words[language][slot]``, and what it knows about labels, tags and columns."""

    name: str
    words: Mapping[str, Mapping[str, str]]
    constraints: tuple[Constraint, ...] = ()
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


def load_domain(name: str, files: Sequence[str] = ()) -> Domain:
    """The domain pack of that name, built in or out of further files.

    Raises:
        ConfigError: no such domain (the nearest name is given); anything that ``load_pack_file`` finds.
    """
    domains = dict(_domains())
    for file in files:
        domains |= load_pack_file(file, domains)
    if name not in domains:
        raise ConfigError(
            f"unknown domain {name!r}{did_you_mean(name, domains)}",
            remedy=f"data.domain is one of {', '.join(domains)}; instructions.packs adds files of others",
        )
    return domains[name]


def domain_names() -> list[str]:
    """The built-in domain packs."""
    return list(_domains())


def load_pack_file(path: str | Path, taken: Iterable[str] = ()) -> dict[str, Domain]:
    """Read and check a file of domain packs; ``taken`` = names that are not free.

    Raises:
        ConfigError: see ``check_pack_file``; the message holds every problem with file, line and column.
    """
    file = YamlFile(path)
    packs = check_pack_file(file, taken)
    file.check()
    return packs


def check_pack_file(file: YamlFile, taken: Iterable[str] = ()) -> dict[str, Domain]:
    """The packs of a file by name; what is wrong is added to ``file.problems``.

    A problem is: not YAML; an unknown key or slot; a language that lacks a word; no language at all; a frame without its
    slot; a constraint without ``{value}`` or with edges that do not increase; a name that is taken.
    """
    top = file.mapping(file.root, (), (), "a file of domain packs") if file.root is not None else None
    taken, out = set(taken), {}
    for name, node in (top or {}).items():
        if name in taken:
            file.note(node, f"the name {name!r} is taken by an earlier pack", remedy="choose another name")
        pack = file.mapping(
            node, (*LANGUAGES, "constraints", "skip_labels", "skip_tags", "names"), (), f"pack {name!r}"
        )
        if pack is None:
            continue
        languages = [language for language in LANGUAGES if language in pack]
        if not languages:
            file.note(node, f"pack {name!r} has no language", remedy=f"add {' or '.join(LANGUAGES)}")
        names = file.mapping(pack["names"], LANGUAGES, (), "names") if "names" in pack else {}
        out[name] = Domain(
            name=name,
            words={language: _pack_words(file, pack[language], language) for language in languages},
            constraints=_constraints(file, pack["constraints"], languages) if "constraints" in pack else (),
            skip_labels=_lower(file, pack, "skip_labels"),
            skip_tags=_lower(file, pack, "skip_tags"),
            names={
                language: {
                    label.lower(): file.text(said, "a name")
                    for label, said in (file.mapping(labels, (), (), "names of a language") or {}).items()
                }
                for language, labels in (names or {}).items()
            },
        )
    return out


def _pack_words(file: YamlFile, node: Any, language: str) -> dict[str, str]:
    known = (*WORD_SLOTS[language], *FRAMES)
    entry = file.mapping(node, known, known, language) or {}
    words = {key: file.text(value, key) for key, value in entry.items()}
    for key, text in words.items():
        if not text:
            file.note(entry[key], f"{key} is empty")
        allowed = (FRAMES[key], *WORD_SLOTS[language]) if key in FRAMES else ()
        _check_slots(file, entry[key], text, allowed, FRAMES.get(key, ""))
    return words


def _constraints(file: YamlFile, node: Any, languages: Sequence[str]) -> tuple[Constraint, ...]:
    out = []
    for column, entry in (file.mapping(node, (), (), "constraints") or {}).items():
        given = file.mapping(entry, (*LANGUAGES, "edges"), languages, f"constraint {column!r}")
        if given is None:
            continue
        say = {language: file.text(given[language], language) for language in languages}
        for language, text in say.items():
            _check_slots(file, given[language], text, ("value",), "value")
        edges = []
        for place in file.entries(given["edges"], "edges") if "edges" in given else ():
            try:
                edges.append(float(file.text(place, "an edge")))
            except ValueError:
                file.note(place, f"{place.value!r} is not a number")
        if any(a >= b for a, b in pairwise(edges)):
            file.note(given["edges"], "edges must increase")
        out.append(Constraint(column, say, tuple(edges)))
    return tuple(out)


def _check_slots(file: YamlFile, node: Any, text: str, allowed: Sequence[str], needed: str) -> None:
    names = SLOT.findall(text)
    for name in names:
        if name not in allowed:
            file.note(
                node,
                f"unknown slot {{{name}}}{did_you_mean(name, allowed)}",
                find=f"{{{name}}}",
                remedy=f"known slots: {', '.join(allowed)}" if allowed else "this is a plain word",
            )
    rest = SLOT.sub("", text)
    if "{" in rest or "}" in rest:
        file.note(node, "a brace without its partner", find="{" if "{" in rest else "}")
    if needed and needed not in names:
        file.note(node, f"{{{needed}}} is missing")


def _lower(file: YamlFile, pack: Mapping[str, Any], key: str) -> frozenset[str]:
    return frozenset(file.text(n, key).lower() for n in file.entries(pack[key], key)) if key in pack else frozenset()


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
    """Slot -> word, and the same with a capital first letter: ``{nouns}`` films, ``{Nouns}`` Films.

    Raises:
        ConfigError: the pack has no such language.
    """
    if language not in domain.words:
        raise ConfigError(
            f"the domain pack {domain.name!r} has no {language!r}, only {', '.join(domain.words)}",
            remedy="add the language to the pack, or change instructions.languages",
        )
    plain = {slot: domain.words[language][slot] for slot in WORD_SLOTS[language]}
    return plain | {capital(slot): capital(word) for slot, word in plain.items()}


def capital(text: str) -> str:
    """The text with its first letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


@cache
def _domains() -> dict[str, Domain]:
    return load_pack_file(FOLDER / "domains.yaml")


@cache
def _phrases() -> dict[str, Phrases]:
    tree = read_template_file("phrases.yaml")
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


def read_template_file(name: str) -> dict[str, Any]:
    """A YAML file of ``templates/``, as it is."""
    return yaml.load((FOLDER / name).read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))

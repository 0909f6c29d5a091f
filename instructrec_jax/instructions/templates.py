"""Instruction templates: the built-in ones and those of a team's own files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.instructions.packs import FOLDER, LANGUAGES
from instructrec_jax.instructions.template import Template
from instructrec_jax.instructions.template_file import load_template_file

__all__ = ["Template", "families", "in_families", "load_template_file", "load_templates"]

_FILES = ("{}.yaml", "{}_grid.yaml", "{}_widenings.yaml")


def load_templates(languages: Sequence[str] = LANGUAGES, files: Sequence[str] = ()) -> list[Template]:
    """The built-in templates of the languages, in file order, then those of further files in these languages.

    Raises:
        ConfigError: unknown language; anything that ``load_template_file`` finds.
    """
    out: list[Template] = []
    for language in languages:
        if language not in LANGUAGES:
            raise ConfigError(
                f"unknown language {language!r}{did_you_mean(language, LANGUAGES)}",
                remedy=f"instructions.languages holds {', '.join(LANGUAGES)}",
            )
        out.extend(_builtin(language))
    for file in files:
        # Taken ids are those of all languages, so that a file is good or bad whatever the config's languages.
        taken = [*out, *(t for language in LANGUAGES if language not in languages for t in _builtin(language))]
        out.extend(t for t in load_template_file(file, taken) if t.language in languages)
    return out


@cache
def _builtin(language: str) -> tuple[Template, ...]:
    out: list[Template] = []
    for name in _FILES:
        out.extend(load_template_file(FOLDER / name.format(language), out))
    return tuple(out)


def families(templates: Sequence[Template]) -> list[str]:
    """Every name that ``instructions.families`` may hold: the ids and what stands before each of their dots."""
    names: dict[str, None] = {}
    for template in templates:
        parts = template.id.split(".")
        names |= dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return list(names)


def in_families(templates: Sequence[Template], chosen: Sequence[str]) -> list[Template]:
    """The templates to train on: all that are not held out, or those of the chosen families.

    Raises:
        ConfigError: a family that no template belongs to (the nearest name is given), or that is held out as a whole.
    """
    trained = [t for t in templates if not t.held_out]
    if not chosen:
        return trained
    for family in chosen:
        if not any(t.is_in(family) for t in templates):
            raise ConfigError(
                f"instructions.families: no template is in {family!r}{did_you_mean(family, families(templates))}",
                remedy="`instructrec templates list` shows the families",
            )
        if not any(t.is_in(family) for t in trained):
            raise ConfigError(
                f"instructions.families: all wordings of {family!r} are held out", remedy="they are for measuring only"
            )
    return [t for t in trained if any(t.is_in(family) for family in chosen)]

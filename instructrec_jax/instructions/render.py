"""A template and the data for its slots become text with placeholders for soft tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from instructrec_jax.instructions.example import FEATURE_SLOT, ITEM_SLOT, TITLE_CLOSE, TITLE_OPEN, Feature
from instructrec_jax.instructions.packs import Domain, clean_text, load_phrases, word_slots
from instructrec_jax.instructions.template import Template

ItemsAs = Literal["token", "title", "both"]
ANSWERED_TITLES = 3  # newest items of a history that an answer names


class Slots(NamedTuple):
    """What fills the slots of a template. Items are catalogue indices."""

    history: Sequence[int] = ()  # newest last
    preference: str = ""  # P2, a sentence
    intention: str = ""  # I1 or I2, a wish
    candidates: Sequence[int] = ()  # T3 and, two of them, T1: in the order shown
    item: int = -1  # T0: the item asked about; a widening: the item chosen
    features: tuple[Feature, ...] = ()
    answer: int = -1  # the item of the answer
    verdict: bool = True  # T0: the answer
    learnt_from: int = -1  # titles of the history from this one on carry loss; -1 = none
    # Before each item of the history and, one more, behind the last: a pause, or none; () = none at all
    pauses: Sequence[Feature | None] = ()


class Rendered(NamedTuple):
    """Text with one ``ITEM_SLOT`` / ``FEATURE_SLOT`` per entry of the tuples, in reading order."""

    prompt: str
    prompt_items: tuple[int, ...]
    answer: str
    answer_items: tuple[int, ...]
    features: tuple[Feature, ...]


def render(
    template: Template,
    slots: Slots,
    domain: Domain,
    titles: Sequence[str] = (),
    *,
    items_as: ItemsAs = "token",
    candidates_as: ItemsAs | None = None,
    about_user: bool = False,
) -> Rendered:
    """Fill a template.

    An item stands as one soft token ("token"), as its title ("title"), or as the token and then the title ("both": the
    token first, so that the position before an item's token has read nothing of that item). Soft tokens of a history
    have nothing between them; titles are separated as the language does.

    Args:
        template: the wording.
        slots: the data; a slot that the template has not is ignored.
        domain: the nouns and verbs.
        titles: title per item, cleaned by ``clean_text``; needed for "title", "both" and for answers in words.
        items_as: how items stand in the history.
        candidates_as: how candidates and the item of a pointwise question or a widening stand; None = as in the history.
        about_user: put the features, if there are any, before a prompt that has no slot for them.

    Raises:
        ValueError: a slot that the template needs is empty, or a title holds a slot character.
    """
    items: list[int] = []
    features: list[Feature] = []
    parts: list[str] = []
    prompt, answer, phrases = compiled(template, domain, about_user and bool(slots.features))
    shown_as = candidates_as or items_as
    for slot, words in prompt:
        if not slot:
            parts.append(words)
        elif slot == "history":
            learnt = slots.learnt_from if items_as == "title" else -1
            between = phrases["between_titles"]
            parts.append(_history(slots, titles, items_as, between, items, learnt, features))
        elif slot == "preference" or slot == "intention":
            text = clean_text(getattr(slots, slot))
            if not text:
                raise ValueError(f"template {template.id} needs {slot}")
            parts.append(_without_stop(text, words))
        elif slot == "candidates" or slot == "candidates_numbered":
            if not slots.candidates:
                raise ValueError(f"template {template.id} needs candidates")
            if slot == "candidates":
                parts.append(_item_list(slots.candidates, titles, shown_as, phrases["between_titles"], items))
            else:
                shown = (_item_list((i,), titles, shown_as, "", items) for i in slots.candidates)
                parts.append(" ".join(f"{n}. {text}" for n, text in enumerate(shown, 1)))
        elif slot in ("first", "second"):
            if len(slots.candidates) != 2:
                raise ValueError(f"template {template.id} needs 2 candidates, not {len(slots.candidates)}")
            parts.append(_item_list((slots.candidates[slot == "second"],), titles, shown_as, "", items))
        elif slot in ("item", "chosen"):
            if slots.item < 0:
                raise ValueError(f"template {template.id} needs an item")
            parts.append(_item_list((slots.item,), titles, shown_as, "", items))
        elif slot == "features":
            if not slots.features:
                raise ValueError(f"template {template.id} needs features")
            features.extend(slots.features)
            parts.append(FEATURE_SLOT * len(slots.features))
    prompt_items = tuple(items)
    text = "".join(parts)
    if text.count(ITEM_SLOT) != len(prompt_items):
        raise ValueError(f"template {template.id}: a title holds the item slot character; clean it with clean_text")

    answer_text, answer_items = "", ()
    for slot, words in answer:
        if not slot:
            answer_text += words
        elif slot == "verdict":
            answer_text += phrases["yes" if slots.verdict else "no"]
        elif slot == "intention" or slot == "preference":
            answer_text += _without_stop(clean_text(getattr(slots, slot)), words)
        elif slot == "history_titles":
            answer_text += phrases["between_titles"].join(titles[i] for i in slots.history[-ANSWERED_TITLES:])
        elif slots.answer < 0:
            continue  # at prediction time there is no answer yet
        elif slot == "answer_title":
            answer_text += titles[slots.answer]
        else:
            answer_text += ITEM_SLOT
            answer_items = (*answer_items, slots.answer)
    return Rendered(text, prompt_items, answer_text, answer_items, tuple(features))


Pieces = tuple[tuple[str, str], ...]  # (slot, following words) or ("", words)


@lru_cache(maxsize=4096)
def compiled(template: Template, domain: Domain, about_user: bool = False) -> tuple[Pieces, Pieces, Mapping[str, str]]:
    """Prompt and answer in pieces, domain words filled in, and the single phrases of the language.

    ``about_user``: features stand before a prompt that has no slot for them.
    """
    phrases = load_phrases(template.language).one
    prompt = _words(template.prompt, domain, template.language)
    if about_user and "features" not in template.reads:
        prompt = (*_words(phrases["about_user"], domain, template.language), *prompt)
    return prompt, _words(template.answer, domain, template.language), phrases


def _words(text: str, domain: Domain, language: str) -> Pieces:
    filled = text
    for slot, word in word_slots(domain, language).items():
        filled = filled.replace(f"{{{slot}}}", word)
    pieces = re.split(r"\{(\w+)\}", filled)
    out: list[tuple[str, str]] = []
    for at, piece in enumerate(pieces):
        if at % 2:
            out.append((piece, pieces[at + 1]))
        elif piece:
            out.append(("", piece))
    return tuple(out)


def _without_stop(text: str, following: str) -> str:
    """The text without its full stop if the words after its slot begin with one."""
    return text.rstrip(".。 ") if following[:1] in (".", "。") else text


def _history(
    slots: Slots,
    titles: Sequence[str],
    items_as: ItemsAs,
    separator: str,
    items: list[int],
    learnt: int,
    features: list[Feature],
) -> str:
    """The text of a history; a pause is a soft token before the item that ended it."""
    if not any(slots.pauses) or items_as == "title":
        return _item_list(slots.history, titles, items_as, separator, items, learnt)
    features.extend(pause for pause in slots.pauses if pause)
    before = [FEATURE_SLOT if pause else "" for pause in slots.pauses]
    shown = [_item_list((i,), titles, items_as, separator, items) for i in slots.history]
    between = "" if items_as == "token" else separator
    return between.join(pause + text for pause, text in zip(before, shown)) + before[-1]


def _item_list(
    shown: Sequence[int], titles: Sequence[str], items_as: ItemsAs, separator: str, tokens: list[int], learnt: int = -1
) -> str:
    """The text of some items; those that stand as soft tokens are appended to ``tokens``; titles from ``learnt`` on are marked."""
    if items_as != "title":
        tokens.extend(shown)
    if items_as == "token":
        return ITEM_SLOT * len(shown)
    if items_as == "title":
        if learnt < 0:
            return separator.join([titles[i] for i in shown])
        marked = (f"{TITLE_OPEN}{titles[i]}{TITLE_CLOSE}" if n >= learnt else titles[i] for n, i in enumerate(shown))
        return separator.join(marked)
    return separator.join([f"{ITEM_SLOT} {titles[i]}" for i in shown])

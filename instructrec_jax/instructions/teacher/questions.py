"""The words in which a teacher is asked, and the request that they become."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from instructrec_jax.config import TeacherConfig
from instructrec_jax.errors import ConfigError, did_you_mean
from instructrec_jax.instructions.packs import Domain, word_slots
from instructrec_jax.instructions.teacher.asks import Ask, Evidence


class Request(NamedTuple):
    """One question to a model. Two requests with one key are the same question and have one answer."""

    key: str  # hash of model, parameters and prompt
    kind: str
    prompt: str
    user: int  # user index, for the cache to forget by; never sent. -1 = nobody


class Refusal(NamedTuple):
    """An answer that was not accepted, for the next question to mention."""

    answer: str
    complaint: str


def form(config: TeacherConfig) -> str:
    """ "json" or "text"."""
    return ("text" if config.backend == "local" else "json") if config.answer == "auto" else config.answer


def request(
    ask: Ask, evidence: Evidence, domain: Domain, config: TeacherConfig, refused: Refusal | None = None
) -> Request:
    """The question for an ask; after a refusal with the last answer and what was wrong with it.

    Raises:
        ConfigError: there are no questions in this language.
    """
    frames = _frames()
    if ask.language not in frames:
        raise ConfigError(
            f"the teacher speaks no {ask.language!r}{did_you_mean(ask.language, frames)}",
            remedy=f"instructions.languages holds {', '.join(frames)}",
        )
    frame = frames[ask.language]
    most = config.max_words if ask.kind == "preference" else max(config.min_words, config.max_words // 3)
    prompt = frame[ask.kind].format_map(
        {**word_slots(domain, ask.language), "evidence": evidence.text, "most": str(most)}
    )
    prompt += "\n" + frame[f"as_{form(config)}"].format(kind=ask.kind)
    if refused is not None:
        prompt += "\n\n" + frame["again"].format(answer=refused.answer, complaint=refused.complaint)
    asked = [
        config.backend, config.model, config.temperature, config.max_output_tokens, config.seed, form(config), prompt,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()
    return Request(digest, ask.kind, prompt, ask.user)


@cache
def _frames() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "questions.yaml").read_text("utf-8"))

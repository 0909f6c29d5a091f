"""From what a model replies to a text that may be judged: read with tolerance, checked without."""

from __future__ import annotations

import json
import re
from typing import Any

from instructrec_jax.instructions.packs import clean_text

_ENDS = re.compile(r"[.!?。！？](?=[\s”\"'）)]|$)|[。！？]")
_LABEL = re.compile(r"^(?:answer|preference|intention|wish|回答|偏好|心愿)\s*[:：]\s*", re.IGNORECASE)
_QUOTES = "\"'“”‘’「」`*"


class Unusable(ValueError):  # noqa: N818 - what a model said, not a fault of the program
    """The reply holds no usable text; the message is what the model is told."""


def schema(kind: str) -> dict[str, Any]:
    """JSON schema of an answer."""
    return {
        "type": "object",
        "properties": {kind: {"type": "string"}},
        "required": [kind],
        "additionalProperties": False,
    }


def read(reply: str, kind: str, form: str, *, cut: bool = False) -> str:
    """The text in a reply.

    Args:
        reply: what the model said. JSON may stand in a fence or among other words; it is read up to its closing brace.
        kind: "preference" or "intention".
        form: "json" or "text".
        cut: the reply ended because it was too long. A text then ends with its last whole sentence.

    Raises:
        Unusable: no JSON object, another schema, or no text.
    """
    text = _object(reply, kind) if form == "json" else reply
    text = text.split("\n\n")[0] if form == "text" else text
    text = _LABEL.sub("", clean_text(text).strip(_QUOTES + " "))
    if cut and form == "text":
        ends = [match.end() for match in _ENDS.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    text = text.strip(_QUOTES + " ")
    if not text:
        raise Unusable("it is longer than allowed" if cut else "it is empty")
    if kind == "intention":
        return text.rstrip(".。")  # prompts go on behind a wish
    return text if text[-1] in ".!?。！？" else text + ("。" if "\u4e00" <= text[-1] <= "\u9fff" else ".")


def _object(reply: str, kind: str) -> str:
    start = reply.find("{")
    if start < 0:
        raise Unusable("it holds no JSON object")
    try:
        value, _ = json.JSONDecoder(strict=False).raw_decode(reply, start)
    except json.JSONDecodeError as error:
        raise Unusable(f"it is not valid JSON ({error.msg})") from error
    if set(value) != {kind}:
        raise Unusable(f"its keys are {', '.join(map(repr, value)) or 'none'}, and only {kind!r} is allowed")
    if not isinstance(value[kind], str):
        raise Unusable(f"{kind!r} must be a text, not a {type(value[kind]).__name__}")
    return value[kind]

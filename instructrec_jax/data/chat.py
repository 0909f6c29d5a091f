"""The chat template of a published model: token ids of a conversation, and which of them the assistant says.

A template is a Jinja text that comes with a tokeniser directory; transformers renders it. This module adds what training
needs and templates seldom give: the loss mask, a frame around texts that hold soft tokens, a fixed date, and the rule that
control tokens come from the template alone: ``<|im_end|>`` typed in a film title stays the few words that it looks like.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int, Int32

from instructrec_jax.data.chat_text import Messages, Span, copy_of, pin_date, with_marks, without_marks
from instructrec_jax.errors import DataError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
DATE = datetime.date(2024, 7, 26)  # "26 Jul 2024": what Llama 3.1's template writes when it is told no date
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEDY = "put {% generation %} ... {% endgeneration %} around the assistant's words in the template"
# Texts that a frame is tried on: what a tokeniser may join with the characters before or after it.
PROBES = ("a", "The Matrix (1999)", "1", "'s", "(x)", "!", ":", '"q"', "—", "é", "看过的电影。", "😀", "👍🏽", "")

Tokens = Int32[np.ndarray, " S"]
Mask = Bool[np.ndarray, " S"]
Offsets = Int[np.ndarray, "S 2"]  # characters [start, end) of each token


@dataclass(frozen=True, eq=False)
class Frame:
    """The tokens around one question and its answer: ``prefix`` + user's words + ``suffix`` + answer + ``end``.

    ``prefix + user + suffix`` is what the model reads before it answers. The last ``suffix_said`` tokens of ``suffix`` and the
    first ``end_said`` of ``end`` are in the loss mask of ``ChatFormat.encode``: the end-of-turn token, and for Qwen3 the empty
    thinking block unless it is loaded with ``enable_thinking: false``.
    """

    prefix: Int32[np.ndarray, " P"]
    suffix: Int32[np.ndarray, " M"]
    end: Int32[np.ndarray, " E"]
    suffix_said: int
    end_said: int

    def join(self, user: Sequence[int] | Tokens, answer: Sequence[int] | Tokens) -> tuple[Tokens, Mask]:
        """The whole conversation from the tokens of both texts, and which of it the assistant says."""
        parts = [self.prefix, user, self.suffix, answer, self.end]
        tokens = np.concatenate([np.asarray(part, np.int32) for part in parts])
        start = len(self.prefix) + len(user) + len(self.suffix)
        place = np.arange(len(tokens))
        return tokens, (place >= start - self.suffix_said) & (place < start + len(answer) + self.end_said)


@dataclass(frozen=True)
class _Rendered:
    text: str
    data: tuple[list[Span], ...]  # per message: where its words stand in ``text``, without white space at their ends
    ends: tuple[list[int], ...]  # per message: where its words end, also if the template drops how they start
    generation: tuple[Span, ...]  # spans of ``{% generation %}``


@dataclass(frozen=True, eq=False, repr=False)
class ChatFormat:
    """A tokeniser with its chat template. Make it with ``ChatFormat.load``.

    Control tokens are the special tokens and the other added tokens that the template writes (``<think>``), but not white space.
    """

    template: str
    tokenizer: Tokenizer
    where: Path
    variables: Mapping[str, Any]  # what the template sees besides the messages
    control: Mapping[str, Any]  # text of a control token -> its AddedToken

    @classmethod
    def load(
        cls, folder: str | Path, arguments: Mapping[str, Any] | None = None, date: datetime.date = DATE
    ) -> ChatFormat:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` of a Hugging Face directory.

        Args:
            folder: the directory of a tokeniser or of a whole model.
            arguments: what the template may ask for, such as ``{"enable_thinking": False}``. ``date_string`` is set from
                ``date`` if it is not given.
            date: the day that a template sees as today, so that the same data makes the same tokens tomorrow.

        Raises:
            DataError: there is no tokeniser in ``folder`` or it cannot be read.
            UserError: there is no chat template, or the tokeniser makes control tokens from plain text.
        """
        from transformers import PreTrainedTokenizerFast

        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise DataError("no tokeniser", file=file, remedy="name a folder that holds a tokenizer.json")
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"cannot read the tokeniser: {error}", file=file) from error
        if not loaded.chat_template:
            raise UserError(
                f"{folder}: the tokeniser has no chat template",
                remedy="a base model has none: set model.chat none, or name the instruction-tuned model",
            )
        try:
            template = loaded.get_chat_template()
        except ValueError as error:  # several named templates and no default one
            raise UserError(f"{folder}: {error}") from error
        control = {
            token.content: token
            for token in loaded.added_tokens_decoder.values()
            if token.content and (token.special or (token.content in template and not token.content.isspace()))
        }
        variables = {**loaded.special_tokens_map, "date_string": date.strftime("%d %b %Y"), **(arguments or {})}
        template, dates = pin_date(template, date)
        tokenizer = copy_of(loaded.backend_tokenizer.to_str())
        made = cls(template, tokenizer, Path(folder), {**variables, **dates}, control)
        ids = {tokenizer.token_to_id(token) for token in control}
        ids.discard(tokenizer.token_to_id(loaded.unk_token or ""))
        for token in control:  # a vocabulary of whole words could hold one as a word
            if ids.intersection(made.plain(token)):
                raise made._error(f"the tokeniser makes a control token of the plain text {token!r}")
        return made

    def __getstate__(self) -> dict[str, Any]:
        # A pickled Tokenizer forgets that special tokens are text, so ``text`` is made again.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def text(self) -> Tokenizer:
        """The tokeniser for words that come from data: it knows no control tokens."""
        content = json.loads(self.tokenizer.to_str())
        for token in content["added_tokens"]:
            # ``encode_special_tokens`` spares special tokens only, and <think> is none.
            token["special"] = token["content"] in self.control
        made = copy_of(json.dumps(content))
        made.encode_special_tokens = True
        return made

    def plain(self, words: str) -> list[int]:
        """Token ids of words from data. No control token comes out, whatever is typed."""
        return self.text.encode(words, add_special_tokens=False).ids

    def encode(self, messages: Messages) -> tuple[Tokens, Mask]:
        """Token ids of a conversation and the loss mask: which tokens the assistant says.

        The ids are those of ``apply_chat_template(messages)``, except that control tokens typed in a message are encoded as
        words. (The assistant may write those that are not special, such as ``<think>``; others may not.)

        With ``{% generation %}`` in the template the mask is the one of ``return_assistant_tokens_mask=True``: every token that
        holds a character of a span (transformers from 5.24 on; before, it lost spans that start with a space which is in no token,
        and all but the first token of a last character that takes several). Without it the mask holds, per
        assistant message, all tokens from the end of the generation prompt to the end-of-turn token, both from the text: the
        words, a thinking block that the prompt leaves to the model, and the control token after the words with what stands
        before it. White space that the template writes after that token is not in it. If no control token follows the words,
        all that the template writes after them is in the mask.

        Raises:
            UserError: the template refuses the messages (roles that do not alternate, no system role), or one has another
                form, or the template rewrites the words so that the assistant's cannot be told from the others.
        """
        rendered = self._render(messages)
        ids, offsets = self._tokenise(messages, rendered)
        mask = np.zeros(len(ids), bool)
        spans = rendered.generation if GENERATION.search(self.template) else self._said(messages, rendered)
        for start, end in spans:
            mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return ids, mask

    def frame(self, system: str | None = None) -> Frame:
        """What stands around the user's words and the answer in a conversation of one question.

        ``frame.join(chat.plain(user), chat.plain(answer))`` equals ``encode`` of the messages, tokens and mask, for texts without
        white space at their ends that the template does not rewrite (Qwen3 moves what an answer has before ``</think>``). It is
        tried on many texts here.

        Raises:
            UserError: the template forbids a system message, or the tokeniser joins characters of the template with those
                beside them, so that the parts cannot be encoded alone.
        """
        head = [] if system is None else [{"role": "system", "content": system}]

        def asked(user: str, answer: str) -> list[dict[str, str]]:
            return [*head, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]

        whole = self._render(asked("u", "a"))
        user, answer = self._one(whole.data, -2), self._one(whole.data, -1)
        borders = [0, *user, *answer, len(whole.text)]
        if borders != sorted(borders):
            raise self._error("the template puts the answer before the question")
        parts = []
        for start, end in ((0, user[0]), (user[1], answer[0]), (answer[1], len(whole.text))):
            inside = [[(s - start, e - start) for s, e in spans if start <= s and e <= end] for spans in whole.data]
            parts.append(self._tokenise(asked("u", "a"), _Rendered(whole.text[start:end], tuple(inside), (), ()))[0])
        first = Frame(*parts, suffix_said=0, end_said=0)
        _, said = self.encode(asked("u", "a"))
        tail = len(said) - len(first.end)
        start = tail - len(self.plain("a"))
        frame = Frame(*parts, suffix_said=int(said[:start].sum()), end_said=int(said[tail:].sum()))
        for at, word in enumerate(PROBES):
            texts = (word, PROBES[-1 - at])
            got, want = frame.join(*map(self.plain, texts)), self.encode(asked(*texts))
            if not all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)):
                raise self._error(
                    f"the parts around {texts[0]!r} and {texts[1]!r}, encoded alone, give the tokens {got[0].tolist()} with "
                    f"{int(got[1].sum())} said, but the whole gives {want[0].tolist()} with {int(want[1].sum())}",
                    "the tokeniser joins the template's text with the words beside it: choose a model whose template sets "
                    "them apart with special tokens, or set model.chat none",
                )
        return frame

    def _render(self, messages: Messages) -> _Rendered:
        """The text of a conversation, and where the words of each message are in it."""
        for number, message in enumerate(messages, 1):
            good = set(message) == {"role", "content"} and message["role"] in ROLES
            if not good or not isinstance(message["content"], str):
                raise UserError(
                    f"message {number}: expected a role of {ROLES} and a text as content, got {dict(message)!r}"
                )
        text, generation = self._jinja(messages)
        marked, marks = with_marks(messages)
        found, data, ends = without_marks(self._jinja(marked)[0], marks)
        if found != text:  # the template looked at the words and did something else because of the marks
            data = ends = [[] for _ in messages]
        rendered = _Rendered(text, tuple(data), tuple(ends), generation)
        for number, message in enumerate(messages):
            typed = (token.group() for token in self._pattern.finditer(message["content"]))
            if not data[number] and not all(self._may_write(message, token) for token in typed):
                self._one(data, number)  # raises: which control tokens are the template's cannot be told
        return rendered

    def _jinja(self, messages: Messages, prompt: bool = False) -> tuple[str, tuple[Span, ...]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise UserError("a conversation needs at least one message")
        try:
            rendered: Any = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=bool(GENERATION.search(self.template)),
                add_generation_prompt=prompt,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise self._error(f"the chat template refuses the messages ({roles}): {error}") from error
        texts, spans = rendered
        return texts[0], tuple((int(start), int(end)) for start, end in spans[0]) if spans else ()

    def _error(self, problem: str, remedy: str = "") -> UserError:
        return UserError(f"{self.where}: {problem}", remedy=remedy)

    def _one(self, places: Sequence[list], message: int) -> Any:
        """The place of a message, if it has exactly one."""
        if len(places[message]) != 1:
            raise self._error(
                f"the chat template rewrites message {message % len(places) + 1}, so that its words cannot be found",
                REMEDY,
            )
        return places[message][0]

    def _said(self, messages: Messages, rendered: _Rendered) -> list[Span]:
        """Spans of the assistant's words with their end-of-turn token, for a template that does not mark them."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise UserError("message 1: a conversation starts with the system or the user, not with the assistant")
            stop = self._one(rendered.ends, number)
            words = rendered.data[number][0][0] if rendered.data[number] else stop
            prompt, _ = self._jinja(messages[:number], prompt=True)
            pairs = enumerate(zip(prompt, rendered.text[:words]))
            start = next((at for at, (a, b) in pairs if a != b), min(len(prompt), words))  # they agree up to here
            # The prompt may ask for more than an earlier turn shows (Qwen3 drops old thinking blocks), but not for less.
            end = self._turn_end.match(rendered.text, stop)
            if (start < len(prompt) and rendered.text[start:words].strip()) or end is None:
                raise self._error(
                    f"cannot tell what the assistant says in message {number + 1} of the rendered chat",
                    REMEDY,
                )
            spans.append((start, end.end()))
        return spans

    @cached_property
    def _turn_end(self) -> re.Pattern[str]:
        """What follows the assistant's words up to the end-of-turn token: their own white space, the template's text."""
        rendered = self._render([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}])
        tail = rendered.text[self._one(rendered.ends, 1) :]
        tokens = list(self._pattern.finditer(tail))
        if tokens and not tail[tokens[-1].end() :].strip():
            tail = tail[: tokens[-1].end()]
        return re.compile(r"\s*" + re.escape(tail))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _may_write(self, message: Mapping[str, str], token: str) -> bool:
        """Whether this control token in the words of a message is meant as one."""
        return message["role"] == "assistant" and not self.control[token].special

    def _tokenise(self, messages: Messages, rendered: _Rendered) -> tuple[Tokens, Offsets]:
        """Token ids and the characters of each, with control tokens in the words of messages taken as words."""
        text = rendered.text
        words = [(*span, message) for message, spans in zip(messages, rendered.data, strict=True) for span in spans]
        pieces: list[list] = [[0, 0, False]]  # from, to, whether control tokens are words here

        def add(end: int, plain: bool) -> None:
            if plain or pieces[-1][2]:
                pieces.append([pieces[-1][1], end, plain])
            else:
                pieces[-1][1] = end  # nearly always one piece at last: the one call that transformers makes

        typed = False
        for match in self._pattern.finditer(text):
            owner = next((m for start, end, m in words if match.start() < end and start < match.end()), None)
            if owner is not None and not self._may_write(owner, match.group()):
                typed = True
                continue
            add(match.start(), typed)
            add(match.end(), False)
            typed = False
        add(len(text), typed)
        if len(pieces) > 1:
            token = next(iter(self.control))
            alone = self.tokenizer.encode(token + "a", add_special_tokens=False).ids[1:] == self.plain("a")
            if not alone or any(token.lstrip or token.rstrip for token in self.control.values()):
                raise self._error(
                    "a message holds a control token as text, and this tokeniser encodes a text otherwise alone than in place",
                    f"remove control tokens such as {token!r} from the texts",
                )
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end, plain in pieces:
            encoding = (self.text if plain else self.tokenizer).encode(text[start:end], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + a, start + b) for a, b in encoding.offsets]
        return np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

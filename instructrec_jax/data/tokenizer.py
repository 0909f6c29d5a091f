"""The tokeniser: byte-level BPE trained on the templates and the catalogue, or the one that a published model came with.

Either is a Hugging Face tokeniser directory, so ``transformers.AutoTokenizer.from_pretrained`` loads it anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from instructrec_jax.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS, ITEM, FEATURE, UNKNOWN = "<pad>", "<bos>", "<eos>", "<item>", "<feature>", "<unk>"
SPECIAL = (PAD, BOS, EOS, ITEM, FEATURE, UNKNOWN)  # ids 0..5: padding is 0, so a target of 0 means "nothing to predict"

_SHORT, _KNOWN = 160, 1 << 16  # characters of a text whose ids are kept, and how many texts


@dataclass(frozen=True)
class Text:
    """The loaded tokeniser with the ids that the loader and the scorer need."""

    tokenizer: Tokenizer
    vocab_size: int
    bos: int = 1
    eos: int = 2
    item: int = 3  # what stands in ``tokens`` where a soft token does; a published model has no such token, any id does
    feature: int = 4
    before: tuple[int, ...] = (1,)  # a prompt starts with these: <bos>, or the head of a chat template
    after: tuple[int, ...] = ()  # and ends with these: where the assistant's turn begins
    end: tuple[int, ...] = (2,)  # an answer ends with these
    layouts: dict[tuple, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # of data/tokenise.py
    by_words: bool = False  # no token reaches over a space between words, see ``_split_at_spaces``
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        return list(self._known.get(text) or self._ids(text))

    def _ids(self, text: str) -> tuple[int, ...]:
        words = _words(text) if self.by_words else [text]
        if len(words) == 1:
            # "fast": without the characters that each token stands for, which nobody asks for here
            ids = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        else:
            ids = []
            for word in words:
                ids += self._known.get(word) or self._ids(word)
        known = tuple(ids)
        if len(text) <= _SHORT:  # templates and wishes say the same again and again
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[text] = known
        return known

    def ids(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The same as an array."""
        return np.array(self.encode(text), np.int32)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts at once (parallel inside the tokeniser)."""
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _words(text: str) -> list[str]:
    """The words of a text, each with the space before it; the whole text if it has any other white space."""
    words = text.split(" ")
    if text.split() != [word for word in words if word] or "" in words[1:-1]:
        return [text]
    return [*words[:1], *[f" {word}" for word in words[1:]]] if words[0] else [f" {word}" for word in words[1:]]


def _split_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a text's tokens are those of its words one after the other: texts differ, their words are mostly the same.

    So it is with the tokenisers of ``train``: what they take apart before any merge is single digits, and then words with at most one
    space, which is the first character. A published tokeniser may do anything, and is not asked.
    """
    made = json.loads(tokenizer.to_str())
    found = made["pre_tokenizer"] or {}
    steps = [
        (step["type"], step.get("individual_digits"), step.get("add_prefix_space"), step.get("use_regex"))
        for step in found.get("pretokenizers", ())
    ]
    return made["normalizer"] is None and steps == [("Digits", True, None, None), ("ByteLevel", None, False, True)]


def train(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Text:
    """Train byte-level BPE on ``texts`` and save it under ``folder`` (replaced as a whole).

    The vocabulary may come out smaller than ``vocab_size`` when the texts are few; the model rounds it up anyway.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Single digits: years and model numbers share their parts instead of each being a rare token.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[ITEM, FEATURE], **names
    ).save_pretrained(fresh)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.replace(folder)
    return load(folder)


def load(folder: str | Path) -> Text:
    """Load a tokeniser directory.

    Raises:
        DataError: the file is missing or lacks one of the special tokens.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise DataError("no tokeniser", file=file, remedy="run `instructrec data prepare CONFIG` again")
    tokenizer = Tokenizer.from_file(str(file))
    ids = {name: tokenizer.token_to_id(name) for name in (BOS, EOS, ITEM, FEATURE)}
    missing = [name for name, token in ids.items() if token is None]
    if missing:
        raise DataError(f"the tokeniser lacks the special tokens {missing}", file=file)
    # A title or a wish that holds "<eos>" is text: only the code that builds rows writes special tokens.
    tokenizer.encode_special_tokens = True
    found = {name: token for name, token in ids.items() if token is not None}
    bos, eos = found[BOS], found[EOS]
    return Text(
        tokenizer, tokenizer.get_vocab_size(), bos, eos, found[ITEM], found[FEATURE], (bos,), (), (eos,),
        by_words=_split_at_spaces(tokenizer),
    )  # fmt: skip


FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip


def copy_pretrained(model: str | Path, folder: str | Path) -> None:
    """The tokeniser files of a published model, copied under ``folder`` (which must not exist).

    Raises:
        DataError: the model has no tokenizer.json.
    """
    model, folder = Path(model), Path(folder)
    if not (model / "tokenizer.json").is_file():
        raise DataError(
            "no tokenizer.json", file=model, remedy="save the tokeniser in the fast format beside the weights"
        )
    folder.mkdir(parents=True)
    for name in FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


def load_pretrained(folder: str | Path, chat: str = "auto") -> Text:
    """The tokeniser of a published model, with its chat frame if it has a template and ``chat`` is not "none".

    Without a frame, what the tokeniser itself puts around a text (``<bos>``, T5's ``</s>``) goes around the prompt.

    Raises:
        DataError: there is no tokeniser, or it names no token that ends an answer.
        UserError: the chat template cannot frame a prompt; see ``data/chat.py``.
    """
    from tokenizers import Tokenizer

    from instructrec_jax.data.chat import ChatFormat

    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError("no tokeniser", file=file, remedy="run `instructrec data prepare CONFIG` again")
    settings = (
        json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if (folder / "tokenizer_config.json").is_file()
        else {}
    )
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = settings.get("eos_token") or settings.get("sep_token")
    eos = tokenizer.token_to_id(named["content"] if isinstance(named, dict) else named) if named else None
    if eos is None:
        raise DataError("tokenizer_config.json names no eos_token", file=folder, remedy="add it: it ends every answer")
    whole = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after, end = tuple(whole[:at]), tuple(whole[at + len(plain) :]), (eos,)
    has_template = (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
    if chat == "auto" and has_template:
        # Recommendations are answered at once: where a template asks (Qwen3), the empty thinking block belongs to the prompt.
        made = ChatFormat.load(folder, {"enable_thinking": False})
        frame = made.frame()
        before, after = tuple(frame.prefix.tolist()), tuple(frame.suffix.tolist())
        end = tuple(frame.end[: max(frame.end_said, 1)].tolist())
        tokenizer = made.text
    else:
        tokenizer.encode_special_tokens = True  # a title that holds a special token's name is text
    bos = before[0] if before else eos
    return Text(tokenizer, tokenizer.get_vocab_size(), bos, eos, eos, eos, before, after, end)

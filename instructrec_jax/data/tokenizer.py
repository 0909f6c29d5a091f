"""A byte-level BPE tokeniser trained on the templates and the catalogue, for models that start from scratch.

It is saved as a Hugging Face tokeniser directory, so ``transformers.AutoTokenizer.from_pretrained`` loads it anywhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from instructrec_jax.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS, ITEM, FEATURE, UNKNOWN = "<pad>", "<bos>", "<eos>", "<item>", "<feature>", "<unk>"
SPECIAL = (PAD, BOS, EOS, ITEM, FEATURE, UNKNOWN)  # ids 0..5: padding is 0, so a target of 0 means "nothing to predict"


@dataclass(frozen=True)
class Text:
    """The loaded tokeniser with the ids that the loader and the scorer need."""

    tokenizer: Tokenizer
    vocab_size: int
    bos: int = 1
    eos: int = 2
    item: int = 3
    feature: int = 4

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts at once (parallel inside the tokeniser)."""
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


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
    return Text(tokenizer, tokenizer.get_vocab_size(), found[BOS], found[EOS], found[ITEM], found[FEATURE])

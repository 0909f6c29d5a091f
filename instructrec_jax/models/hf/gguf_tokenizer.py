"""The tokenizer inside a GGUF file as ``tokenizer.json`` and ``tokenizer_config.json``.

Two kinds are read: byte-level BPE (``gpt2``), whose merges are in the file, and SentencePiece BPE (``llama``), whose merges follow from
the scores of its pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructrec_jax.errors import DataError, did_you_mean
from instructrec_jax.files import write_json

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # GGUF's token types that matter here
SPACE = "▁"

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# How text is cut before merging, by llama.cpp's name for it.
_CUTS = {
    "gpt-2": "bytes",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": "llama3",
    "qwen2": "qwen2",
}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(values: dict[str, Any], folder: Path, file: str, rows: int, positions: int) -> dict[str, Any]:
    """Write the tokenizer of a GGUF file.

    Args:
        values: the file's key-value part, arrays included.
        folder: receives ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template).
        file: for messages.
        rows: of the embedding.
        positions: longest input, tokens.

    Returns:
        ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` for the configs, None where the file names none. The second is
        a list where a turn ends with another token than a text.

    Raises:
        DataError: an unknown kind of tokenizer or of pre-tokenizer; arrays that are missing or of different lengths; a token
            that occurs twice; more tokens than the embedding has rows; an id that is no token.
    """
    tokens, types = _array(values, "tokens", file), _array(values, "token_type", file, int)
    if len(tokens) != len(types):
        raise DataError(f"{len(tokens):,} tokens, but {len(types):,} token types", file=file)
    if len(tokens) > rows:
        raise DataError(f"{len(tokens):,} tokens, but the embedding has {rows:,} rows", file=file)
    ids = {role: _token_id(values, f"{key}_token_id", len(tokens), file) for role, key in _ROLES.items()}
    kind = values.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(values, tokens, types, file)
    elif kind == "llama":
        tokens = [SPACE * len(t) if y == USER_DEFINED and t.strip(" ") == "" else t for t, y in zip(tokens, types)]
        unknown = ids["unk_token"]
        tokenizer = _sentencepiece(values, tokens, types, None if unknown is None else tokens[unknown], file)
    else:
        raise DataError(f"tokenizer {kind!r} is not supported", file=file, remedy="supported: gpt2 and llama")
    _add_tokens(tokenizer, tokens, types)
    _add_ends(tokenizer, values, tokens, ids)

    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        **{role: tokens[number] for role, number in ids.items() if number is not None},
    }
    if isinstance(template := values.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)

    turn = _token_id(values, "eot_token_id", len(tokens), file)
    end: Any = ids["eos_token"]
    if turn is not None and turn != end:
        end = turn if end is None else [end, turn]
    return {"bos_token_id": ids["bos_token"], "eos_token_id": end, "pad_token_id": ids["pad_token"]}


def _array(values: dict[str, Any], key: str, file: str, kind: type = str) -> list[Any]:
    array = values.get(f"tokenizer.ggml.{key}")
    if not isinstance(array, list) or not array or not all(isinstance(entry, kind) for entry in array):
        raise DataError(
            f"the array tokenizer.ggml.{key} of {kind.__name__} is missing",
            file=file,
            remedy="convert a file that holds its tokenizer",
        )
    return array


def _token_id(values: dict[str, Any], key: str, count: int, file: str) -> int | None:
    number = values.get(f"tokenizer.ggml.{key}")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < count:
        raise DataError(f"tokenizer.ggml.{key} is {number!r}, but there are {count:,} tokens", file=file)
    return number


def _vocabulary(tokens: list[str], file: str) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        number = next(n for n, token in enumerate(tokens) if vocabulary[token] != n)
        raise DataError(f"token {tokens[number]!r} is in tokenizer.ggml.tokens twice, as {number} and {vocabulary[tokens[number]]}",
                        file=file)  # fmt: skip
    return vocabulary


def _byte_level(values: dict[str, Any], tokens: list[str], types: list[int], file: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = str(values.get("tokenizer.ggml.pre", "default"))
    if name not in _CUTS:
        raise DataError(
            f"pre-tokenizer {name!r} is not supported{did_you_mean(name, _CUTS)}",
            file=file,
            remedy=f"supported: {', '.join(_CUTS)}; or take the model's safetensors release",
        )
    cut = _CUTS[name]
    vocabulary = _vocabulary(tokens, file)
    merges = []
    for line in _array(values, "merges", file):
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise DataError(f"merge {line!r} is of pieces that are no tokens", file=file)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama3"))
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in ("bytes", "digits"))
    if cut == "digits":
        first = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, pieces])  # pyright: ignore[reportAttributeAccessIssue]
    elif cut == "bytes":
        tokenizer.pre_tokenizer = pieces  # pyright: ignore[reportAttributeAccessIssue]
    else:
        first = pre_tokenizers.Split(Regex(_LLAMA3 if cut == "llama3" else _QWEN2), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, pieces])  # pyright: ignore[reportAttributeAccessIssue]
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _sentencepiece(values: dict[str, Any], tokens: list[str], types: list[int], unknown: str | None, file: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _array(values, "scores", file, float)
    if len(scores) != len(tokens):
        raise DataError(f"{len(tokens):,} tokens, but {len(scores):,} scores", file=file)
    vocabulary = _vocabulary(tokens, file)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (  # pyright: ignore[reportAttributeAccessIssue]
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def merges_of(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE model implies: every split of a piece into two pieces, best score of the whole first.

    Tokens that a user defined come before all others, as in SentencePiece, which never cuts them.
    """
    whole = {t: n for n, (t, y) in enumerate(zip(tokens, types)) if y not in (CONTROL, BYTE)}
    found = []
    for token, number in whole.items():
        score = 0.0 if types[number] == USER_DEFINED else scores[number]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in whole and right in whole:
                # User-defined runs of spaces share one score: the shorter first, so that they grow one by one.
                found.append((-score, number, whole[left], whole[right], left, right))
    found.sort(key=lambda merge: merge[:4])
    return [merge[4:] for merge in found]


def _add_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    # As they are, they are found in raw text before anything else; control tokens are left out when text is decoded.
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, y in zip(tokens, types) if y == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, y in zip(tokens, types) if y == USER_DEFINED])


def _add_ends(tokenizer: Any, values: dict[str, Any], tokens: list[str], ids: dict[str, int | None]) -> None:
    from tokenizers import processors

    sentencepiece = values["tokenizer.ggml.model"] == "llama"
    begins = values.get(
        "tokenizer.ggml.add_bos_token", sentencepiece or values.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    ends = values.get("tokenizer.ggml.add_eos_token", False)
    first = [ids["bos_token"]] if begins and ids["bos_token"] is not None else []
    last = [ids["eos_token"]] if ends and ids["eos_token"] is not None else []
    if not first and not last:
        return
    before, after = ([tokens[n] for n in some] for some in (first, last))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(tokens[n], n) for n in dict.fromkeys([*first, *last])],
    )

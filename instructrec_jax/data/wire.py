"""Instruction examples as bytes: a ``tf.train.Example``, fields in the order that protobuf gives them for TFDS's writer.
(Sorted by name; a name that begins with another one comes before that.)

Records are made and read by the million, and most of each is the same as in others: the words of a template, empty lists, "not dense".
So bytes are put together from fields that are made once (``serialise``), and a record is cut into runs of fields, most of which were
met before (``parse``). Whatever is not laid out as here (another order, a field more) is left to protobuf, as is every run that is
new. Long runs are not kept: memory does not grow with the data.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from instructrec_jax.instructions.example import Feature, InstructionExample

_MOST_BITS = (1 << 64) - 1
FIELD, VALUE, INTEGERS = 0x0A, 0x12, 0x1A  # tags: a field, its value in it, a list of integers in that
_SHORT = 512  # bytes of a run, or characters of a text, that is worth keeping
_KEPT = 1 << 13  # how many of each kind


# ------------------------------------------------------------------------------------------------------------- writing


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first; negative numbers as of 64 bits."""
    number &= _MOST_BITS
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


_varints = {number: _varint(number) for number in range(1 << 10)}  # and items as they come


def _together(numbers: Sequence[int]) -> bytes:
    """Varints one after the other."""
    try:
        return b"".join(map(_varints.__getitem__, numbers))
    except KeyError:
        _varints.update((n, _varint(n)) for n in numbers if n not in _varints and 0 <= n < 1 << 15)
        return b"".join([_varints.get(number) or _varint(number) for number in numbers])


_sizes = [_varint(size) for size in range(1 << 12)]


def _sized(content: bytes) -> bytes:
    size = len(content)
    return (_sizes[size] if size < 1 << 12 else _varint(size)) + content


@functools.cache
def _key(name: str) -> bytes:
    return b"\n" + _sized(name.encode()) + b"\x12"


def _entry(name: str, kind: bytes, values: bytes) -> bytes:
    """A field: ``kind`` is the tag of its list of bytes, floats or integers; ``values`` are the encoded list."""
    return b"\n" + _sized(_key(name) + _sized(kind + _sized(values)))


def _words(name: str, value: str) -> bytes:
    return _entry(name, b"\n", b"\n" + _sized(value.encode()))


@functools.lru_cache(_KEPT)
def before_integers(name: str, size: int) -> bytes:
    """What stands before the integers of a field, which take ``size`` bytes."""
    field = _entry(name, bytes([INTEGERS]), b"\n" + _sized(bytes(size)) if size else b"")
    return field[: len(field) - size]


def _integers(name: str, values: Sequence[int]) -> bytes:
    content = _together(values)
    return before_integers(name, len(content)) + content


_known_words = functools.lru_cache(_KEPT)(_words)
_known_integers = functools.lru_cache(_KEPT)(_integers)


def _text(name: str, value: str) -> bytes:
    return (_known_words if len(value) <= _SHORT else _words)(name, value)


NO_ANSWER = _integers("answer_items", ()) + _words("answer", "") + _integers("candidates", ())  # in words, that is


@functools.lru_cache(_KEPT)
def _features(index: tuple[int, ...], values: bytes) -> bytes:
    """By the bytes of the values: 0 and -0 are equal, but not the same."""
    return _integers("feature_index", index) + _entry(
        "feature_value", b"\x12", b"\n" + _sized(values) if values else b""
    )


NO_FEATURES = _features((), b"")


@functools.lru_cache(_KEPT)
def _about(intention: str, language: str, metric: str, preference: str) -> bytes:
    return b"".join(
        _words(name, value) for name, value in zip(_ABOUT, (intention, language, metric, preference), strict=True)
    )


@functools.lru_cache(_KEPT)
def _asked(task: str, template: str) -> bytes:
    return _words("task", task) + _words("template", template)


def features_of(features: Sequence[Feature]) -> bytes:
    """The fields of the features."""
    index, value = zip(*features) if features else ((), ())
    return _features(index, struct.pack(f"<{len(value)}f", *value)) if features else NO_FEATURES


@functools.lru_cache(_KEPT)
def learnt(dense: bool, dense_from: int) -> bytes:
    """The fields that say what is learnt beside the target."""
    return _integers("dense_from", (dense_from,)) + _integers("dense", (int(dense),))


def user_of(user: int) -> bytes:
    """The field of the user."""
    return _known_integers("user", (user,))


def around_items(example: InstructionExample) -> tuple[bytes, bytes]:
    """The fields of an example between its features and its items, and those between its items and its user."""
    about = _about(example.intention, example.language, example.metric, example.preference)
    asked = _known_integers("target", (example.target,)), _asked(example.task, example.template)
    return about, _text("prompt", example.prompt) + b"".join(asked)


def wholes(fields: Sequence[Sequence[bytes]]) -> Iterator[bytes]:
    """Many records: each of one entry of every list of fields."""
    size = map(sum, zip(*(map(len, field) for field in fields)))
    heads = [b"\n" + (_sizes[n] if n < 1 << 12 else _varint(n)) for n in size]
    return map(b"".join, zip(heads, *fields, strict=True))


def serialise(example: InstructionExample) -> bytes:
    """The example as TFDS would write it."""
    (
        template, language, preference, intention, task, metric, user, prompt, prompt_items, answer, answer_items,
        features, target, candidates, dense, dense_from,
    ) = example  # fmt: skip
    answered = NO_ANSWER
    if answer or answer_items or candidates:
        answered = _known_integers("answer_items", answer_items) + _text("answer", answer)
        answered += _integers("candidates", candidates)
    record = b"".join(
        (
            answered,
            learnt(dense, dense_from),
            features_of(features),
            _about(intention, language, metric, preference),
            _integers("prompt_items", prompt_items),
            _text("prompt", prompt),
            _known_integers("target", (target,)),
            _asked(task, template),
            user_of(user),
        )
    )
    return b"\n" + _sized(record)


# ------------------------------------------------------------------------------------------------------------- reading


@functools.cache
def message() -> Any:
    """The class of a record. Looking it up costs as much as filling a field."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


@functools.cache
def _integer_list() -> Any:
    from tensorflow_datasets.proto import tf_feature_pb2

    return tf_feature_pb2.Int64List


def _bytes(feature: Any) -> str:
    return feature.bytes_list.value[0].decode()


def _one(feature: Any) -> int:
    return feature.int64_list.value[0]


def _many(feature: Any) -> tuple[int, ...]:
    return tuple(feature.int64_list.value)


def _floats(feature: Any) -> tuple[float, ...]:
    return tuple(feature.float_list.value)


# The fields in their order, in runs that are the same in many records.
_Run = tuple[tuple[str, Callable[[Any], Any]], ...]
_ABOUT = ("intention", "language", "metric", "preference")
LEARNT: _Run = (("dense_from", _one), ("dense", _one), ("feature_index", _many), ("feature_value", _floats))
WORDING: _Run = tuple((name, _bytes) for name in _ABOUT)
ASKED: _Run = (("task", _bytes), ("template", _bytes))


class OtherLayoutError(Exception):
    """The record is not laid out as ``serialise`` does it."""


def _values(run: bytes, fields: _Run) -> tuple[Any, ...]:
    """The values of the fields that a run holds, and nothing else."""
    try:
        found = message().FromString(b"\n" + _sized(run)).features.feature
    except DecodeError:
        raise OtherLayoutError from None
    if len(found) != len(fields) or not all(name in found for name, _ in fields):
        raise OtherLayoutError
    if fields is LEARNT:
        first, dense, index, value = [read(found[name]) for name, read in fields]
        return bool(dense), first, tuple(map(Feature, index, value))
    return tuple([read(found[name]) for name, read in fields])


_known_values = functools.lru_cache(8 * _KEPT)(_values)


def read_run(run: bytes, fields: _Run) -> tuple[Any, ...]:
    """The values of a run of fields.

    Raises:
        OtherLayoutError: it does not hold these and no others.
    """
    return (_known_values if len(run) <= _SHORT else _values)(run, fields)


def _list(run: bytes, key: bytes, tag: int) -> bytes:
    """The list of values in a run of one field, which has that key and kind: without protobuf, for what differs from record to record."""
    at = _inside(run, 0, FIELD)
    if not run.startswith(key, at):
        raise OtherLayoutError
    at = _inside(run, at + len(key) - 1, VALUE)
    return run[_inside(run, at, tag) :]


def _numbers(run: bytes, key: bytes) -> tuple[int, ...]:
    try:
        return tuple(_integer_list().FromString(_list(run, key, INTEGERS)).value[:])
    except DecodeError:
        raise OtherLayoutError from None


@functools.lru_cache(_KEPT)
def _number(run: bytes, key: bytes) -> int:
    return _numbers(run, key)[0]


def _string(run: bytes, key: bytes) -> str:
    values = _list(run, key, FIELD)
    return values[_inside(values, 0, FIELD) :].decode()


def _prompt(run: bytes) -> str:
    return _string(run, _PROMPT)


def _answer(run: bytes) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    at = _starts(run, 0)
    if len(at) != 4 or at[3] != len(run):
        raise OtherLayoutError
    items, answer, candidates = run[: at[1]], run[at[1] : at[2]], run[at[2] :]
    return _numbers(items, _ANSWER_ITEMS), _string(answer, _ANSWER), _numbers(candidates, _CANDIDATES)


_known_prompt = functools.lru_cache(_KEPT)(_prompt)


def read_prompt(run: bytes) -> str:
    """The text of a run of that one field."""
    return (_known_prompt if len(run) <= _SHORT else _prompt)(run)


_known_answer = functools.lru_cache(8 * _KEPT)(_answer)


def read_answer(run: bytes) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    """The items and words of an answer, and the candidates: a run that differs wherever there are some.

    Raises:
        OtherLayoutError: it does not hold these and no others.
    """
    return (_known_answer if len(run) <= _SHORT else _answer)(run)


_ANSWER_ITEMS, _ANSWER, _CANDIDATES = map(_key, ("answer_items", "answer", "candidates"))
_PROMPT, PROMPT_ITEMS, TARGET, USER = map(_key, ("prompt", "prompt_items", "target", "user"))


def _inside(content: bytes, at: int, tag: int) -> int:
    """Where the content of a message begins whose tag stands at ``at``, if it reaches to the end.

    A size of more than two bytes never fits: long records are left to protobuf.
    """
    size = content[at + 1]
    start = at + 2
    if size > 127:
        size += (content[start] << 7) - 128
        start += 1
    if content[at] != tag or start + size != len(content):
        raise OtherLayoutError
    return start


def _cut(record: bytes) -> list[int]:
    """Where the fields of a record begin, and its end, if sizes have one or two bytes. Tags are looked at later."""
    return _starts(record, _inside(record, 0, FIELD))


def _starts(record: bytes, at: int) -> list[int]:
    end = len(record)
    starts = [at]
    while at < end:
        size = record[at + 1]
        if size < 128:
            at += 2 + size
        else:
            at += 3 + size + (record[at + 2] << 7) - 128
        starts.append(at)
    return starts


def parse(record: bytes) -> InstructionExample:
    """The inverse of ``serialise``.

    Fields one after the other are a message as much as the whole is, so every run is read by itself; if each holds the names that
    belong there, the record holds these and no others.
    """
    try:
        at = _cut(record)
        if len(at) != 18 or at[17] != len(record):
            return _parse(record)
        answer_items, answer, candidates = read_answer(record[at[0] : at[3]])
        dense, dense_from, features = read_run(record[at[3] : at[7]], LEARNT)
        intention, language, metric, preference = read_run(record[at[7] : at[11]], WORDING)
        prompt_items = _numbers(record[at[11] : at[12]], PROMPT_ITEMS)
        prompt = read_prompt(record[at[12] : at[13]])
        target = _number(record[at[13] : at[14]], TARGET)
        task, template = read_run(record[at[14] : at[16]], ASKED)
        user = _number(record[at[16] :], USER)
    except (OtherLayoutError, IndexError):  # an index beyond the end
        return _parse(record)
    return InstructionExample(
        template, language, preference, intention, task, metric, user, prompt, prompt_items, answer, answer_items,
        features, target, candidates, dense, dense_from,
    )  # fmt: skip


def _parse(record: bytes) -> InstructionExample:
    """Of any layout, by protobuf."""
    feature = message().FromString(record).features.feature
    index = feature["feature_index"].int64_list.value
    return InstructionExample(
        template=_bytes(feature["template"]),
        language=_bytes(feature["language"]),
        preference=_bytes(feature["preference"]),
        intention=_bytes(feature["intention"]),
        task=_bytes(feature["task"]),
        metric=_bytes(feature["metric"]),
        user=_one(feature["user"]),
        prompt=_bytes(feature["prompt"]),
        prompt_items=_many(feature["prompt_items"]),
        answer=_bytes(feature["answer"]),
        answer_items=_many(feature["answer_items"]),
        features=tuple(map(Feature, index, feature["feature_value"].float_list.value)),
        target=_one(feature["target"]),
        candidates=_many(feature["candidates"]),
        dense=bool(_one(feature["dense"])),
        dense_from=_one(feature["dense_from"]),
    )

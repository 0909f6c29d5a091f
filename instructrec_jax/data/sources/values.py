"""Columns as they come (text, or Parquet types) as the types of the schema, with a mask of what could not be read."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from instructrec_jax.data.text import split_list

_INTEGER = r"^[+-]?[0-9]{1,18}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
# A feature column is numeric if all of it looks like this: no leading zeros, which are part of a code (zip codes, IMDb
# ids).
_FEATURE_NUMBER = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"
# Seconds per unit: the coarsest in which the median lies before the year 5138.
_UNITS = ((1, "seconds"), (10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds"))
_NANO = 10**9


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Any scalar column [n] as strings; null becomes "". Whole floats lose their ".0" (pandas writes integers with gaps
    so).
    """
    array = _flat(column)
    if pa.types.is_floating(array.type):
        with suppress(pa.ArrowInvalid):
            array = pc.cast(array, pa.int64())
    return pc.fill_null(pc.cast(array, pa.string()), "")


def as_numbers(column: pa.Array | pa.ChunkedArray) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """A column as float64 with NaN where a cell is empty, and a mask of the cells that are neither empty nor a finite
    number.
    """
    array = _flat(column)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        empty = array.is_null().to_numpy(zero_copy_only=False)
        values = pc.cast(array, pa.float64()).to_numpy(zero_copy_only=False)
        # NaN is how pandas writes an empty cell.
        return values, np.isinf(values) & ~empty
    text = pc.utf8_trim_whitespace(as_text(array))
    good = pc.match_substring_regex(text, _NUMBER)
    values = pc.cast(pc.if_else(good, text, None), pa.float64()).to_numpy(zero_copy_only=False)
    bad = pc.invert(pc.or_(good, pc.equal(text, ""))).to_numpy(zero_copy_only=False)
    return values, bad | np.isinf(values)


def as_integers(column: pa.Array | pa.ChunkedArray) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """A column as int64, and a mask of the cells that are not a whole number (empty cells included)."""
    values, fraction, bad, _ = as_times(column, dates=False)
    return values, bad | (fraction != 0)


def as_times(
    column: pa.Array | pa.ChunkedArray, *, dates: bool = True
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Bool[np.ndarray, " n"], str]:
    """Event times as whole seconds and nanoseconds.

    Accepts numbers (seconds, or milli-, micro- and nanoseconds, told by the size of the median), ISO 8601 dates and
    times (UTC where no zone is given) and Arrow timestamps.

    Returns:
        Seconds [n], nanoseconds within the second [n], the mask of cells that are no time (empty ones included), the
        unit found.
    """
    array = _flat(column)
    if pa.types.is_temporal(array.type):
        nanos = pc.cast(pc.cast(array, pa.timestamp("ns"), safe=False), pa.int64())
        bad = nanos.is_null().to_numpy(zero_copy_only=False)
        whole = pc.fill_null(nanos, 0).to_numpy(zero_copy_only=False)
        return whole // _NANO, whole % _NANO, bad, "timestamps"
    text = pc.utf8_trim_whitespace(as_text(array))
    try:
        if pc.any(pc.match_substring(text, "0x", ignore_case=True)).as_py():
            raise pa.ArrowInvalid("Arrow's cast would read a hexadecimal number")
        values = pc.cast(text, pa.int64()).to_numpy(zero_copy_only=False)  # the usual case, and the fastest
        fraction, bad = np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    except pa.ArrowInvalid:
        values, fraction, bad = _mixed_times(text, dates)
    unit, name = _UNITS[0]
    if dates and (~bad).any():
        middle = np.median(np.abs(values[~bad]))
        unit, name = next((u for u in _UNITS if middle < 1e11 * u[0]), _UNITS[-1])
    if unit > 1:
        values, rest = np.divmod(values, unit)
        fraction = rest * (_NANO // unit)
    return values, fraction, bad, name


def _mixed_times(text: pa.Array, dates: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    integer = pc.match_substring_regex(text, _INTEGER)
    values = pc.fill_null(pc.cast(pc.if_else(integer, text, None), pa.int64()), 0).to_numpy(zero_copy_only=False).copy()
    fraction = np.zeros(len(values), np.int64)
    left = ~integer.to_numpy(zero_copy_only=False)
    number = pc.match_substring_regex(text, _NUMBER)
    floats = pc.cast(pc.if_else(number, text, None), pa.float64()).to_numpy(zero_copy_only=False)
    real = left & (np.abs(np.nan_to_num(floats, nan=np.inf)) < 9e18)
    values[real] = np.floor(floats[real]).astype(np.int64)
    # Float64 holds today's seconds to about a quarter of a microsecond: finer digits are noise.
    fraction[real] = np.minimum(np.round((floats[real] - values[real]) * 1e6).astype(np.int64), 999_999) * 1000
    left &= ~real
    if dates:
        for i in np.flatnonzero(left):
            try:
                moment = datetime.fromisoformat(text[int(i)].as_py())
            except ValueError:
                continue
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            span = moment - datetime(1970, 1, 1, tzinfo=UTC)
            values[i] = span.days * 86_400 + span.seconds
            fraction[i] = span.microseconds * 1000
            left[i] = False
    return values, fraction, left


def as_lists(column: pa.Array | pa.ChunkedArray, separator: str) -> pa.Array:
    """A list column [n] as list<string>: cells like ``a|b`` or ``['a', 'b']``; "(no genres listed)" gives no words."""
    array = _flat(column)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        rows = [[str(w) for w in cell if w is not None] if cell is not None else [] for cell in array.to_pylist()]
    else:
        cells = as_text(array).dictionary_encode()
        unique = [split_list(cell, separator) for cell in cells.dictionary.to_pylist()]
        rows = [unique[i] for i in cells.indices.to_numpy(zero_copy_only=False)]
    return pa.array(rows, pa.list_(pa.string()))


def as_feature(name: str, column: pa.Array | pa.ChunkedArray) -> pa.Array | None:
    """A column that the schema does not name, as float64 (all cells are numbers), list<string>, or string. None = no
    such form.

    Names that end in ``id``, ``code``, ``path``, ``url`` or ``phone`` stay text: their digits are not a quantity.
    """
    array = _flat(column)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        inner = array.type.value_type
        return None if pa.types.is_nested(inner) else as_lists(array, "|")
    if pa.types.is_boolean(array.type):
        return as_text(array)
    code = name.lower().endswith(("id", "code", "path", "url", "phone")) or name.lower() in (
        "zip",
        "title",
        "description",
    )
    if pa.types.is_null(array.type):
        return as_text(array)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        if code:
            return as_text(array)
        values, bad = as_numbers(array)
        return pa.array(np.where(bad, np.nan, values), pa.float64(), from_pandas=True)
    try:
        text = as_text(array)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    if not code and pc.any(pc.not_equal(text, "")).as_py():
        numeric = pc.or_(pc.match_substring_regex(text, _FEATURE_NUMBER), pc.equal(text, ""))
        if pc.all(numeric).as_py():
            return pc.cast(pc.if_else(pc.equal(text, ""), None, text), pa.float64())
    return text

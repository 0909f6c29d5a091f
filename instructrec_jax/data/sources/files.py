"""From a file on disk to an Arrow table of strings, with the way back from a table row to the row of the file.

The fast path is pyarrow's reader over the whole file. Only when something is wrong, a second, slower pass with the
standard library's reader finds the exact row. A *row* is a record: a quoted field may span lines and still counts one;
the header is row 1 (Parquet and files without a header: the first record is row 1), and blank lines count.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from instructrec_jax.errors import DataError

_BLOCK = 1 << 26  # bytes; no record may be longer
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Dialect:
    """How a text file is laid out."""

    delimiter: str = ","
    quoted: bool = True
    names: tuple[str, ...] | None = None  # column names of a file without a header
    encodings: tuple[str, ...] = ("utf-8",)  # tried in turn
    wide_delimiter: str = ""  # a delimiter of several characters, replaced by ``delimiter`` before parsing


@dataclass(frozen=True)
class Origin:
    """The file behind a table, and how its records are found again."""

    file: Path
    fields: int  # of a well-formed record
    text: str | None = field(default=None, repr=False)  # None: Parquet
    dialect: Dialect = Dialect()

    @cached_property
    def _rows(self) -> tuple[list[int], list[tuple[int, int]]]:
        good: list[int] = []
        broken: list[tuple[int, int]] = []
        for row, record in _records(self.text or "", self.dialect):
            if len(record) == self.fields:
                good.append(row)
            else:
                broken.append((row, len(record)))
        return (good if self.dialect.names else good[1:]), broken

    def row(self, record: int) -> int:
        """The file's row (1-based) of the well-formed record ``record`` (0-based)."""
        if self.text is None:
            return int(record) + 1
        return self._rows[0][int(record)]

    def broken(self) -> list[tuple[int, int]]:
        """(row, number of fields) of the records whose number of fields is wrong."""
        return self._rows[1]


@dataclass(frozen=True)
class Loaded:
    """One table as read: text files give strings in every column, Parquet columns keep their type."""

    table: pa.Table
    origin: Origin
    broken: int = 0  # records with a wrong number of fields; they are not in ``table``

    @property
    def file(self) -> Path:
        """The file it came from."""
        return self.origin.file


def _records(text: str, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """(row, fields) of every record that is not blank; rows are 1-based and count blank lines."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        quoting = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=dialect.delimiter, quoting=quoting)
        for row, record in enumerate(reader, 1):
            if record:
                yield row, record
    finally:
        csv.field_size_limit(limit)


def listing(folder: Path) -> str:
    """What a folder holds, for a message."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return shown or "nothing"


def need_folder(path: str | Path) -> Path:
    """``path`` as a folder that exists; otherwise a ``DataError`` that lists what is there instead."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(
            "is a file, not a folder", file=folder, remedy="set data.path to the folder that holds the tables"
        )
    parent = next((p for p in folder.absolute().parents if p.is_dir()), Path("/"))
    raise DataError("no such folder", file=folder, remedy=f"set data.path; {parent} holds {listing(parent)}")


def read_bytes(file: Path) -> bytes:
    """A file's bytes, unpacked if they are gzip (by content, not by name).

    Raises:
        DataError: missing, a folder, 0 bytes, or a truncated or damaged gzip stream.
    """
    if not file.is_file():
        there = (
            f"{file.parent} holds {listing(file.parent)}" if file.parent.is_dir() else f"no folder {file.parent} either"
        )
        raise DataError("no such file", file=file, remedy=there)
    data = file.read_bytes()
    again = "copy or download it again"
    if not data:
        raise DataError("the file is empty (0 bytes)", file=file, remedy=again)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except EOFError:
            raise DataError(
                f"truncated: gzip stream ends early, after {len(data)} bytes", file=file, remedy=again
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"damaged gzip file: {error}", file=file, remedy=again) from None
        if not data:
            raise DataError("the file is empty (0 bytes after unpacking)", file=file, remedy=again)
    elif file.suffix == ".gz":
        raise DataError("named .gz but not gzip data", file=file, remedy="rename it, or pack it with gzip")
    return data


def _decode(data: bytes, file: Path, dialect: Dialect) -> str:
    for encoding in dialect.encodings:
        try:
            return data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
        except UnicodeDecodeError:
            continue
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        records = list(_records(data[: error.start].decode("utf-8", "replace") + "x", dialect))
        raise DataError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            file=file,
            row=records[-1][0],
            remedy="save the file as UTF-8 (for example: iconv -f latin1 -t utf-8)",
        ) from None
    raise AssertionError("unreachable")


def read_text(file: Path, dialect: Dialect = Dialect(), *, drop_broken: bool = False) -> Loaded:
    """A delimited text file, plain or gzip, every column as strings ("NA" stays text, "" stays "").

    Args:
        file: the file.
        dialect: its layout.
        drop_broken: leave out records with a wrong number of fields and count them, instead of an error.

    Raises:
        DataError: everything of ``read_bytes``; not UTF-8 (names offset and row); only a header; a column name twice;
            a record with a wrong number of fields; a quoted field that never ends.
    """
    text = _decode(read_bytes(file), file, dialect)
    if dialect.wide_delimiter:
        text = text.replace(dialect.wide_delimiter, dialect.delimiter)
    names = dialect.names or _header(text, file, dialect)
    origin = Origin(file, len(names), text, dialect)
    broken = 0

    def skip(_row: pacsv.InvalidRow) -> str:
        nonlocal broken
        broken += 1
        return "skip"

    try:
        table = pacsv.read_csv(
            pa.BufferReader(text.encode("utf-8")),
            pacsv.ReadOptions(
                use_threads=False,
                block_size=_BLOCK,
                column_names=list(names) if dialect.names else None,
                encoding="utf8",
            ),
            pacsv.ParseOptions(
                delimiter=dialect.delimiter,
                quote_char='"' if dialect.quoted else False,
                newlines_in_values=dialect.quoted,
                invalid_row_handler=skip,
            ),
            pacsv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, check_utf8=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"cannot be read as a table: {error}", file=file, remedy="check quotes and delimiters"
        ) from error
    if broken and not drop_broken:
        row, found = origin.broken()[0]
        hint = _unclosed_quote(origin)
        raise DataError(
            hint or f"{found} fields instead of {len(names)}" + (f" ({broken} such rows)" if broken > 1 else ""),
            file=file,
            row=row,
            remedy="quote fields that hold a delimiter or a quote; data.clean.bad_row: drop leaves such rows out",
        )
    if not table.num_rows:
        raise DataError(
            "only a header, no rows" if not dialect.names else "no rows",
            file=file,
            remedy="fill it, or leave the file out",
        )
    _check_last_field(table, origin)
    return Loaded(table.rename_columns([name.strip() for name in names]), origin, broken)


def _header(text: str, file: Path, dialect: Dialect) -> tuple[str, ...]:
    try:
        names = next(_records(text[: 1 << 20], dialect))[1]
    except StopIteration:
        raise DataError("the file holds only blank lines", file=file, remedy="copy or download it again") from None
    stripped = [name.strip() for name in names]
    for i, name in enumerate(stripped):
        if name in stripped[:i]:
            raise DataError(
                f"the header has this column twice (fields {stripped.index(name) + 1} and {i + 1})",
                file=file,
                row=1,
                column=name,
                remedy="rename one of them",
            )
    return tuple(names)


def _unclosed_quote(origin: Origin) -> str:
    """A message if the file ends inside a quoted field, which swallows every row after the opening quote."""
    if not origin.dialect.quoted or origin.text is None:
        return ""
    reader = csv.reader(io.StringIO(origin.text, newline=""), delimiter=origin.dialect.delimiter, strict=True)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    line = 1
    try:
        for _ in reader:
            line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return f"a quoted field that opens in the record at line {line} is never closed"
    finally:
        csv.field_size_limit(limit)
    return ""


def _check_last_field(table: pa.Table, origin: Origin) -> None:
    """An unclosed quote in the last column makes one long field of the rest of the file, without a parse error."""
    if not origin.dialect.quoted or origin.text is None:
        return
    last = table.column(table.num_columns - 1)[-1].as_py().replace('"', '""')
    if origin.text.endswith('"' + last) and (message := _unclosed_quote(origin)):
        raise DataError(
            message,
            file=origin.file,
            row=origin.row(table.num_rows - 1),
            remedy='close the field, and double quotes inside it ("")',
        )


def read_parquet(file: Path) -> Loaded:
    """A Parquet file, columns as typed there. Raises ``DataError`` if it is missing, empty, damaged or has no rows."""
    data = read_bytes(file)
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a readable Parquet file: {error}", file=file, remedy="write it again") from error
    if not table.num_rows:
        raise DataError("no rows", file=file, remedy="fill it, or leave the file out")
    return Loaded(table, Origin(file, table.num_columns))


def read_file(file: Path, *, drop_broken: bool = False) -> Loaded:
    """CSV, TSV (plain or gzip) or Parquet, by the file's name."""
    suffixes = [s.lower() for s in file.suffixes]
    if ".parquet" in suffixes:
        return read_parquet(file)
    return read_text(file, Dialect(delimiter="\t" if ".tsv" in suffixes else ","), drop_broken=drop_broken)

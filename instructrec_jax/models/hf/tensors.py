"""The tensors of a safetensors folder, by name: checked when it is opened, mapped when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from instructrec_jax.errors import DataError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_AGAIN = "download or convert the model again"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # in the file

    def read(self) -> np.ndarray:
        """A read-only view of the mapped file: only the parts that are used come into memory."""
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,))
        return mapped.reshape(self.shape)


def open_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors`` or of the shards that ``model.safetensors.index.json`` names.

    Raises:
        DataError: no such file, a shard that is missing or shorter than its header says (with the first tensor that is cut),
            a tensor of the index that its shard lacks.
    """
    if (folder / INDEX).is_file():
        try:
            named: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise DataError(f"the index is damaged: {error}", file=folder / INDEX, remedy=_AGAIN) from error
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(named.values())):
            if not (folder / shard).is_file():
                lost = next(name for name, file in named.items() if file == shard)
                raise DataError(f"the shard is missing; it holds {lost}", file=folder / shard, remedy=_AGAIN)
            tensors |= _open_file(folder / shard)
        for name, shard in named.items():
            if name not in tensors:
                raise DataError(
                    f"the shard lacks the tensor {name} that {INDEX} names", file=folder / shard, remedy=_AGAIN
                )
        return tensors
    if not (folder / SINGLE).is_file():
        raise DataError(
            f"no {SINGLE} and no {INDEX}",
            file=folder,
            remedy="give the folder of a published model in safetensors (pickled .bin files are not read)",
        )
    return _open_file(folder / SINGLE)


def _open_file(file: Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(
                f"the file is cut off inside its header: {size:,} bytes, header {length:,}", file=file, remedy=_AGAIN
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise DataError(f"the header is damaged: {error}", file=file, remedy=_AGAIN) from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        start, end = (8 + length + at for at in entry["data_offsets"])
        if end > size:
            raise DataError(
                f"the file is cut off: tensor {name} of shape {tuple(entry['shape'])} ends at byte {end:,}, "
                f"the file has {size:,}",
                file=file,
                remedy=_AGAIN,
            )
        if entry["dtype"] not in DTYPES:
            raise DataError(f"tensor {name} has the type {entry['dtype']}, which is not supported", file=file)
        tensors[name] = Tensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors


def find(tensors: dict[str, Tensor], names: Iterable[str], folder: Path, shape: tuple[int, ...]) -> tuple[str, Tensor]:
    """The tensor under the first spelling of its name that is there, checked against the shape that the config asks for.

    Raises:
        DataError: it is missing, or has another shape.
    """
    names = list(names)
    for name in names:
        if name in tensors:
            found = tensors[name]
            if found.shape != shape:
                raise DataError(
                    f"tensor {name} has the shape {found.shape}, but config.json asks for {shape}",
                    file=found.file,
                    remedy="config.json and weights are of two models",
                )
            return name, found
    raise DataError(
        f"tensor {names[0]} of shape {shape} is missing"
        + (f" (also looked for {', '.join(names[1:3])})" if names[1:] else ""),
        file=folder,
        remedy=_AGAIN,
    )

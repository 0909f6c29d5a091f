"""Weights in from GGUF: a quantised file of llama.cpp becomes a Hugging Face folder that this package and transformers read.

Quantised tensors are dequantised; the result has the quality of the quantised file, not of the original release. The file is
mapped and each tensor is written as soon as it is converted, a block of rows at a time, so memory stays far below its size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from instructrec_jax import files
from instructrec_jax.errors import ConfigError, DataError, UserError
from instructrec_jax.models.hf import gguf_layout as layouts
from instructrec_jax.models.hf.gguf_tokenizer import write_tokenizer

MANIFEST = "conversion.json"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BLOCK = 4 << 20  # values converted at once
_AGAIN = "download the file again"


def convert(
    gguf_file: str | Path,
    out_dir: str | Path,
    dtype: str = "bfloat16",
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a GGUF file as a Hugging Face folder.

    Args:
        gguf_file: a model of the architectures ``llama`` (also Mistral, SmolLM2), ``gemma3``, ``qwen2``, ``qwen3`` or ``gpt2``,
            in one file, with its tokenizer.
        out_dir: the new folder: ``config.json``, ``model.safetensors``, ``tokenizer.json``, ``tokenizer_config.json``,
            ``generation_config.json`` and ``conversion.json``, the manifest with checksums. It appears complete or not at all. A
            folder that an earlier conversion made is kept if it is complete and of this very file, else replaced.
        dtype: of the weights: ``bfloat16``, ``float16`` or ``float32``.
        say: receives progress lines.

    Returns:
        ``out_dir``.

    Raises:
        ConfigError: an unknown ``dtype``.
        UserError: ``out_dir`` holds something that no conversion made.
        DataError: not a GGUF file, one that is cut off, one of several parts or of another byte order; an architecture, setting,
            tokenizer or quantisation that is not supported; a missing or unknown tensor, or one of another shape than the
            settings say.
    """
    source, out = Path(gguf_file), Path(out_dir)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", remedy=f"one of {', '.join(DTYPES)}")
    if not source.is_file():
        raise DataError("no such file", file=source)
    digest = files.sha256(source)
    if out.exists() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out} is not empty and was not made by a conversion", remedy="name another folder")
        manifest = complete(out)
        if manifest and manifest["source"]["sha256"] == digest and manifest["dtype"] == dtype:
            say(f"already converted: {out}")
            return out
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        _build(source, digest, fresh, dtype, say)
        move_in(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out


def complete(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted folder whose files all have their recorded sizes, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        good = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return manifest if good and manifest["source"]["sha256"] and manifest["dtype"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def move_in(fresh: Path, place: Path) -> None:
    """Put a finished folder in its place; what was there goes. A reader sees the old folder, none for a moment, or the new one."""
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _build(source: Path, digest: str, folder: Path, dtype: str, say: Callable[[str], None]) -> None:
    say(f"reading {source.name} ({source.stat().st_size / 1e6:.0f} MB)")
    reader = _open(source)
    tensors = {t.name: t for t in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    values = _values(reader, source)
    if values.get("split.count", 1) not in (0, 1):
        raise DataError(
            f"the file is one of {values['split.count']} parts",
            file=source,
            remedy="join them with llama.cpp's gguf-split --merge",
        )
    settings = layouts.Settings({k: v for k, v in values.items() if not k.startswith("tokenizer.")}, str(source))
    factors = _dequantised(tensors["rope_freqs.weight"], source) if "rope_freqs.weight" in tensors else None
    config, slots = layouts.layout(settings, shapes, factors)
    for key, value in settings.unread().items():
        say(f"note: the setting {key} = {value} is not used")
    positions = config.get("max_position_embeddings") or config["n_positions"]
    ids = write_tokenizer(values, folder, str(source), config["vocab_size"], positions)
    files.write_json(folder / "config.json", {**config, **ids, "dtype": dtype, "use_cache": True})
    files.write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    count = sum(int(np.prod(slot.shape)) for slot in slots)
    say(f"converting {len(slots)} tensors, {count:,} parameters, to {dtype}")
    _write_safetensors(
        folder / "model.safetensors", slots, dtype, lambda slot: _blocks(tensors[slot.source], slot, source)
    )
    made = sorted(path.name for path in folder.iterdir())
    manifest = {
        "source": {"file": source.name, "bytes": source.stat().st_size, "sha256": digest},
        "architecture": settings.architecture,
        "quantisation": _kinds(tensors),
        "parameters": count,
        "dtype": dtype,
        "files": {n: {"bytes": (folder / n).stat().st_size, "sha256": files.sha256(folder / n)} for n in made},
        "versions": {name: version(name) for name in ("instructrec_jax", "gguf", "numpy", "tokenizers")},
    }
    files.write_json(folder / MANIFEST, manifest)


def _open(path: Path) -> Any:
    """A reader of the file, which is checked to hold everything that its header announces."""
    from gguf import GGUFReader

    size = path.stat().st_size

    class Reader(GGUFReader):
        """The library takes what lies past the end for empty; this one stops there."""

        infos: Any = ()

        def _get(self, offset: int, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > size:
                names = {int(offset) - int(self.data_offset) - int(f.parts[-1][0]): f.name for f in self.infos}
                what = f"tensor {names[0]} ends" if 0 in names else "its header goes on"
                raise DataError(
                    f"the file is cut off: {what} at byte {end:,}, it has {size:,}", file=path, remedy=_AGAIN
                )
            return super()._get(offset, dtype, count, *args, **kwargs)

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            self.infos = fields
            super()._build_tensors(start_offs, fields)

    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise DataError(f"not a GGUF file: it begins with {magic!r}", file=path, remedy="give a .gguf file")
    try:
        reader = Reader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"the file is damaged: {error}", file=path, remedy=_AGAIN) from error
    if reader.byte_order != "I":
        raise DataError(
            "the file has the other byte order than this machine", file=path, remedy="take the other variant"
        )
    return reader


def _values(reader: Any, path: Path) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (UnicodeDecodeError, IndexError, ValueError) as error:
        raise DataError(f"the file is damaged: {error}", file=path, remedy=_AGAIN) from error


def _kinds(tensors: dict[str, Any]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for tensor in tensors.values():
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    return kinds


def _dequantised(tensor: Any, path: Path, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a tensor as float32, [rows, ...] outermost axis first.

    Raises:
        DataError: a quantisation that cannot be read.
    """
    from gguf import quants

    try:
        return quants.dequantize(tensor.data[rows], tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise DataError(
            f"tensor {tensor.name} has the type {tensor.tensor_type.name}, which cannot be dequantised",
            file=path,
            remedy="take a file quantised as Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, F16, BF16 or F32",
        ) from error


def _blocks(tensor: Any, slot: layouts.Slot, path: Path) -> Iterator[np.ndarray]:
    """A tensor's float32 values in the Hugging Face layout, some rows at a time where the edit allows it."""
    total = slot.shape[0]
    step = total if slot.edit in ("pairs", "transpose") else max(1, _BLOCK // max(1, int(np.prod(slot.shape[1:]))))
    for start in range(0, total, step):
        yield layouts.edited(_dequantised(tensor, path, slice(start, start + step)), slot)


def _write_safetensors(
    path: Path, slots: list[layouts.Slot], dtype: str, blocks: Callable[[layouts.Slot], Iterator[np.ndarray]]
) -> None:
    """A safetensors file, written in one pass: its library would want all tensors in memory."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for slot in slots:
        size = int(np.prod(slot.shape)) * kind.itemsize
        header[slot.name] = {"dtype": DTYPES[dtype], "shape": list(slot.shape_out), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes, as the format asks
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for slot in slots:
            _write_tensor(stream, slot, blocks(slot), kind)
        stream.flush()
        os.fsync(stream.fileno())


def _write_tensor(stream: BinaryIO, slot: layouts.Slot, blocks: Iterator[np.ndarray], kind: np.dtype) -> None:
    for block in blocks:
        with np.errstate(over="ignore"):
            cast = block.astype(kind)
        if not np.isfinite(cast).all():
            why = f"values beyond {kind.name}" if np.isfinite(block).all() else "values that are not finite"
            raise DataError(f"tensor {slot.source} holds {why}", remedy="choose another dtype, or " + _AGAIN)
        stream.write(cast.tobytes())

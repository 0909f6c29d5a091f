"""Instruction examples on disk: ArrayRecord shards, written as a TFDS data set without TensorFlow.

``write`` streams examples through a ``tfds.core.GeneratorBasedBuilder`` into ``folder/instructions/1.0.0`` and finishes with
``manifest.json`` (counts, schema, seed, config hash, sha256 of each shard). A folder without a manifest is not complete.
``Records`` checks the shards against the manifest, so a truncated or corrupted shard is named before training starts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instructrec_jax.errors import ConfigError, DataError
from instructrec_jax.files import read_json, sha256, write_json
from instructrec_jax.instructions.example import Feature, InstructionExample

NAME, VERSION = "instructions", "1.0.0"
MANIFEST = "manifest.json"
_NO_EXAMPLES = "keep more of the data (data.clean, data.split), or more families (instructions)"


@functools.cache  # TFDS registers the class by its name, and refuses a second one
def _builder_class() -> type:
    import tensorflow_datasets as tfds

    class Instructions(tfds.core.GeneratorBasedBuilder):
        """Instruction examples of one prepared data set."""

        VERSION = tfds.core.Version(VERSION)
        name = NAME

        def __init__(self, examples: Callable[[], Iterator[InstructionExample]], counts: Counter, **kwargs: Any):
            self._examples, self._counts = examples, counts
            super().__init__(**kwargs)

        def _info(self) -> Any:
            ints = tfds.features.Tensor(shape=(None,), dtype=np.int32)
            floats = tfds.features.Tensor(shape=(None,), dtype=np.float32)
            scalar = np.int32
            text = tfds.features.Text()
            features = {
                **dict.fromkeys(
                    ("template", "language", "preference", "intention", "task", "metric", "prompt", "answer"), text
                ),
                **dict.fromkeys(("prompt_items", "answer_items", "candidates", "feature_index"), ints),
                "feature_value": floats,
                **dict.fromkeys(("user", "target", "dense", "dense_from"), scalar),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Instruction examples rendered from logs and a catalogue.",
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager: Any) -> dict:
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator:
            for number, example in enumerate(self._examples()):
                self._counts[f"{example.preference},{example.intention},{example.task}"] += 1
                yield number, to_record(example)

    return Instructions


def to_record(example: InstructionExample) -> dict[str, Any]:
    """The example as a flat dictionary of TFDS features."""
    record = dict(vars(example))
    features = record.pop("features")
    record["feature_index"] = np.asarray([f.index for f in features], np.int32)
    record["feature_value"] = np.asarray([f.value for f in features], np.float32)
    for key in ("prompt_items", "answer_items", "candidates"):
        record[key] = np.asarray(record[key], np.int32)
    record["dense"] = int(example.dense)
    return record


def from_record(record: dict[str, Any]) -> InstructionExample:
    """The inverse of ``to_record``."""

    def text(key: str) -> str:
        return record[key].decode() if isinstance(record[key], bytes) else str(record[key])

    words = {
        k: text(k) for k in ("template", "language", "preference", "intention", "task", "metric", "prompt", "answer")
    }
    items: dict[str, Any] = {
        k: tuple(int(i) for i in record[k]) for k in ("prompt_items", "answer_items", "candidates")
    }
    return InstructionExample(
        **words,
        **items,
        features=tuple(
            Feature(int(i), float(v)) for i, v in zip(record["feature_index"], record["feature_value"], strict=True)
        ),
        user=int(record["user"]),
        target=int(record["target"]),
        dense=bool(record["dense"]),
        dense_from=int(record["dense_from"]),
    )


def write(
    examples: Callable[[], Iterator[InstructionExample]],
    folder: str | Path,
    *,
    config_hash: str,
    seed: int,
    shard_records: int,
) -> dict[str, Any]:
    """Write every example of ``examples()`` and return the manifest. Replaces what was in ``folder``; complete or absent.

    Raises:
        DataError: there is no example.
        ConfigError: more shards than examples.
    """
    import tensorflow_datasets as tfds

    if shard_records < 1:
        raise ConfigError(f"instructions.shard_records = {shard_records}", remedy="at least 1")
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    counts: Counter = Counter()
    tfds.display_progress_bar(False)
    builder = _builder_class()(examples, counts, data_dir=str(fresh), file_format="array_record")
    shards = {}
    num_shards = max(1, -(-getattr(examples, "expected", 0) // shard_records))
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a "download"
            builder.download_and_prepare(download_config=config)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, AssertionError) and sum(counts.values()) < num_shards:
            if not counts:
                raise DataError("there is no instruction example to write", file=folder, remedy=_NO_EXAMPLES) from error
            raise ConfigError(
                f"instructions.shard_records = {shard_records} asks for {num_shards} shards of {sum(counts.values())} examples",
                remedy="use a larger number",
            ) from error
        raise
    data_dir = fresh / NAME / VERSION
    for file in sorted(data_dir.glob("*.array_record*")):
        shards[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = {
        "format": "tfds array_record",
        "records": int(sum(counts.values())),
        "records_by_aspect": dict(sorted(counts.items())),
        "shards": shards,
        "schema": json.loads((data_dir / "features.json").read_text()),
        "seed": seed,
        "config_hash": config_hash,
    }
    write_json(fresh / MANIFEST, manifest)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.replace(folder)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a records folder.

    Raises:
        DataError: there is none, which means that the folder is absent or was never finished.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise DataError(
            "no manifest: the records are absent or incomplete",
            file=file,
            remedy="run `instructrec data prepare CONFIG`",
        )
    return read_json(file, "run `instructrec data prepare CONFIG` again")


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every shard against the manifest.

    Raises:
        DataError: a shard is missing, has another size or another checksum; the message names it and gives both numbers.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["shards"].items():
        file = Path(folder) / NAME / VERSION / name
        remedy = "run `instructrec data prepare CONFIG` again"
        if not file.is_file():
            raise DataError("the shard is missing", file=file, remedy=remedy)
        if file.stat().st_size != expected["bytes"]:
            raise DataError(
                f"the shard has {file.stat().st_size} bytes, the manifest says {expected['bytes']}",
                file=file,
                remedy=remedy,
            )
        if (found := sha256(file)) != expected["sha256"]:
            raise DataError(
                f"the shard is corrupted: sha256 {found}, the manifest says {expected['sha256']}",
                file=file,
                remedy=remedy,
            )
    return manifest


class Records:
    """Random access to the verified examples: ``len`` and ``[]``, as Grain's ``MapDataset.source`` wants it."""

    def __init__(self, folder: str | Path):
        import tensorflow_datasets as tfds

        self._folder = Path(folder)
        self.manifest = verify(folder)
        builder: Any = tfds.builder_from_directory(str(self._folder / NAME / VERSION))
        self._source = builder.as_data_source(split="train")

    def __len__(self) -> int:
        return self.manifest["records"]

    def __getitem__(self, index: int) -> InstructionExample:
        return from_record(self._source[index])

    def __repr__(self) -> str:
        # Grain compares the source's repr when it restores an iterator; it must not hold a memory address.
        return f"Records({self.manifest['config_hash']}, {len(self)})"

"""From a source to a prepared data set: read, clean, split, features, tokeniser, instruction records.

A prepared folder is complete or absent: everything is built beside it and moved into place, the manifest last.

    manifest.json      config hash, statistics, cleaning steps with counts, examples by family
    data/              split interactions, items, users, tags (Parquet)
    tokenizer/         Hugging Face tokeniser
    item_features.npy  [I, Fc]; user_features.npz
    texts.parquet      what a teacher wrote, if instructions.teacher names a folder
    negatives.npy      lists of hard negatives, if instructions.negatives_file names a file
    records/           instruction examples of the training split (ArrayRecord, a TFDS data set)
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from instructrec_jax import bucket
from instructrec_jax.config import Config
from instructrec_jax.data import features as feature_tables
from instructrec_jax.data import records, sources, store, tokenizer
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.features import UserFeatures
from instructrec_jax.data.mixture import Space, own, own_users
from instructrec_jax.data.schema import SplitData
from instructrec_jax.data.splits import split
from instructrec_jax.errors import ConfigError, DataError, UserError, did_you_mean
from instructrec_jax.evaluation.hard_negatives import read_lists
from instructrec_jax.files import in_bucket, read_json, sha256, write_json
from instructrec_jax.instructions.build import FAMILIES, Builder
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.pauses import PAUSES, check_time_gaps, pauses_in
from instructrec_jax.instructions.teacher import texts
from instructrec_jax.instructions.teacher.texts import TEXTS, TaughtWords

Say = Callable[[str], None]
Progress = Callable[[str, int, Iterator], Iterator]  # label, expected length, iterator -> the same items

FILES = (
    "item_features.npy",
    "user_features.npz",
    "tokenizer/tokenizer.json",
)  # data/ and records/ have their own manifests
NEGATIVES = "negatives.npy"  # int32 [U, k]: items of every user, best first, -1 = none
_PART_EVENTS = 1 << 17  # events of a part of the users, about
_USERS = 1 << 14  # users whose features are kept: a user is the subject of several examples
TOKENIZER_SAMPLE = 20_000  # rendered examples that the tokeniser is trained on, beside all titles


@dataclass(frozen=True)
class Prepared:
    """A prepared data set, loaded."""

    folder: Path
    data: SplitData
    text: tokenizer.Text
    item_features: Float[np.ndarray, "I Fc"]
    users: UserFeatures
    manifest: dict[str, Any]
    sets: tuple[Space, ...] = ()  # of a mixture

    @property
    def records(self) -> Path:
        """Folder of the instruction records."""
        return self.folder / "records"

    @property
    def num_records(self) -> int:
        """Number of the instruction records."""
        return records.read_manifest(self.records)["records"]

    def part(self, space: Space) -> Prepared:
        """One set of a mixture with its own items and users, numbered and named as before; records and tokeniser are the whole's."""
        manifest = {**self.manifest, "statistics": space.statistics}
        features = self.item_features[slice(*space.items)]
        return Prepared(self.folder, own(self.data, space), self.text, features, own_users(self.users, space), manifest)

    def builder(self, config: Config) -> Builder:
        """Prompts over this data set."""
        return builder_of(self.data, self.users, config, self.folder)


def each_set(config: Config, prepared: Prepared) -> list[tuple[Config, Prepared, Space | None]]:
    """Config, data and place of every set of a mixture; another config with its data is its own only set."""
    if not prepared.sets:
        return [(config, prepared, None)]
    return [(config.member(n), prepared.part(space), space) for n, space in enumerate(prepared.sets)]


def number_of(config: Config, prepared: Prepared, name: str = "") -> int:
    """Which of ``each_set`` has a name; "" where there is only one.

    Raises:
        UserError: there is no such set, or there are several and no name is given.
    """
    names = [space.name for space in prepared.sets] or [config.name]
    if name in names or (not name and len(names) == 1):
        return names.index(name) if name else 0
    what = f"{config.name} has no set {name!r}{did_you_mean(name, names)}" if name else f"{config.name} is a mixture"
    raise UserError(what, remedy=f"--set with one of {', '.join(names)}")


def builder_of(data: SplitData, users: UserFeatures, config: Config, folder: Path) -> Builder:
    """Prompts over a data set whose taught texts, if there are any, are in ``folder``."""
    tokens = functools.lru_cache(_USERS)(users.tokens) if users.index.shape[1] else None
    settings = config.instructions
    builder = Builder(
        data, settings, config.data.domain, tokens, items_as=settings.items_as, pauses=pauses_in(users.names)
    )
    if settings.teacher:
        builder.words = TaughtWords(
            builder.words, data, folder / TEXTS, seed=settings.seed, history_items=settings.history_items
        )
    if settings.negatives == "file":
        builder.lists = np.load(folder / NEGATIVES, mmap_mode="r")
    return builder


def prepare(
    config: Config,
    say: Say,
    progress: Progress | None = None,
    *,
    engine: Literal["local", "beam"] = "local",
    beam_options: Sequence[str] = (),
) -> Prepared:
    """Build the prepared data set of a config, replacing an older one of the same name.

    The engine writes the instruction records; both give the same bytes. ``beam_options``: as of ``beam_engine.write``.

    Raises:
        UserError: Apache Beam is asked for and not installed.
        DataError: bad input, naming file, row and column.
        ConfigError: settings that do not fit the data.
    """
    if config.mixture:
        if engine != "local":
            raise UserError("a mixture is written by --engine local", remedy="--engine beam prepares each of its sets")
        from instructrec_jax.mixture import mix

        return mix(config, say, progress)
    final = config.prepared_dir
    check_replaceable(final)
    raw = clean(sources.read(config.data, config.name), config.data.clean)
    data = split(raw, config.data.split)
    check_time_gaps(config.instructions, data)
    for step in data.steps:
        say(f"  {step.name}: {step.interactions[0]:,} → {step.interactions[1]:,} interactions, {step.users[0]:,} → {step.users[1]:,} "
            f"users, {step.items[0]:,} → {step.items[1]:,} items{'; ' + step.detail if step.detail else ''}")  # fmt: skip

    beside = bucket.cache_root() if in_bucket(final) else final.parent
    fresh = beside / f".{final.name}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        store.save_split(data, fresh / "data")
        say("  item and user features")
        vectors = encoded(data, config, say) if config.model.text_encoder else None
        item_features = feature_tables.item_features(
            data, config.model.content_features, config.model.cooccurrence_features, vectors
        )
        users = feature_tables.user_features(data)
        if config.instructions.time_gaps:
            users = replace(users, names=[*users.names, *PAUSES])
        np.save(fresh / "item_features.npy", item_features)
        np.savez(fresh / "user_features.npz", names=np.asarray(users.names, str), index=users.index, value=users.value)

        if config.instructions.teacher:  # a copy: the folder stands by itself, and its sum is on record
            shutil.copyfile(texts.verified(config.instructions.teacher), fresh / TEXTS)
        if config.instructions.negatives == "file":
            lists, found = read_lists(config.instructions.negatives_file, data, config.data.hash_ids)
            say(f"  hard negatives: {found}")
            np.save(fresh / NEGATIVES, lists)
        builder = builder_of(data, users, config, fresh)
        if config.model.pretrained:
            from instructrec_jax.models.hf.fetch import resolve

            say(f"  tokeniser of {config.model.pretrained}")
            tokenizer.copy_pretrained(resolve(config.model.pretrained), fresh / "tokenizer")
        else:
            say("  tokeniser")
            tokenizer.train(_texts(data, builder), config.model.vocab_size, fresh / "tokenizer")
        if engine == "beam":
            manifest, counts = beam_engine().write(fresh, config, beam_options)
        else:
            manifest, counts = write_records(builder, config, fresh / "records", progress)
        written, skipped, words, drawn = (
            dict(sorted(counts[kind].items())) for kind in ("written", "skipped", "words", "negatives")
        )
        say(f"  {manifest['records']:,} instruction examples in {len(manifest['shards'])} shard(s)"
            + (f"; without words to say: {skipped}" if skipped else ""))  # fmt: skip
        if words:
            say("  words by " + ", ".join(f"{name} {count:,}" for name, count in words.items()))
        if drawn:
            say("  negatives: " + ", ".join(f"{count:,} {name}" for name, count in drawn.items()))
        write_json(
            fresh / "manifest.json",
            {
                "name": config.name,
                "config_hash": config.data_hash(),
                "statistics": store.statistics(data),
                "steps": [asdict(step) for step in data.steps],
                "examples": written,
                "skipped": skipped,
                "words": words,
                **({"negatives": drawn} if drawn else {}),
                "files": {name: sha256(fresh / name) for name in (*FILES, TEXTS, NEGATIVES) if (fresh / name).exists()},
            },
        )
        if in_bucket(final):
            say(f"  to {final}")
            bucket.publish(fresh, final)
        else:
            if final.exists():
                shutil.rmtree(final)
            fresh.replace(final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return load(config)


def encoded(data: SplitData, config: Config, say: Say) -> Float[np.ndarray, "I D"]:
    """What the text encoder makes of the items."""
    import jax

    from instructrec_jax.encode import encode_texts
    from instructrec_jax.models.hf.fetch import resolve
    from instructrec_jax.training.mesh import make_mesh

    say(f"  {data.num_items:,} item texts through {config.model.text_encoder}")
    with jax.set_mesh(make_mesh(config.mesh)):
        return encode_texts(resolve(config.model.text_encoder), feature_tables.item_sentences(data))


def check_replaceable(folder: Path) -> None:
    """Only a folder that ``prepare`` wrote may be replaced as a whole."""
    ours = {"manifest.json", "data", "records", "tokenizer", TEXTS, NEGATIVES, *FILES}
    if folder.exists() and (not folder.is_dir() or any(p.name not in ours for p in folder.iterdir())):
        raise ConfigError(
            f"{folder} is there and is not a prepared data set", remedy="choose another name or prepared folder"
        )


def expected_records(windows: int, config: Config) -> int:
    """About how many records so many sequential windows give: what the number of shards is made from."""
    share = config.instructions.copies + sum(getattr(config.instructions, family) for family in FAMILIES)
    return round(windows * share)


class _Examples:
    """The builder's stream with a length hint (for the number of shards) and progress."""

    def __init__(self, builder: Builder, config: Config, progress: Progress | None):
        self._builder, self._progress = builder, progress
        self.expected = expected_records(builder.num_windows, config)

    def __call__(self) -> Iterator[InstructionExample]:
        return self._shown(self._builder.training_examples(self._parts))

    def records(self) -> Iterator[tuple[str, bytes]]:
        """(Aspects, record) of the same examples."""
        return self._shown(self._builder.records(self._parts))

    def _parts(self) -> Iterator[SplitData]:
        return self._builder.data.parts(_PART_EVENTS)

    def _shown(self, stream: Iterator) -> Iterator:
        return self._progress("  instructions", self.expected, stream) if self._progress else stream


def write_records(
    builder: Builder, config: Config, folder: Path, progress: Progress | None
) -> tuple[dict[str, Any], dict[str, Counter[str]]]:
    """Write the records of a builder whose words have been asked for nothing that counts: the manifest, and the counts of both."""
    words = builder.words.counts if isinstance(builder.words, TaughtWords) else Counter()
    words.clear()  # what the tokeniser's sample asked for
    manifest = records.write(
        _Examples(builder, config, progress),
        folder,
        config_hash=config.data_hash(),
        seed=config.instructions.seed,
        shard_records=config.instructions.shard_records,
    )
    counts = {"written": builder.written, "skipped": builder.skipped, "words": words, "negatives": builder.drawn}
    return manifest, counts


def beam_engine() -> ModuleType:
    """The module ``beam_engine``.

    Raises:
        UserError: Apache Beam is not installed.
    """
    try:
        return importlib.import_module("instructrec_jax.beam_engine")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("apache_beam"):
            raise
        raise UserError("Apache Beam is not installed", remedy="pip install 'instructrec_jax[beam]'") from error


def _texts(data: SplitData, builder: Builder) -> Iterator[str]:
    yield from data.catalogue.titles
    yield from (tag for _, _, tag in data.tags)
    total = max(builder.num_windows * 3, 1)
    # Evenly spaced over the stream, so that every family is in the sample.
    every = max(1, total // TOKENIZER_SAMPLE)
    for example in islice(builder.training_examples(), 0, None, every):
        yield example.prompt
        if example.answer:
            yield example.answer


def load(config: Config) -> Prepared:
    """Load a prepared data set and check that it belongs to this config. One in a bucket is copied to this machine's cache first.

    Raises:
        DataError: it is absent, incomplete, damaged, or was made with other data, instruction or feature settings.
    """
    folder = config.prepared_dir
    remedy = "run `instructrec data prepare CONFIG` with the same settings"
    if in_bucket(folder):
        folder = bucket.local_copy(folder)
        remedy += f"; a copy that is damaged can be removed: {folder}"
    if not (folder / "manifest.json").is_file():
        raise DataError("there is no prepared data set here", file=folder, remedy=remedy)
    manifest = read_json(folder / "manifest.json", remedy)
    if manifest.get("config_hash") != config.data_hash():
        raise DataError(
            f"the prepared data has config hash {manifest.get('config_hash')}, this config has {config.data_hash()}",
            file=folder / "manifest.json",
            remedy=remedy,
        )
    for name, expected in manifest.get("files", {}).items():
        if not (folder / name).is_file():
            raise DataError("missing, but manifest.json lists it", file=folder / name, remedy=remedy)
        if (found := sha256(folder / name)) != expected:
            raise DataError(
                f"damaged or changed: sha256 {found}, manifest.json says {expected}", file=folder / name, remedy=remedy
            )
    data = store.load_split(folder / "data")
    with np.load(folder / "user_features.npz") as arrays:
        users = UserFeatures([str(n) for n in arrays["names"]], arrays["index"], arrays["value"])
    if config.model.pretrained:
        text = tokenizer.load_pretrained(folder / "tokenizer", config.model.chat)
    else:
        text = tokenizer.load(folder / "tokenizer")
    sets = tuple(Space.from_json(tree) for tree in manifest.get("sets", ()))
    return Prepared(folder, data, text, np.load(folder / "item_features.npy"), users, manifest, sets)

"""``instructrec data forget``: a prepared data set without one user, and the runs that have seen them.

The user keeps an index without events and without a name, so that everybody else's indices, records (if in another order on disk) and
frozen negatives stay what they are. What goes: their events, features, tags and instruction records; records of other people that
say a wish in a tag that nobody else gave that item; texts that a teacher wrote from their events or from such tags, and its
cached answers; tuned baselines of these data.

What stays: the item features and the tokeniser, which are sums over everybody, the weights of runs, and what else was prepared from
the same log. Runs and folders are listed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from instructrec_jax import baseline_store
from instructrec_jax import config as configs
from instructrec_jax.bucket import refuse
from instructrec_jax.config import Config
from instructrec_jax.data import records, store
from instructrec_jax.data.privacy import user_keys
from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError, DataError, UserError
from instructrec_jax.files import read_json, sha256, write_atomic, write_json
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.instructions.packs import clean_text
from instructrec_jax.instructions.teacher import texts
from instructrec_jax.instructions.teacher.cache import FILE, Cache
from instructrec_jax.prepare import NEGATIVES, Prepared, load
from instructrec_jax.teach import folder_of

_FIELDS = texts.Taught.__dataclass_fields__
_AGAIN = "run `instructrec data prepare CONFIG` again"


@dataclass(frozen=True)
class Seen:
    """A run that was trained on a log with the user in it."""

    run: Path
    checkpoints: tuple[str, ...]  # steps


@dataclass(frozen=True)
class Forgotten:
    """What was removed, and what remains to be decided on."""

    events: int
    records: int  # the user's own
    worded_by: int  # of others, worded by a tag of the user
    tags: int
    texts: int  # taught texts, accepted or refused
    answers: int  # cached answers of a teacher
    baselines: tuple[str, ...]  # tuned ones, removed whole
    runs: tuple[Seen, ...]
    folders: tuple[Path, ...]  # other prepared data sets that hold the user


def forget(config: Config, user_id: str) -> Forgotten:
    """Rewrite the prepared data set of a config, and its teacher's folder, without one user.

    Args:
        config: its data must be prepared.
        user_id: as in the log; with ``data.hash_ids`` also as in the prepared data.

    Raises:
        UserError: a mixture, no such user (also where they were forgotten before), another command works on the folder, or it is in
            a bucket.
        DataError: the data are not prepared with these settings, or damaged.
    """
    if config.mixture:
        raise UserError(
            f"{config.name} is a mixture",
            remedy="forget the user in the set's own config, and prepare the mixture again",
        )
    folder = config.prepared_dir
    refuse(folder, "data forget")
    prepared = load(config)
    records.verify(prepared.records)
    data = prepared.data
    key = user_keys(config.data.hash_ids)
    names = {key(user_id), user_id} if config.data.hash_ids else {user_id}
    index = next(
        (u for u, name in enumerate(data.user_ids) if name in names and data.offsets[u + 1] > data.offsets[u]), -1
    )
    if index < 0:
        raise UserError(
            f"no user {user_id!r} among the {data.num_users:,} users of {data.name}",
            remedy="check the id; a user who was forgotten before is not found either",
        )
    name = data.user_ids[index]
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            own, worded_by = _rewrite(config, prepared, index)
            taught, answers = _forget_texts(folder_of(config), name, _by_title(data, index))
            tuned = _forget_baselines(baseline_store.folder_of(config))
    except Timeout as error:
        raise UserError(f"another command works on {folder}", remedy="wait for it") from error
    return Forgotten(
        events=int(data.offsets[index + 1] - data.offsets[index]),
        records=own,
        worded_by=worded_by,
        tags=sum(user == index for user, _, _ in data.tags),
        texts=taught,
        answers=answers,
        baselines=tuned,
        runs=runs_that_saw(config),
        folders=others_with(config, prepared, index),
    )


def _forget_baselines(folder: Path) -> tuple[str, ...]:
    """Remove the tuned baselines: they hold lists and vectors of users, and belong to data that are no more."""
    names = tuple(sorted(file.parent.name for file in folder.glob("*/*.json")))
    shutil.rmtree(folder, ignore_errors=True)
    return tuple(dict.fromkeys(names))


def without_user(data: SplitData, index: int) -> SplitData:
    """The data with the user's events, name, features and tags gone, and everybody's index as before."""
    start, stop = int(data.offsets[index]), int(data.offsets[index + 1])
    keep = np.ones(len(data.item), bool)
    keep[start:stop] = False
    offsets = data.offsets.copy()
    offsets[index + 1 :] -= stop - start
    blank = f"forgotten-{index}"
    users = data.users
    if users is not None:
        rows = users.to_pylist()
        rows[index] = {**dict.fromkeys(users.column_names), "user_id": blank}
        users = pa.Table.from_pylist(rows, users.schema)
    return replace(
        data,
        user_ids=[blank if u == index else name for u, name in enumerate(data.user_ids)],
        offsets=offsets,
        item=data.item[keep],
        split=data.split[keep],
        time=None if data.time is None else data.time[keep],
        rating=None if data.rating is None else data.rating[keep],
        users=users,
        tags=[tag for tag in data.tags if tag[0] != index],
    )


def runs_that_saw(config: Config) -> tuple[Seen, ...]:
    """Runs under ``config.runs`` that were trained on the same log, alone or in a mixture, with their checkpoints.

    Other instructions or another split of it (``instructrec refit``) have the user's events as well.
    """
    found = []
    for file in sorted(Path(config.runs).glob("*/config.yaml")):
        try:
            run = configs.load(file)
            same = any(_log(member) == _log(config) for member in (run.members() if run.mixture else [run]))
        except ConfigError:  # of another version, or a set's config is gone: it cannot be ruled out
            same = True
        if same:
            steps = sorted((p.name for p in (file.parent / "checkpoints").glob("*") if p.name.isdigit()), key=int)
            found.append(Seen(file.parent, tuple(steps)))
    return tuple(found)


def _log(config: Config) -> tuple[str, ...]:
    """What tells one log from another."""
    data = config.data
    return data.source, str(Path(data.path).resolve()), data.interactions


def others_with(config: Config, prepared: Prepared, index: int) -> tuple[Path, ...]:
    """Other prepared data sets beside this one that hold its user ``index``: of that id, alone or in a mixture, with one of their items.

    Ids that another set hashes with another secret are not known here.
    """
    own = prepared.data
    name, items = own.user_ids[index], {own.catalogue.item_ids[i] for i in own.history(index).tolist()}
    found = []
    for file in sorted(prepared.folder.parent.glob("*/manifest.json")):
        if file.parent == prepared.folder:
            continue
        try:
            other = store.load_split(file.parent / "data")
        except (DataError, OSError):  # no prepared data set, or a damaged one, which nothing reads
            continue
        for prefix in ("", f"{config.name}:"):  # as a mixture names its sets' ids
            if prefix + name in other.user_ids:
                user = other.user_ids.index(prefix + name)
                shown = {other.catalogue.item_ids[i] for i in other.history(user).tolist()}
                if not shown.isdisjoint({prefix + item for item in items}):
                    found.append(file.parent)
    return tuple(found)


def _rewrite(config: Config, prepared: Prepared, index: int) -> tuple[int, int]:
    """Build the folder anew beside its place and swap it in; gives the records removed: the user's, and others worded by them."""
    final = prepared.folder
    fresh, old = (final.with_name(f".{final.name}.{what}{os.getpid()}") for what in ("", "old."))
    shutil.rmtree(fresh, ignore_errors=True)
    data = without_user(prepared.data, index)
    left_out = [0, 0]
    try:
        shutil.copytree(final, fresh, ignore=shutil.ignore_patterns("data", "records", "manifest.json"))
        store.save_split(data, fresh / "data")
        with np.load(final / "user_features.npz") as arrays:
            features = {name: arrays[name].copy() for name in arrays.files}
        features["index"][index] = -1
        features["value"][index] = 0
        np.savez(fresh / "user_features.npz", **features)
        if (fresh / NEGATIVES).exists():
            lists = np.load(fresh / NEGATIVES)
            lists[index] = -1
            np.save(fresh / NEGATIVES, lists)
        if (fresh / texts.TEXTS).exists():
            taught, shown = texts.read(fresh / texts.TEXTS)
            kept = texts.without(taught, prepared.data.user_ids[index], _by_title(prepared.data, index))
            texts.save(kept, fresh / texts.TEXTS, shown)
        before = records.read_manifest(final / "records")
        stream = _Kept(records.Records(final / "records"), _own_tags(prepared.data, index), index, left_out)
        written = records.write(
            stream,
            fresh / "records",
            config_hash=before["config_hash"],
            seed=before["seed"],
            shard_records=config.instructions.shard_records,
        )
        manifest = read_json(final / "manifest.json", _AGAIN)
        manifest["statistics"] = store.statistics(data)
        manifest["files"] = {name: sha256(fresh / name) for name in manifest["files"]}
        entry = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "records": before["records"] - written["records"],
        }
        manifest["forgotten"] = [*manifest.get("forgotten", []), entry]
        write_json(fresh / "manifest.json", manifest)
        final.replace(old)
        fresh.replace(final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not final.exists():
            old.replace(final)
        shutil.rmtree(old, ignore_errors=True)
    return left_out[0], left_out[1]


class _Kept:
    """The records that stay, in their order; counts those that go while it is read."""

    def __init__(
        self, source: records.Records, own_tags: dict[int, list[str]], index: int, left_out: list[int]
    ) -> None:
        self._source, self._own_tags, self._index, self._left_out = source, own_tags, index, left_out
        self._all_tags = sorted({tag for tags in own_tags.values() for tag in tags})
        self.expected = len(source)

    def __call__(self) -> Iterator[InstructionExample]:
        self._left_out[:] = [0, 0]
        for number in range(len(self._source)):
            example = self._source[number]
            if example.user == self._index:
                self._left_out[0] += 1
            elif example.intention == "I1" and self._tells(example):
                self._left_out[1] += 1
            else:
                yield example

    def _tells(self, example: InstructionExample) -> bool:
        """Whether a wish is told in a tag of the user's own.

        Widenings answer with a wish, and have no target to look up where the prompt tells the item: any item's tag is the user's then.
        """
        said = f"{example.prompt}\n{example.answer}".lower()
        tags = self._own_tags.get(example.target, ()) if example.target >= 0 else self._all_tags
        return any(tag in said for tag in tags)


def _own_tags(data: SplitData, index: int) -> dict[int, list[str]]:
    """Item -> tags, as prompts say them, that this user gave it and nobody else did."""
    own, others = set(), set()
    for user, item, tag in data.tags:
        if said := clean_text(tag).lower():
            (own if user == index else others).add((item, said))
    out: dict[int, list[str]] = {}
    for item, tag in sorted(own - others):
        out.setdefault(item, []).append(tag)
    return out


def _by_title(data: SplitData, index: int) -> dict[str, list[str]]:
    """``_own_tags`` by the item's title, as taught texts name it."""
    return {clean_text(data.catalogue.titles[item]): tags for item, tags in _own_tags(data, index).items()}


def _forget_texts(folder: Path, name: str, own_tags: dict[str, list[str]]) -> tuple[int, int]:
    """Remove a user and their words from a teacher's folder: (texts, cached answers) removed."""
    if not (folder / FILE).exists() and not (folder / texts.TEXTS).exists():
        return 0, 0
    with FileLock(folder / ".lock", timeout=0):
        gone = 0
        if (folder / texts.TEXTS).exists():
            taught, shown = texts.read(folder / texts.TEXTS)
            kept = texts.without(taught, name, own_tags)
            gone = len(taught) - len(kept)
            manifest = read_json(folder / texts.MANIFEST, _AGAIN) if (folder / texts.MANIFEST).exists() else {}
            texts.save(kept, folder / texts.TEXTS, shown)
            if manifest:
                write_json(folder / texts.MANIFEST, {**manifest, "texts_sha256": sha256(folder / texts.TEXTS)})
        if (file := folder / texts.REJECTED).exists():
            lines = file.read_text(encoding="utf-8").splitlines()
            rows = [texts.Taught(**{k: v for k, v in json.loads(line).items() if k in _FIELDS}) for line in lines]
            left = [line for line, row in zip(lines, rows) if texts.without([row], name, own_tags)]
            write_atomic(file, "".join(line + "\n" for line in left))
            gone += len(lines) - len(left)
        answers = 0
        if (folder / FILE).exists():
            cache = Cache(folder)
            answers = cache.forget([name], sorted({tag for tags in own_tags.values() for tag in tags}))
            cache.close()
    return gone, answers

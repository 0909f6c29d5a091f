"""Prepared data in a bucket: copied as a whole or not at all. A folder of the disk stands for the bucket's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from instructrec_jax import bucket, prepare
from instructrec_jax.errors import DataError, UserError
from tests.tiny import tiny_config, write_slice


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("bucket")
    write_slice(tmp / "data")
    return prepare.prepare(tiny_config(tmp), lambda _: None).folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INSTRUCTREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_copy_is_made_once(prepared: Path, cache: Path) -> None:
    copy = bucket.local_copy(prepared)
    assert copy.parent == cache and content(copy) == content(prepared)
    marked = copy / "item_features.npy"
    marked.write_bytes(b"seen")
    assert bucket.local_copy(prepared) == copy and marked.read_bytes() == b"seen"
    assert [p.name for p in cache.iterdir()] == [copy.name]


def test_other_data_have_another_copy(prepared: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / prepared.name
    shutil.copytree(prepared, other)
    (other / "records" / "manifest.json").write_text("{}")
    assert bucket.local_copy(other) != bucket.local_copy(prepared)


def test_data_that_are_replaced_meanwhile_are_refused(
    prepared: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / "far"
    shutil.copytree(prepared, far)
    copied = shutil.copyfileobj

    def replaced(*arguments: object) -> None:
        copied(*arguments)  # type: ignore[arg-type]
        (far / "records" / "manifest.json").write_text("{}")

    monkeypatch.setattr(bucket.shutil, "copyfileobj", replaced)
    with pytest.raises(DataError, match="replaced while it was copied"):
        bucket.local_copy(far)
    assert list(cache.iterdir()) == []


def test_a_copy_that_breaks_off_leaves_nothing(prepared: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bucket.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        bucket.local_copy(prepared)
    assert list(cache.iterdir()) == []


def test_what_is_not_there(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data set here"):
        bucket.local_copy(tmp_path / "none")


def test_publishing_replaces_the_whole_and_keeps_the_copy(
    prepared: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, far = cache / ".built", tmp_path / "far"
    shutil.copytree(prepared, built)
    (far / "records").mkdir(parents=True)
    for stale in ("manifest.json", "records/old-shard"):
        (far / stale).write_text("old")
    order, copied = [], shutil.copyfileobj

    def noted(source: object, target: object, size: int) -> None:
        assert not (far / "manifest.json").exists() or Path(target.name).name == "manifest.json"  # type: ignore[attr-defined]
        order.append(str(Path(target.name).relative_to(far)))  # type: ignore[attr-defined]
        copied(source, target, size)  # type: ignore[arg-type]

    monkeypatch.setattr(bucket.shutil, "copyfileobj", noted)
    bucket.publish(built, far)
    assert order[-1] == "manifest.json" and content(far) == content(prepared)
    monkeypatch.setattr(bucket.shutil, "copyfileobj", None)  # nothing is copied again
    assert content(bucket.local_copy(far)) == content(prepared) and not built.exists()


def test_changes_in_place_are_refused_with_the_remedy() -> None:
    from instructrec_jax.files import path_of

    bucket.refuse(Path("prepared/x"), "data forget")
    with pytest.raises(
        UserError, match=r"data forget rewrites.*gs://b/prepared/x.*\n.*gcloud storage cp -r gs://b/prepared/x \."
    ):
        bucket.refuse(path_of("gs://b/prepared/x"), "data forget")

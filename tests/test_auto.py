"""The automatic preset: what it reads off a folder."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.auto import LOGITS, auto_config
from instructrec_jax.data import sources
from instructrec_jax.data.cleaning import clean
from instructrec_jax.data.splits import split
from instructrec_jax.errors import DataError
from tests.datasets import write_csv


def folder_of(
    folder: Path,
    histories: Sequence[Sequence[int]],
    *,
    time: str = "timestamp",
    items: Sequence[str] = ("item_id", "title"),
    title: str = "Thing {}",
    count: int | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(f"u{u}", f"i{i}", t + 1) for u, history in enumerate(histories) for t, i in enumerate(history)]
    write_csv(folder / "interactions.csv", ["user_id", "item_id", time], rows)
    count = max(i for h in histories for i in h) + 1 if count is None else count
    cells = [[f"i{i}", title.format(i), *[f"{name} {i % 4}" for name in items[2:]]] for i in range(count)]
    write_csv(folder / "items.csv", items, cells)
    return folder


def dense(users: int = 30, items: int = 20, events: int = 10, seed: int = 0) -> list[list[int]]:
    """Every user and item often enough for a 5-core, no pair twice."""
    r = np.random.default_rng(seed)
    return [r.permutation(items)[:events].tolist() for _ in range(users)]


def sparse(users: int = 30, events: int = 4) -> list[list[int]]:
    """Users with few events on items that nobody else has."""
    return [list(range(u * events, (u + 1) * events)) for u in range(users)]


def usable(config: configs.Config) -> None:
    """The settings fit together, and the data that they clean and split is not empty."""
    assert configs.from_dict(configs.to_dict(config)) == config
    model, train = config.model, config.train
    assert model.width % model.heads == 0 and model.heads % model.kv_heads == 0
    assert train.sequence_length % train.logits_chunk == 0 and train.batch_size % 8 == 0
    assert train.warmup_steps < train.steps and train.eval_every <= train.steps
    assert 16 <= config.instructions.history_items <= 64
    assert config.instructions.history_items < train.sequence_length, "a whole history fits into a row"
    data = split(clean(sources.read(config.data, config.name), config.data.clean), config.data.split)
    assert len(data.cases(2)) > 0


def test_a_dense_log_is_cut_to_its_core(tmp_path):
    config = auto_config(folder_of(tmp_path / "shop", dense()))
    assert config.data.clean.k_core == 5 and config.data.clean.duplicates == "last"
    assert config.name == "auto-shop" and config.data.source == "tables"
    assert Path(config.data.path) == (tmp_path / "shop").resolve()
    usable(config)


def test_item_logits_of_a_large_catalogue_come_in_parts(tmp_path):
    few = auto_config(folder_of(tmp_path / "few", dense())).train
    many = auto_config(folder_of(tmp_path / "many", sparse(users=6_000))).train
    assert few.logits_chunk == 16
    positions = many.batch_size * many.logits_chunk
    assert positions * 24_000 <= LOGITS < 2 * positions * 24_000 and many.sequence_length % many.logits_chunk == 0


def test_a_sparse_log_keeps_every_item(tmp_path):
    config = auto_config(folder_of(tmp_path / "shop", sparse()))
    assert config.data.clean.k_core == 0
    usable(config)


def test_the_core_is_taken_from_a_share_on(tmp_path):
    """Of 300 dense events and ``n`` loose ones the core keeps 300 / (300 + n): 80 % at 75."""
    loose = [[100 + 5 * u + k for k in range(5)] for u in range(30)]
    few, many = (auto_config(folder_of(tmp_path / str(n), [*dense(), *loose[:n]])) for n in (14, 16))
    assert (few.data.clean.k_core, many.data.clean.k_core) == (5, 0)


def test_positions_alone_are_enough(tmp_path):
    config = auto_config(folder_of(tmp_path / "shop", dense(), time="position"))
    assert config.data.split.kind == "leave-one-out"
    usable(config)


def test_common_repeats_are_kept_as_events(tmp_path):
    songs = [[*h, *h[:2]] for h in dense()]
    config = auto_config(folder_of(tmp_path / "songs", songs))
    assert config.data.clean.duplicates == "keep"
    usable(config)
    data = split(clean(sources.read(config.data, "x"), config.data.clean), config.data.split)
    assert len(data.item) == sum(map(len, songs))


def test_rare_repeats_are_one_event(tmp_path):
    histories = dense()
    histories[0].append(histories[0][0])
    assert auto_config(folder_of(tmp_path / "shop", histories)).data.clean.duplicates == "last"


@pytest.mark.parametrize(
    ("items", "title", "domain"),
    [
        (("item_id", "title", "brand"), "Drill {}", "products"),
        (("item_id", "title", "genres"), "Film {} (1999)", "films"),
        (("item_id", "title", "genres"), "Song {}", "generic"),
        (("item_id", "title"), "Film {} (1999)", "generic"),
        (("item_id", "title", "brand", "genres"), "Game {} (99)", "products"),
        (("item_id", "title"), "Thing {}", "generic"),
    ],
)
def test_the_words_follow_the_catalogue(tmp_path, items, title, domain):
    config = auto_config(folder_of(tmp_path / "shop", dense(), items=items, title=title))
    assert config.data.domain == domain
    usable(config)


def test_the_history_follows_the_users(tmp_path):
    sizes = {
        n: auto_config(folder_of(tmp_path / str(n), dense(items=150, events=n))).instructions.history_items
        for n in (6, 17, 100)
    }
    assert sizes == {6: 16, 17: 32, 100: 64}
    assert auto_config(tmp_path / "100").train.sequence_length > auto_config(tmp_path / "6").train.sequence_length


def test_more_events_mean_more_steps(tmp_path):
    few, many = (auto_config(folder_of(tmp_path / str(n), dense(users=n, items=40, events=20))) for n in (30, 1500))
    assert few.train.steps < many.train.steps


def test_an_item_that_the_catalogue_lacks_does_not_stop_it(tmp_path):
    config = auto_config(folder_of(tmp_path / "shop", dense(items=20), count=19))
    assert config.data.clean.unknown_item == "title-less"
    usable(config)


def test_compressed_files_give_the_same(tmp_path):
    plain = auto_config(folder_of(tmp_path / "a" / "shop", dense()))
    other = folder_of(tmp_path / "b" / "shop", dense())
    for file in list(other.iterdir()):
        (other / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    packed = auto_config(other)
    assert packed.name == plain.name and packed.train == plain.train and packed.data.clean == plain.data.clean
    assert packed.data_hash() != plain.data_hash(), "another folder is another data set"


def test_names_of_folders_become_names_of_runs(tmp_path, monkeypatch):
    assert auto_config(folder_of(tmp_path / "my shop (2)!", dense())).name == "auto-my-shop-2-"
    assert auto_config(folder_of(tmp_path / "电影", dense())).name == "auto-电影"
    monkeypatch.chdir(tmp_path / "电影")
    config = auto_config(Path())
    assert config.name == "auto-电影" and Path(config.data.path).is_absolute()


def test_the_preset_can_be_prepared(tmp_path):
    config = auto_config(folder_of(tmp_path / "shop", dense(), items=("item_id", "title", "brand")))
    tree = configs.with_overrides(
        configs.to_dict(config), ["--prepared", str(tmp_path / "p"), "--model.vocab_size=400"]
    )
    prepared = prepare.prepare(configs.from_dict(tree), lambda _: None)
    assert prepared.item_features.shape[0] == prepared.data.num_items and prepared.manifest["examples"]["sequential"]


@pytest.mark.parametrize("kind", ["none", "file", "empty"])
def test_a_folder_that_is_not_there_or_empty(tmp_path, kind):
    folder = tmp_path / "shop"
    if kind == "file":
        folder.write_text("x")
    elif kind == "empty":
        folder.mkdir()
    with pytest.raises(DataError) as caught:
        auto_config(folder)
    assert "shop" in str(caught.value) and caught.value.remedy
    assert ("no such folder" in str(caught.value)) == (kind != "empty")

"""MovieLens as GroupLens publishes it: 100K, 1M (and 10M), and the CSV editions (latest, latest-small, 20M, 25M, 32M).

The edition is known by its files: ``u.data``, ``ratings.dat``, ``ratings.csv``. Old files are Latin-1, new ones UTF-8;
each is tried as UTF-8 first, and the old ones as Latin-1 after that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from instructrec_jax.config import DataConfig
from instructrec_jax.data.schema import RawData
from instructrec_jax.data.sources import checks
from instructrec_jax.data.sources.files import Dialect, Loaded, listing, need_folder, read_text
from instructrec_jax.data.sources.mapping import rename
from instructrec_jax.errors import DataError

GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
# The numbers of users.dat, in its README's order.
OCCUPATIONS_1M = (
    "other or not specified",
    "academic or educator",
    "artist",
    "clerical or administrative",
    "college or graduate student",
    "customer service",
    "doctor or health care",
    "executive or managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales or marketing",
    "scientist",
    "self-employed",
    "technician or engineer",
    "tradesman or craftsman",
    "unemployed",
    "writer",
)
_RATING = ("user_id", "item_id", "rating", "timestamp")
_OLD = ("utf-8", "latin-1")


def read(config: DataConfig, name: str) -> RawData:
    """Read the edition in ``config.path``; ``config.columns`` may map further columns of the CSV editions."""
    folder = need_folder(config.path)
    for file, load in (("u.data", _load_100k), ("ratings.dat", _load_1m), ("ratings.csv", _load_latest)):
        if (folder / file).is_file():
            loaded = load(folder, config.clean.bad_row == "drop")
            break
    else:
        raise DataError(
            "no MovieLens edition here: none of u.data, ratings.dat, ratings.csv",
            file=folder,
            remedy=f"unpack the archive and set data.path to its folder, which holds {listing(folder)}",
        )
    columns = config.columns if file == "ratings.csv" else {}
    return checks.assemble(name, rename(loaded, columns), config, f"MovieLens {file} in {folder.name}")


def _load_100k(folder: Path, drop: bool) -> dict[str, Loaded]:
    def table(file: str, delimiter: str, names: tuple[str, ...]) -> Loaded:
        dialect = Dialect(delimiter, quoted=False, names=names, encodings=_OLD)
        return read_text(folder / file, dialect, drop_broken=drop)

    described = ("item_id", "title", "release_date", "video_release_date", "imdb_url")
    items = table("u.item", "|", (*described, *GENRES_100K))
    flags = np.stack([items.table[genre].to_numpy() for genre in GENRES_100K])
    for genre, column in zip(GENRES_100K, flags):
        wrong = np.flatnonzero((column != "0") & (column != "1"))
        if len(wrong):
            raise DataError(
                f"genre flag is {column[wrong[0]]!r}, not 0 or 1",
                file=items.file,
                row=items.origin.row(wrong[0]),
                column=genre,
                remedy="copy or download the file again",
            )
    # "unknown" says that no genre is on record.
    genres = [[g for g, on in zip(GENRES_100K[1:], row) if on] for row in (flags[1:] == "1").T]
    kept = items.table.select([c for c in described if c != "video_release_date"])  # empty in every row
    loaded = {
        "interactions": table("u.data", "\t", _RATING),
        "items": Loaded(
            kept.append_column("genres", pa.array(genres, pa.list_(pa.string()))), items.origin, items.broken
        ),
    }
    if (folder / "u.user").is_file():
        loaded["users"] = table("u.user", "|", ("user_id", "age", "gender", "occupation", "zip_code"))
    return loaded


def _load_1m(folder: Path, drop: bool) -> dict[str, Loaded]:
    def table(file: str, names: tuple[str, ...]) -> Loaded:
        # U+001F stands in no field; Arrow wants a delimiter of one byte.
        dialect = Dialect("\x1f", quoted=False, names=names, encodings=_OLD, wide_delimiter="::")
        return read_text(folder / file, dialect, drop_broken=drop)

    loaded = {
        "interactions": table("ratings.dat", _RATING),
        "items": table("movies.dat", ("item_id", "title", "genres")),
    }
    if (folder / "users.dat").is_file():
        users = table("users.dat", ("user_id", "gender", "age", "occupation", "zip_code"))
        codes = {str(i): name for i, name in enumerate(OCCUPATIONS_1M)}
        jobs = pa.array([codes.get(code, code) for code in users.table["occupation"].to_pylist()], pa.string())
        loaded["users"] = Loaded(users.table.set_column(3, "occupation", jobs), users.origin, users.broken)
    if (folder / "tags.dat").is_file():  # the 10M edition
        loaded["tags"] = table("tags.dat", ("user_id", "item_id", "tag", "timestamp"))
    return loaded


def _load_latest(folder: Path, drop: bool) -> dict[str, Loaded]:
    files = {"interactions": "ratings.csv", "items": "movies.csv", "tags": "tags.csv"}
    loaded = {}
    for table, file in files.items():
        if table == "tags" and not (folder / file).is_file():
            continue
        one = read_text(folder / file, drop_broken=drop)
        ours = {"userId": "user_id", "movieId": "item_id"}
        loaded[table] = Loaded(
            one.table.rename_columns([ours.get(name, name) for name in one.table.column_names]), one.origin, one.broken
        )
    return loaded

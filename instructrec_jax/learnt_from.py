"""What a run's weights belong to: the items, words and features of the data that it was trained on.

The hash of a config says how data were made, not from what. A log that has grown, prepared again with the same settings, gives other
numbers to items and words, for which the weights of an earlier run mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from instructrec_jax.errors import DataError
from instructrec_jax.files import read_json, write_json
from instructrec_jax.prepare import Prepared

FILE = "data.json"
_REMEDY = "train anew on these data in another --runs folder, or prepare the former ones again"
_NAMES = {
    "items": "items",
    "words": "tokeniser",
    "user_features": "features of users",
    "item_features": "features of items",
}


def keep(run_dir: Path, prepared: Prepared) -> None:
    """Note what the run learns from."""
    write_json(run_dir / FILE, _of(prepared))


def check(run_dir: Path, prepared: Prepared) -> None:
    """Refuse data that the run's weights do not belong to. A run of an earlier version, which noted nothing, is let through.

    Raises:
        DataError: other items, words or features than those it was trained on.
    """
    if not (run_dir / FILE).is_file():
        return
    then, now = read_json(run_dir / FILE, "remove it to go on unchecked"), _of(prepared)
    for name, what in _NAMES.items():
        if then.get(name) != now[name]:
            counts = [f"{about.get(name, {}).get('count', 0):,}" for about in (then, now)]
            raise DataError(
                f"the run was trained on other data: other {what} ({counts[0]} then, {counts[1]} in {prepared.folder})",
                file=run_dir / FILE,
                remedy=_REMEDY,
            )


def _of(prepared: Prepared) -> dict[str, Any]:
    tokenizer = prepared.manifest["files"].get("tokenizer/tokenizer.json", "")
    return {
        "items": _named(prepared.data.catalogue.item_ids),
        "words": {"count": prepared.text.vocab_size, "sha256": tokenizer},
        "user_features": _named(prepared.users.names),
        # Not their values, which differ in the last digits from one machine to the next
        "item_features": {"count": prepared.item_features.shape[1]},
    }


def _named(names: Iterable[str]) -> dict[str, Any]:
    names = list(names)
    return {"count": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}

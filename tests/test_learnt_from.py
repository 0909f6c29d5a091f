"""A run is read with the data that it was trained on, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructrec_jax import config as configs
from instructrec_jax import learnt_from, prepare, run
from instructrec_jax.errors import DataError
from instructrec_jax.forget import forget
from tests.test_prepare import config_of, silent, write_folder


def test_a_log_that_has_grown_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    config = config_of(tmp_path)
    first = prepare.prepare(config, silent)
    folder = configs.run_dir(config)
    learnt_from.keep(folder, first)
    (folder / "config.yaml").write_text(configs.dump(config))
    forget(config, first.data.user_ids[2])  # items, words and features stay what they are
    learnt_from.check(folder, prepare.load(config))

    with (tmp_path / "data/items.csv").open("a") as file:
        file.write("999,Picture 999 (1999),Comedy\n")
    with (tmp_path / "data/interactions.csv").open("a") as file:
        file.writelines(f"{user},999,4,50\n" for user in range(3))
    grown = prepare.prepare(config, silent)
    assert grown.data.num_items == first.data.num_items + 1
    with (
        pytest.raises(DataError, match=f"other items .{first.data.num_items} then, {grown.data.num_items} in"),
        run.trained(folder),
    ):
        pass
    with pytest.raises(DataError, match="other items"):
        run.train_run(config, folder, silent)
    (folder / learnt_from.FILE).unlink()
    learnt_from.check(folder, grown)  # of a version that noted nothing

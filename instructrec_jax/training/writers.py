"""Where metrics go beside ``metrics.jsonl``: TensorBoard, and any writer that a package declares.

A package offers a writer as an entry point of the group ``instructrec_jax.writers``: a class that is called with (folder, name of the run,
config, step that the run goes on from) and has ``write`` and ``close``. ``wandb`` and ``mlflow`` are extras of this package.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Protocol

from instructrec_jax.config import Config, to_dict
from instructrec_jax.errors import ConfigError, UserError, did_you_mean

GROUP = "instructrec_jax.writers"


class Writer(Protocol):
    """Takes the finite numbers of a step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, by name."""
        ...

    def close(self) -> None:
        """Everything is written when it returns."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/``; those of steps that will be done again are hidden."""

    def __init__(self, folder: Path, name: str, config: Config, resume_step: int):
        from tensorboardX import SummaryWriter

        del name, config
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step or None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One scalar per number."""
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._board.close()


class WandB:
    """Weights & Biases. The name of the run is its id, so a resumed run goes on; WANDB_MODE and the like mean what they do there."""

    def __init__(self, folder: Path, name: str, config: Config, resume_step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        del resume_step
        self._run: Any = wandb.init(
            project="instructrec_jax", id=name, name=name, dir=str(folder), config=to_dict(config), resume="allow"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """All numbers of a step; those of steps that were done before are left out by wandb itself."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Wait for the upload."""
        self._run.finish()


class MLflow:
    """MLflow, at the place that MLFLOW_TRACKING_URI names. A resumed run is found by its name, and goes on."""

    def __init__(self, folder: Path, name: str, config: Config, resume_step: int):
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        del folder, resume_step
        self._client: Any = MlflowClient()
        experiment = self._client.get_experiment_by_name("instructrec_jax")
        number = experiment.experiment_id if experiment else self._client.create_experiment("instructrec_jax")
        before = self._client.search_runs([number], filter_string=f"attributes.run_name = '{name}'")
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(number, run_name=name).info.run_id
            self._client.log_dict(self._id, to_dict(config), "config.json")

    def write(self, step: int, values: dict[str, float]) -> None:
        """One metric per number."""
        for key, value in values.items():
            self._client.log_metric(self._id, key.replace("@", "_at_"), value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


def open_writers(folder: Path, name: str, config: Config, resume_step: int) -> list[Writer]:
    """The writers that ``train.writers`` names.

    Raises:
        ConfigError: no package offers a writer of that name.
        UserError: a library that the writer needs is not installed.
    """
    # TensorBoard is the default and must not depend on how the package was installed.
    offered = {e.name: e.load for e in importlib.metadata.entry_points(group=GROUP)} | {
        "tensorboard": lambda: TensorBoard
    }
    out: list[Writer] = []
    for writer in config.train.writers:
        if writer not in offered:
            raise ConfigError(
                f"train.writers names {writer!r}, which no installed package offers{did_you_mean(writer, offered)}",
                remedy=f"any of {', '.join(sorted(offered))}, or [] for none",
            )
        try:
            out.append(offered[writer]()(folder, name, config, resume_step))
        except ImportError as error:
            raise UserError(
                f"train.writers names {writer!r}, but {error}", remedy=f"pip install 'instructrec_jax[{writer}]'"
            ) from error
    return out

"""Where metrics go beside ``metrics.jsonl``: TensorBoard, and any writer that a package declares.

A package offers a writer as an entry point of the group ``instructrec_jax.writers``: a class that is called with (run folder, config, step
that the run goes on from) and has ``write`` and ``close``. ``wandb`` and ``mlflow`` are extras of this package.
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

    def __init__(self, run_dir: Path, config: Config, resume_step: int):
        from tensorboardX import SummaryWriter

        del config
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step or None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One scalar per number."""
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._board.close()


class WandB:
    """Weights & Biases. The run's folder is its id, so a resumed run goes on; WANDB_MODE=offline and the like mean what they do there."""

    def __init__(self, run_dir: Path, config: Config, resume_step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        del resume_step
        self._run: Any = wandb.init(
            project="instructrec_jax",
            id=run_dir.name,
            name=run_dir.name,
            dir=str(run_dir),
            config=to_dict(config),
            resume="allow",
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """All numbers of a step; those of steps that were done before are left out by wandb itself."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Wait for the upload."""
        self._run.finish()


class MLflow:
    """MLflow, at the place that MLFLOW_TRACKING_URI names. The run's id is kept in ``mlflow_run_id``, so a resumed run goes on."""

    def __init__(self, run_dir: Path, config: Config, resume_step: int):
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        del resume_step
        self._client: Any = MlflowClient()
        kept = run_dir / "mlflow_run_id"
        if kept.exists():
            self._id = kept.read_text(encoding="utf-8")
            self._client.update_run(self._id, status="RUNNING")
            return
        name = "instructrec_jax"
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=run_dir.name).info.run_id
        self._client.log_dict(self._id, to_dict(config), "config.json")
        kept.write_text(self._id, encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """One metric per number."""
        for key, value in values.items():
            self._client.log_metric(self._id, key.replace("@", "_at_"), value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


def open_writers(run_dir: Path, config: Config, resume_step: int) -> list[Writer]:
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
    for name in config.train.writers:
        if name not in offered:
            raise ConfigError(
                f"train.writers names {name!r}, which no installed package offers{did_you_mean(name, offered)}",
                remedy=f"any of {', '.join(sorted(offered))}, or [] for none",
            )
        try:
            out.append(offered[name]()(run_dir, config, resume_step))
        except ImportError as error:
            raise UserError(
                f"train.writers names {name!r}, but {error}", remedy=f"pip install 'instructrec_jax[{name}]'"
            ) from error
    return out

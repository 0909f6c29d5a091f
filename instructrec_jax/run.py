"""The assembly: rooms are wired together here, for the commands and for whoever uses the package as a library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from instructrec_jax import config as configs
from instructrec_jax import prepare
from instructrec_jax.config import Config
from instructrec_jax.data.loader import training_iterator
from instructrec_jax.data.schema import VALID, Cases
from instructrec_jax.errors import UserError
from instructrec_jax.evaluation.metrics import TargetRank, metrics_at, rank_of_target
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.models.decoder import Sizes
from instructrec_jax.models.sharding import RULES, padded
from instructrec_jax.scoring import Scorer
from instructrec_jax.training.checkpoint import Checkpoints
from instructrec_jax.training.loop import Finished, train
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import init_params

Say = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """A config with its prepared data on a mesh. Make it with ``session`` and use it inside that ``with`` block."""

    config: Config
    prepared: prepare.Prepared
    builder: Builder
    sizes: Sizes
    content: jax.Array

    def scorer(self, params: Any, *, batch_size: int | None = None) -> Scorer:
        """A scorer of this data set with given parameters."""
        data = self.prepared.data
        return Scorer(
            self.config.model,
            self.sizes,
            params,
            self.content,
            data.num_items,
            self.prepared.text,
            data.catalogue.titles,
            batch_size=batch_size or self.config.evaluate.batch_size,
        )

    def sequential_prompts(self, cases: Cases) -> list[InstructionExample]:
        """The next-item prompt of every case."""
        return [
            self.builder.evaluation_prompt("sequential", int(u), int(e), language=self.language)
            for u, e in zip(cases.user, cases.end)
        ]

    @property
    def language(self) -> str:
        """Language of evaluation prompts: the first that was trained."""
        return self.config.instructions.languages[0]


@contextlib.contextmanager
def session(config: Config) -> Iterator[Session]:
    """Load the prepared data of a config and put it on the mesh of all devices.

    Raises:
        DataError: the data is not prepared.
        ConfigError: the mesh does not fit the devices.
    """
    prepared = prepare.load(config)
    with jax.set_mesh(make_mesh(config.mesh)) as _:
        mesh = jax.sharding.get_mesh()
        features = prepared.item_features
        rows = padded(prepared.data.num_items)
        content = np.zeros((rows, features.shape[1]), np.float32)
        content[: len(features)] = features
        sizes = Sizes(
            vocab=padded(prepared.text.vocab_size),
            items=rows,
            features=padded(len(prepared.users.names), 64) if prepared.users.names else 0,
            content=features.shape[1],
        )
        yield Session(
            config,
            prepared,
            prepared.builder(config),
            sizes,
            jax.device_put(content, jax.NamedSharding(mesh, RULES.table_used)),
        )


def train_run(config: Config, run_dir: Path, say: Say) -> Finished:
    """Train (or resume) a run of a prepared config."""
    with session(config) as s:
        valid = sample_cases(s.prepared.data.cases(VALID), config.train.eval_users, config.train.seed)
        if not len(valid):
            raise UserError("the validation split is empty", remedy="see data.split and data.clean.min_user_events")
        prompts = s.sequential_prompts(valid)
        histories = case_histories(s, valid)

        def validate(params: Any) -> dict[str, float]:
            ranks = rank_cases(s.scorer(params), prompts, valid, histories)
            values = metrics_at(ranks, (10,))
            return {k: float(values[k].mean()) for k in ("ndcg@10", "hr@10")}

        batches = training_iterator(
            s.prepared.records,
            s.prepared.text,
            batch_size=config.train.batch_size,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        try:
            return train(
                config,
                run_dir,
                batches=batches,
                content=s.content,
                sizes=s.sizes,
                num_items=s.prepared.data.num_items,
                validate=validate,
                say=say,
            )
        finally:
            batches.close()


@contextlib.contextmanager
def trained(run_dir: str | Path, overrides: tuple[str, ...] = ()) -> Iterator[tuple[Session, Any, int]]:
    """The session of a run, the parameters of its best checkpoint, and that step.

    Raises:
        UserError: the folder is not a run, or has no complete checkpoint yet.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not a run: it has no config.yaml", remedy="give the folder that `instructrec train` printed"
        )
    config = configs.load(run_dir / "config.yaml", overrides)
    with session(config) as s:
        checkpoints = Checkpoints(run_dir / "checkpoints", config.train.keep)
        try:
            step = checkpoints.best()
            if step is None:
                raise UserError(
                    f"{run_dir} has no complete checkpoint yet", remedy="run `instructrec train` on its config"
                )
            params = checkpoints.restore_params(step, init_params(config, s.sizes, s.content, 0))
        finally:
            checkpoints.close()
        yield s, params, step


def sample_cases(cases: Cases, most: int, seed: int) -> Cases:
    """At most ``most`` cases, a fixed random sample in the original order."""
    if len(cases) <= most:
        return cases
    pick = np.sort(np.random.default_rng(seed).choice(len(cases), most, replace=False))
    return Cases(cases.user[pick], cases.end[pick], cases.target[pick])


def case_histories(s: Session, cases: Cases) -> list[Int[np.ndarray, " n"]]:
    """All events before each case's target: what a ranking leaves out."""
    return [s.prepared.data.history(int(u), int(e)) for u, e in zip(cases.user, cases.end)]


def rank_cases(
    scorer: Scorer, prompts: list[InstructionExample], cases: Cases, histories: list[np.ndarray], block: int = 1024
) -> TargetRank:
    """Full-catalogue ranks of the targets, a block of cases at a time: scores ``[block, I]`` are never kept."""
    parts = []
    for start in range(0, len(cases), block):
        stop = start + block
        scores: Float[np.ndarray, "cases I"] = scorer.score_all(prompts[start:stop])
        parts.append(rank_of_target(scores, cases.target[start:stop], histories[start:stop], first_case=start))
    return TargetRank.concatenate(parts)

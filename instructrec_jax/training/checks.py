"""What is compared on the devices of a run before its first step."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructrec_jax.config import ModelConfig, TrainConfig
from instructrec_jax.errors import UserError
from instructrec_jax.models import architecture
from instructrec_jax.models.adapters import Tree
from instructrec_jax.models.heads import Output
from instructrec_jax.models.parts import normal
from instructrec_jax.models.sharding import RULES, gathered, lookup
from instructrec_jax.training import hosts
from instructrec_jax.training.step import Batch, batch_gradients, count_targets, head_losses, put_batch

LENGTH = 16  # S
TOLERANCE = 1e-3  # of a table's largest gradient; what the bug leaves out is as large as the gradient itself


@functools.cache
def check_embedding_gradients(mesh: jax.sharding.Mesh) -> None:
    """Compare the gradients of the word and item tables over micro-batches and chunks with those of one plain batch.

    XLA has compiled sums of embedding gradients in a loop wrongly (openxla/xla issue 49143), which no loss curve shows. Two tiny tables
    on the run's mesh go through the step's own losses and sums, with loops and without. A mesh is checked once in a process.

    Raises:
        UserError: they differ.
    """
    differences = jax.device_get(_differences(mesh))
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise UserError(
                f"the devices add up the gradient of the table {name!r} wrongly: over micro-batches it differs from that of the "
                f"whole batch by {difference:.2g} of its largest value (at most {TOLERANCE:g} is rounding)",
                remedy="export XLA_FLAGS=--xla_disable_hlo_passes=while-loop-all-reduce-code-motion, or use another JAX version",
            )


def _differences(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """By table: the largest difference of the two gradients, over the largest gradient."""
    rows, columns = mesh.shape["replica"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    ids, width = 16 * columns, 8 * mesh.shape["fsdp"]
    plain = TrainConfig(logits_chunk=LENGTH)
    looped = replace(plain, logits_chunk=LENGTH // 4)
    arch = architecture.from_numbers(ModelConfig(width=width), ids)

    def gradients(tables: Tree, batch: Batch, train: TrainConfig) -> Tree:
        totals = count_targets(batch)

        def micro_loss(tables: Tree, micro: Batch, _: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            used = {name: gathered(table, RULES.table_vd) for name, table in tables.items()}
            hidden = lookup(used["words"], micro["tokens"]) + lookup(used["items"], micro["item"])
            bias = jnp.zeros(ids, out_sharding=RULES.vector_v)
            out = Output(hidden, used["words"], None, used["items"], bias, (hidden, hidden))
            return head_losses(out, micro, totals, ids, train, arch)

        return batch_gradients(micro_loss, tables, batch, jax.random.key(0))[2]

    @jax.jit
    def differences(whole: Batch, micro: Batch) -> dict[str, jax.Array]:
        keys = dict(zip(("words", "items"), jax.random.split(jax.random.key(0))))
        tables = {name: normal(key, 1.0, (ids, width), RULES.table_vd) for name, key in keys.items()}
        right, looped_right = gradients(tables, whole, plain), gradients(tables, micro, looped)
        return jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)), right, looped_right)

    with jax.set_mesh(mesh):
        batch = _batch(2 * rows // jax.process_count(), ids)
        given = put_batch(batch, 1), put_batch(batch, 2)
        compiled = differences.lower(*given).compile()
        hosts.meet("before the first collective")  # one process may have taken much longer to come here
        return compiled(*given)


def _batch(rows: int, ids: int) -> dict[str, np.ndarray]:
    """This process's random rows, with every kind of target."""
    random = np.random.default_rng(jax.process_index())
    batch = {k: random.integers(1, ids, (rows, LENGTH)) for k in ("tokens", "item", "text_target", "item_target")}
    batch["item"] *= random.random(batch["item"].shape) < 0.5
    batch["positions"] = np.tile(np.arange(LENGTH), (rows, 1))
    batch |= {k: np.ones((rows, LENGTH)) for k in ("segment_ids", "task")}
    return {k: v.astype(np.int32) for k, v in batch.items()}

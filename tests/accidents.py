"""``instructrec`` as one of several processes, to which something happens: ``python -m tests.accidents WHAT ARGUMENTS...``.

none              nothing
killed-in-save    SIGKILL while the second checkpoint is written in the background
told-in-step      SIGTERM after the third step
told-in-validation    SIGTERM between the first batches of the first validation
broken-chip       its devices' parts of the weights are not numbers after the fifth step
late              it needs longer than a heartbeat may take for the end of its work, when all steps are done
elsewhere         its run folder is another one, as on a machine without a shared disk
losses            no command: 20 steps on slices of one stream of global batches, the losses as JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any


def _told(when: Any) -> None:
    """SIGTERM to this process at a poll; JAX's service looks for it once a second."""
    from instructrec_jax.training.hosts import StopRequest

    poll, polls = StopRequest.poll, []

    def slow(self: Any) -> bool:
        polls.append(sys._getframe(1).f_code.co_name)
        if when(polls):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2.5)
        return poll(self)

    StopRequest.poll = slow


def _killed_in_save() -> None:
    from instructrec_jax.data.loader import TrainingBatches

    save, saves = TrainingBatches.save, []

    async def deadly(self: Any, directory: Any) -> Any:
        write = await save(self, directory)
        saves.append(directory)

        async def die() -> None:
            await directory.await_creation()
            os.kill(os.getpid(), signal.SIGKILL)

        if len(saves) < 2:
            return write
        write.close()
        return die()

    TrainingBatches.save = deadly


def _late() -> None:
    from instructrec_jax import run

    train_run = run.train_run

    def slow(*arguments: Any) -> Any:
        finished = train_run(*arguments)
        time.sleep(1.5 * float(os.environ["INSTRUCTREC_HEARTBEAT_SECONDS"]))
        return finished

    run.train_run = slow


def _broken_chip() -> None:
    import jax
    import jax.numpy as jnp

    from instructrec_jax.training import loop

    def broken(weight: jax.Array) -> jax.Array:
        parts = [jax.device_put(jnp.full_like(part.data, jnp.nan), part.device) for part in weight.addressable_shards]
        return jax.make_array_from_single_device_arrays(weight.shape, weight.sharding, parts)

    make, calls = loop.make_train_step, []

    def make_broken(*arguments: Any) -> Any:
        step = make(*arguments)

        def run(state: Any, *rest: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:
                state = {**state, "params": jax.tree.map(broken, state["params"])}
            return step(state, *rest)

        return run

    loop.make_train_step = make_broken


def losses(mesh: Any, steps: int) -> list[float]:
    """Losses of the first steps on a mesh, where this process feeds its rows of every batch of 16."""
    import jax

    from instructrec_jax.config import Config, ModelConfig, TrainConfig
    from instructrec_jax.models import architecture
    from instructrec_jax.training.mesh import data_slice
    from instructrec_jax.training.step import init_model, init_state, make_train_step, put_batch
    from tests.tiny import NUM_ITEMS, SIZES, content, random_batch

    config = Config(
        model=ModelConfig(width=32, heads=4, kv_heads=2, head_size=8, mlp_width=64, dropout=0.2, item_dropout=0.1),
        train=TrainConfig(batch_size=16, sequence_length=32, logits_chunk=8, steps=20, warmup_steps=2),
    )
    index, count = data_slice(mesh)
    rows = slice(index * 16 // count, (index + 1) * 16 // count)
    out = []
    with jax.set_mesh(mesh):
        features = content()
        arch = architecture.from_numbers(config.model, SIZES.vocab)
        trained, frozen = init_model(config, arch, SIZES, features, 0)
        state = init_state(trained, config.train)
        step = make_train_step(config, arch, SIZES, NUM_ITEMS)
        for number in range(steps):
            batch = put_batch({k: v[rows] for k, v in random_batch(16, 32, seed=number).items()}, 1)
            state, metrics = step(state, frozen, batch, features)
            out.append(float(metrics["loss"]))
    return out


def main() -> None:
    """See the module's text."""
    what = sys.argv.pop(1)
    if what == "losses":
        from instructrec_jax.config import MeshConfig
        from instructrec_jax.training import hosts
        from instructrec_jax.training.mesh import make_mesh

        hosts.start()
        found = losses(make_mesh(MeshConfig(*map(int, sys.argv[1:]))), 20)
        hosts.voice(print)(json.dumps(found))
        return
    if what == "killed-in-save":
        _killed_in_save()
    elif what == "late":
        _late()
    elif what == "broken-chip":
        _broken_chip()
    elif what == "told-in-step":
        _told(lambda polls: len(polls) == 4)
    elif what == "told-in-validation":
        _told(lambda polls: polls.count("leave") == 2 and polls[-1] == "leave")
    elif what == "elsewhere":
        sys.argv[-1] += "-elsewhere"
    from instructrec_jax.cli import main as command

    command()


if __name__ == "__main__":
    main()

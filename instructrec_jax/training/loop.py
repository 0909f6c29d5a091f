"""Training, in the order in which it happens. There is no Trainer: this function is the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from instructrec_jax.config import Config, dump, to_dict
from instructrec_jax.files import write_atomic, write_json
from instructrec_jax.models.adapters import Tree
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.training import hosts
from instructrec_jax.training.checkpoint import Checkpoints, check_writable
from instructrec_jax.training.checks import check_embedding_gradients
from instructrec_jax.training.goodput import Ledger
from instructrec_jax.training.log import Metrics, Window, log_line, peak_flops
from instructrec_jax.training.mesh import check_plan
from instructrec_jax.training.profile import Profiler
from instructrec_jax.training.step import State, evaluated, init_state, make_train_step, put_batch

# (params, what to call now and then) -> {"ndcg@10": ..., "hr@10": ...}
Validate = Callable[[Any, Callable[[], None]], dict[str, float]]


@dataclass(frozen=True)
class Finished:
    """How a call of ``train`` ended."""

    step: int
    best_step: int | None
    best: dict[str, float]
    stopped: bool  # True: SIGTERM, SIGINT or a preemption notice; the same command resumes


def busy(result: dict[str, jax.Array]) -> bool:
    """Whether the devices are still at the step that gives ``result``: then nobody waits for a batch."""
    return any(not value.is_ready() for value in result.values())


def train(
    config: Config,
    run_dir: Path,
    *,
    batches: Iterator[dict[str, np.ndarray]],
    content: jax.Array,
    arch: Architecture,
    sizes: Sizes,
    trained: Tree,
    frozen: Tree,
    num_items: int,
    validate: Validate | None,
    ledger: Ledger,
    popularity: Int[np.ndarray, " I"] | None = None,
    say: Callable[[str], None],
) -> Finished:
    """Train until ``config.train.steps``, resuming from the run's last complete checkpoint.

    Args:
        config: the resolved config; written to ``run_dir/config.yaml`` and into every checkpoint.
        run_dir: where checkpoints, ``metrics.jsonl`` and TensorBoard events go.
        batches: this process's loader; its position is saved with the state.
        content: item features ``[I, Fc]`` on the mesh. Call inside ``jax.set_mesh``.
        arch: the model's.
        sizes: table sizes; ``num_items`` is the number of real items in the padded item table.
        trained: parameters at step 0 that learn; the run's own, since their buffers are reused.
        frozen: the others, which no checkpoint holds.
        num_items: real items.
        validate: metrics of given parameters on the validation split. It calls its second argument between batches, which raises
            ``hosts.Stopped`` when the run is to stop. None where no event was left for it: then the last step counts.
        popularity: training events of every item; what ``train.item_negatives_by: popularity`` draws by.
        ledger: where the time goes, running since the call began.
        say: prints one line; of several processes the first one speaks.

    Raises:
        UserError: a loss that is not finite (with the step window), a plan that does not divide, a folder that cannot be written.
    """
    settings = config.train
    say = hosts.voice(say)

    # --------------------------------------------------------------------------------------------------- check the plan
    mesh = check_plan(config, arch, sizes, jax.device_count())
    check_embedding_gradients(jax.sharding.get_mesh())

    # -------------------------------------------------------------------------------------- state: fresh, or the last saved
    state: State = init_state(trained, settings)
    del trained  # donated to the first step
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    check_writable(run_dir, state_bytes * (settings.keep + 2))
    if hosts.first():
        write_atomic(run_dir / "config.yaml", dump(config))
    checkpoints = Checkpoints(run_dir / "checkpoints", settings.keep, settings.keep_every, clean=True)
    parameters, fixed = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state["params"], frozen))
    say(
        f"{parameters:,} parameters learn{f', {fixed:,} are frozen' if fixed else ''}; {state_bytes / 1e6:.1f} MB of state; mesh {mesh}"
    )
    say(
        f"{settings.batch_size} rows x {settings.sequence_length} tokens a step in {settings.accumulate} micro-batch(es)"
    )
    first = checkpoints.latest() or 0
    if first:
        state = checkpoints.restore(first, state, batches)
        say(f"resumed from step {first}")
    if first >= settings.steps:
        say(f"nothing to do: the run is at step {first} of {settings.steps}")

    # ------------------------------------------------------------------------------------------------------ the train loop
    train_step = make_train_step(config, arch, sizes, num_items, popularity)
    ledger.resume(run_dir / "metrics.jsonl", first)
    log = Metrics(run_dir, config, first)
    profiler = Profiler(config.profile, run_dir)
    peak = peak_flops()
    stop = hosts.StopRequest()
    best: dict[str, float] = {}
    passes = 2 if fixed else 3
    step = saved = first
    metrics: dict[str, jax.Array] = {}

    def due(step: int) -> bool:
        return validate is not None and step > 0 and (step % settings.eval_every == 0 or step == settings.steps)

    def save(values: dict[str, float] | None) -> None:
        nonlocal saved
        window.check(step)  # no checkpoint has a state that is not finite
        with ledger("checkpoint"):
            checkpoints.save(step, state, batches, to_dict(config), values)
        log.write(step, ledger.values())
        saved = step

    def validate_and_save() -> None:
        nonlocal best
        assert validate is not None
        jax.block_until_ready(metrics)
        begun = time.perf_counter()
        try:
            with ledger("evaluate"):
                best = validate(evaluated(state), stop.leave)
        except hosts.Stopped:
            return  # the step is saved without metrics, and the run that resumes validates first
        seconds = time.perf_counter() - begun
        log.write(step, {f"valid_{k}": v for k, v in best.items()} | {"valid_seconds": seconds})
        say(f"step {step}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in best.items()))
        if step == saved:  # by a call that was stopped while it validated
            checkpoints.add_metrics(step, best)
        else:
            save(best)

    try:
        with ledger("step"):
            if due(first) and not checkpoints.metrics(first):
                validate_and_save()
            window, started = Window(ledger), time.perf_counter()
            while step < settings.steps and not stop.poll():
                waited = time.perf_counter()
                batch = put_batch(next(batches), settings.accumulate)
                if not busy(metrics):
                    ledger.move(time.perf_counter() - waited, "step", "data")
                with profiler.step(step + 1, metrics), ledger("step" if metrics else "compile"):
                    state, metrics = train_step(state, frozen, batch, content)
                window.add(metrics)
                step += 1

                if step % settings.log_every == 0 or step == settings.steps:
                    values = window.summary(step, config, arch, sizes, passes, peak)
                    log.write(step, values | ledger.values())
                    eta = (settings.steps - step) * (time.perf_counter() - started) / (step - first)
                    say(log_line(step, settings.steps, values, eta))
                    window = Window(ledger)

                if due(step):
                    validate_and_save()
                elif step % settings.checkpoint_every == 0:
                    save(None)
            if saved != step:  # a stop, or a run without validation
                save(None)
    finally:
        stop.release()
        profiler.close(metrics)
        with ledger("checkpoint"):
            checkpoints.wait()
        log.write(saved, ledger.values())
        log.close()

    # ------------------------------------------------------------------------------------------------------------- the end
    if stop.name:
        say(f"{stop.name}: saved step {step}; the same command continues from there")
    best_step = checkpoints.best()
    best = checkpoints.metrics(best_step) if best_step is not None else {}
    checkpoints.close()
    say(ledger.table())
    if hosts.first():
        end = {"step": step, "best_step": best_step, "best": best, "seconds": ledger.seconds()}
        write_json(run_dir / "finished.json", end)
    return Finished(step, best_step, best, bool(stop.name))
